"""Checkpoints of `CLIPText` and `T5Encoder` in other projects' names and layouts.

* transformers' `CLIPTextModel`, `CLIPTextModelWithProjection` and `T5EncoderModel`, settings from
  `config.json`; inside a single file of Stable Diffusion 1 the first has the prefix
  `cond_stage_model.transformer.`, inside one of SDXL `conditioner.embedders.0.transformer.`;
* open_clip (`transformer.resblocks.0.attn.in_proj_weight`, which holds q, k and v), with the prefix
  `cond_stage_model.model.` in Stable Diffusion 2 and `conditioner.embedders.1.model.` in SDXL.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.clip_text import ACTIVATIONS, CLIPText
from dmq_jax.models.t5_text import T5Encoder
from dmq_jax.models.torch_weights import (
    Source,
    choose,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    without_prefix,
    write_tensors,
)

# What a `config.json` of transformers also says, and what changes nothing at inference.
_REMARKS = {
    'architectures', 'model_type', 'torch_dtype', 'dtype', 'transformers_version', 'use_cache',
    'bos_token_id', 'pad_token_id', 'initializer_factor', 'initializer_range', 'output_past',
    'classifier_dropout', 'is_encoder_decoder', 'tie_word_embeddings', 'output_hidden_states',
    'output_attentions', 'return_dict', 'chunk_size_feed_forward', 'id2label', 'label2id',
    'problem_type',
}  # fmt: skip
_CLIP_CLASSES = {'CLIPTextModel': False, 'CLIPTextModelWithProjection': True}
_CLIP_DEFAULTS = {
    'vocab_size': 49408,
    'hidden_size': 512,
    'intermediate_size': 2048,
    'projection_dim': 512,
    'num_hidden_layers': 12,
    'num_attention_heads': 8,
    'max_position_embeddings': 77,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'eos_token_id': 49407,
}
_T5_DEFAULTS = {
    'vocab_size': 32128,
    'd_model': 512,
    'd_kv': 64,
    'd_ff': 2048,
    'num_layers': 6,
    'num_heads': 8,
    'relative_attention_num_buckets': 32,
    'relative_attention_max_distance': 128,
    'layer_norm_epsilon': 1e-6,
    'feed_forward_proj': 'relu',
}
_T5_FIXED = {
    'feed_forward_proj': ('gated-gelu',),
    'dense_act_fn': ('gelu_new',),
    'is_gated_act': (True,),
    'is_decoder': (False,),
}
_T5_WITHOUT_EFFECT = {
    'dropout_rate', 'num_decoder_layers', 'decoder_start_token_id', 'eos_token_id', 'n_positions',
    'task_specific_params', 'scale_decoder_outputs',
}  # fmt: skip
# Before transformers 4.31 every checkpoint said so, and meant the highest token of a text.
_OLD_END_TOKEN = 2
# open_clip has no setting for it: in ViT-L, ViT-H and ViT-bigG a head has 64 channels.
_OPEN_CLIP_HEAD_DIM = 64

# Path of a module here -> its name there; the first match wins.
_CLIP = (
    ('token_embed', 'embeddings.token_embedding'),
    ('norm_out', 'final_layer_norm'),
    ('projection', 'text_projection'),
    (r'block_(\d+)/([qkv]|out)', r'encoder.layers.\1.self_attn.\2_proj'),
    (r'block_(\d+)/norm(\d)', r'encoder.layers.\1.layer_norm\2'),
    (r'block_(\d+)/dense_0', r'encoder.layers.\1.mlp.fc1'),
    (r'block_(\d+)/dense_1', r'encoder.layers.\1.mlp.fc2'),
)
_OPEN_CLIP = (
    ('token_embed', 'token_embedding'),
    ('norm_out', 'ln_final'),
    (r'block_(\d+)/out', r'transformer.resblocks.\1.attn.out_proj'),
    (r'block_(\d+)/norm(\d)', r'transformer.resblocks.\1.ln_\2'),
    (r'block_(\d+)/dense_0', r'transformer.resblocks.\1.mlp.c_fc'),
    (r'block_(\d+)/dense_1', r'transformer.resblocks.\1.mlp.c_proj'),
)
_T5 = (
    ('token_embed', 'shared'),
    ('distance_embed', 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias'),
    ('norm_out', 'encoder.final_layer_norm'),
    (r'block_(\d+)/out', r'encoder.block.\1.layer.0.SelfAttention.o'),
    (r'block_(\d+)/([qkv])', r'encoder.block.\1.layer.0.SelfAttention.\2'),
    (r'block_(\d+)/norm1', r'encoder.block.\1.layer.0.layer_norm'),
    (r'block_(\d+)/norm2', r'encoder.block.\1.layer.1.layer_norm'),
    (r'block_(\d+)/gate', r'encoder.block.\1.layer.1.DenseReluDense.wi_0'),
    (r'block_(\d+)/dense_0', r'encoder.block.\1.layer.1.DenseReluDense.wi_1'),
    (r'block_(\d+)/dense_1', r'encoder.block.\1.layer.1.DenseReluDense.wo'),
)
_POSITIONS = 'position_embed'


def clip_from_transformers(config: Mapping[str, Any]) -> CLIPText:
    """The network that a `config.json` of a `CLIPTextModel`, with or without projection, describes.

    Raises:
      ValueError: a setting, or a value of one, that `CLIPText` has no counterpart of.
    """
    (architecture,) = config.get('architectures') or ['CLIPTextModel']
    has_projection = choose(
        'architectures', _CLIP_CLASSES, architecture, class_name='a text encoder'
    )
    settings = read_settings(
        config, class_name=architecture, defaults=_CLIP_DEFAULTS,
        fixed={'hidden_act': tuple(ACTIVATIONS)},
        without_effect={*_REMARKS, 'attention_dropout', 'dropout'},
    )  # fmt: skip
    end_token = settings['eos_token_id']
    return CLIPText(
        vocabulary_size=settings['vocab_size'],
        width=settings['hidden_size'],
        hidden=settings['intermediate_size'],
        num_layers=settings['num_hidden_layers'],
        num_heads=settings['num_attention_heads'],
        max_length=settings['max_position_embeddings'],
        activation=settings['hidden_act'],
        epsilon=settings['layer_norm_eps'],
        projection=settings['projection_dim'] if has_projection else None,
        end_token=None if end_token == _OLD_END_TOKEN else end_token,
    )


def clip_from_open_clip(
    tensors: Mapping[str, np.ndarray], *, prefix: str = '', without_last_layer: bool = False
) -> CLIPText:
    """The network of an open_clip checkpoint, from the names and shapes of its tensors.

    Args:
      tensors: the state dict.
      prefix: of the text encoder's names in it.
      without_last_layer: leave out the last block and the projection, as Stable Diffusion 2 does.

    Raises:
      ValueError: a tensor that every such checkpoint has is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in tensors:
            raise ValueError(
                f'1 tensors missing, e.g. {prefix + name!r}: is this the layout of open_clip?'
            )
        return tuple(tensors[prefix + name].shape)

    vocabulary_size, width = shape('token_embedding.weight')
    pattern = re.compile(rf'{re.escape(prefix)}transformer\.resblocks\.(\d+)\.')
    layers = {match[1] for name in tensors if (match := pattern.match(name))}
    return CLIPText(
        vocabulary_size=vocabulary_size,
        width=width,
        hidden=shape('transformer.resblocks.0.mlp.c_fc.weight')[0],
        num_layers=len(layers) - without_last_layer,
        num_heads=max(width // _OPEN_CLIP_HEAD_DIM, 1),
        max_length=shape('positional_embedding')[0],
        activation='gelu',
        projection=None if without_last_layer else shape('text_projection')[1],
    )


def t5_from_transformers(config: Mapping[str, Any]) -> T5Encoder:
    """The network that a `config.json` of transformers' T5 describes, of which the encoder.

    Raises:
      ValueError: a setting, or a value of one, that `T5Encoder` has no counterpart of: among them
        the feed-forward layers of T5 before version 1.1.
    """
    settings = read_settings(
        {'feed_forward_proj': _T5_DEFAULTS['feed_forward_proj'], **config}, class_name='T5',
        defaults=_T5_DEFAULTS, fixed=_T5_FIXED, without_effect=_REMARKS | _T5_WITHOUT_EFFECT,
    )  # fmt: skip
    return T5Encoder(
        vocabulary_size=settings['vocab_size'],
        width=settings['d_model'],
        head_dim=settings['d_kv'],
        num_heads=settings['num_heads'],
        hidden=settings['d_ff'],
        num_layers=settings['num_layers'],
        num_buckets=settings['relative_attention_num_buckets'],
        max_distance=settings['relative_attention_max_distance'],
        epsilon=settings['layer_norm_epsilon'],
    )


def clip_params_from_transformers(
    tensors: Mapping[str, np.ndarray], network: CLIPText, *, prefix: str = '', **options: Any
) -> PyTree:
    """Parameters of `network` from a state dict of transformers' CLIP text encoder.

    Args:
      tensors: the checkpoint; only names with `prefix` are read.
      network: its network.
      prefix: 'cond_stage_model.transformer.' in a single file of Stable Diffusion 1,
        'conditioner.embedders.0.transformer.' in one of SDXL.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    names = {}
    for short, name in _short_names(tensors, prefix).items():
        # Not in what the newest transformers saves of a network without projection.
        short = short.removeprefix('text_model.')
        if short != 'embeddings.position_ids':
            names[short] = name
    return read_params(tensors, text_shapes(network), _short_clip_source, names=names, **options)


def clip_params_from_open_clip(
    tensors: Mapping[str, np.ndarray], network: CLIPText, *, prefix: str = '', **options: Any
) -> PyTree:
    """Parameters of `network` from a state dict of an open_clip text encoder.

    A network without projection leaves that of the checkpoint, and one block after its last one.

    Args:
      tensors: the checkpoint; only names with `prefix` are read.
      network: its network, for example that of `clip_from_open_clip`.
      prefix: 'cond_stage_model.model.' in a single file of Stable Diffusion 2,
        'conditioner.embedders.1.model.' in one of SDXL.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    unused = ('logit_scale', 'attn_mask')
    if network.projection is None:
        unused += ('text_projection', f'transformer.resblocks.{network.num_layers}.')
    names = {
        short: name
        for short, name in _short_names(tensors, prefix).items()
        if not short.startswith(unused)
    }
    return read_params(tensors, text_shapes(network), open_clip_source, names=names, **options)


def t5_params_from_transformers(
    tensors: Mapping[str, np.ndarray], network: T5Encoder, **options: Any
) -> PyTree:
    """Parameters of `network` from a state dict of transformers' T5, of which the encoder.

    Args:
      tensors: the checkpoint; the decoder and the second name of the table are passed over.
      network: its network.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    copy = 'encoder.embed_tokens.weight'
    names = {
        name: name
        for name in tensors
        if not name.startswith(('decoder.', 'lm_head.')) and name != copy
    }
    if copy in tensors:
        names.setdefault('shared.weight', copy)
    return read_params(tensors, text_shapes(network), t5_source, names=names, **options)


def transformers_from_clip_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of transformers' CLIP text encoder with these parameters."""
    return write_tensors(params, clip_source)


def transformers_from_t5_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of transformers' `T5EncoderModel` with these parameters."""
    return write_tensors(params, t5_source)


def clip_source(path: str) -> Source:
    """Where transformers holds the parameter at `path` of a `CLIPText`."""
    where = _short_clip_source(path)
    is_outside = where.name.startswith('text_projection')
    return where if is_outside else where._replace(name=f'text_model.{where.name}')


def open_clip_source(path: str) -> Source:
    """Where open_clip holds the parameter at `path` of a `CLIPText`."""
    if path == _POSITIONS:
        return Source('positional_embedding')
    if path == 'projection/kernel':
        # A parameter that is multiplied from the right: not stored as a layer is.
        return Source('text_projection', transposed=False)
    if match := re.fullmatch(r'block_(\d+)/([qkv])/(kernel|bias)', path):
        leaf = 'weight' if match[3] == 'kernel' else 'bias'
        name = f'transformer.resblocks.{match[1]}.attn.in_proj_{leaf}'
        return Source(name, part='qkv'.index(match[2]), parts=3)
    return Source(rename(path, _OPEN_CLIP))


def t5_source(path: str) -> Source:
    """Where transformers holds the parameter at `path` of a `T5Encoder`."""
    return Source(rename(path, _T5))


def text_shapes(network: CLIPText | T5Encoder) -> PyTree:
    """Shapes of the parameters, nothing computed."""
    return parameter_shapes(network, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def _short_clip_source(path: str) -> Source:
    if path == _POSITIONS:
        return Source('embeddings.position_embedding.weight')
    return Source(rename(path, _CLIP))


def _short_names(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, str]:
    names = without_prefix(tensors, prefix)
    if not names:
        raise ValueError(
            f'no tensor begins with {prefix!r} among {len(tensors)}, e.g. '
            f'{next(iter(tensors), None)!r}; give the prefix of the text encoder.'
        )
    return names
