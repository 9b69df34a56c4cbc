"""A network of one block that hears of timestep and class: what learns it is compiled quickly.

It has one or two of each kind of layer, and normalizations, as the U-Nets have.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmq_jax import denoisers
from dmq_jax.diffusion.schedule import Schedule
from tests import tiny

NUM_CLASSES = 3
CHANNELS = 8
INFO = denoisers.DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=100, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=NUM_CLASSES,
)


class Block(nn.Module):
    """Two convolutions, shifted by the embedding between them, added to the input."""

    @nn.compact
    def __call__(self, x, embedding):
        h = nn.swish(nn.GroupNorm(2, name='norm1')(x))
        h = nn.Conv(x.shape[-1], (3, 3), name='conv1')(h)
        h = h + nn.Dense(x.shape[-1], name='time_proj')(embedding)[:, None, None, :]
        h = nn.swish(nn.GroupNorm(2, name='norm2')(h))
        return x + nn.Conv(x.shape[-1], (3, 3), name='conv2')(h)


class Network(nn.Module):
    """One block between two layers that belong to none; the last class is the null class."""

    @nn.compact
    def __call__(self, x, t, y):
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)[:, None] / 20
        features = jnp.concatenate([f(t * s) for f in (jnp.sin, jnp.cos) for s in (1, 0.3)], -1)
        embedding = nn.Dense(CHANNELS, name='time_embed')(features)
        embedding = nn.swish(embedding + nn.Embed(NUM_CLASSES + 1, CHANNELS, name='classes')(y))
        h = nn.Conv(CHANNELS, (3, 3), name='conv_in')(x)
        h = Block(name='block_0')(h, embedding)
        return nn.Conv(1, (3, 3), name='conv_out')(nn.swish(h))


@functools.cache
def teacher():
    denoiser = tiny.random_denoiser(Network(), INFO, tiny.like_initial)
    # In NumPy: to put it on a mesh, no program has to cut it to pieces.
    return denoiser._replace(params=jax.device_get(denoiser.params))
