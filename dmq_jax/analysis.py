"""Where the remaining error of a student sits: when, in weights or activations, in which layer.

Errors are normalised squared distances |a - b|^2 / |b|^2 with the teacher as b, on images along the
teacher's own trajectory. One compiled program answers every question: a gate per kernel and a gate
per layer's inputs choose, as data, between the student's rounded tensor and the teacher's.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dmq_jax import denoisers
from dmq_jax.config import SamplerConfig
from dmq_jax.diffusion import samplers
from dmq_jax.methods import low_rank
from dmq_jax.methods.base import apply_fake, get_kernel, with_kernels
from dmq_jax.quant.plan import Plan
from dmq_jax.runtime.progress import progress

Gates = Mapping[str, Bool[Array, '']]
Chooses = Callable[[str], bool]

# What of the student is switched on: (kernels, inputs).
_PARTS = {'student': (True, True), 'weights': (True, False), 'activations': (False, True)}


def run(
    teacher: denoisers.Denoiser,
    student: denoisers.Denoiser,
    sampler_config: SamplerConfig,
    *,
    key: Key[Array, ''],
    num_images: int = 16,
    num_sensitivity_timesteps: int = 4,
    description: str = 'analyse',
) -> dict[str, Any]:
    """Every error of a student, as JSON values.

    Args:
      teacher: the float network.
      student: the same network in fake-quantized mode (`exporting.denoiser(..., 'fake')`).
      sampler_config: draws the teacher's trajectory, along which the two are compared.
      key: root key of the images.
      num_images: images compared.
      num_sensitivity_timesteps: timesteps, spread evenly over the trajectory, that the images are
        dealt to where single layers are compared.
      description: shown beside the progress.

    Returns:
      `timesteps`: [S] as visited. `error`: {'student', 'weights', 'activations'}, each [S]: with
      everything as in the student, with its kernels but float activations, with its activations
      but the teacher's kernels. `layers`: {path: {'weight_error', 'sensitivity'}} in the order of
      execution; the error of the kernel (None if it is float), and that of the prediction when this
      layer's kernel and inputs alone are the student's. `sensitivity_timesteps`, `num_images`.
    """
    sampler = denoisers.make_denoiser_sampler(teacher, sampler_config)
    timesteps = np.asarray(sampler.timesteps, np.int32)
    keys = jax.random.split(key, num_images)
    labels = denoisers.balanced_labels(num_images, teacher.info.num_classes)
    visited = _trajectory(teacher, sampler_config.guidance_scale, sampler, keys, labels)
    plan = dict(student.predict.plan)
    mixed = jax.jit(functools.partial(predict_mixed, student.predict))

    def predict(x: Array, t: Array, kernels: Chooses, inputs: Chooses) -> np.ndarray:
        gates = [{path: jnp.asarray(is_on(path)) for path in plan} for is_on in (kernels, inputs)]
        return np.asarray(mixed(teacher.params, student.params, *gates, x, t, labels))

    error: dict[str, list[float]] = {name: [] for name in _PARTS}
    for row in progress(range(len(timesteps)), f'{description}: timesteps'):
        x, t = visited[row], jnp.full((num_images,), timesteps[row])
        target = predict(x, t, _never, _never)
        for name, parts in _PARTS.items():
            choose = [_always if is_on else _never for is_on in parts]
            error[name].append(mean_error(predict(x, t, *choose), target))

    spread = np.linspace(0, len(timesteps) - 1, num_sensitivity_timesteps + 2)[1:-1]
    rows = np.round(spread).astype(int)[np.arange(num_images) % num_sensitivity_timesteps]
    x, t = visited[rows, np.arange(num_images)], jnp.asarray(timesteps[rows])
    target = predict(x, t, _never, _never)
    weight_errors = kernel_errors(plan, teacher.params, student.params)
    layers = {}
    for path in progress(plan, f'{description}: layers'):
        is_this = functools.partial(str.__eq__, path)
        layers[path] = {
            'weight_error': weight_errors.get(path),
            'sensitivity': mean_error(predict(x, t, is_this, is_this), target),
        }
    return {
        'num_images': num_images,
        'timesteps': timesteps.tolist(),
        'error': error,
        'layers': layers,
        'sensitivity_timesteps': sorted(set(timesteps[rows].tolist()), reverse=True),
    }


def _always(path: str) -> bool:
    return True


def _never(path: str) -> bool:
    return False


def _trajectory(
    teacher: denoisers.Denoiser,
    guidance_scale: float,
    sampler: samplers.Sampler,
    keys: Key[Array, 'B'],
    labels: Int[Array, 'B'] | None,
) -> Float[Array, 'S B H W C']:
    """x_t at every timestep that the teacher's sampler visits."""
    predict = denoisers.guided(
        teacher.predict, teacher.info, guidance_scale, keep_variance=sampler.learns_variance
    )

    @jax.jit
    def visit_all(params, sampler, keys, labels):
        x_T = samplers.initial_noise(keys, teacher.info.image_shape)
        visit = lambda x, t: (predict(params, x, t, labels), None)  # noqa: E731
        return samplers.trajectory(visit, sampler, x_T, keys)[1].x

    return visit_all(teacher.params, sampler, keys, labels)


def predict_mixed(
    predict: denoisers.QuantizedPredict,
    teacher_params: PyTree,
    student_params: PyTree,
    kernel_gates: Gates,
    input_gates: Gates,
    x: Float[Array, 'B H W C'],
    t: Int[Array, 'B'],
    y: Int[Array, 'B'] | None,
) -> Float[Array, 'B H W C']:
    """The prediction with the student's tensors where a gate is on, the teacher's elsewhere.

    Args:
      predict: of the student; says its network, its plan and how tables are read.
      teacher_params: the float parameters.
      student_params: those of a fake-quantized student.
      kernel_gates: by path of the plan; True takes the student's kernel.
      input_gates: by path of the plan; True rounds the inputs as the student does.
      x: noisy images.
      t: the timestep of each.
      y: the class of each; None if the network is unconditional.
    """
    plan = dict(predict.plan)
    channels, branches = student_params['channels'], student_params['branches']
    kernels = {}
    for path, spec in plan.items():
        if spec.weight is not None:
            # With the factors that stay on, the product is the teacher's.
            own = get_kernel(teacher_params, path)
            own = own / _factors(channels.get(path), own.ndim)
            if path in branches:
                own = own - low_rank.delta(branches[path])
            kernels[path] = jnp.where(
                kernel_gates[path], get_kernel(student_params['params'], path), own
            )
    rows = {
        path: {
            role: row
            if role == 'branch'
            else _gated_channels(row, channels[path], kernel_gates[path])
            if role == 'channels'
            else {**row, 'gate': input_gates[path]}
            for role, row in roles.items()
        }
        for path, roles in denoisers.rows_at(student_params, t, predict.lookup).items()
    }
    params = with_kernels(teacher_params, kernels)
    return apply_fake(predict.network.apply, plan, params, rows, x, t, y)


def _is_timeless(tables: Mapping[str, Array]) -> bool:
    """Whether factors of channels are the same at all timesteps."""
    return all(table.shape[0] == 1 for table in tables.values())


def _factors(tables: Mapping[str, Array] | None, ndim: int) -> Array:
    """What factors of channels multiply a kernel of `ndim` axes by; 1 where time changes it."""
    one = jnp.ones((1, 1))
    if tables is None or not _is_timeless(tables):
        return one.reshape((1,) * ndim)
    product = tables.get('input', one).reshape(-1, 1) * tables.get('output', one)
    return product.reshape((1,) * (ndim - 2) + product.shape)


def _gated_channels(
    factors: Mapping[str, Array], tables: Mapping[str, Array], is_on: Array
) -> Mapping[str, Array]:
    """Factors of channels: where time changes them, those of the student's kernel alone, else 1."""
    if _is_timeless(tables):
        return factors
    return {end: jnp.where(is_on, factor, 1.0) for end, factor in factors.items()}


def kernel_errors(plan: Plan, teacher_params: PyTree, student_params: PyTree) -> dict[str, float]:
    """Normalised error of every quantized kernel, with all that is beside it, by path."""
    channels, branches = student_params['channels'], student_params['branches']
    errors = {}
    for path, spec in plan.items():
        if spec.weight is None:
            continue
        before = get_kernel(teacher_params, path)
        after = get_kernel(student_params['params'], path)
        if path in branches:
            after = after + low_rank.delta(branches[path])
        after = after * _factors(channels.get(path), after.ndim)
        errors[path] = mean_error(np.asarray(after)[None], np.asarray(before)[None])
    return errors


def mean_error(value: Float[np.ndarray, 'B ...'], target: Float[np.ndarray, 'B ...']) -> float:
    """The mean over the first axis of |value - target|^2 / |target|^2."""
    axes = tuple(range(1, value.ndim))
    distance = np.sum((value.astype(np.float64) - target) ** 2, axis=axes)
    # The smallest normal number: no error relative to a target of 0 is an error of 0.
    size = np.maximum(np.sum(target.astype(np.float64) ** 2, axis=axes), np.finfo(float).tiny)
    return float(np.mean(distance / size))
