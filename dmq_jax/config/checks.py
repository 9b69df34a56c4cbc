"""Checks that options share; every message says what was given and what was expected."""

import difflib
import functools
import math
import re
import typing
from collections.abc import Sequence
from typing import Any, Literal

FLOAT_BITS = 32  # a width of 32 bits means: leave the tensor in floating point


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """The type of every field of a dataclass, by name."""
    return typing.get_type_hints(schema)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message that asks for a known name like `name`; '' if there is none."""
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {near[0]!r}?' if near else ''


def check(holds: bool, text: str) -> None:
    """Raises a ValueError with `text` unless it holds."""
    if not holds:
        raise ValueError(text)


def check_choice(name: str, value: Any, hint: Any) -> None:
    """`value` is one of those of the type `hint`, a `Literal`."""
    choices = typing.get_args(hint)
    if value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ''
        expected = ', '.join(map(repr, choices))
        raise ValueError(f'{name}={value!r}: expected one of {expected}{near or "."}')


def check_choices(config: Any) -> None:
    """Every field typed `Literal[...]` of `config` holds one of its values."""
    for name, hint in field_types(type(config)).items():
        if typing.get_origin(hint) is Literal:
            check_choice(name, getattr(config, name), hint)


def check_at_least(config: Any, minimum: int, *names: str) -> None:
    """The numbers called `names` of `config` are finite and not below `minimum`."""
    for name in names:
        value = getattr(config, name)
        holds = math.isfinite(value) and value >= minimum
        check(holds, f'{name}={value}: expected at least {minimum}.')


def check_bits(name: str, bits: int) -> None:
    """A width that tensors may have."""
    valid = 2 <= bits <= 8 or bits == FLOAT_BITS
    check(valid, f'{name}={bits}: expected 2..8, or {FLOAT_BITS} to stay in floating point.')


def check_patterns(config: Any, *names: str) -> None:
    """The fields called `names` of `config` hold regular expressions."""
    for name in names:
        pattern = getattr(config, name)
        try:
            re.compile(pattern)
        except re.error as error:
            text = f'{name}={pattern!r}: not a regular expression ({error}).'
            raise ValueError(text) from None
