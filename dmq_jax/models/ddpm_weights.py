"""Checkpoints of `DDPMUNet` in other projects' names and layouts.

* diffusers' `UNet2DModel` (`down_blocks.0.resnets.0.conv1.weight`), whose settings come from its
  `config.json`; attention in either of its spellings (`to_q` and, before 2023, `query`);
* DDIM (Song et al. 2021, arXiv:2010.02502), ermongroup's and pesser's state dicts
  (`down.0.block.0.conv1.weight`), where level i on the way up is stored under its *resolution* i,
  not in the order of use, and attention is made of 1x1 convolutions.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.torch_weights import (
    Source,
    choose,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    unsupported,
    without_old_attention,
    write_tensors,
)

_CLASS = 'UNet2DModel'
# Settings of UNet2DModel that DDPMUNet has one answer to: setting -> accepted values.
_FIXED = {
    'center_input_sample': (False,),
    'time_embedding_type': ('positional',),
    'mid_block_type': ('UNetMidBlock2D',),
    'mid_block_scale_factor': (1,),
    'downsample_type': ('conv',),
    'upsample_type': ('conv',),
    'act_fn': ('silu', 'swish'),
    'class_embed_type': (None,),
}
# Settings that change nothing at inference.
_WITHOUT_EFFECT = {'sample_size', 'dropout', 'num_train_timesteps'}
# What UNet2DModel takes where its config.json, maybe older than the setting, is silent.
_DEFAULTS = {
    'in_channels': 3,
    'out_channels': 3,
    'freq_shift': 0,
    'flip_sin_to_cos': True,
    'down_block_types': ('DownBlock2D', *3 * ('AttnDownBlock2D',)),
    'up_block_types': (*3 * ('AttnUpBlock2D',), 'UpBlock2D'),
    'block_out_channels': (224, 448, 672, 896),
    'layers_per_block': 2,
    'downsample_padding': 1,
    'attention_head_dim': 8,
    'norm_num_groups': 32,
    'attn_norm_num_groups': None,
    'norm_eps': 1e-5,
    'resnet_time_scale_shift': 'default',
    'add_attention': True,
    'num_class_embeds': None,
    'time_embedding_dim': None,
}
_PADDING = {0: 'asymmetric', 1: 'symmetric'}
_SCALE_SHIFT = {'default': False, 'scale_shift': True}
_DOWN_ATTENTION = {'DownBlock2D': False, 'AttnDownBlock2D': True}
_UP_ATTENTION = {'UpBlock2D': False, 'AttnUpBlock2D': True}

# Path in DDPMUNet -> name in the other layout; the first match wins.
_DIFFUSERS = (
    ('conv_in', 'conv_in'),
    ('time_embed/dense_0', 'time_embedding.linear_1'),
    ('time_embed/dense_1', 'time_embedding.linear_2'),
    ('class_embed', 'class_embedding'),
    (r'(down|up)_(\d+)/block_(\d+)/time_proj', r'\1_blocks.\2.resnets.\3.time_emb_proj'),
    (r'(down|up)_(\d+)/block_(\d+)/(\w+)', r'\1_blocks.\2.resnets.\3.\4'),
    (r'(down|up)_(\d+)/attention_(\d+)/norm', r'\1_blocks.\2.attentions.\3.group_norm'),
    (r'(down|up)_(\d+)/attention_(\d+)/out', r'\1_blocks.\2.attentions.\3.to_out.0'),
    (r'(down|up)_(\d+)/attention_(\d+)/(\w+)', r'\1_blocks.\2.attentions.\3.to_\4'),
    (r'(down|up)_(\d+)/(down|up)sample', r'\1_blocks.\2.\3samplers.0.conv'),
    (r'mid/block_(\d+)/time_proj', r'mid_block.resnets.\1.time_emb_proj'),
    (r'mid/block_(\d+)/(\w+)', r'mid_block.resnets.\1.\2'),
    (r'mid/attention_(\d+)/norm', r'mid_block.attentions.\1.group_norm'),
    (r'mid/attention_(\d+)/out', r'mid_block.attentions.\1.to_out.0'),
    (r'mid/attention_(\d+)/(\w+)', r'mid_block.attentions.\1.to_\2'),
    ('norm_out', 'conv_norm_out'),
    ('conv_out', 'conv_out'),
)
_DDIM = (
    ('conv_in', 'conv_in'),
    (r'time_embed/dense_(\d+)', r'temb.dense.\1'),
    (r'(down|up)_(\d+)/block_(\d+)/time_proj', r'\1.\2.block.\3.temb_proj'),
    (r'(down|up)_(\d+)/block_(\d+)/conv_shortcut', r'\1.\2.block.\3.nin_shortcut'),
    (r'(down|up)_(\d+)/block_(\d+)/(\w+)', r'\1.\2.block.\3.\4'),
    (r'(down|up)_(\d+)/attention_(\d+)/out', r'\1.\2.attn.\3.proj_out'),
    (r'(down|up)_(\d+)/attention_(\d+)/(\w+)', r'\1.\2.attn.\3.\4'),
    (r'(down|up)_(\d+)/(down|up)sample', r'\1.\2.\3sample.conv'),
    (r'mid/block_0/time_proj', r'mid.block_1.temb_proj'),
    (r'mid/block_1/time_proj', r'mid.block_2.temb_proj'),
    (r'mid/block_0/(\w+)', r'mid.block_1.\1'),
    (r'mid/block_1/(\w+)', r'mid.block_2.\1'),
    (r'mid/attention_0/out', r'mid.attn_1.proj_out'),
    (r'mid/attention_0/(\w+)', r'mid.attn_1.\1'),
    ('norm_out', 'norm_out'),
    ('conv_out', 'conv_out'),
)


def network_from_diffusers(config: Mapping[str, Any]) -> DDPMUNet:
    """The network that a `config.json` of diffusers' `UNet2DModel` describes.

    Settings absent from `config` have the value that `UNet2DModel` gives them.

    Raises:
      ValueError: a setting, or a value of one, that `DDPMUNet` has no counterpart of.
    """
    settings = read_settings(
        config,
        class_name=_CLASS,
        defaults=_DEFAULTS,
        fixed=_FIXED,
        without_effect=_WITHOUT_EFFECT,
    )

    def refused(name: str, accepted: tuple[Any, ...]) -> ValueError:
        return unsupported(name, settings[name], accepted, class_name=_CLASS)

    def one_of(name: str, table: Mapping[Any, Any]) -> Any:
        return choose(name, table, settings[name], class_name=_CLASS)

    def attention(name: str, table: Mapping[str, bool]) -> tuple[bool, ...]:
        # 'UNetRes' is how the first releases spelled it; diffusers drops it, too.
        kinds = [kind.removeprefix('UNetRes') for kind in settings[name]]
        return tuple(choose(name, table, kind, class_name=_CLASS) for kind in kinds)

    channels = tuple(settings['block_out_channels'])
    scale_shift = one_of('resnet_time_scale_shift', _SCALE_SHIFT)
    groups = settings['norm_num_groups']
    if not isinstance(groups, int):
        raise refused('norm_num_groups', ('a number',))
    if settings['time_embedding_dim'] not in (None, 4 * channels[0]):
        raise refused('time_embedding_dim', (None, 4 * channels[0]))
    # With scale_shift, null means that the attention in the middle has no norm at all.
    accepted = (groups,) if scale_shift else (groups, None)
    if settings['add_attention'] and settings['attn_norm_num_groups'] not in accepted:
        raise refused('attn_norm_num_groups', accepted)
    return DDPMUNet(
        channels=channels,
        in_channels=settings['in_channels'],
        out_channels=settings['out_channels'],
        layers_per_block=settings['layers_per_block'],
        down_attention=attention('down_block_types', _DOWN_ATTENTION),
        up_attention=attention('up_block_types', _UP_ATTENTION),
        mid_attention=settings['add_attention'],
        head_dim=settings['attention_head_dim'],
        num_groups=groups,
        epsilon=settings['norm_eps'],
        pad_downsample=one_of('downsample_padding', _PADDING),
        cos_first=settings['flip_sin_to_cos'],
        frequency_shift=settings['freq_shift'],
        scale_shift=scale_shift,
        num_class_embeds=settings['num_class_embeds'],
    )


def diffusers_from_network(network: DDPMUNet, image_size: tuple[int, int]) -> dict[str, Any]:
    """The `config.json` of the `UNet2DModel` that computes what `network` does.

    Args:
      network: any settings but patches.
      image_size: height and width, which the file states though no weight depends on them.

    Raises:
      ValueError: `patch_size` above 1, which `UNet2DModel` does not have.
    """
    if network.patch_size != 1:
        raise ValueError(f'patch_size={network.patch_size}: UNet2DModel has none; expected 1.')
    up_attention = network.up_attention or network.down_attention[::-1]
    down_types, up_types, paddings = (
        {value: name for name, value in table.items()}
        for table in (_DOWN_ATTENTION, _UP_ATTENTION, _PADDING)
    )
    return {
        '_class_name': 'UNet2DModel',
        'sample_size': image_size[0] if image_size[0] == image_size[1] else list(image_size),
        'in_channels': network.in_channels,
        'out_channels': network.out_channels or network.in_channels,
        'block_out_channels': list(network.channels),
        'layers_per_block': network.layers_per_block,
        'down_block_types': [down_types[attention] for attention in network.down_attention],
        'up_block_types': [up_types[attention] for attention in up_attention],
        'add_attention': network.mid_attention,
        'attention_head_dim': network.head_dim,
        'norm_num_groups': network.num_groups,
        'attn_norm_num_groups': network.num_groups,
        'norm_eps': network.epsilon,
        'downsample_padding': paddings[network.pad_downsample],
        'flip_sin_to_cos': network.cos_first,
        'freq_shift': network.frequency_shift,
        'resnet_time_scale_shift': 'scale_shift' if network.scale_shift else 'default',
        'num_class_embeds': network.num_class_embeds,
    }


def params_from_diffusers(
    tensors: Mapping[str, np.ndarray],
    network: DDPMUNet,
    *,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters of `network` from the state dict of a `UNet2DModel`.

    `dtype` and `put` are those of `torch_weights.read_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over or of another shape.
    """
    names = without_old_attention(tensors)
    return read_params(
        tensors, _shapes(network), diffusers_source, names=names, dtype=dtype, put=put
    )


def params_from_ddim(
    tensors: Mapping[str, np.ndarray],
    network: DDPMUNet,
    *,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters of `network` from a state dict of the DDIM code.

    The prefix `module.`, which data-parallel training leaves on every name, is dropped. `dtype` and
    `put` are those of `torch_weights.read_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over or of another shape; or a
        class-conditional network, which DDIM does not have.
    """
    if network.num_class_embeds is not None:
        raise ValueError(
            f'num_class_embeds={network.num_class_embeds}: DDIM checkpoints have no classes; '
            f'expected None.'
        )
    names = {name.removeprefix('module.'): name for name in tensors}
    source = functools.partial(ddim_source, last=len(network.channels) - 1)
    return read_params(tensors, _shapes(network), source, names=names, dtype=dtype, put=put)


def ddim_source(path: str, *, last: int) -> Source:
    """Where DDIM's state dict has the parameter at `path`; `last` is the coarsest level."""
    name = rename(path, _DDIM)
    return Source(re.sub(r'^up\.(\d+)', lambda match: f'up.{last - int(match[1])}', name))


def diffusers_from_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `UNet2DModel` with these parameters: `params_from_diffusers` undone."""
    return write_tensors(params, diffusers_source)


def diffusers_source(path: str) -> Source:
    """Where a state dict of diffusers has the parameter at `path`."""
    return Source(rename(path, _DIFFUSERS))


def _shapes(network: DDPMUNet) -> PyTree:
    side = network.patch_size * 2 ** (len(network.channels) - 1)
    x = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    y = None if network.num_class_embeds is None else number
    return parameter_shapes(network, x, number, y)
