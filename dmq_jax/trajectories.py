"""Moments of trajectories: what a network is given while it draws, kept to learn from.

Evenly spaced timesteps of many images, with both branches of guidance, as calibration sets of
diffusion have them (Q-Diffusion, arXiv:2302.04304).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, Key, PyTree

from dmq_jax import denoisers
from dmq_jax.config import ReconstructConfig
from dmq_jax.diffusion import samplers
from dmq_jax.runtime import mesh, programs


class Inputs(NamedTuple):
    """What the network is given at moments of trajectories.

    Attributes:
      x: noisy images.
      t: timestep of each.
      y: condition of each; None if unconditional.
    """

    x: Float[Array, 'N H W C']
    t: Int[Array, 'N']
    y: PyTree


def draw_inputs(
    teacher: denoisers.Denoiser,
    denoiser: denoisers.Denoiser,
    config: ReconstructConfig,
    *,
    key: Key[Array, ''],
    device_mesh: mesh.Mesh | None = None,
) -> Inputs:
    """`num_timesteps` evenly spaced moments of `num_images` trajectories.

    With guidance, each is there twice: with the null condition and with its own.

    Args:
      teacher: says what is drawn and with which classes.
      denoiser: draws: the teacher, or a student.
      config: sampler, and how many.
      key: root key of the images.
      device_mesh: splits every batch over its devices; None: one device.
    """
    device_mesh = device_mesh or mesh.make_mesh(1)
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    info, scale = teacher.info, config.sampler.guidance_scale
    predict = mesh.on_whole(device_mesh, denoisers.guided(denoiser.predict, info, scale))
    weights = mesh.shard_weights(device_mesh, denoiser.params)
    steps = np.arange(config.num_timesteps) * (len(sampler.timesteps) // config.num_timesteps)
    labels = denoisers.balanced_labels(config.num_images, info.num_classes)

    @programs.NetworkProgram
    def draw(params, sampler, keys, y):
        x_T = samplers.initial_noise(keys, info.image_shape)
        _, carries = samplers.trajectory(
            lambda x, t: (predict(params, x, t, y), None), sampler, x_T, keys
        )
        return carries.x[steps]

    moments, parts = [], mesh.batch_parts(device_mesh)
    for begin in range(0, config.num_images, config.batch_size):
        indices = np.arange(begin, min(begin + config.batch_size, config.num_images))
        # Filled up to what the devices divide, and cut.
        padded = np.resize(indices, -(-len(indices) // parts) * parts)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(padded, jnp.uint32))
        y = None if labels is None else labels[padded]
        keys, y = mesh.shard_batch(device_mesh, (keys, y))
        drawn = mesh.fetch(device_mesh, draw(weights, sampler, keys, y))
        moments.append(drawn[:, : len(indices)])
    x = np.concatenate(moments, axis=1)  # [timesteps, images, H, W, C]
    t = np.repeat(np.asarray(sampler.timesteps)[steps], config.num_images)
    x = x.reshape(-1, *x.shape[2:])
    y = None if labels is None else jnp.tile(jnp.asarray(labels), config.num_timesteps)
    inputs = Inputs(jnp.asarray(x), jnp.asarray(t), y)
    if scale == 1.0:
        return inputs
    null = inputs._replace(y=denoisers.null_like(y, info))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), null, inputs)


def save_inputs(path: str | os.PathLike, inputs: Inputs, key: Key[Array, '']) -> None:
    """Writes inputs and the key they were drawn with as one `.npz`."""
    arrays = {'x': inputs.x, 't': inputs.t, 'key': jax.random.key_data(key)}
    if inputs.y is not None:
        arrays |= {f'y:{n}': a for n, a in _as_mapping(inputs.y).items()}
    partial = Path(path).with_suffix('.partial.npz')
    partial.parent.mkdir(parents=True, exist_ok=True)
    np.savez(partial, **jax.device_get(arrays))
    os.replace(partial, path)


def load_inputs(path: str | os.PathLike) -> Inputs:
    """Reads what `save_inputs` wrote."""
    with np.load(path) as arrays:
        y = {n[2:]: jnp.asarray(arrays[n]) for n in arrays.files if n.startswith('y:')}
        y = y.get('', y) if y else None
        return Inputs(jnp.asarray(arrays['x']), jnp.asarray(arrays['t']), y)


def _as_mapping(y):
    return traverse_util.flatten_dict(y, sep=':') if isinstance(y, Mapping) else {'': y}
