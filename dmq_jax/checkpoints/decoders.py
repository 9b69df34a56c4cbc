"""Autoencoders in a diffusers folder or a CompVis checkpoint: the decoding half, and the other.

What draws needs the decoding half alone; the encoding half is read when somebody asks for it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from dmq_jax.checkpoints.components import CONFIG, find_component, reading_settings
from dmq_jax.checkpoints.opening import Tensors
from dmq_jax.checkpoints.options import Options, place
from dmq_jax.denoisers import Decoder
from dmq_jax.models import autoencoder_weights
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder

_PREFIX = 'first_stage_model.'
_ENCODING_HALF = ('encoder/', 'quant/')
_NETWORKS = {
    'AutoencoderKL': autoencoder_weights.kl_from_diffusers,
    'VQModel': autoencoder_weights.vq_from_diffusers,
}


def decoder_from_folder(options: Options) -> Decoder | None:
    """The decoder that `components` holds; None without them.

    Raises:
      FileNotFoundError: a folder without one.
    """
    if options.components is None:
        return None
    decoder = find_decoder(Path(options.components), '')
    if decoder is None:
        raise FileNotFoundError(
            f'teacher.components={options.components!r}: no vae/config.json there; expected a '
            f'diffusers folder.'
        )
    return decoder


def find_decoder(folder: Path, *other: str) -> Decoder | None:
    """The decoder of a diffusers folder, in `vae/`, `vqvae/` or the subfolders `other`, if any.

    Raises:
      ValueError: another kind of autoencoder, or tensors that do not fit.
      FileNotFoundError: settings without weights.
    """
    component = find_component(folder, 'vae', 'vqvae', *other)
    if component is None:
        return None
    make = _NETWORKS.get(component.class_name)
    if make is None:
        raise ValueError(
            f'{component.folder}: _class_name={component.class_name!r}: expected one of '
            f'{", ".join(_NETWORKS)}.'
        )
    try:
        with reading_settings(component.folder / CONFIG):
            network = make(component.config)
        tensors = component.open()
        return _decoder(
            network, lambda put: autoencoder_weights.autoencoder_params_from_diffusers(
                tensors, network, put=put
            )
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f'{component.folder}: {error}') from error


def decoder_from_compvis(tensors: Tensors, scaling_factor: float) -> Decoder | None:
    """The decoder inside a CompVis checkpoint; None where it has none.

    Args:
      tensors: the whole checkpoint.
      scaling_factor: what its latents are multiplied by.

    Raises:
      ValueError: tensors of another autoencoder.
    """
    if f'{_PREFIX}decoder.conv_in.weight' not in tensors:
        return None
    network = _network_from_shapes(tensors, scaling_factor)
    return _decoder(
        network,
        lambda put: autoencoder_weights.autoencoder_params_from_ldm(tensors, network, put=put),
    )


def _network_from_shapes(tensors: Tensors, scaling_factor: float) -> Any:
    """The autoencoder of latent diffusion that has these tensors; all are told by shapes."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors.shape_of(_PREFIX + name)

    def count(name: Callable[[int], str]) -> int:
        return next(i for i in range(100) if _PREFIX + name(i) not in tensors)

    levels = count(lambda i: f'encoder.down.{i}.block.0.conv1.weight')
    shared = dict(
        channels=tuple(shape(f'encoder.down.{i}.block.0.conv1.weight')[0] for i in range(levels)),
        in_channels=shape('encoder.conv_in.weight')[1],
        out_channels=shape('decoder.conv_out.weight')[0],
        latent_channels=shape('decoder.conv_in.weight')[1],
        layers_per_block=count(lambda j: f'encoder.down.0.block.{j}.conv1.weight'),
        attention=tuple(
            f'{_PREFIX}encoder.down.{i}.attn.0.q.weight' in tensors for i in range(levels)
        ),
        mid_attention=f'{_PREFIX}encoder.mid.attn_1.q.weight' in tensors,
        scaling_factor=scaling_factor,
    )
    if f'{_PREFIX}quantize.embedding.weight' in tensors:
        size, width = shape('quantize.embedding.weight')
        return VQAutoencoder(**shared, codebook_size=size, codebook_channels=width)
    return AutoencoderKL(**shared)


def _decoder(network: Any, read: Callable[[Callable[[str, np.ndarray], Any]], PyTree]) -> Decoder:
    """The decoder whose parameters, and the encoder's, `read` gives to the function it is given."""

    def half(*, encoding: bool) -> PyTree:
        """The parameters of one half; those of the other are checked, but not kept."""

        def put(path: str, array: np.ndarray) -> Any:
            return place(path, array) if path.startswith(_ENCODING_HALF) == encoding else None

        flat = traverse_util.flatten_dict(read(put), sep='/')
        kept = {path: leaf for path, leaf in flat.items() if leaf is not None}
        return traverse_util.unflatten_dict(kept, sep='/')

    return Decoder(network, half(encoding=False), functools.partial(half, encoding=True))
