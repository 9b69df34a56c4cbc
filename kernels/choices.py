"""Notes of which back end each operation took, for whoever wants to list them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

_LISTENERS: contextvars.ContextVar[tuple[list, ...]] = contextvars.ContextVar(
    'listeners', default=()
)


class Call(NamedTuple):
    """One traced call of an operation.

    Attributes:
      op: 'int_matmul' or 'int_conv'.
      implementation: name of the back end.
      reason: why it was chosen.
      problem: sizes; see `int_matmul.api.Problem`.
    """

    op: str
    implementation: str
    reason: str
    problem: Any


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Within it, every call traced in this thread is appended to the list it yields."""
    calls: list[Call] = []
    token = _LISTENERS.set((*_LISTENERS.get(), calls))
    try:
        yield calls
    finally:
        _LISTENERS.reset(token)


def note(call: Call) -> None:
    """Tells whoever listens."""
    for calls in _LISTENERS.get():
        calls.append(call)
