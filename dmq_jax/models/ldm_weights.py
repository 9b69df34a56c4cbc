"""Checkpoints of `LDMUNet`, in the names of CompVis (and Stability) and of diffusers.

CompVis' checkpoints hold the whole model; the U-Net's names begin with `model.diffusion_model.`
and number the blocks as ADM's do. The moving average, where one is kept, is under `model_ema.`,
without the dots of its names. diffusers' are those of `UNet2DConditionModel`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.adm_weights import (
    block_source,
    heads_of_levels,
    level_heads,
    numbered_block,
)
from dmq_jax.models.ldm_unet import ClassEmbedder, LDMUNet
from dmq_jax.models.torch_weights import (
    Source,
    choose,
    expected_tensors,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    unsupported,
    without_prefix,
)

_COMPVIS = 'the LDM UNetModel'
_PREFIX = 'model.diffusion_model.'
_EMA_PREFIX = 'model_ema.'
_CLASS_EMBEDDER = 'cond_stage_model.embedding.weight'
_COMPVIS_DEFAULTS = {
    'in_channels': None,
    'out_channels': None,
    'model_channels': None,
    'attention_resolutions': None,
    'num_res_blocks': None,
    'channel_mult': (1, 2, 4, 8),
    'num_heads': -1,
    'num_head_channels': -1,
    'use_spatial_transformer': False,
    'transformer_depth': 1,
    'transformer_depth_middle': None,
    'context_dim': None,
    'use_scale_shift_norm': False,
    'resblock_updown': False,
    'use_linear_in_transformer': False,
    'num_classes': None,
    'adm_in_channels': None,
    'legacy': True,
}
_COMPVIS_FIXED = {
    'dims': (2,),
    'conv_resample': (True,),
    'num_heads_upsample': (-1,),
    'use_new_attention_order': (False,),
    'n_embed': (None,),
    'disable_self_attentions': (None,),
    'num_attention_blocks': (None,),
    'disable_middle_self_attn': (False,),
    'disable_middle_transformer': (False,),
}
_COMPVIS_WITHOUT_EFFECT = (
    'image_size', 'dropout', 'use_checkpoint', 'use_fp16', 'use_bf16',
    'spatial_transformer_attn_type', 'offload_to_cpu',
)  # fmt: skip

_SD = {
    'in_channels': 4,
    'out_channels': 4,
    'model_channels': 320,
    'num_res_blocks': 2,
    'use_spatial_transformer': True,
    'legacy': False,
}
_LSUN_VQ = {
    'in_channels': 3,
    'out_channels': 3,
    'model_channels': 224,
    'attention_resolutions': [8, 4, 2],
    'num_res_blocks': 2,
    'channel_mult': [1, 2, 3, 4],
    'num_head_channels': 32,
}
# `unet_config.params` of the published models, which their checkpoints do not contain.
PUBLISHED: dict[str, dict[str, Any]] = {
    'cin256-v2': {
        'in_channels': 3,
        'out_channels': 3,
        'model_channels': 192,
        'attention_resolutions': [8, 4, 2],
        'num_res_blocks': 2,
        'channel_mult': [1, 2, 3, 5],
        'num_heads': 1,
        'use_spatial_transformer': True,
        'transformer_depth': 1,
        'context_dim': 512,
    },
    'lsun_bedrooms': _LSUN_VQ,
    'celebahq': _LSUN_VQ,
    'ffhq': _LSUN_VQ,
    'lsun_churches': {
        'in_channels': 4,
        'out_channels': 4,
        'model_channels': 192,
        'attention_resolutions': [1, 2, 4, 8],
        'num_res_blocks': 2,
        'channel_mult': [1, 2, 2, 4, 4],
        'num_heads': 8,
        'use_scale_shift_norm': True,
        'resblock_updown': True,
    },
    'sd-v1': {
        **_SD,
        'attention_resolutions': [4, 2, 1],
        'channel_mult': [1, 2, 4, 4],
        'num_heads': 8,
        'context_dim': 768,
    },
    'sd-v2': {
        **_SD,
        'attention_resolutions': [4, 2, 1],
        'channel_mult': [1, 2, 4, 4],
        'num_head_channels': 64,
        'use_linear_in_transformer': True,
        'context_dim': 1024,
    },
    'sdxl': {
        **_SD,
        'attention_resolutions': [4, 2],
        'channel_mult': [1, 2, 4],
        'num_head_channels': 64,
        'transformer_depth': [1, 2, 10],
        'use_linear_in_transformer': True,
        'context_dim': 2048,
        'num_classes': 'sequential',
        'adm_in_channels': 2816,
    },
}

_DIFFUSERS = 'UNet2DConditionModel'
_DIFFUSERS_DEFAULTS = {
    'in_channels': 4,
    'out_channels': 4,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'down_block_types': (*3 * ('CrossAttnDownBlock2D',), 'DownBlock2D'),
    'up_block_types': ('UpBlock2D', *3 * ('CrossAttnUpBlock2D',)),
    'block_out_channels': (320, 640, 1280, 1280),
    'layers_per_block': 2,
    'norm_num_groups': 32,
    'norm_eps': 1e-5,
    'cross_attention_dim': 1280,
    'transformer_layers_per_block': 1,
    'attention_head_dim': 8,
    'num_attention_heads': None,
    'addition_embed_type': None,
    'addition_time_embed_dim': None,
    'projection_class_embeddings_input_dim': None,
    'resnet_time_scale_shift': 'default',
    'time_embedding_dim': None,
}
_DIFFUSERS_FIXED = {
    'center_input_sample': (False,),
    'mid_block_type': ('UNetMidBlock2DCrossAttn',),
    'only_cross_attention': (False, None),
    'downsample_padding': (1,),
    'mid_block_scale_factor': (1,),
    'act_fn': ('silu', 'swish'),
    'reverse_transformer_layers_per_block': (None,),
    'encoder_hid_dim': (None,),
    'encoder_hid_dim_type': (None,),
    'dual_cross_attention': (False,),
    'class_embed_type': (None,),
    'num_class_embeds': (None,),
    'resnet_skip_time_act': (False,),
    'resnet_out_scale_factor': (1.0,),
    'time_embedding_type': ('positional',),
    'time_embedding_act_fn': (None,),
    'timestep_post_act': (None,),
    'time_cond_proj_dim': (None,),
    'conv_in_kernel': (3,),
    'conv_out_kernel': (3,),
    'attention_type': ('default',),
    'class_embeddings_concat': (False,),
    'mid_block_only_cross_attention': (None, False),
    'cross_attention_norm': (None,),
}
# Linear layers and 1x1 convolutions compute the same; our softmax is float32 in any case.
_DIFFUSERS_WITHOUT_EFFECT = (
    'sample_size', 'dropout', 'use_linear_projection', 'upcast_attention',
    'addition_embed_type_num_heads',
)  # fmt: skip
_DOWN = {'DownBlock2D': False, 'CrossAttnDownBlock2D': True}
_UP = {'UpBlock2D': False, 'CrossAttnUpBlock2D': True}

# Module within a block of a transformer -> its name, the same in both layouts.
_TRANSFORMER = (
    ('norm', 'norm'),
    ('proj_(in|out)', r'proj_\1'),
    (r'block_(\d+)/(norm\d)', r'transformer_blocks.\1.\2'),
    (r'block_(\d+)/(attn\d)/(q|k|v)', r'transformer_blocks.\1.\2.to_\3'),
    (r'block_(\d+)/(attn\d)/out', r'transformer_blocks.\1.\2.to_out.0'),
    (r'block_(\d+)/ff_in', r'transformer_blocks.\1.ff.net.0.proj'),
    (r'block_(\d+)/ff_out', r'transformer_blocks.\1.ff.net.2'),
)
_COMPVIS_OUTSIDE = (
    ('time_embed/dense_0', 'time_embed.0'),
    ('time_embed/dense_1', 'time_embed.2'),
    ('added_embed/dense_0', 'label_emb.0.0'),
    ('added_embed/dense_1', 'label_emb.0.2'),
    ('conv_in', 'input_blocks.0.0'),
    ('norm_out', 'out.0'),
    ('conv_out', 'out.2'),
)
_DIFFUSERS_TABLE = (
    ('time_embed/dense_0', 'time_embedding.linear_1'),
    ('time_embed/dense_1', 'time_embedding.linear_2'),
    ('added_embed/dense_0', 'add_embedding.linear_1'),
    ('added_embed/dense_1', 'add_embedding.linear_2'),
    (r'(down|up)_(\d+)/block_(\d+)/time_proj', r'\1_blocks.\2.resnets.\3.time_emb_proj'),
    (r'(down|up)_(\d+)/block_(\d+)/(\w+)', r'\1_blocks.\2.resnets.\3.\4'),
    (r'(down|up)_(\d+)/(down|up)sample', r'\1_blocks.\2.\3samplers.0.conv'),
    (r'mid/block_(\d+)/time_proj', r'mid_block.resnets.\1.time_emb_proj'),
    (r'mid/block_(\d+)/(\w+)', r'mid_block.resnets.\1.\2'),
    ('conv_in', 'conv_in'),
    ('norm_out', 'conv_norm_out'),
    ('conv_out', 'conv_out'),
)


def network_from_compvis(config: Mapping[str, Any]) -> LDMUNet:
    """The network that `unet_config.params` of a CompVis or Stability model describes.

    `PUBLISHED` has those of the published models.

    Raises:
      ValueError: a setting that is missing, or one (or a value) that `LDMUNet` has no
        counterpart of.
    """
    settings = read_settings(
        config,
        class_name=_COMPVIS,
        defaults=_COMPVIS_DEFAULTS,
        fixed=_COMPVIS_FIXED,
        without_effect=_COMPVIS_WITHOUT_EFFECT,
    )
    needed = ['in_channels', 'out_channels', 'model_channels', 'attention_resolutions']
    for name in [*needed, 'num_res_blocks']:
        if settings[name] is None:
            raise ValueError(f'{name} of {_COMPVIS} is missing; it has no default.')
    if settings['num_heads'] == settings['num_head_channels'] == -1:
        raise ValueError(
            f'num_heads and num_head_channels of {_COMPVIS} are both -1; expected one of them.'
        )
    transformer, context_dim = settings['use_spatial_transformer'], settings['context_dim']
    if transformer != isinstance(context_dim, int):
        raise _refused_compvis('context_dim', context_dim, ('a number' if transformer else None,))
    added_dim = settings['adm_in_channels']
    if settings['num_classes'] != (None if added_dim is None else 'sequential'):
        raise _refused_compvis(
            'num_classes', settings['num_classes'], (None, "'sequential' with adm_in_channels")
        )
    channels = tuple(factor * settings['model_channels'] for factor in settings['channel_mult'])
    depth = _per_level('transformer_depth', settings, len(channels), _COMPVIS)
    mid_depth = settings['transformer_depth_middle']
    return LDMUNet(
        channels=channels,
        in_channels=settings['in_channels'],
        out_channels=settings['out_channels'],
        num_blocks=_single('num_res_blocks', settings, _COMPVIS),
        # Downsampling factors, whatever their name says.
        depth=tuple(
            d if 2**i in settings['attention_resolutions'] else 0 for i, d in enumerate(depth)
        ),
        mid_depth=depth[-1] if mid_depth is None else mid_depth,
        num_heads=heads_of_levels(channels, settings['num_heads'], settings['num_head_channels']),
        context_dim=context_dim,
        added_dim=added_dim,
        resblock_updown=settings['resblock_updown'],
        scale_shift=settings['use_scale_shift_norm'],
    )


def network_from_diffusers(config: Mapping[str, Any]) -> LDMUNet:
    """The network that a `config.json` of diffusers' `UNet2DConditionModel` describes.

    Settings absent from `config` have the value that `UNet2DConditionModel` gives them.

    Raises:
      ValueError: a setting, or a value of one, that `LDMUNet` has no counterpart of.
    """
    settings = read_settings(
        config,
        class_name=_DIFFUSERS,
        defaults=_DIFFUSERS_DEFAULTS,
        fixed=_DIFFUSERS_FIXED,
        without_effect=_DIFFUSERS_WITHOUT_EFFECT,
    )
    one_of = functools.partial(choose, class_name=_DIFFUSERS)
    refused = functools.partial(unsupported, class_name=_DIFFUSERS)
    down = [one_of('down_block_types', _DOWN, kind) for kind in settings['down_block_types']]
    up = [one_of('up_block_types', _UP, kind) for kind in settings['up_block_types']]
    if up != down[::-1]:
        raise refused('up_block_types', settings['up_block_types'], ('the mirrored ones down',))
    channels = tuple(settings['block_out_channels'])
    if settings['time_embedding_dim'] not in (None, 4 * channels[0]):
        raise refused('time_embedding_dim', settings['time_embedding_dim'], (4 * channels[0],))
    depth = _per_level('transformer_layers_per_block', settings, len(channels), _DIFFUSERS)
    # diffusers' own reading: `attention_head_dim` counts heads, unless the count itself is given.
    counts = 'num_attention_heads' if settings['num_attention_heads'] else 'attention_head_dim'
    added = one_of(
        'addition_embed_type', {None: False, 'text_time': True}, settings['addition_embed_type']
    )
    widths = ('projection_class_embeddings_input_dim', 'addition_time_embed_dim')
    for name in widths:
        if added != isinstance(settings[name], int):
            raise refused(name, settings[name], ('a number' if added else None,))
    return LDMUNet(
        channels=channels,
        in_channels=settings['in_channels'],
        out_channels=settings['out_channels'],
        num_blocks=_single('layers_per_block', settings, _DIFFUSERS),
        depth=tuple(d if attention else 0 for d, attention in zip(depth, down, strict=True)),
        mid_depth=depth[-1],
        num_heads=_per_level(counts, settings, len(channels), _DIFFUSERS),
        context_dim=_single('cross_attention_dim', settings, _DIFFUSERS),
        added_dim=settings[widths[0]],
        **({'size_features': settings[widths[1]]} if added else {}),
        scale_shift=one_of(
            'resnet_time_scale_shift',
            {'default': False, 'scale_shift': True},
            settings['resnet_time_scale_shift'],
        ),
        num_groups=settings['norm_num_groups'],
        epsilon=settings['norm_eps'],
        cos_first=settings['flip_sin_to_cos'],
        frequency_shift=settings['freq_shift'],
    )


def params_from_compvis(
    tensors: Mapping[str, np.ndarray],
    network: LDMUNet,
    *,
    ema: bool = False,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters of `network` from a checkpoint of CompVis or Stability.

    Args:
      tensors: the state dict of the whole model, or of the U-Net alone without the prefix.
      network: from `network_from_compvis`, or any that fits.
      ema: read the moving average instead of the weights themselves.
      dtype: of the parameters.
      put: see `torch_weights.read_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over or of another shape.
    """
    source, shapes = functools.partial(compvis_source, network=network), ldm_shapes(network)
    names = without_prefix(tensors, _PREFIX) or None
    if ema:
        average = without_prefix(tensors, _EMA_PREFIX)
        names = {
            name: average.pop(flat)
            for name in expected_tensors(shapes, source)
            if (flat := f'diffusion_model{name}'.replace('.', '')) in average
        }
        names |= {key: key for flat, key in average.items() if flat not in ('decay', 'num_updates')}
    return read_params(tensors, shapes, source, names=names, dtype=dtype, put=put)


def params_from_diffusers(
    tensors: Mapping[str, np.ndarray],
    network: LDMUNet,
    *,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters of `network` from the state dict of a `UNet2DConditionModel`.

    Args:
      tensors: the state dict.
      network: from `network_from_diffusers`, or any that fits.
      dtype: of the parameters.
      put: see `torch_weights.read_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over or of another shape.
    """
    return read_params(tensors, ldm_shapes(network), diffusers_source, dtype=dtype, put=put)


def class_embedder_from_compvis(
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> tuple[ClassEmbedder, PyTree]:
    """The class condition of a checkpoint of CompVis, and its parameters.

    Raises:
      ValueError: the checkpoint has none.
    """
    if _CLASS_EMBEDDER not in tensors:
        raise ValueError(
            f'no tensor {_CLASS_EMBEDDER!r}: expected a class-conditional model such as cin256-v2.'
        )
    embedder = ClassEmbedder(*tensors[_CLASS_EMBEDDER].shape)
    shapes = parameter_shapes(embedder, jax.ShapeDtypeStruct((1,), jnp.int32))
    params = read_params(
        tensors,
        shapes,
        lambda path: Source(_CLASS_EMBEDDER),
        names={_CLASS_EMBEDDER: _CLASS_EMBEDDER},
        dtype=dtype,
        put=put,
    )
    return embedder, params


def compvis_source(path: str, *, network: LDMUNet) -> Source:
    """Where the U-Net of a CompVis checkpoint has the parameter of `network` at `path`."""
    found = numbered_block(
        path,
        attention=[depth > 0 for depth in network.depth],
        num_blocks=network.num_blocks,
        resblock_updown=network.resblock_updown,
    )
    if found is None:
        return Source(rename(path, _COMPVIS_OUTSIDE))
    prefix, inner = found
    if '/attention_' in path and network.context_dim is not None:
        return Source(f'{prefix}.{rename(inner, _TRANSFORMER)}')
    heads = level_heads(path, network.num_heads)
    return block_source(prefix, inner, num_heads=heads, new_attention_order=False)


def diffusers_source(path: str) -> Source:
    """Where a `UNet2DConditionModel` has the parameter of an `LDMUNet` at `path`."""
    way, attention, rest = path.partition('/attention_')
    if not attention:
        return Source(rename(path, _DIFFUSERS_TABLE))
    way, _, level = way.partition('_')
    block = f'{way}_block' if way == 'mid' else f'{way}_blocks.{level}'
    j, _, inner = rest.partition('/')
    return Source(f'{block}.attentions.{j}.{rename(inner, _TRANSFORMER)}')


def ldm_shapes(network: LDMUNet) -> PyTree:
    """Shapes of the parameters."""
    side = 2 ** (len(network.channels) - 1)

    def floats(*shape: int | None) -> jax.ShapeDtypeStruct | None:
        return None if None in shape else jax.ShapeDtypeStruct(shape, jnp.float32)

    return parameter_shapes(
        network,
        floats(1, side, side, network.in_channels),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        floats(1, 1, network.context_dim),
        floats(1, network.pooled_dim),
        None if network.added_dim is None else floats(1, 6),
    )


def _refused_compvis(name: str, value: Any, accepted: tuple[Any, ...]) -> ValueError:
    return unsupported(name, value, accepted, class_name=_COMPVIS)


def _per_level(
    name: str, settings: Mapping[str, Any], levels: int, class_name: str
) -> tuple[int, ...]:
    """A setting that is one number for all levels, or a list."""
    value = settings[name]
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(v, int) for v in values):
        raise unsupported(name, value, ('a number', f'{levels} numbers'), class_name=class_name)
    return values


def _single(name: str, settings: Mapping[str, Any], class_name: str) -> int:
    """A setting that is one number, or a list of equal ones."""
    value = settings[name]
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise unsupported(name, value, ('the same number for all levels',), class_name=class_name)
    return values.pop()
