"""The teacher samples while it is observed -> statistics of every activation at every timestep.

The sampler is one `lax.scan`, so what the hook sees at each step comes back stacked [S, ...]: the
very shape of the tables of scales.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from dmq_jax import denoisers
from dmq_jax.config import CalibrateConfig
from dmq_jax.diffusion import samplers
from dmq_jax.methods.base import Stats
from dmq_jax.quant import observers
from dmq_jax.quant.layers import collect_stats, observe_inputs
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import Plan
from dmq_jax.runtime import hosts, mesh, programs
from dmq_jax.runtime.progress import progress


class Calibration(NamedTuple):
    """What the students are calibrated from.

    Attributes:
      timesteps: the timestep of each row, descending as visited.
      stats: {path: {role: TensorStats}}, leading axis S.
    """

    timesteps: Int[np.ndarray, 'S']
    stats: Stats


def run(
    teacher: denoisers.Denoiser,
    plan: Plan,
    config: CalibrateConfig,
    *,
    key: Key[Array, ''],
    device_mesh: mesh.Mesh,
    channels: bool = False,
) -> Calibration:
    """Observes every input of `plan` while the teacher draws `num_images` images.

    Args:
      teacher: the float network.
      plan: the layers observed.
      config: number of images, batch, sampler, size of the samples kept.
      key: root key of the images.
      device_mesh: where batches are split.
      channels: whether a method wants ranges of single channels (`Method.channel_stats`).
    """
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    observe = programs.NetworkProgram(
        functools.partial(
            observe_batch,
            teacher._replace(params=None),
            tuple(plan.items()),
            config.values_per_tensor,
            config.sampler.guidance_scale,
            whole=functools.partial(mesh.whole, device_mesh),
            channels=channels,
        )  # fmt: skip
    )
    batch_size = min(config.batch_size, config.num_images)
    mesh.check_batch_size(device_mesh, batch_size, name='calibrate.batch_size')
    labels = denoisers.balanced_labels(config.num_images, teacher.info.num_classes)
    params = mesh.shard_weights(device_mesh, teacher.params)
    stats: Stats | None = None
    for begin in progress(range(0, config.num_images, batch_size), 'calibrate'):
        indices = np.arange(begin, begin + batch_size, dtype=np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))
        y = None if labels is None else jnp.asarray(labels[indices])
        found = observe(params, sampler, *mesh.shard_batch(device_mesh, (keys, y)))
        new = mesh.fetch(device_mesh, found)
        hosts.stop_if_asked()
        stats = new if stats is None else _merge(stats, new)
    return Calibration(np.asarray(sampler.timesteps), stats)


def _merge(first: Stats, second: Stats) -> Stats:
    return {
        path: {
            role: jax.tree.map(np.asarray, observers.merge(tensor, second[path][role]))
            for role, tensor in roles.items()
        }
        for path, roles in first.items()
    }


def observe_batch(
    teacher: denoisers.Denoiser,
    plan: tuple,
    num_values: int,
    guidance_scale: float,
    params: PyTree,
    sampler: samplers.Sampler,
    keys: Key[Array, 'B'],
    labels: Int[Array, 'B'] | None,
    *,
    whole: Callable[[PyTree], PyTree] = lambda params: params,
    channels: bool = False,
) -> Stats:
    """Statistics of one batch of trajectories, leading axis S; `whole` gathers split weights."""
    plan = dict(plan)

    def visit(x, t):
        found = {}

        def predict(params, x, t, y):
            with observe_inputs(plan, num_values, channels=channels):
                prediction, collections = teacher.network.apply(
                    {'params': whole(params)}, x, t, y, mutable=['stats']
                )
            found.update(collect_stats(plan, collections['stats']))
            return prediction

        guided = denoisers.guided(
            predict, teacher.info, guidance_scale, keep_variance=sampler.learns_variance
        )
        return guided(params, x, t, labels), found

    x_T = samplers.initial_noise(keys, teacher.info.image_shape)
    _, stats = samplers.sample(visit, sampler, x_T, keys)
    return stats


def save(path: str | os.PathLike, calibration: Calibration) -> None:
    """Writes statistics as one `.npz`."""
    arrays = {'timesteps': calibration.timesteps}
    for layer, roles in calibration.stats.items():
        for role, stats in roles.items():
            arrays |= {
                f'{layer}:{role}:{f}': v for f, v in stats._asdict().items() if v is not None
            }
    np.savez(path, **arrays)


def load(path: str | os.PathLike) -> Calibration:
    """Reads what `save` wrote."""
    stats: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(path) as arrays:
        timesteps = arrays['timesteps']
        for name in arrays.files:
            if name != 'timesteps':
                layer, role, field = name.split(':')
                stats.setdefault(layer, {}).setdefault(role, {})[field] = arrays[name]
    return Calibration(
        timesteps,
        {
            layer: {role: TensorStats(**fields) for role, fields in roles.items()}
            for layer, roles in stats.items()
        },
    )
