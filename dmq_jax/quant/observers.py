"""From statistics of a tensor to its scale and zero point.

Statistics carry any leading axes (timesteps, channels); every function maps over them at once.
They are a range plus an evenly spread sample of the values, small enough to keep for every
tensor at every timestep, from which each observer can decide later.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmq_jax.quant import numerics
from dmq_jax.quant.tensor import QuantSpec, scale_shape

NUM_CANDIDATES = 80  # shrink factors 1, 0.99, ... 0.21 (BRECQ's and EfficientDM's search)
ERROR_NORM = 2.4  # exponent of the error the search minimises (the same codes)
_GOLDEN_SECTION = 0.6180339887498949
_SMALLEST_SCALE = 1e-8  # an all-zero tensor: any scale represents it


class TensorStats(NamedTuple):
    """What was seen of one tensor.

    Attributes:
      low: smallest value.
      high: largest value.
      values: an even sample of the values.
      extremes: the smallest and the largest value of every block of the tensor: the tails, which
        a sample would miss and a range search would then cut off for nothing. None if `values`
        are all there are.
      count: how many values the tensor had; None likewise.
      channel_low: smallest value of each entry of the last axis; None unless asked for.
      channel_high: largest value of each; None likewise.
      channels: the entry of the last axis that each of `values` is of; None likewise.
    """

    low: Float[Array, '*lead']
    high: Float[Array, '*lead']
    values: Float[Array, '*lead n']
    extremes: Float[Array, '*lead m'] | None = None
    count: Float[Array, '*lead'] | None = None
    channel_low: Float[Array, '*lead C'] | None = None
    channel_high: Float[Array, '*lead C'] | None = None
    channels: Int[Array, '*lead n'] | None = None


def observe(x: Float[Array, '...'], num_values: int, *, channels: bool = False) -> TensorStats:
    """Range, sample and extremes of one tensor.

    Args:
      x: any shape.
      num_values: size of the sample, and the number of blocks; a tensor with fewer values is
        repeated.
      channels: whether ranges of the entries of the last axis are wanted as well.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    flat = x.reshape(-1)
    # A stride without a common factor with the size meets every channel equally often. (An even
    # stride over sizes like 64 * 28 * 28 * 32 would see two channels of 32.) Near the golden
    # section of the size, it also spreads evenly over images and pixels.
    stride = round(flat.size * _GOLDEN_SECTION) or 1
    while math.gcd(stride, flat.size) > 1:
        stride += 1
    index = np.arange(num_values, dtype=np.int64) * stride % flat.size
    block = -(-flat.size // num_values)
    blocks = jnp.pad(flat, (0, block * num_values - flat.size), mode='wrap')
    blocks = blocks.reshape(num_values, block)
    extremes = jnp.concatenate([jnp.min(blocks, axis=1), jnp.max(blocks, axis=1)])
    stats = TensorStats(
        jnp.min(x),
        jnp.max(x),
        flat[index.astype(np.int32)],
        extremes,
        jnp.asarray(flat.size, jnp.float32),
    )
    if not channels:
        return stats
    rows = x.reshape(-1, x.shape[-1])
    return stats._replace(
        channel_low=jnp.min(rows, axis=0),
        channel_high=jnp.max(rows, axis=0),
        channels=jnp.asarray(index % x.shape[-1], jnp.int32),
    )


def merge(first: TensorStats, second: TensorStats) -> TensorStats:
    """Statistics of both together: the wider range, both samples."""
    return _both(first, second, jnp.minimum, jnp.maximum)


def running(average: TensorStats, new: TensorStats, momentum: float = 0.95) -> TensorStats:
    """An exponential average of the range (Q-Diffusion's running statistics); both samples."""

    def move(old, value):
        return momentum * old + (1 - momentum) * value

    return _both(average, new, move, move)


def _both(first: TensorStats, second: TensorStats, lower, higher) -> TensorStats:
    def both(name, combine):
        a, b = getattr(first, name), getattr(second, name)
        return None if a is None or b is None else combine(a, b)

    def joined(a, b):
        return jnp.concatenate([a, b], axis=-1)

    combine = {
        'low': lower, 'high': higher, 'values': joined, 'extremes': joined, 'count': jnp.add,
        'channel_low': lower, 'channel_high': higher, 'channels': joined,
    }  # fmt: skip
    stats = TensorStats(**{name: both(name, how) for name, how in combine.items()})
    # Counted values whose extremes are not all known would be counted twice.
    return stats if stats.extremes is not None else stats._replace(count=None)


def pool(stats: TensorStats) -> TensorStats:
    """Statistics over the first axis together: from per timestep [S, ...] to one row [1, ...]."""

    def joined(values: Array | None) -> Array | None:
        if values is None:
            return None
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*values.shape[:-2], -1)[None]

    def over_time(combine: Callable[..., Array], values: Array | None) -> Array | None:
        return None if values is None else combine(values, axis=0, keepdims=True)

    return TensorStats(
        over_time(jnp.min, stats.low),
        over_time(jnp.max, stats.high),
        joined(stats.values),
        joined(stats.extremes),
        over_time(jnp.sum, stats.count),
        over_time(jnp.min, stats.channel_low),
        over_time(jnp.max, stats.channel_high),
        joined(stats.channels),
    )


def scale_channels(
    stats: TensorStats, factor: Float[Array, 'C'], shift: Float[Array, 'C'] | None = None
) -> TensorStats:
    """Statistics of x * factor + shift, from those of x; the extremes are those of the channels.

    Args:
      stats: with ranges of the channels.
      factor: above 0, for each entry of the last axis.
      shift: for each entry of the last axis; None: 0.
    """
    shift = jnp.zeros_like(factor) if shift is None else shift
    wide, added = (row.reshape((1,) * stats.low.ndim + (-1,)) for row in (factor, shift))
    low, high = stats.channel_low * wide + added, stats.channel_high * wide + added
    return stats._replace(
        low=jnp.min(low, axis=-1),
        high=jnp.max(high, axis=-1),
        values=stats.values * factor[stats.channels] + shift[stats.channels],
        extremes=jnp.concatenate([low, high], axis=-1),
        channel_low=low,
        channel_high=high,
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
        new_error = _mean_error(stats, new_scale, new_zero_point, qmin, qmax)
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


def _mean_error(stats, scale, zero_point, qmin, qmax):
    """Estimate of the mean |x - x̂|^2.4: extremes counted once, the sample standing for the rest."""

    def errors(values):
        approximation = numerics.fake_quantize(
            values, scale[..., None], zero_point[..., None], float(qmin), float(qmax)
        )
        return jnp.abs(values - approximation) ** ERROR_NORM

    mean = jnp.mean(errors(stats.values), axis=-1)
    if stats.extremes is None:
        return mean
    num_extremes = stats.extremes.shape[-1]
    rest = jnp.maximum(stats.count - num_extremes, 0.0)
    return (mean * rest + jnp.sum(errors(stats.extremes), axis=-1)) / (rest + num_extremes)


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
