"""Denoisers: where a network, its weights and its noise schedule meet.

Teacher and student are the same type, so samplers, metrics and reports cannot tell them apart.
`predict` is a pure function of its parameters: they are an argument of everything compiled, never
a constant baked into it.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, PyTree

from dmq_jax.diffusion.samplers import Sampler, make_sampler
from dmq_jax.diffusion.schedule import Schedule, sampling_timesteps
from dmq_jax.models.ddpm_unet import DDPMUNet

ASSETS = Path(__file__).parent / 'assets'
TEACHER_FORMAT = 'dmq_jax.teacher.1'

Predict = Callable[..., Float[Array, 'B H W C']]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserInfo:
    """What a sampler must know of a denoiser besides its function.

    Attributes:
      schedule: noise schedule it was trained with.
      prediction: what it predicts, 'eps' or 'v'.
      image_shape: (height, width, channels) of its images.
      num_classes: classes it is conditioned on, labels 0..num_classes-1, the null class being
        num_classes; None if unconditional.
    """

    schedule: Schedule
    prediction: str
    image_shape: tuple[int, int, int]
    num_classes: int | None


class Denoiser(NamedTuple):
    """A network that predicts the noise in an image.

    Attributes:
      predict: `predict(params, x, t, y)`, pure; `t` is a scalar or one per image, `y` the class of
        each image or None.
      params: its parameters, any pytree.
      info: schedule, prediction type, image shape, classes.
      network: the float Flax module underneath.
    """

    predict: Predict
    params: PyTree
    info: DenoiserInfo
    network: Any


def float_denoiser(network: DDPMUNet, params: PyTree, info: DenoiserInfo) -> Denoiser:
    """The denoiser that simply applies `network`."""

    def predict(params, x, t, y=None):
        return network.apply({'params': params}, x, t, y)

    return Denoiser(predict, params, info, network)


def guided(predict: Predict, info: DenoiserInfo, guidance_scale: float) -> Predict:
    """`predict` with classifier-free guidance (arXiv:2207.12598, eq. 6), as one doubled batch.

    Args:
      predict: of a class-conditional denoiser.
      info: says which class is the null class.
      guidance_scale: weight s of `null + s (conditional - null)`; 1 leaves `predict` as it is.

    Raises:
      ValueError: guidance of an unconditional denoiser.
    """
    if guidance_scale == 1.0:
        return predict
    if info.num_classes is None:
        raise ValueError(
            f'guidance_scale={guidance_scale}: this denoiser is unconditional; expected 1.0.'
        )

    def predict_guided(params, x, t, y):
        null = jnp.full_like(y, info.num_classes)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t, t])
        both = predict(params, jnp.concatenate([x, x]), times, jnp.concatenate([null, y]))
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict_guided


def make_denoiser_sampler(info: DenoiserInfo, config: Any) -> Sampler:
    """The sampler that a `config.SamplerConfig` describes, on the schedule of `info`.

    Raises:
      ValueError: see `diffusion.schedule.sampling_timesteps` and `diffusion.samplers.make_sampler`.
    """
    timesteps = sampling_timesteps(info.schedule, config.num_steps, config.spacing)
    return make_sampler(
        config.name, info.schedule, timesteps, eta=config.eta, prediction=info.prediction
    )


def save_teacher(
    path: str | os.PathLike, teacher: Denoiser, metadata: dict[str, Any] | None = None
) -> None:
    """Writes a float teacher as one safetensors file, weights in float16.

    Args:
      path: the file; its folder must exist.
      teacher: a denoiser whose network is a `DDPMUNet`.
      metadata: facts about its training, JSON values.
    """
    from safetensors.numpy import save_file

    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, np.float16))
        for name, leaf in traverse_util.flatten_dict(teacher.params, sep='/').items()
    }
    save_file(
        tensors,
        path,
        {
            'format': TEACHER_FORMAT,
            'network': json.dumps(network_settings(teacher.network)),
            'info': json.dumps(dataclasses.asdict(teacher.info)),
            'training': json.dumps(metadata or {}),
        },
    )


def network_settings(network: DDPMUNet) -> dict[str, Any]:
    """The attributes that rebuild `network`, as JSON values; the dtype is not one of them."""
    names = [f.name for f in dataclasses.fields(network) if f.name not in ('parent', 'name', 'dtype')]
    return {name: getattr(network, name) for name in names}


def make_network(settings: dict[str, Any]) -> DDPMUNet:
    """The network that `network_settings` described."""
    return DDPMUNet(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def make_info(settings: dict[str, Any]) -> DenoiserInfo:
    """The `DenoiserInfo` whose `dataclasses.asdict` is `settings`, possibly through JSON."""
    return DenoiserInfo(
        schedule=Schedule(**settings['schedule']),
        prediction=settings['prediction'],
        image_shape=tuple(settings['image_shape']),
        num_classes=settings['num_classes'],
    )


def bundled_teachers() -> list[str]:
    """Names that `load_teacher` knows without a file."""
    return sorted(p.name.removesuffix('_teacher.safetensors') for p in ASSETS.glob('*_teacher.safetensors'))


def load_teacher(path: str | os.PathLike) -> Denoiser:
    """A float teacher: a bundled name, or a file written by `save_teacher`.

    Raises:
      FileNotFoundError: neither a bundled name nor a file.
      ValueError: a file that is not a teacher, or whose tensors do not fit its network.
    """
    from safetensors import SafetensorError, safe_open

    file = ASSETS / f'{path}_teacher.safetensors'
    if not file.is_file():
        file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f'teacher.path={str(path)!r}: expected a bundled name ({", ".join(bundled_teachers())}) '
            f'or a .safetensors file written by dmq_jax.train_teacher.'
        )
    try:
        with safe_open(file, framework='numpy') as opened:
            metadata = opened.metadata() or {}
            if metadata.get('format') != TEACHER_FORMAT:
                raise ValueError(
                    f'{file}: format is {metadata.get("format")!r}, expected {TEACHER_FORMAT!r}.'
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{file}: not a complete safetensors file ({error}).') from error
    network = make_network(json.loads(metadata['network']))
    info = make_info(json.loads(metadata['info']))
    check_tensors(network, info, tensors, source=str(file))
    params = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}
    return float_denoiser(network, traverse_util.unflatten_dict(params, sep='/'), info)


def init_params(network: DDPMUNet, info: DenoiserInfo, key: Array) -> PyTree:
    """Random parameters of `network`."""
    x, t, y = example_inputs(info, batch_size=1)
    return jax.jit(network.init)(key, x, t, y)['params']


def example_inputs(
    info: DenoiserInfo, batch_size: int
) -> tuple[Float[Array, 'B H W C'], Int[Array, ''], Int[Array, 'B'] | None]:
    """Zeros of the shapes that `predict` takes: images, timestep, classes."""
    y = None if info.num_classes is None else jnp.zeros((batch_size,), jnp.int32)
    return jnp.zeros((batch_size, *info.image_shape)), jnp.zeros((), jnp.int32), y


def check_tensors(
    network: DDPMUNet, info: DenoiserInfo, tensors: dict[str, Any], *, source: str
) -> None:
    """Refuses tensors that are not exactly the parameters of `network`.

    Raises:
      ValueError: naming the first missing, left-over or misshapen tensor.
    """
    expected = jax.eval_shape(lambda key: init_params(network, info, key), jax.random.key(0))
    expected = traverse_util.flatten_dict(expected, sep='/')
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f'{source}: {len(missing)} tensors missing, e.g. {missing[0]!r}.')
    if left_over := sorted(tensors.keys() - expected.keys()):
        raise ValueError(
            f'{source}: {len(left_over)} tensors unused, e.g. {left_over[0]!r}: other network?'
        )
    for name, leaf in expected.items():
        if tuple(tensors[name].shape) != leaf.shape:
            raise ValueError(
                f'{source}: {name!r} has shape {tuple(tensors[name].shape)}, expected {leaf.shape}.'
            )
