"""Prompts as rows of a table of conditions, written when a text-conditional network is read.

The text encoders run here and are dropped: the denoiser keeps what they said of every prompt, as a
class-conditional one keeps the embedding of every class. The row after the prompts is the null
condition of guidance: the negative prompt, or the empty text. For other texts, such as those of
images to learn from, the encoders are read again.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.checkpoints.components import (
    CONFIG,
    Component,
    find_component,
    read_json,
    reading_settings,
)
from dmq_jax.checkpoints.opening import Tensors
from dmq_jax.checkpoints.options import Options, place
from dmq_jax.files.tokenizer import Tokenizer, open_tokenizer
from dmq_jax.models import text_weights
from dmq_jax.models.clip_text import CLIPText
from dmq_jax.models.dit import PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.models.t5_text import T5Encoder
from dmq_jax.networks import TABLE, Conditioned

# Tokens of a caption: arXiv:2310.00426 and, for Sigma, arXiv:2403.04692.
_PIXART_LENGTH, _PIXART_SIGMA_LENGTH = 120, 300
_OPEN_CLIP_SD2 = 'cond_stage_model.model.'
_CLIP_SD1 = 'cond_stage_model.transformer.'
_CLIP_SDXL = 'conditioner.embedders.0.transformer.'
_OPEN_CLIP_SDXL = 'conditioner.embedders.1.model.'
_CLIP_HEAD_DIM = 64
_CLIP_LENGTH = 77


class Encoder(NamedTuple):
    """One text encoder.

    Attributes:
      network: `CLIPText` or `T5Encoder`.
      read: its parameters; called when they are needed.
      tokenizer: of its vocabulary.
    """

    network: Any
    read: Callable[[], PyTree]
    tokenizer: Tokenizer


class Encoders(NamedTuple):
    """All text encoders of a model.

    Attributes:
      encoders: one, or SDXL's two.
      length: tokens of a text for T5.
      zero_null: the null condition is zero unless a negative prompt is given, as in SDXL.
    """

    encoders: list[Encoder]
    length: int = _PIXART_LENGTH
    zero_null: bool = False


class Prompted(NamedTuple):
    """A network behind a table of prompts.

    Attributes:
      network: with the table in front.
      params: its parameters, the table among them.
      num_prompts: how many are asked for; the row after theirs is the null condition.
      encode: other prompts -> rows of such a table, by input; the encoders are read for those that
        it was not asked for before. None where nothing but shapes is.
    """

    network: Conditioned
    params: PyTree
    num_prompts: int
    encode: Callable[[Sequence[str]], dict[str, jax.Array]] | None


def with_prompts(
    network: LDMUNet | PixArt,
    params: PyTree,
    find: Callable[[], Encoders],
    options: Options,
    *,
    size: tuple[int, int],
) -> Prompted:
    """The network behind a table of the prompts of `options`.

    Args:
      network: takes the condition.
      params: its parameters.
      find: the encoders, which are not needed where nothing but shapes is.
      options: of which the prompts.
      size: height and width of the images, which some networks are told.
    """
    prompts = list(options.prompts or ('',))
    null = options.negative_prompt
    texts = [*prompts, null or '']
    if options.shapes_only:
        return _without_encoders(network, params, texts)
    found = find()
    table = _table(network, found, texts, size)
    if null is None and found.zero_null:
        for name in table.keys() & {'context', 'pooled'}:
            table[name][-1] = 0
    rows = tuple((name, array.shape[1:]) for name, array in table.items())
    conditioned = Conditioned(network, rows, len(texts))
    params = {**params, TABLE: {name: place(name, array) for name, array in table.items()}}

    said: dict[str, dict[str, np.ndarray]] = {}

    def encode(texts: Sequence[str]) -> dict[str, jax.Array]:
        # Every student asks for the same texts, and an encoder may be larger than the network.
        if new := [text for text in dict.fromkeys(texts) if text not in said]:
            found = _table(network, find(), new, size)
            for i, text in enumerate(new):
                said[text] = {name: array[i] for name, array in found.items()}
        names = said[texts[0]]
        return {name: place(name, np.stack([said[text][name] for text in texts])) for name in names}

    return Prompted(conditioned, params, len(prompts), encode)


def _table(
    network: LDMUNet | PixArt, found: Encoders, texts: Sequence[str], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """What the network is told of each text, in float32."""
    encode = _encode_caption if isinstance(network, PixArt) else _encode_context
    table = encode(network, found, texts)
    height, width = (np.full((len(texts), 1), side, np.float32) for side in size)
    if isinstance(network, PixArt) and network.size_conditions:
        table['resolution'] = np.concatenate([height, width], axis=1)
        table['aspect_ratio'] = (height / width)[:, 0]
    elif isinstance(network, LDMUNet) and network.added_dim is not None:
        nothing = np.zeros_like(height)
        table['sizes'] = np.concatenate([height, width, nothing, nothing, height, width], axis=1)
    return {name: array.astype(np.float32) for name, array in table.items()}


def _without_encoders(network: LDMUNet | PixArt, params: PyTree, texts: Sequence[str]) -> Prompted:
    if isinstance(network, PixArt):
        width = network.caption_channels or network.num_heads * network.head_dim
        rows = {'text': (_PIXART_LENGTH, width), 'text_mask': (_PIXART_LENGTH,)}
        if network.size_conditions:
            rows |= {'resolution': (2,), 'aspect_ratio': ()}
    else:
        rows = {'context': (_CLIP_LENGTH, network.context_dim)}
        if network.added_dim is not None:
            rows |= {'pooled': (network.pooled_dim,), 'sizes': (6,)}
    count = len(texts)
    table = {
        name: jax.ShapeDtypeStruct((count, *shape), np.float32) for name, shape in rows.items()
    }
    conditioned = Conditioned(network, tuple(rows.items()), count)
    return Prompted(conditioned, {**params, TABLE: table}, count - 1, None)


def encoders_from_folder(
    folder: str | Path | None,
    checkpoint: Path,
    dtype: str = 'float32',
    *,
    length: int | None = None,
) -> Encoders:
    """The encoders of a diffusers folder.

    Args:
      folder: with `text_encoder/`, `tokenizer/` and for SDXL `text_encoder_2/`, `tokenizer_2/`.
      checkpoint: what they belong to, for messages.
      dtype: of the parameters of T5, which is larger than what it is for.
      length: tokens of a text for T5; None: told by the folder's pipeline.

    Raises:
      FileNotFoundError: no folder, encoder or tokenizer.
      ValueError: an encoder of another kind.
    """
    folder = _needed(folder, checkpoint)
    encoders = []
    for ending in ('', '_2'):
        component = find_component(folder, f'text_encoder{ending}')
        if component is not None:
            tokenizer = open_tokenizer(folder / f'tokenizer{ending}')
            encoders.append(_encoder(component, tokenizer, dtype))
    if not encoders:
        raise FileNotFoundError(
            f'{folder}: no text_encoder/config.json; a network that is conditioned on a text needs '
            f'its encoder.'
        )
    index = folder / 'model_index.json'
    settings = read_json(index) if index.is_file() else {}
    is_sigma = settings.get('_class_name') == 'PixArtSigmaPipeline'
    return Encoders(
        encoders,
        length=length or (_PIXART_SIGMA_LENGTH if is_sigma else _PIXART_LENGTH),
        zero_null=bool(settings.get('force_zeros_for_empty_prompt', False)),
    )


def encoders_from_compvis(tensors: Tensors, options: Options) -> Encoders:
    """The encoders inside a single file of Stable Diffusion, tokenizers from `components`.

    Raises:
      FileNotFoundError: no components, or no tokenizer there.
      ValueError: a file without the encoders of Stable Diffusion.
    """
    folder = _needed(options.components, tensors.path, what='the tokenizer')
    tokenizer = open_tokenizer(folder / 'tokenizer')
    if any(name.startswith(_OPEN_CLIP_SDXL) for name in tensors):
        second = open_tokenizer(folder / 'tokenizer_2')
        return Encoders(
            [_clip_encoder(tensors, _CLIP_SDXL, tokenizer),
             _open_clip_encoder(tensors, _OPEN_CLIP_SDXL, second)],
            zero_null=True,
        )  # fmt: skip
    if any(name.startswith(_OPEN_CLIP_SD2) for name in tensors):
        return Encoders([_open_clip_encoder(tensors, _OPEN_CLIP_SD2, tokenizer)])
    if any(name.startswith(_CLIP_SD1) for name in tensors):
        return Encoders([_clip_encoder(tensors, _CLIP_SD1, tokenizer)])
    return encoders_from_folder(folder, tensors.path)


def _needed(folder: str | Path | None, checkpoint: Path, what: str = 'the text encoder') -> Path:
    if folder is None:
        raise FileNotFoundError(
            f'{checkpoint}: this file lacks {what} that its prompts need: name a diffusers folder '
            f'with text_encoder/ and tokenizer/ as teacher.components.'
        )
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'teacher.components={str(folder)!r}: no such folder.')
    return Path(folder)


def _encoder(component: Component, tokenizer: Tokenizer, dtype: str) -> Encoder:
    is_t5 = component.config.get('model_type') == 't5' or 'd_model' in component.config
    make = text_weights.t5_from_transformers if is_t5 else text_weights.clip_from_transformers
    read = (
        text_weights.t5_params_from_transformers
        if is_t5
        else text_weights.clip_params_from_transformers
    )
    try:
        with reading_settings(component.folder / CONFIG):
            network = make(component.config)
    except ValueError as error:
        raise ValueError(f'{component.folder}: {error}') from error

    def params() -> PyTree:
        try:
            kept = jnp.dtype(dtype if is_t5 else 'float32')
            return read(component.open(), network, put=place, dtype=kept)
        except ValueError as error:
            raise ValueError(f'{component.folder}: {error}') from error

    return Encoder(network, params, tokenizer)


def _clip_encoder(tensors: Tensors, prefix: str, tokenizer: Tokenizer) -> Encoder:
    embeddings, layers = f'{prefix}text_model.embeddings.', f'{prefix}text_model.encoder.layers.'
    vocabulary, width = tensors.shape_of(f'{embeddings}token_embedding.weight')
    network = CLIPText(
        vocabulary_size=vocabulary,
        width=width,
        hidden=tensors.shape_of(f'{layers}0.mlp.fc1.weight')[0],
        num_layers=len({n[len(layers) :].split('.')[0] for n in tensors if n.startswith(layers)}),
        num_heads=max(width // _CLIP_HEAD_DIM, 1),
        max_length=tensors.shape_of(f'{embeddings}position_embedding.weight')[0],
    )
    read = functools.partial(
        text_weights.clip_params_from_transformers, tensors, network, prefix=prefix, put=place
    )
    return Encoder(network, read, tokenizer)


def _open_clip_encoder(tensors: Tensors, prefix: str, tokenizer: Tokenizer) -> Encoder:
    network = text_weights.clip_from_open_clip(
        tensors, prefix=prefix, without_last_layer=prefix == _OPEN_CLIP_SD2
    )
    read = functools.partial(
        text_weights.clip_params_from_open_clip, tensors, network, prefix=prefix, put=place
    )
    return Encoder(network, read, tokenizer)


def _run(encoder: Encoder, texts: Sequence[str], length: int) -> tuple[list[Any], np.ndarray]:
    """What the network says of each text, as NumPy arrays, and the masks of their tokens."""
    tokens = encoder.tokenizer(texts, length)
    for text, is_cut in zip(texts, tokens.is_cut, strict=True):
        if is_cut:
            warnings.warn(
                f'prompt {text!r:.60}...: longer than the {length} tokens that the text encoder '
                f'reads; its end is cut off. Say it in fewer words.',
                stacklevel=2,
            )
    params, network = encoder.read(), encoder.network

    @jax.jit
    def apply(params, ids, mask):
        inputs = (ids, mask) if isinstance(network, T5Encoder) else (ids,)
        return network.apply({'params': params}, *inputs)

    said = [
        jax.device_get(apply(params, jnp.asarray(ids[None]), jnp.asarray(mask[None])))
        for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
    ]
    return said, tokens.mask


def _encode_context(network: LDMUNet, found: Encoders, texts: Sequence[str]) -> dict[str, Any]:
    """The inputs of Stable Diffusion: 1 and 2 the last layer, SDXL the last but one of both."""
    expected = 1 if network.added_dim is None else 2
    if len(found.encoders) != expected:
        raise ValueError(
            f'{len(found.encoders)} text encoders: expected {expected} for this network.'
        )
    said = [_run(encoder, texts, encoder.network.max_length)[0] for encoder in found.encoders]
    if expected == 1:
        return {'context': np.concatenate([text.last for text in said[0]])}
    contexts = [np.concatenate([text.penultimate for text in each]) for each in said]
    return {
        'context': np.concatenate(contexts, axis=-1),
        'pooled': np.concatenate([text.pooled for text in said[1]]),
    }


def _encode_caption(network: PixArt, found: Encoders, texts: Sequence[str]) -> dict[str, Any]:
    """The inputs of PixArt: the features of T5, and which of them are tokens."""
    del network
    said, mask = _run(found.encoders[0], texts, found.length)
    return {'text': np.concatenate(said), 'text_mask': mask.astype(np.float32)}
