"""Folders saved by diffusers as denoisers: the network, and the components it needs to sample."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from dmq_jax.checkpoints import strangers, text
from dmq_jax.checkpoints.components import (
    CONFIG,
    Component,
    find_component,
    find_weights,
    read_json,
    reading_settings,
)
from dmq_jax.checkpoints.decoders import decoder_from_folder, find_decoder
from dmq_jax.checkpoints.options import Options
from dmq_jax.checkpoints.process import SCHEDULER_CONFIG, process_from_settings
from dmq_jax.denoisers import Denoiser, DenoiserInfo, float_denoiser
from dmq_jax.models import ddpm_weights, dit_weights, ldm_weights
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.networks import Network, class_rows

_SUBFOLDERS = ('unet', 'transformer', '')
_LATENT_FACTOR = 8
# Endings of files that may be a checkpoint by themselves.
_FILES = ('.safetensors', '.ckpt', '.pt', '.pth')


class _Reader(NamedTuple):
    """How networks of one class are read.

    Attributes:
      network: from the settings.
      params: from tensors, network and options of `read_params`.
    """

    network: Callable[[Mapping[str, Any]], Any]
    params: Callable[..., PyTree]


_READERS = {
    'UNet2DModel': _Reader(ddpm_weights.network_from_diffusers, ddpm_weights.params_from_diffusers),
    'UNet2DConditionModel': _Reader(
        ldm_weights.network_from_diffusers, ldm_weights.params_from_diffusers
    ),
    'DiTTransformer2DModel': _Reader(
        dit_weights.dit_from_diffusers, dit_weights.dit_params_from_diffusers
    ),
    'PixArtTransformer2DModel': _Reader(
        dit_weights.pixart_from_diffusers, dit_weights.pixart_params_from_diffusers
    ),
}
# Before diffusers 0.28 DiT and PixArt were settings of one class, told apart by their norm.
_OLD_CLASS = 'Transformer2DModel'
_OLD_NORMS = {
    'ada_norm_zero': 'DiTTransformer2DModel',
    'ada_norm_single': 'PixArtTransformer2DModel',
}


def load(folder: Path, options: Options) -> Denoiser:
    """The denoiser of a diffusers folder; components lie in subfolders, or at its root.

    Raises:
      FileNotFoundError: a folder that lacks a part.
      ValueError: settings without a counterpart here, or tensors that do not fit.
    """
    component = _network_component(folder)
    scheduler = next(
        (f for f in (folder / SCHEDULER_CONFIG, folder / 'scheduler' / SCHEDULER_CONFIG)
         if f.is_file()), None,
    )  # fmt: skip
    if scheduler is None:
        raise FileNotFoundError(
            f'{folder}: no {SCHEDULER_CONFIG} (there or in scheduler/); expected a folder saved by '
            f'diffusers.'
        )
    find_weights(component.folder)
    if find_component(folder, 'text_encoder_2') and not find_component(folder, 'text_encoder'):
        raise ValueError(f'{folder}: {strangers.refiner()}')
    reader = _READERS[component.class_name]
    try:
        with reading_settings(component.folder / CONFIG):
            network = reader.network(_without_class(component.config))
        with reading_settings(scheduler):
            schedule, prediction = process_from_settings(read_json(scheduler))
        side = _checked_size(component.config, network)
        params = reader.params(component.open(), network, **options.reading())
        decoder = find_decoder(folder) or decoder_from_folder(options)
    except ValueError as error:
        raise ValueError(f'{folder}: {error}') from error
    num_classes, wrapped = _num_classes(folder, network, options), network
    encode_prompts = None
    if isinstance(network, LDMUNet | PixArt):
        factor = decoder.factor if decoder else _LATENT_FACTOR
        own = find_component(folder, 'text_encoder') is not None
        source = folder if own else options.components
        wrapped, params, num_classes, encode_prompts = text.with_prompts(
            network, params, lambda: text.encoders_from_folder(
                source, folder, options.dtype
            ), options,
            size=(side[0] * factor, side[1] * factor),
        )  # fmt: skip
    info = DenoiserInfo(
        schedule=schedule,
        prediction=prediction,
        image_shape=(*side, network.in_channels),
        num_classes=num_classes,
        learned_variance=network.out_channels == 2 * network.in_channels,
        is_latent=decoder is not None or isinstance(network, LDMUNet | DiT | PixArt),
    )
    return float_denoiser(wrapped, params, info)._replace(
        decoder=decoder, encode_prompts=encode_prompts
    )


def _network_component(folder: Path) -> Component:
    """The component that denoises, its class name one of `_READERS`."""
    for name in _SUBFOLDERS:
        component = find_component(folder, name)
        if component is None:
            continue
        config = dict(component.config)
        kind = component.class_name
        if kind == _OLD_CLASS:
            # What the old class has and the new ones have not is off in every such file.
            kind = _OLD_NORMS.get(config.get('norm_type'))
            config = {key: value for key, value in config.items() if value not in (None, False)}
        if kind in _READERS and 'quantization_config' in config:
            raise ValueError(
                f'{component.folder}: {CONFIG} has a quantization_config: this network is '
                f'quantized already; give the float one.'
            )
        if kind in _READERS:
            return Component(component.folder, {**config, '_class_name': kind})
    first, *others = _READERS
    raise FileNotFoundError(
        f"{folder}: no {CONFIG} with '_class_name': {first!r} (there, in unet/ or transformer/), "
        f'nor {", ".join(others)}; expected a folder saved by diffusers.{_what_is_there(folder)}'
    )


def _what_is_there(folder: Path) -> str:
    """What a folder without a network holds instead, as a sentence."""
    classes = [
        f'{component.class_name} in {name or "."}/'
        for name in (*_SUBFOLDERS, 'vae')
        if (component := find_component(folder, name)) is not None
    ]
    if classes:
        return f' It holds {", ".join(classes)}.'
    files = [file for ending in _FILES for file in sorted(folder.glob(f'*{ending}'))]
    if files:
        return f' If {files[0].name!r} is the checkpoint, name that file.'
    return ''


def _without_class(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != '_class_name'}


def _checked_size(config: Mapping[str, Any], network: Network) -> tuple[int, int]:
    strangers.check_channels(network.in_channels, getattr(network, 'out_channels', None))
    size = config.get('sample_size', getattr(network, 'sample_size', None))
    if size is None:
        raise ValueError(
            f'sample_size={size}: expected the side of its images; add it to {CONFIG}.'
        )
    return (size, size) if isinstance(size, int) else tuple(size)


def _num_classes(folder: Path, network: Network, options: Options) -> int | None:
    if isinstance(network, DiT):
        return network.num_classes
    rows = class_rows(network)
    if options.num_classes is None:
        return rows or None
    if options.num_classes > rows:
        raise ValueError(
            f'teacher.num_classes={options.num_classes}: {folder} has a class table of {rows} '
            f'rows; expected at most so many, or None.'
        )
    return options.num_classes
