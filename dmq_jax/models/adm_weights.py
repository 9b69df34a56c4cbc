"""Checkpoints of `ADMUNet`: the state dicts of guided diffusion, and the flags that go with them.

The names number the blocks in the order of use (`input_blocks.7.0.in_layers.2.weight`): every
residual block with the attention after it, and every change of resolution on the way down, is one
entry of `input_blocks`; on the way up a change of resolution is part of the entry before it. LDM
took these names over. A fused `qkv` holds, in the legacy order, q, k and v of the first head, then
of the second; in the new order, q of all heads, then k, then v.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.torch_weights import (
    Source,
    Table,
    choose,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
)

_OWNER = 'guided diffusion'
# Flags of the published scripts that say something of the network, and what absence means.
_DEFAULTS = {
    'image_size': 64,
    'large_size': None,
    'num_channels': 128,
    'num_res_blocks': 2,
    'num_heads': 4,
    'num_heads_upsample': -1,
    'num_head_channels': -1,
    'attention_resolutions': '16,8',
    'channel_mult': '',
    'class_cond': False,
    'learn_sigma': False,
    'use_scale_shift_norm': True,
    'resblock_updown': False,
    'use_new_attention_order': False,
}
# Flags of the process, of training, and of precision.
_WITHOUT_EFFECT = (
    'small_size', 'dropout', 'use_checkpoint', 'use_fp16', 'diffusion_steps', 'noise_schedule',
    'timestep_respacing', 'use_kl', 'predict_xstart', 'rescale_timesteps',
    'rescale_learned_sigmas',
)  # fmt: skip
_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
# An upsampler to 512 has no level of half the width.
_UPSAMPLER_CHANNEL_MULT = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
_NUM_CLASSES = 1000

_IMAGENET = {
    'class_cond': True,
    'learn_sigma': True,
    'resblock_updown': True,
    'attention_resolutions': '32,16,8',
    'num_channels': 256,
    'num_head_channels': 64,
}
# Flags of the published checkpoints (README of guided diffusion), by the name of their file.
PUBLISHED: dict[str, dict[str, Any]] = {
    '64x64_diffusion': {
        **_IMAGENET,
        'image_size': 64,
        'num_channels': 192,
        'num_res_blocks': 3,
        'use_new_attention_order': True,
    },
    '128x128_diffusion': {
        **_IMAGENET,
        'image_size': 128,
        'num_heads': 4,
        'num_head_channels': -1,
    },
    '256x256_diffusion': {**_IMAGENET, 'image_size': 256},
    '256x256_diffusion_uncond': {**_IMAGENET, 'image_size': 256, 'class_cond': False},
    '512x512_diffusion': {**_IMAGENET, 'image_size': 512},
    '64_256_upsampler': {
        **_IMAGENET,
        'large_size': 256,
        'num_channels': 192,
        'num_heads': 4,
        'num_head_channels': -1,
    },
    '128_512_upsampler': {
        **_IMAGENET,
        'large_size': 512,
        'num_channels': 192,
        'attention_resolutions': '32,16',
    },
    **{
        name: {**_IMAGENET, 'image_size': 256, 'class_cond': False}
        for name in ('lsun_bedroom', 'lsun_cat', 'lsun_horse', 'lsun_horse_nodropout')
    },
}

# Module within a numbered block -> its name there.
_RES_BLOCK = (
    ('norm1', 'in_layers.0'),
    ('conv1', 'in_layers.2'),
    ('time_proj', 'emb_layers.1'),
    ('norm2', 'out_layers.0'),
    ('conv2', 'out_layers.3'),
    ('conv_shortcut', 'skip_connection'),
)
_SELF_ATTENTION = (('norm', 'norm'), ('(q|k|v)', 'qkv'), ('out', 'proj_out'))
_OUTSIDE = (
    ('time_embed/dense_0', 'time_embed.0'),
    ('time_embed/dense_1', 'time_embed.2'),
    ('class_embed', 'label_emb'),
    ('conv_in', 'input_blocks.0.0'),
    ('norm_out', 'out.0'),
    ('conv_out', 'out.2'),
)


def network_from_adm(flags: Mapping[str, Any]) -> ADMUNet:
    """The network that the flags of guided diffusion's scripts describe.

    Flags absent have the value that the scripts give them; `large_size` makes an upsampler. See
    `PUBLISHED` for the flags of the published checkpoints.

    Raises:
      ValueError: a flag, or a value of one, that `ADMUNet` has no counterpart of.
    """
    settings = read_settings(
        flags,
        class_name=_OWNER,
        defaults=_DEFAULTS,
        fixed={'num_heads_upsample': (-1,)},
        without_effect=_WITHOUT_EFFECT,
    )
    upsampler = settings['large_size'] is not None
    name = 'large_size' if upsampler else 'image_size'
    size, width = settings[name], settings['num_channels']
    if settings['channel_mult']:
        multipliers = tuple(int(part) for part in settings['channel_mult'].split(','))
    else:
        table = _UPSAMPLER_CHANNEL_MULT if upsampler else _CHANNEL_MULT
        multipliers = choose(name, table, size, class_name=_OWNER)
    channels = tuple(int(factor * width) for factor in multipliers)
    sizes = [int(part) for part in settings['attention_resolutions'].split(',')]
    num_heads, head_dim = settings['num_heads'], settings['num_head_channels']
    return ADMUNet(
        channels=channels,
        out_channels=6 if settings['learn_sigma'] else 3,
        num_blocks=settings['num_res_blocks'],
        attention=tuple(2**i in [size // s for s in sizes] for i in range(len(channels))),
        num_heads=heads_of_levels(channels, num_heads, head_dim),
        time_features=width,
        num_classes=_NUM_CLASSES if settings['class_cond'] else None,
        low_res_channels=3 if upsampler else 0,
        resblock_updown=settings['resblock_updown'],
        scale_shift=settings['use_scale_shift_norm'],
    )


def heads_of_levels(channels: Sequence[int], num_heads: int, head_dim: int) -> tuple[int, ...]:
    """Heads of attention on each level; a `head_dim` other than -1 decides."""
    return tuple(num_heads if head_dim == -1 else c // head_dim for c in channels)


def params_from_adm(
    tensors: Mapping[str, np.ndarray],
    network: ADMUNet,
    *,
    new_attention_order: bool,
    dtype: Any = np.float32,
    put: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters of `network` from a state dict of guided diffusion.

    Args:
      tensors: the state dict.
      network: from `network_from_adm`, or any that fits.
      new_attention_order: the flag `use_new_attention_order`; the tensors do not tell.
      dtype: of the parameters.
      put: see `torch_weights.read_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over or of another shape.
    """
    source = functools.partial(adm_source, network=network, new_attention_order=new_attention_order)
    return read_params(tensors, adm_shapes(network), source, dtype=dtype, put=put)


def adm_source(path: str, *, network: ADMUNet, new_attention_order: bool) -> Source:
    """Where a state dict of guided diffusion has the parameter of `network` at `path`."""
    found = numbered_block(
        path,
        attention=network.attention,
        num_blocks=network.num_blocks,
        resblock_updown=network.resblock_updown,
    )
    if found is None:
        return Source(rename(path, _OUTSIDE))
    prefix, inner = found
    return block_source(
        prefix, inner, num_heads=level_heads(path, network.num_heads),
        new_attention_order=new_attention_order,
    )  # fmt: skip


def adm_shapes(network: ADMUNet) -> PyTree:
    """Shapes of the parameters."""
    side = 2 ** (len(network.channels) - 1)
    image = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    return parameter_shapes(
        network,
        image((1, side, side, network.in_channels)),
        number,
        None if network.num_classes is None else number,
        image((1, 1, 1, network.low_res_channels)) if network.low_res_channels else None,
    )


def numbered_block(
    path: str, *, attention: Sequence[bool], num_blocks: int, resblock_updown: bool
) -> tuple[str, str] | None:
    """The numbered block that the parameter at `path` is in, and the rest of the path.

    Args:
      path: in `ADMUNet` or `LDMUNet`.
      attention: whether the blocks of a level are followed by attention, finest first.
      num_blocks: blocks of a level on the way down.
      resblock_updown: the resolution is changed by residual blocks.

    Returns:
      The prefix of the names there and the path within ('conv1/kernel'; nothing but 'kernel' for
      a convolution that changes the resolution), or None outside all blocks.
    """
    if match := re.fullmatch(r'mid/(block|attention)_(\d+)/(.+)', path):
        index = 1 if match[1] == 'attention' else 2 * int(match[2])
        return f'middle_block.{index}', match[3]
    match = re.fullmatch(r'(down|up)_(\d+)/(block|attention|downsample|upsample)_?(\d*)/(.+)', path)
    if match is None:
        return None
    way, level, kind, j, inner = match[1], int(match[2]), match[3], match[4], match[5]
    first = level * (num_blocks + 1)
    if way == 'down':
        # 'input_blocks.0' is the first convolution.
        index = first + 1 + (num_blocks if kind == 'downsample' else int(j))
        position = '1' if kind == 'attention' else '0'
        if kind == 'downsample' and not resblock_updown:
            position += '.op'
        return f'input_blocks.{index}.{position}', inner
    if kind == 'upsample':
        position = '2' if attention[len(attention) - 1 - level] else '1'
        if not resblock_updown:
            position += '.conv'
        return f'output_blocks.{first + num_blocks}.{position}', inner
    return f'output_blocks.{first + int(j)}.{"1" if kind == "attention" else "0"}', inner


def block_source(
    prefix: str,
    inner: str,
    *,
    num_heads: int,
    new_attention_order: bool,
    attention: Table = _SELF_ATTENTION,
) -> Source:
    """Where the parameter at `inner` of the block called `prefix` is.

    Args:
      prefix: from `numbered_block`.
      inner: the rest of the path, from there, too.
      num_heads: of attention in that block.
      new_attention_order: of a fused `qkv`.
      attention: names within attention.
    """
    module, _, leaf = inner.rpartition('/')
    if not module:
        return Source(f'{prefix}.{"bias" if leaf == "bias" else "weight"}')
    name = f'{prefix}.{rename(inner, _RES_BLOCK + attention)}'
    if '.qkv.' not in name:
        return Source(name)
    heads = 1 if new_attention_order else num_heads
    return Source(name, part='qkv'.index(module), parts=3, heads=heads)


def level_heads(path: str, num_heads: Sequence[int]) -> int:
    """The entry of `num_heads` (finest level first) for the level of `path`."""
    way, _, level = path.partition('/')[0].partition('_')
    if way == 'mid':
        return num_heads[-1]
    return num_heads[int(level)] if way == 'down' else num_heads[::-1][int(level)]
