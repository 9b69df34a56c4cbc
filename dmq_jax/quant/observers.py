"""From statistics of a tensor to its scale and zero point.

Statistics carry any leading axes (timesteps, channels); every function maps over them at once.
They are a range plus an evenly strided sample of the values, small enough to keep for every
tensor at every timestep, from which each observer can decide later.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmq_jax.quant import numerics
from dmq_jax.quant.tensor import QuantSpec, scale_shape

NUM_CANDIDATES = 80  # shrink factors 1, 0.99, ... 0.21 (BRECQ's and EfficientDM's search)
ERROR_NORM = 2.4  # exponent of the error the search minimises (the same codes)
_SMALLEST_SCALE = 1e-8  # an all-zero tensor: any scale represents it


class TensorStats(NamedTuple):
    """What was seen of one tensor.

    Attributes:
      low: smallest value.
      high: largest value.
      values: a sample of the values.
    """

    low: Float[Array, '*lead']
    high: Float[Array, '*lead']
    values: Float[Array, '*lead n']


def observe(x: Float[Array, '...'], num_values: int) -> TensorStats:
    """Range and sample of one tensor.

    Args:
      x: any shape.
      num_values: size of the sample; a tensor with fewer values is repeated.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    flat = x.reshape(-1)
    # A fractional stride walks through rows and channels alike; an integer one that divides the
    # number of channels would see the same few channels for ever.
    index = jnp.arange(num_values, dtype=jnp.float32) * (flat.size / num_values)
    index = jnp.minimum(index.astype(jnp.int32), flat.size - 1)
    return TensorStats(jnp.min(x), jnp.max(x), flat[index])


def merge(first: TensorStats, second: TensorStats) -> TensorStats:
    """Statistics of both together: the wider range, both samples."""
    return TensorStats(
        jnp.minimum(first.low, second.low),
        jnp.maximum(first.high, second.high),
        jnp.concatenate([first.values, second.values], axis=-1),
    )


def running(average: TensorStats, new: TensorStats, momentum: float = 0.95) -> TensorStats:
    """An exponential average of the range (Q-Diffusion's running statistics); both samples."""

    def move(old, value):
        return momentum * old + (1 - momentum) * value

    return TensorStats(
        move(average.low, new.low),
        move(average.high, new.high),
        jnp.concatenate([average.values, new.values], axis=-1),
    )


def pool(stats: TensorStats) -> TensorStats:
    """Statistics over the first axis together: from per timestep [S, ...] to one row [1, ...]."""
    values = jnp.moveaxis(stats.values, 0, -2)
    return TensorStats(
        jnp.min(stats.low, axis=0, keepdims=True),
        jnp.max(stats.high, axis=0, keepdims=True),
        values.reshape(*values.shape[:-2], -1)[None],
    )


def compute_scale(
    low: Float[Array, '*axes'], high: Float[Array, '*axes'], spec: QuantSpec
) -> tuple[Float[Array, '*axes'], Float[Array, '*axes']]:
    """Scale and zero point that cover the range [low, high] on the grid of `spec`.

    The uniform affine quantizer (Krishnamoorthi 2018, arXiv:1806.08342, section 2). The range is
    first widened to contain 0, so that zero padding stays exact.

    Args:
      low: smallest value to represent, in the units of the tensor.
      high: largest.
      spec: bits and symmetry.

    Returns:
      scale: > 0, units of the tensor per integer step; absmax / qmax if symmetric.
      zero_point: integer-valued, in [qmin, qmax]; 0 if symmetric.
    """
    qmin, qmax = spec.grid
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if spec.symmetric:
        scale = jnp.maximum(jnp.maximum(-low, high) / qmax, _SMALLEST_SCALE)
        return scale, jnp.zeros_like(scale)
    scale = jnp.maximum((high - low) / (qmax - qmin), _SMALLEST_SCALE)
    return scale, jnp.clip(jnp.round(-low / scale), qmin, qmax)


def percentile_range(
    values: Float[Array, '*lead n'], percentile: float
) -> tuple[Float[Array, '*lead'], Float[Array, '*lead']]:
    """The range that leaves out (100 - percentile) / 2 per cent of the values on each side."""
    tail = (100.0 - percentile) / 2
    low = jnp.percentile(values, tail, axis=-1)
    return low, jnp.percentile(values, 100.0 - tail, axis=-1)


def search_scale(
    stats: TensorStats, spec: QuantSpec
) -> tuple[Float[Array, '*lead'], Float[Array, '*lead']]:
    """The scale among 80 shrunken ranges with the least mean |x - x̂|^2.4 over the sample.

    The grid search of BRECQ (arXiv:2102.05426) and EfficientDM's code, one candidate at a time so
    that memory does not grow with their number.

    Args:
      stats: range and sample, any leading axes.
      spec: bits and symmetry.
    """
    qmin, qmax = spec.grid

    def visit(best, shrink):
        error, scale, zero_point = best
        new_scale, new_zero_point = compute_scale(stats.low * shrink, stats.high * shrink, spec)
        approximation = numerics.fake_quantize(
            stats.values, new_scale[..., None], new_zero_point[..., None], qmin, qmax
        )
        new_error = jnp.mean(jnp.abs(stats.values - approximation) ** ERROR_NORM, axis=-1)
        better = new_error < error
        return (
            jnp.where(better, new_error, error),
            jnp.where(better, new_scale, scale),
            jnp.where(better, new_zero_point, zero_point),
        ), None

    start = jnp.full_like(stats.low, jnp.inf), *compute_scale(stats.low, stats.high, spec)
    shrinks = 1.0 - 0.01 * jnp.arange(NUM_CANDIDATES, dtype=jnp.float32)
    (_, scale, zero_point), _ = jax.lax.scan(visit, start, shrinks)
    return scale, zero_point


def calibrate(
    stats: TensorStats, spec: QuantSpec
) -> tuple[Float[Array, '*lead'], Float[Array, '*lead']]:
    """Scale and zero point by the observer that `spec` names.

    Raises:
      ValueError: an unknown observer.
    """
    match spec.observer:
        case 'minmax':
            return compute_scale(stats.low, stats.high, spec)
        case 'percentile':
            return compute_scale(*percentile_range(stats.values, spec.percentile), spec)
        case 'mse':
            return search_scale(stats, spec)
    raise ValueError(f"observer={spec.observer!r}: expected 'minmax', 'percentile' or 'mse'.")


def calibrate_weight(
    weight: Float[Array, '... K N'], spec: QuantSpec
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
    """Scale and zero point of a weight, in `scale_shape`, from all of its values.

    Args:
      weight: Dense [K, N] or Conv [kh, kw, C, O].
      spec: granularity, bits, observer.
    """
    shape = scale_shape(weight.shape, spec)
    if spec.per_channel:
        taps, inputs, outputs = weight.shape[:-2], weight.shape[-2], weight.shape[-1]
        groups = shape[-2]
        rows = weight.reshape(*taps, groups, inputs // groups, outputs)
        # [groups, outputs, values]
        rows = jnp.moveaxis(rows, (-3, -1), (0, 1)).reshape(groups, outputs, -1)
    else:
        rows = weight.reshape(-1)
    stats = TensorStats(jnp.min(rows, axis=-1), jnp.max(rows, axis=-1), rows)
    scale, zero_point = calibrate(stats, spec)
    return scale.reshape(shape), zero_point.reshape(shape)
