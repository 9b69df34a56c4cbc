"""A network of two blocks, shifted by the timestep: what learns block by block compiles quickly."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import denoisers
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.quant.layers import collect_stats, observe_inputs
from tests import tiny

INFO = denoisers.DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=None,
)


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, features):
        h = jnp.tanh(nn.Dense(12, name='dense_0')(features))
        return jnp.tanh(nn.Dense(12, name='dense_1')(h))


class Block(nn.Module):
    """A convolution of what the timestep has shifted, added to the input."""

    @nn.compact
    def __call__(self, x, embedding):
        shift = nn.Dense(x.shape[-1], name='time_proj')(embedding)
        return x + nn.Conv(x.shape[-1], (3, 3), name='conv1')(jnp.tanh(x + shift[:, None, None, :]))


class Network(nn.Module):
    """Two blocks between two layers that belong to none."""

    @nn.compact
    def __call__(self, x, t, y=None):
        del y
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)[:, None] / 10
        features = jnp.concatenate([f(t * s) for f in (jnp.sin, jnp.cos) for s in (1, 0.3)], -1)
        embedding = Embedding(name='time_embed')(features)
        h = nn.Conv(6, (3, 3), name='conv_in')(x)
        for i in range(2):
            h = Block(name=f'block_{i}')(h, embedding)
        return nn.Conv(1, (3, 3), name='conv_out')(h)


@functools.cache
def teacher():
    return tiny.random_denoiser(Network(), INFO, tiny.like_initial)


def visited(inputs):
    """The timesteps of drawn inputs, in the order of sampling."""
    return np.unique(np.asarray(inputs.t))[::-1].astype(np.int32)


def observe(denoiser, plan, inputs, *, channels=False):
    """Statistics of `plan`'s inputs, one row per timestep of `inputs`."""

    def visit(_, moment):
        with observe_inputs(plan, 64, channels=channels):
            _, found = denoiser.network.apply(
                {'params': denoiser.params}, *moment, mutable=['stats']
            )
        return None, collect_stats(plan, found['stats'])

    timesteps = jnp.asarray(visited(inputs))
    moments = inputs.x.reshape(len(timesteps), -1, *inputs.x.shape[1:]), timesteps
    return jax.jit(lambda moments: jax.lax.scan(visit, None, moments)[1])(moments)
