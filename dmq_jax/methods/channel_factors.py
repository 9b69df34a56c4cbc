"""Factors of a layer's input channels: ranges made equal in the input, folded into the weight.

    Y = X W = (X / r) (r W),    r > 0 one number per input channel

does not change a float layer, but one scale then serves all channels of X / r. Two rules:

* 'smallest' (TCAQ-DM, arXiv:2412.16700, eqs. 3 to 5 as a third party's code states them; the
  numbering is not certain): with a[t, d] = max |X| of channel d at timestep t,

      r[t, d] = a[t, d] / min_d a[t, d],   r[d] = sum_t a[t, d] r[t, d] / sum_t a[t, d]

  so every channel comes down to the smallest one's range, and timesteps of a large range count
  more. r is cut at a limit, since what leaves the input enters the weight.
* 'balanced' (SmoothQuant, arXiv:2211.10438, eq. 4; the paper behind SVDQuant's and MPQ-DM's
  smoothing): r[d] = (max |X_d|)^s / (max |W_d|)^(1 - s), which shares the ranges between both.

A layer whose input is not scaled by what precedes it needs one multiplication in its activation
quantizer. Nothing is folded further: between a norm's own factors and a convolution stands a SiLU,
for which it would not be exact.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dmq_jax.config import ChannelFactorsConfig
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec, Plan

Factors = Mapping[str, Float[Array, 'K']]

# A channel that is never used must not make the factors of all others infinite; the bound of the
# code that eqs. 3 to 5 are read from.
_LARGEST = 100.0
_TINY = 1e-12


def compute(
    stats: TensorStats,
    kernel: Float[Array, '... K N'],
    spec: LayerSpec,
    config: ChannelFactorsConfig,
) -> Float[Array, 'K']:
    """The factors r of one layer.

    Args:
      stats: of its input, ranges of the channels included, leading axis S.
      kernel: of the layer.
      spec: of the layer; tells the limit where `config` leaves it open.
      config: rule, strength, limit.
    """
    peaks = jnp.maximum(jnp.abs(stats.channel_low), jnp.abs(stats.channel_high))  # a[t, d]
    limit = min(_limit(spec, config), _LARGEST)
    if config.rule == 'balanced':
        of_input = jnp.maximum(jnp.max(peaks, axis=0), _TINY)
        of_weight = jnp.max(jnp.abs(kernel), axis=(*range(kernel.ndim - 2), -1))
        of_weight = jnp.maximum(of_weight, _TINY)
        share = config.strength
        ratio = of_input**share / of_weight ** (1 - share)
        # Around 1: a common factor changes nothing but the units of the scales.
        ratio = ratio / jnp.exp(jnp.mean(jnp.log(ratio)))
        return jnp.clip(ratio, 1 / limit, limit)
    # Floored: see _LARGEST.
    floor = jnp.max(peaks, axis=1, keepdims=True) / _LARGEST
    peaks = jnp.maximum(peaks, jnp.maximum(floor, _TINY))
    ratio = peaks / jnp.min(peaks, axis=1, keepdims=True)
    factors = jnp.sum(peaks * ratio, axis=0) / jnp.sum(peaks, axis=0)
    return jnp.minimum(factors, limit) ** config.strength


def _limit(spec: LayerSpec, config: ChannelFactorsConfig) -> float:
    if config.limit is not None:
        return config.limit
    # TCAQ-DM's R_tru.
    is_w4a8 = spec.weight.bits == 4 and spec.inputs.bits == 8
    return 3.0 if is_w4a8 else _LARGEST


def init(
    plan: Plan, params: PyTree, stats: base.Stats, config: ChannelFactorsConfig
) -> dict[str, Float[Array, 'K']]:
    """Factors of every trainable layer whose weight and input are quantized; none at strength 0.

    Raises:
      ValueError: statistics without ranges of channels.
    """
    factors = {}
    if not is_on(config):
        return factors
    for path, spec in plan.items():
        if not spec.trainable or spec.weight is None or spec.inputs is None:
            continue
        if stats[path]['input'].channel_low is None:
            raise ValueError(
                f'the statistics of layer {path!r} have no ranges of single channels, which their '
                f'factors are made from: calibrate with `channels=True`.'
            )
        kernel = base.get_kernel(params, path)
        factors[path] = compute(stats[path]['input'], kernel, spec, config)
    return factors


def is_on(config: ChannelFactorsConfig) -> bool:
    """Whether there are any factors."""
    return config.strength > 0


def fold(params: PyTree, factors: Factors) -> PyTree:
    """`params` with r W for every W."""
    kernels = {}
    for path, factor in factors.items():
        kernel = base.get_kernel(params, path)
        kernels[path] = kernel * factor.reshape((1,) * (kernel.ndim - 2) + (-1, 1))
    return base.with_kernels(params, kernels)


def scale_stats(stats: base.Stats, factors: Factors) -> base.Stats:
    """Statistics of X / r for every X."""
    scaled = {
        path: {'input': observers.scale_channels(stats[path]['input'], 1 / factor)}
        for path, factor in factors.items()
    }
    return {**stats, **scaled}


def channels(factors: Factors) -> dict[str, dict[str, Float[Array, '1 K']]]:
    """`Bound.channels`: what multiplies the inputs, at all timesteps."""
    return {path: {'input': jax.lax.stop_gradient(1 / r)[None]} for path, r in factors.items()}
