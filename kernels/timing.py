"""Fair timing on a busy machine: variants take turns, and their medians are compared."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Of a layer within one timed call where it takes microseconds, less than launching it does.
MANY_CALLS = 20


class Timing(NamedTuple):
    """Times of a jitted function, in seconds.

    Attributes:
      compile_s: to compile.
      median_s: of one call.
      spread_s: between the quartiles of the calls; NaN if unknown.
    """

    compile_s: float
    median_s: float
    spread_s: float = math.nan


def default_calls() -> int:
    """Calls of a layer that one timed call should make on this platform."""
    return 1 if jax.default_backend() == 'cpu' else MANY_CALLS


def measure(
    variants: Mapping[str, tuple[Callable, tuple]], *, num_rounds: int, num_calls: int = 1
) -> dict[str, Timing]:
    """Times functions of one problem against each other.

    Args:
      variants: name → (function to jit, its arguments); the arguments are never constants.
      num_rounds: timed calls of each, one of each per round, so that a change of load meets all.
      num_calls: of the function within one timed call, whose time is divided by it: what a host
        spends on launching would otherwise hide what a GPU spends on a layer.

    Returns:
      name → timing, after two calls that do not count.
    """
    compiled, compile_s, seconds = {}, {}, {name: [] for name in variants}
    for name, (function, arguments) in variants.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(_repeated(function, num_calls)).lower(*arguments).compile()
        compile_s[name] = time.perf_counter() - start
    for index in range(num_rounds + 2):
        for name, (_, arguments) in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            if index >= 2:
                seconds[name].append((time.perf_counter() - start) / num_calls)
    return {
        name: Timing(compile_s[name], statistics.median(taken), _spread(taken))
        for name, taken in seconds.items()
    }


def _repeated(function: Callable, num_calls: int) -> Callable:
    """`num_calls` calls in a row, of which XLA can neither drop nor join any."""
    if num_calls == 1:
        return function

    def run(*arguments):
        firsts = jax.tree.map(lambda operand: operand[(0,) * operand.ndim], arguments)

        def again(_, carry):
            result, operands = carry
            operands = jax.tree.map(
                lambda operand, first: _depending_on(result, operand, first), operands, firsts
            )
            return function(*operands), operands

        return lax.fori_loop(1, num_calls, again, (function(*arguments), arguments))[0]

    return run


def _depending_on(result: Array, operand: Array, first: Array) -> Array:
    """The operand, whose first number is written anew; for all that XLA knows, another one.

    An optimization barrier does not do: XLA for CPU drops it, then calls the function once. Each
    number written is a launch, so vectors stay as they are: scales, not factors of a product.
    """
    if operand.ndim < 2:
        return operand
    number = result[(0,) * result.ndim]
    # Never so: results are no NaN, and no sum of products is the least integer.
    is_odd = number == jnp.iinfo(jnp.int32).min if number.dtype == jnp.int32 else number != number
    first = jnp.where(is_odd, jnp.zeros((), operand.dtype), first)
    return lax.dynamic_update_slice(
        operand, first.reshape((1,) * operand.ndim), (0,) * operand.ndim
    )


def _spread(taken: list[float]) -> float:
    if len(taken) < 2:
        return math.nan
    low, _, high = statistics.quantiles(taken, n=4, method='inclusive')
    return high - low


def report_line(
    shape_name: str,
    timings: Mapping[str, Timing],
    *,
    num_products: int,
    columns: Iterable[str] | None = None,
) -> str:
    """One Markdown table row: the first timing is the baseline, the others are ratios to it.

    Args:
      shape_name: of the row.
      timings: by variant.
      num_products: terms of all sums.
      columns: variants of the table, the baseline first; one without a timing is a dash. None:
        those of `timings`.
    """
    (first, *others) = timings if columns is None else columns
    baseline = timings[first]
    compile_s = max(timing.compile_s for timing in timings.values())
    ratios = [
        f'{baseline.median_s / timings[name].median_s:.2f}x' if name in timings else '–'
        for name in others
    ]
    giga_operations = 2 * num_products / baseline.median_s / 1e9
    cells = [
        shape_name,
        f'{baseline.median_s * 1e3:.2f}',
        f'{giga_operations:.0f}',
        *ratios,
        f'{compile_s:.2f}',
    ]
    return f'| {" | ".join(cells)} |'


def report_header(names: Mapping[str, object], *, num_rounds: int) -> str:
    """The line that says where and how, and the head of the table for `report_line`."""
    (_, *others) = names
    device = jax.devices()[0]
    cells = ['shape', 'float32 ms', 'Gop/s', *others, 'slowest compile s']
    return (
        f'jax {jax.__version__}, {device.platform} ({device.device_kind}), median of {num_rounds} '
        'calls in turn; ratio = float32 by XLA / variant\n\n'
        f'| {" | ".join(cells)} |\n|{"---|" * len(cells)}'
    )
