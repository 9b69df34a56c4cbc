"""Checkpoints of `AutoencoderKL` and `VQAutoencoder` in other projects' names and layouts.

* diffusers' `AutoencoderKL` and `VQModel`, settings from `config.json`; attention in either of its
  spellings (`to_q` and, before 2023, `query`), its weights with or without axes of length 1;
* CompVis' latent-diffusion and Stable Diffusion (`first_stage_model.encoder.down.0.block.0...`),
  settings from the `first_stage_config` of their YAML files. Level i on the way up is stored under
  its *resolution* i, not in the order of use, and attention is made of 1x1 convolutions.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder
from dmq_jax.models.torch_weights import (
    Source,
    choose,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    unsupported,
    without_old_attention,
    without_prefix,
    write_tensors,
)

Autoencoder = AutoencoderKL | VQAutoencoder

# Settings that the networks have one answer to: setting -> accepted values.
_FIXED = {
    'act_fn': ('silu', 'swish'),
    'norm_type': ('group',),
    'latents_mean': (None,),
    'latents_std': (None,),
    'lookup_from_codebook': (False,),
}
# Settings that change nothing in float32.
_WITHOUT_EFFECT = {'sample_size', 'force_upcast'}
# What diffusers takes where a config.json is silent.
_DEFAULTS = {
    'in_channels': 3,
    'out_channels': 3,
    'down_block_types': ('DownEncoderBlock2D',),
    'up_block_types': ('UpDecoderBlock2D',),
    'block_out_channels': (64,),
    'layers_per_block': 1,
    'norm_num_groups': 32,
    'scaling_factor': 0.18215,
    'mid_block_add_attention': True,
}
_KL_DEFAULTS = {
    **_DEFAULTS,
    'latent_channels': 4,
    'shift_factor': None,
    'use_quant_conv': True,
    'use_post_quant_conv': True,
}
_VQ_DEFAULTS = {
    **_DEFAULTS,
    'latent_channels': 3,
    'num_vq_embeddings': 256,
    'vq_embed_dim': None,
}
_DOWN_ATTENTION = {'DownEncoderBlock2D': False, 'AttnDownEncoderBlock2D': True}
_UP_ATTENTION = {'UpDecoderBlock2D': False, 'AttnUpDecoderBlock2D': True}

# The `ddconfig` of latent-diffusion: no setting has a default that files leave out but these.
_LDM_FIXED = {
    'attn_type': ('vanilla', 'vanilla-xformers'),
    'resamp_with_conv': (True,),
    'use_linear_attn': (False,),
    'give_pre_end': (False,),
    'tanh_out': (False,),
}
_LDM_DEFAULTS = {
    name: None
    for name in (
        'ch', 'out_ch', 'ch_mult', 'num_res_blocks', 'attn_resolutions', 'in_channels',
        'resolution', 'z_channels', 'double_z',
    )
}  # fmt: skip
_LDM_WITHOUT_EFFECT = {'dropout'}
_LDM_CLASSES = {'AutoencoderKL': True, 'VQModel': False, 'VQModelInterface': False}

# Path of a module here -> its name there; the first match wins.
_DIFFUSERS = (
    ('quant', 'quant_conv'),
    ('post_quant', 'post_quant_conv'),
    ('codebook', 'quantize.embedding'),
    (r'(\w+)/conv_(in|out)', r'\1.conv_\2'),
    (r'(\w+)/norm_out', r'\1.conv_norm_out'),
    (r'(\w+)/(down|up)_(\d+)/(down|up)sample', r'\1.\2_blocks.\3.\4samplers.0.conv'),
    (r'(\w+)/(down|up)_(\d+)/block_(\d+)/(\w+)', r'\1.\2_blocks.\3.resnets.\4.\5'),
    (r'(\w+)/(down|up)_(\d+)/attention_(\d+)/norm', r'\1.\2_blocks.\3.attentions.\4.group_norm'),
    (r'(\w+)/(down|up)_(\d+)/attention_(\d+)/out', r'\1.\2_blocks.\3.attentions.\4.to_out.0'),
    (r'(\w+)/(down|up)_(\d+)/attention_(\d+)/(\w)', r'\1.\2_blocks.\3.attentions.\4.to_\5'),
    (r'(\w+)/mid/block_(\d+)/(\w+)', r'\1.mid_block.resnets.\2.\3'),
    (r'(\w+)/mid/attention_0/norm', r'\1.mid_block.attentions.0.group_norm'),
    (r'(\w+)/mid/attention_0/out', r'\1.mid_block.attentions.0.to_out.0'),
    (r'(\w+)/mid/attention_0/(\w)', r'\1.mid_block.attentions.0.to_\2'),
)
_LDM = (
    ('quant', 'quant_conv'),
    ('post_quant', 'post_quant_conv'),
    ('codebook', 'quantize.embedding'),
    (r'(\w+)/(conv_in|conv_out|norm_out)', r'\1.\2'),
    (r'(\w+)/(down|up)_(\d+)/(down|up)sample', r'\1.\2.\3.\4sample.conv'),
    (r'(\w+)/(down|up)_(\d+)/block_(\d+)/conv_shortcut', r'\1.\2.\3.block.\4.nin_shortcut'),
    (r'(\w+)/(down|up)_(\d+)/block_(\d+)/(\w+)', r'\1.\2.\3.block.\4.\5'),
    (r'(\w+)/(down|up)_(\d+)/attention_(\d+)/out', r'\1.\2.\3.attn.\4.proj_out'),
    (r'(\w+)/(down|up)_(\d+)/attention_(\d+)/(\w+)', r'\1.\2.\3.attn.\4.\5'),
    (r'(\w+)/mid/block_0/(\w+)', r'\1.mid.block_1.\2'),
    (r'(\w+)/mid/block_1/(\w+)', r'\1.mid.block_2.\2'),
    (r'(\w+)/mid/attention_0/out', r'\1.mid.attn_1.proj_out'),
    (r'(\w+)/mid/attention_0/(\w+)', r'\1.mid.attn_1.\2'),
)


def kl_from_diffusers(config: Mapping[str, Any]) -> AutoencoderKL:
    """The network that a `config.json` of diffusers' `AutoencoderKL` describes.

    Raises:
      ValueError: a setting, or a value of one, that `AutoencoderKL` here has no counterpart of.
    """
    fixed = {name: _FIXED[name] for name in ('act_fn', 'latents_mean', 'latents_std')}
    settings = read_settings(
        config, class_name='AutoencoderKL', defaults=_KL_DEFAULTS, fixed=fixed,
        without_effect=_WITHOUT_EFFECT,
    )  # fmt: skip
    return AutoencoderKL(
        **_shared_settings(settings, 'AutoencoderKL'),
        quant_conv=settings['use_quant_conv'],
        post_quant_conv=settings['use_post_quant_conv'],
        shift_factor=settings['shift_factor'] or 0.0,
    )


def vq_from_diffusers(config: Mapping[str, Any]) -> VQAutoencoder:
    """The network that a `config.json` of diffusers' `VQModel` describes.

    Raises:
      ValueError: a setting, or a value of one, that `VQAutoencoder` has no counterpart of.
    """
    fixed = {name: _FIXED[name] for name in ('act_fn', 'norm_type', 'lookup_from_codebook')}
    settings = read_settings(
        config, class_name='VQModel', defaults=_VQ_DEFAULTS, fixed=fixed,
        without_effect=_WITHOUT_EFFECT,
    )  # fmt: skip
    return VQAutoencoder(
        **_shared_settings(settings, 'VQModel'),
        codebook_size=settings['num_vq_embeddings'],
        codebook_channels=settings['vq_embed_dim'],
    )


def autoencoder_from_ldm(config: Mapping[str, Any], *, scaling_factor: float = 1.0) -> Autoencoder:
    """The network that the `first_stage_config` of a latent-diffusion YAML file describes.

    Args:
      config: `{'target': 'ldm.models.autoencoder.AutoencoderKL', 'params': {...}}`.
      scaling_factor: `model.params.scale_factor` of the same file: 0.18215 in Stable Diffusion,
        0.13025 in SDXL; 1 where the file has none.

    Raises:
      ValueError: another kind of autoencoder, or a setting without a counterpart here.
    """
    target = str(config.get('target')).rpartition('.')[2]
    has_moments = choose('target', _LDM_CLASSES, target, class_name='first_stage_config')
    params = config['params']
    settings = read_settings(
        params['ddconfig'], class_name='ddconfig', defaults=_LDM_DEFAULTS, fixed=_LDM_FIXED,
        without_effect=_LDM_WITHOUT_EFFECT,
    )  # fmt: skip
    if silent := [name for name, value in settings.items() if value is None]:
        raise ValueError(f'ddconfig says nothing of {", ".join(silent)}.')
    if settings['double_z'] != has_moments:
        raise unsupported('double_z', settings['double_z'], (has_moments,), class_name=target)
    width = settings['z_channels']
    if has_moments and params['embed_dim'] != width:
        raise unsupported('embed_dim', params['embed_dim'], (width,), class_name=target)
    count = len(settings['ch_mult'])
    attention = [
        settings['resolution'] // 2**i in settings['attn_resolutions'] for i in range(count)
    ]
    shared = dict(
        channels=tuple(settings['ch'] * factor for factor in settings['ch_mult']),
        in_channels=settings['in_channels'],
        out_channels=settings['out_ch'],
        latent_channels=width,
        layers_per_block=settings['num_res_blocks'],
        attention=tuple(attention),
        scaling_factor=scaling_factor,
    )
    if has_moments:
        return AutoencoderKL(**shared)
    return VQAutoencoder(
        **shared, codebook_size=params['n_embed'], codebook_channels=params['embed_dim']
    )


def autoencoder_params_from_diffusers(
    tensors: Mapping[str, np.ndarray], network: Autoencoder, **options: Any
) -> PyTree:
    """Parameters of `network` from the state dict of diffusers' `AutoencoderKL` or `VQModel`.

    Args:
      tensors: the checkpoint.
      network: its network.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    names = without_old_attention(tensors)
    return read_params(
        tensors, autoencoder_shapes(network), diffusers_autoencoder_source, names=names, **options
    )


def autoencoder_params_from_ldm(
    tensors: Mapping[str, np.ndarray],
    network: Autoencoder,
    *,
    prefix: str = 'first_stage_model.',
    **options: Any,
) -> PyTree:
    """Parameters of `network` from a checkpoint of latent-diffusion or Stable Diffusion.

    Args:
      tensors: the checkpoint (`checkpoint['state_dict']`); only names with `prefix` are read.
      network: its network.
      prefix: '' for a file of the autoencoder alone, of whose tensors those of the training loss
        (`loss.`) and the moving average (`model_ema.`) are passed over.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    names = {
        short: name
        for short, name in without_prefix(tensors, prefix).items()
        if not short.startswith(('loss.', 'model_ema.'))
    }
    if not names:
        raise ValueError(
            f'no tensor begins with {prefix!r} among {len(tensors)}, e.g. '
            f'{next(iter(tensors), None)!r}; give the prefix of the autoencoder.'
        )
    return read_params(
        tensors, autoencoder_shapes(network), ldm_autoencoder_source(network), names=names,
        **options,
    )  # fmt: skip


def diffusers_from_autoencoder_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `AutoencoderKL` or `VQModel` with these parameters."""
    return write_tensors(params, diffusers_autoencoder_source)


def diffusers_autoencoder_source(path: str) -> Source:
    """Where diffusers holds the parameter at `path`."""
    return Source(rename(path, _DIFFUSERS))


def ldm_autoencoder_source(network: Autoencoder) -> Callable[[str], Source]:
    """The function that says where latent-diffusion holds a parameter, without the prefix."""
    last = len(network.channels) - 1

    def source(path: str) -> Source:
        name = rename(path, _LDM)
        return Source(re.sub(r'\.up\.(\d+)', lambda match: f'.up.{last - int(match[1])}', name))

    return source


def autoencoder_shapes(network: Autoencoder) -> PyTree:
    """Shapes of the parameters, nothing computed."""
    side = 2 ** (len(network.channels) - 1)
    images = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
    return parameter_shapes(network, images)


def _shared_settings(settings: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    def attention(name: str, table: Mapping[str, bool]) -> tuple[bool, ...]:
        return tuple(choose(name, table, kind, class_name=class_name) for kind in settings[name])

    down = attention('down_block_types', _DOWN_ATTENTION)
    if attention('up_block_types', _UP_ATTENTION) != down[::-1]:
        kinds = {value: name for name, value in _UP_ATTENTION.items()}
        raise unsupported(
            'up_block_types', settings['up_block_types'], ([kinds[here] for here in down[::-1]],),
            class_name=class_name,
        )  # fmt: skip
    channels = tuple(settings['block_out_channels'])
    if len(down) != len(channels):
        raise ValueError(
            f'{len(down)} down_block_types, but {len(channels)} block_out_channels: expected as '
            f'many.'
        )
    return {
        'channels': channels,
        'in_channels': settings['in_channels'],
        'out_channels': settings['out_channels'],
        'latent_channels': settings['latent_channels'],
        'layers_per_block': settings['layers_per_block'],
        'attention': down,
        'mid_attention': settings['mid_block_add_attention'],
        'num_groups': settings['norm_num_groups'],
        'scaling_factor': settings['scaling_factor'],
    }
