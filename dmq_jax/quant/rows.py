"""Rows of the tables of scales: which one a timestep takes, and how it meets a tensor.

A table has a leading axis of timesteps. Its row is picked before the network is called, so no layer
ever knows the time and nothing counts calls.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dmq_jax.quant import numerics
from dmq_jax.quant.tensor import QuantSpec

# 'scale' and 'zero_point' of one tensor: [] or one per image [B]. Where its grid may be powers of
# two, 'powers' as well: the scale of that grid where it is in use, else 0; where it is powers of
# sqrt(2), 'roots': its scale.
Rows = Mapping[str, Array]


def at_timestep(
    tables: PyTree, timesteps: Int[Array, 'S'], t: Array, *, lookup: str = 'nearest'
) -> PyTree:
    """The row of every table (leading axis S, or 1 where all timesteps share it) for `t`.

    Args:
      tables: arrays with a leading axis of S timesteps, or of 1.
      timesteps: what each row belongs to, descending as visited; any other `t` is served too.
      t: a scalar, or one per image [B]; then rows have a leading axis B.
      lookup: 'nearest' timestep, or 'linear' interpolation between the two around `t` (the ends
        are held beyond the first and last).

    Raises:
      ValueError: an unknown lookup.
    """
    if lookup not in ('nearest', 'linear'):
        raise ValueError(f"timestep_lookup={lookup!r}: expected 'nearest' or 'linear'.")
    t, timesteps = jnp.asarray(t), jnp.asarray(timesteps)

    def constant(table: Array) -> Array:
        row = table[0]
        return row if t.ndim == 0 else jnp.broadcast_to(row, (*t.shape, *row.shape))

    if lookup == 'nearest':
        rows = timesteps.astype(jnp.float32).reshape((1,) * t.ndim + (-1,))
        nearest = jnp.argmin(jnp.abs(rows - t.astype(jnp.float32)[..., None]), axis=-1)

        def pick(table: Array) -> Array:
            return constant(table) if table.shape[0] == 1 else table[nearest]
    else:
        ascending = timesteps[::-1].astype(jnp.float32)
        position = jnp.interp(
            t.astype(jnp.float32), ascending, jnp.arange(timesteps.size, dtype=jnp.float32)
        )
        below = jnp.floor(position).astype(jnp.int32)
        above = jnp.minimum(below + 1, timesteps.size - 1)
        share = position - below.astype(jnp.float32)

        def pick(table: Array) -> Array:
            if table.shape[0] == 1:
                return constant(table)
            weight = share.reshape(share.shape + (1,) * (table.ndim - 1))
            rows = table[::-1]
            return rows[below] * (1 - weight) + rows[above] * weight

    return jax.tree.map(pick, tables)


def per_image(row: Array, ndim: int) -> Array:
    """A row that broadcasts against a tensor of `ndim` axes: [] as it is, [B] as [B, 1, ...]."""
    return row if row.ndim == 0 else row.reshape(row.shape + (1,) * (ndim - row.ndim))


def per_channel(row: Array, ndim: int) -> Array:
    """Factors of the last axis that broadcast against `ndim` axes: [K], or one set per image."""
    return row.reshape(row.shape[:-1] + (1,) * (ndim - row.ndim) + row.shape[-1:])


_SHIFTS = {'input': 'shift', 'output': 'offset'}


def scale_channels(x: Float[Array, 'B ...'], channels: Rows | None, end: str) -> Array:
    """`x` times the factors of its channels plus their shifts, where `channels` has any.

    Args:
      x: input of a layer, or its product before the bias.
      channels: of one layer, each [K] or [B, K], any of which may be missing: factors 'input' and
        'output'; 'shift' is added to the scaled input, 'offset' to the scaled output.
      end: 'input' or 'output'.
    """
    if channels is None:
        return x
    if end in channels:
        x = x * per_channel(channels[end], x.ndim).astype(x.dtype)
    added = _SHIFTS[end]
    if added in channels:
        x = x + per_channel(channels[added], x.ndim).astype(x.dtype)
    return x


def fake_quantize_input(x: Float[Array, 'B ...'], rows: Rows, spec: QuantSpec) -> Array:
    """`x` rounded to the grid of `spec` at the given scale and zero point."""
    qmin, qmax = spec.grid
    scale, zero_point = (per_image(rows[name], x.ndim) for name in ('scale', 'zero_point'))
    rounded = numerics.fake_quantize(
        x.astype(jnp.float32), scale, zero_point, float(qmin), float(qmax)
    ).astype(x.dtype)
    if 'powers' in rows:
        powers = per_image(rows['powers'], x.ndim)
        logarithmic = numerics.fake_quantize_powers(
            x.astype(jnp.float32), jnp.where(powers > 0, powers, 1.0),
            numerics.largest_exponent(spec.bits),
        ).astype(x.dtype)  # fmt: skip
        rounded = jnp.where(powers > 0, logarithmic, rounded)
    if 'roots' in rows:
        rounded = numerics.fake_quantize_roots(
            x.astype(jnp.float32), per_image(rows['roots'], x.ndim),
            numerics.largest_root(spec.bits),
        ).astype(x.dtype)  # fmt: skip
    # An analysis switches layers on and off by data, so that one program serves them all.
    return jnp.where(rows['gate'], rounded, x) if 'gate' in rows else rounded
