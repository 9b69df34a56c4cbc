"""RepQ-ViT: calibrated finely, run coarsely, with nothing lost in between.

Li et al., ICCV 2023, arXiv:2212.08254; for transformers, and the attention of U-Nets. Nothing is
learnt. Two reparameterizations:

* after a norm: with s and z the scale and zero point of each channel, s~ and z~ their means,
  r1 = s / s~ and r2 = z - z~, the input

      X' = (X + s r2) / r1,    W' = r1 W,    b' = b - W (s r2)

  has the range of (s~, z~) in every channel, so that one scale serves all as each its own did;
* after a softmax: codes q = round(-2 log2(x / s)), values s 2^(-q/2), which are powers of two and,
  where q is odd, sqrt(2) times those. The largest code stands for 0.

Where this differs from the authors' code, on purpose:

* the norm's own factors are left alone: an activation quantizer multiplies and adds once, since
  several layers read one norm, and some norms are modulated by the timestep after;
* ranges of channels are those seen, over all timesteps; the authors choose a percentile. The scale
  of X' and of all other activations is the plan's, one per timestep or one for all;
* their 2^b codes and a zero beside them would not fit in b bits.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dmq_jax.config import RepQViTConfig
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import Plan, is_softmax
from dmq_jax.quant.tensor import QuantSpec

# A channel that is never used gets a scale all the same, at least this share of the largest.
_SMALLEST_SHARE = 1e-2


def make(config: RepQViTConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; those not marked trainable are only rounded."""
    del num_train_timesteps

    def is_normed(path, params):
        spec = plan[path]
        return (
            spec.trainable
            and None not in (spec.weight, spec.inputs)
            and re.fullmatch(config.layers, path) is not None
            # Zeros around an image would not be shifted with it.
            and base.get_kernel(params, path).ndim == 2
        )

    def init(params, stats, key):
        del key
        normed = [path for path in plan if is_normed(path, params)]
        inputs, kernels = {}, {}
        stats, shifts = dict(stats), {}
        for path in normed:
            if stats[path]['input'].channel_low is None:
                raise ValueError(
                    f'the statistics of layer {path!r} have no ranges of single channels: '
                    f'calibrate with `channels=True`.'
                )
            factor, shift = reparameterization(stats[path]['input'], plan[path].inputs)
            shifts[path] = {'factor': factor, 'shift': shift}
            kernels[path] = base.get_kernel(params, path) * factor[:, None]
            scaled = observers.scale_channels(stats[path]['input'], 1 / factor, shift)
            stats[path] = {'input': scaled}
        inputs = base.init_inputs(plan, stats)
        for path, roles in inputs.items():
            for role, table in roles.items():
                if config.softmax == 'roots' and is_softmax(path, role) and plan[path].trainable:
                    tensor = stats[path][role]
                    tensor = tensor if plan[path].per_timestep else observers.pool(tensor)
                    inputs[path][role] = {
                        **table,
                        'zero_point': jnp.zeros_like(table['zero_point']),
                        'roots': jnp.maximum(tensor.high, 1e-12),
                    }
        weights = base.init_weights(plan, base.with_kernels(params, kernels))
        return {'weight': weights, 'input': inputs, 'channels': shifts}

    def bind(params, state):
        kernels, channels = {}, {}
        for path, entry in state['channels'].items():
            kernels[path] = base.get_kernel(params, path) * entry['factor'][:, None]
            channels[path] = {
                'input': (1 / entry['factor'])[None],
                'shift': entry['shift'][None],
                # W (s r2) = W' (s r2 / r1).
                'offset': -(entry['shift'] @ kernels[path])[None],
            }
        params = base.with_kernels(params, kernels)
        weights = {
            path: base.quantize_weight(base.get_kernel(params, path), **scale, spec=plan[path])
            for path, scale in state['weight'].items()
        }
        return base.Bound(weights, state['input'], channels=channels)

    return base.Method(init, bind, base.output_loss, base.frozen, channel_stats=True)


def reparameterization(stats: TensorStats, spec: QuantSpec) -> tuple[Array, Array]:
    """r1 and s r2 / r1 of a tensor: factors above 0 of its channels, and what is added after.

    Args:
      stats: with ranges of the channels, leading axis S.
      spec: of the tensor.
    """
    low = jnp.minimum(jnp.min(stats.channel_low, axis=0), 0.0)
    high = jnp.maximum(jnp.max(stats.channel_high, axis=0), 0.0)
    scale, _ = observers.compute_scale(low, high, spec)
    scale = jnp.maximum(scale, _SMALLEST_SHARE * jnp.max(scale))
    factor = scale / jnp.mean(scale)
    if spec.symmetric:
        return factor, jnp.zeros_like(factor)
    zero_point = jnp.clip(jnp.round(-low / scale), *map(float, spec.grid))
    shift = zero_point - jnp.round(jnp.mean(zero_point))
    return jax.lax.stop_gradient(factor), jax.lax.stop_gradient(scale * shift / factor)
