"""Files of float teachers: the bundled ones, our own format, and folders saved by diffusers.

A teacher is read in whole or refused: a missing, left-over or misshapen tensor is an error.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dmq_jax import assets
from dmq_jax.denoisers import (
    Denoiser,
    DenoiserInfo,
    float_denoiser,
    init_params,
    make_info,
    make_network,
    network_settings,
)
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.files.safetensors import open_safetensors
from dmq_jax.models import ddpm_weights
from dmq_jax.models.ddpm_unet import DDPMUNet

FORMAT = 'dmq_jax.teacher.1'
_BUNDLED = 'teacher.safetensors'
# The names that diffusers gives to the files of a model and of its scheduler.
CONFIG = 'config.json'
SCHEDULER_CONFIG = 'scheduler_config.json'
DIFFUSERS_WEIGHTS = 'diffusion_pytorch_model.safetensors'


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
            'format': FORMAT,
            'network': json.dumps(network_settings(teacher.network)),
            'info': json.dumps(dataclasses.asdict(teacher.info)),
            'training': json.dumps(metadata or {}),
        },
    )


def load_teacher(path: str | os.PathLike, num_classes: int | None = None) -> Denoiser:
    """A float teacher: a bundled name, a file written by `save_teacher`, or a diffusers folder.

    A diffusers folder holds `config.json` (of a `UNet2DModel`) and its weights as safetensors, at
    its root or in `unet/`, and `scheduler_config.json` at its root or in `scheduler/`. It does not
    tell whether a row of its class table is the null class of guidance, so none is unless
    `num_classes` says so.

    Args:
      path: name, file or folder.
      num_classes: classes of a diffusers folder. Row `num_classes` of its class table is then the
        null class; None takes every row for a class, which leaves no null class. Our own files
        know theirs: None, or the same number.

    Raises:
      FileNotFoundError: no such bundled name, file or folder, or a folder that lacks a part.
      ValueError: a file or folder that is not a teacher, settings without a counterpart here,
        tensors that do not fit the network, or a number of classes that is not the teacher's.
    """
    file = assets.find(path, _BUNDLED)
    if file.is_dir():
        return _load_diffusers(file, num_classes)
    if not file.is_file():
        raise FileNotFoundError(
            f'teacher.path={str(path)!r}: expected a bundled name '
            f'({", ".join(assets.names(_BUNDLED))}), a .safetensors file written by '
            f'dmq_jax.train_teacher, or a diffusers folder.'
        )
    tensors = open_safetensors(file)
    if tensors.metadata.get('format') != FORMAT:
        raise ValueError(
            f'{file}: format is {tensors.metadata.get("format")!r}, expected {FORMAT!r}.'
        )
    network = make_network(json.loads(tensors.metadata['network']))
    info = make_info(json.loads(tensors.metadata['info']))
    if num_classes not in (None, info.num_classes):
        raise ValueError(
            f'teacher.num_classes={num_classes}: {file} says that it has {info.num_classes}; '
            f'expected None.'
        )
    check_tensors(network, info, tensors, source=str(file))
    params = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in tensors.items()}
    return float_denoiser(network, traverse_util.unflatten_dict(params, sep='/'), info)


def _load_diffusers(folder: Path, num_classes: int | None) -> Denoiser:
    configs = {f.parent: json.loads(f.read_text()) for f in _present(folder, 'unet', CONFIG)}
    models = [f for f, config in configs.items() if config.get('_class_name') == 'UNet2DModel']
    schedulers = _present(folder, 'scheduler', SCHEDULER_CONFIG)
    if not models or not schedulers:
        wanted = f'{SCHEDULER_CONFIG} (there or in scheduler/)'
        if not models:
            wanted = f"{CONFIG} with '_class_name': 'UNet2DModel' (there or in unet/)"
        raise FileNotFoundError(f'{folder}: no {wanted}; expected a folder saved by diffusers.')
    weights = [models[0] / f'{DIFFUSERS_WEIGHTS}{end}' for end in ('', '.index.json')]
    if not any(file.is_file() for file in weights):
        raise FileNotFoundError(
            f'{models[0]}: no {weights[0].name} or {weights[1].name}; save the model again with '
            f'safe_serialization=True.'
        )
    config = configs[models[0]]
    try:
        network = ddpm_weights.network_from_diffusers(config)
        schedule, prediction = _process_from_diffusers(json.loads(schedulers[0].read_text()))
        tensors = open_safetensors(next(file for file in weights if file.is_file()))
        params = ddpm_weights.params_from_diffusers(tensors, network)
    except ValueError as error:
        raise ValueError(f'{folder}: {error}') from error
    size = config.get('sample_size')
    if size is None or network.out_channels != network.in_channels:
        raise ValueError(
            f'{folder}: sample_size={size}, in_channels={network.in_channels}, '
            f'out_channels={network.out_channels}: expected a size (add it to {CONFIG}) and as '
            f'many channels out as in.'
        )
    rows = network.num_class_embeds or 0
    if num_classes is not None and num_classes > rows:
        raise ValueError(
            f'teacher.num_classes={num_classes}: {folder} has a class table of {rows} rows; '
            f'expected at most so many, or None.'
        )
    height, width = (size, size) if isinstance(size, int) else size
    info = DenoiserInfo(
        schedule=schedule,
        prediction=prediction,
        image_shape=(height, width, network.in_channels),
        num_classes=network.num_class_embeds if num_classes is None else num_classes,
    )
    return float_denoiser(network, jax.tree.map(jnp.asarray, params), info)


def _present(folder: Path, subfolder: str, name: str) -> list[Path]:
    return [f for f in (folder / name, folder / subfolder / name) if f.is_file()]


def _process_from_diffusers(settings: dict[str, Any]) -> tuple[Schedule, str]:
    """Schedule and prediction type of a `scheduler_config.json`."""
    kinds = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'squaredcos_cap_v2': 'cosine'}
    predictions = {'epsilon': 'eps', 'v_prediction': 'v'}
    # Files older than the setting are of models that predict eps.
    prediction = settings.get('prediction_type', 'epsilon')
    if settings.get('beta_schedule') not in kinds or prediction not in predictions:
        raise ValueError(
            f'{SCHEDULER_CONFIG}: beta_schedule={settings.get("beta_schedule")!r}, '
            f'prediction_type={prediction!r}: expected one of {", ".join(kinds)}, and one of '
            f'{", ".join(predictions)}.'
        )
    for name in ('trained_betas', 'rescale_betas_zero_snr'):
        if settings.get(name):
            raise ValueError(f'{SCHEDULER_CONFIG}: {name} is set, which is not supported.')
    names = ('num_train_timesteps', 'beta_start', 'beta_end')
    if absent := [name for name in names if name not in settings]:
        raise ValueError(f'{SCHEDULER_CONFIG}: no {absent[0]}.')
    schedule = Schedule(
        kind=kinds[settings['beta_schedule']], **{name: settings[name] for name in names}
    )
    return schedule, predictions[prediction]


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
