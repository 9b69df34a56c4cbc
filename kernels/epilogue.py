"""From int32 sums to real values: what follows an integer product, in one fixed order.

    y = (sum - zero_point * w_sum) * w_scale * x_scale + bias + down @ up^T

in float32, left to right; the first bracket is exact in int32. `x_scale` and `zero_point` are
tables with one row per timestep (or one row), and the row to use is an array: one compiled
function serves all timesteps. Back ends may differ in the last bits of the float part only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

OUT_DTYPES = ('float32', 'bfloat16', 'float16')


class Epilogue(NamedTuple):
    """Arrays of the epilogue; None leaves a term out. `N` counts outputs, `I` images.

    Attributes:
      w_scale: of each output, or one for all.
      x_scale: table over timesteps.
      row: row of the tables, one for all or one for each entry of the leading axis of x.
      zero_point: table of the code of x that means 0.0, in [-128, 127].
      bias: in real units.
      low_rank: (down, up): a float branch, down [..., M, R] beside x and up [N, R]; both of 16
        bits multiply on tensor cores.
    """

    w_scale: Float32[Array, 'N'] | Float32[Array, '']
    x_scale: Float32[Array, 'S']
    row: Int32[Array, ''] | Int32[Array, 'I']
    zero_point: Int32[Array, 'S'] | None = None
    bias: Float[Array, 'N'] | None = None
    low_rank: tuple[Float[Array, '*rows R'], Float[Array, 'N R']] | None = None


def check(
    epilogue: Epilogue, out_dtype: str, *, rows_shape: tuple[int, ...], num_outputs: int
) -> None:
    """Raises unless the arrays fit a product with these rows and outputs.

    Args:
      epilogue: to check.
      out_dtype: name of the dtype of the result.
      rows_shape: shape of the result without its last axis.
      num_outputs: N.

    Raises:
      ValueError: says which array disagrees.
    """
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f'out_dtype={out_dtype!r}: expected one of {OUT_DTYPES}.')
    rows = epilogue.x_scale.shape
    down, up = epilogue.low_rank or (None, None)
    for name, array, shapes in (
        ('w_scale', epilogue.w_scale, ((), (num_outputs,))),
        ('x_scale', epilogue.x_scale, (rows[:1],)),
        ('row', epilogue.row, ((), rows_shape[:1])),
        ('zero_point', epilogue.zero_point, (rows,)),
        ('bias', epilogue.bias, ((num_outputs,),)),
        ('low_rank[0]', down, (rows_shape + (0 if down is None else down.shape[-1],),)),
        ('low_rank[1]', up, ((num_outputs, 0 if down is None else down.shape[-1]),)),
    ):
        kind = jnp.integer if name in ('row', 'zero_point') else jnp.floating
        if array is None:
            continue
        if array.shape not in shapes or not jnp.issubdtype(array.dtype, kind):
            raise ValueError(
                f'epilogue.{name} is {array.dtype} {array.shape}: expected {kind.__name__} of '
                f'shape {" or ".join(map(str, shapes))}.'
            )


def picked_row(table: Shaped[Array, 'S'], row: Int32[Array, '*rows']) -> Shaped[Array, '*rows']:
    """Entries of a table over timesteps; a row outside it is the nearest one, in every back end."""
    return table[jnp.clip(row, 0, table.shape[0] - 1)]


def apply(
    total: Int32[Array, '*rows N'], epilogue: Epilogue, w_sum: Int32[Array, '...'], out_dtype: str
) -> Float[Array, '*rows N']:
    """The definition: the equation of this module.

    Args:
      total: integer sums, of codes whose padding already holds the code that means 0.0.
      epilogue: checked by `check`.
      w_sum: sum of the codes of each output's weight, [N] or [..., N] with the batch axes of a
        batched product; used with a zero point only.
      out_dtype: name of the dtype of the result.
    """

    def rows_of(table: Array) -> Array:
        picked = picked_row(table, epilogue.row)
        return picked.reshape(picked.shape + (1,) * (total.ndim - picked.ndim))

    def as_last(vector: Array) -> Array:
        return vector.reshape((1,) * (total.ndim - vector.ndim) + vector.shape)

    if epilogue.zero_point is not None:
        w_sum = as_last(w_sum) if w_sum.ndim == 1 else w_sum[..., None, :]
        total = total - rows_of(epilogue.zero_point.astype(jnp.int32)) * w_sum
    w_scale = epilogue.w_scale.astype(jnp.float32)
    y = total.astype(jnp.float32) * as_last(w_scale)
    y = y * rows_of(epilogue.x_scale.astype(jnp.float32))
    if epilogue.bias is not None:
        y = y + as_last(epilogue.bias.astype(jnp.float32))
    if epilogue.low_rank is not None:
        down, up = epilogue.low_rank
        branch = jnp.einsum(
            '...r,nr->...n', down.astype(jnp.float32), up.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        y = y + branch
    return y.astype(out_dtype)
