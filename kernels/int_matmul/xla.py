"""One int8 `dot_general` with an int32 accumulator.

Three rules came from measurements (README.md): operands are int8, never `jnp.int4` (XLA turns
int4 dots into int32 ones on GPU and refuses them on CPU); both operands have K last; and on CPU
that order must be the one in memory, because XLA otherwise turns a transpose before the dot into
a layout for which it has no fast int8 code.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int8, Int32, Shaped

PLATFORMS = ('cpu', 'gpu', 'tpu')


def refusal() -> str | None:
    """Why this back end cannot run here, None if it can."""
    platform = jax.default_backend()
    if platform not in PLATFORMS:
        return f'integer products by XLA are only known to be exact on {PLATFORMS}, not {platform}'
    return None


def row_major(x: Shaped[Array, '*shape']) -> Shaped[Array, '*shape']:
    """The same array, whose order in memory XLA must not change on CPU.

    Without it `int_matmul(x, swapaxes(v))` runs at half the speed of float32, and a convolution
    with transposed int8 weights at a fiftieth. No effect on the values, nor on other platforms.
    """
    if jax.default_backend() != 'cpu':
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def int_matmul(
    x: Int8[Array, '*batch M K'], w: Int8[Array, '*batch N K']
) -> Int32[Array, '*batch M N']:
    """The product of `reference.int_matmul`, by one dot."""
    batch = tuple(range(x.ndim - 2))
    if batch:  # attention: heads were split off by a transpose
        x = row_major(x)
    contract = x.ndim - 1
    return lax.dot_general(
        x,
        row_major(w),
        (((contract,), (contract,)), (batch, batch)),
        preferred_element_type=jnp.int32,
    )
