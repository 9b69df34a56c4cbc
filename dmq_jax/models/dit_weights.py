"""Checkpoints of `DiT` and `PixArt` in other projects' names and layouts.

* diffusers' `DiTTransformer2DModel` and `PixArtTransformer2DModel`, settings from `config.json`,
  under these names or the older `Transformer2DModel`;
* the original `DiT-XL-2-256x256.pt` (`blocks.0.attn.qkv.weight`) and PixArt's `.pth` files, whose
  settings follow from the names and shapes alone.

The original files hold q, k and v in one tensor, and positions, which are computed here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.dit import DiT, PixArt, position_features
from dmq_jax.models.torch_weights import (
    Source,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    unsupported,
    write_tensors,
)

_DIT_CLASS = 'DiTTransformer2DModel'
_PIXART_CLASS = 'PixArtTransformer2DModel'
# Settings that the networks have one answer to: setting -> accepted values.
_FIXED = {
    'attention_bias': (True,),
    'activation_fn': ('gelu-approximate',),
    'norm_elementwise_affine': (False,),
    # Of the class that both were before 2024, whose name the published files still bear.
    'num_vector_embeds': (None,),
    'only_cross_attention': (False,),
    'double_self_attention': (False,),
    'use_linear_projection': (False,),
}
_OLD_CLASS = 'Transformer2DModel'
# Settings that change nothing at inference in float32.
_WITHOUT_EFFECT = {'dropout', 'norm_num_groups', 'upcast_attention'}
# What diffusers takes where a config.json is silent.
_DIT_DEFAULTS = {
    'num_attention_heads': 16,
    'attention_head_dim': 72,
    'in_channels': 4,
    'out_channels': None,
    'num_layers': 28,
    'sample_size': 32,
    'patch_size': 2,
    'num_embeds_ada_norm': 1000,
    'norm_eps': 1e-5,
}
_PIXART_DEFAULTS = {
    'num_attention_heads': 16,
    'attention_head_dim': 72,
    'in_channels': 4,
    'out_channels': 8,
    'num_layers': 28,
    'cross_attention_dim': 1152,
    'sample_size': 128,
    'patch_size': 2,
    'norm_eps': 1e-6,
    'interpolation_scale': None,
    'use_additional_conditions': None,
    'caption_channels': None,
}

# Path of a module here -> its name there; the first match wins.
_DIFFUSERS_BLOCK = (
    ('patches/proj', 'pos_embed.proj'),
    (r'block_(\d+)/attention/out', r'transformer_blocks.\1.attn1.to_out.0'),
    (r'block_(\d+)/attention/(\w)', r'transformer_blocks.\1.attn1.to_\2'),
    (r'block_(\d+)/cross_attention/out', r'transformer_blocks.\1.attn2.to_out.0'),
    (r'block_(\d+)/cross_attention/(\w)', r'transformer_blocks.\1.attn2.to_\2'),
    (r'block_(\d+)/mlp/dense_0', r'transformer_blocks.\1.ff.net.0.proj'),
    (r'block_(\d+)/mlp/dense_1', r'transformer_blocks.\1.ff.net.2'),
)
_CLASS_EMBEDDER = 'norm1.emb.class_embedder.embedding_table'
_DIFFUSERS_DIT = (
    *_DIFFUSERS_BLOCK,
    (r'block_(\d+)/modulation', r'transformer_blocks.\1.norm1.linear'),
    ('modulation_out', 'proj_out_1'),
    ('out', 'proj_out_2'),
    (r'embed_(\d+)/class', rf'transformer_blocks.\1.{_CLASS_EMBEDDER}'),
    *(
        (
            rf'embed_(\d+)/time/dense_{i}',
            rf'transformer_blocks.\1.norm1.emb.timestep_embedder.linear_{i + 1}',
        )
        for i in range(2)
    ),
)
_DIFFUSERS_PIXART = (
    *_DIFFUSERS_BLOCK,
    *(
        (f'{ours}/dense_{i}', f'{theirs}.linear_{i + 1}')
        for ours, theirs in {
            'time_embed': 'adaln_single.emb.timestep_embedder',
            'resolution_embed': 'adaln_single.emb.resolution_embedder',
            'ratio_embed': 'adaln_single.emb.aspect_ratio_embedder',
            'caption': 'caption_projection',
        }.items()
        for i in range(2)
    ),
    ('modulation', 'adaln_single.linear'),
    ('out', 'proj_out'),
)
_ORIGINAL_BLOCK = (
    ('patches/proj', 'x_embedder.proj'),
    (r'block_(\d+)/attention/out', r'blocks.\1.attn.proj'),
    (r'block_(\d+)/cross_attention/out', r'blocks.\1.cross_attn.proj'),
    (r'block_(\d+)/mlp/dense_0', r'blocks.\1.mlp.fc1'),
    (r'block_(\d+)/mlp/dense_1', r'blocks.\1.mlp.fc2'),
    # Names of fused tensors; `_original_source` says which part of them.
    (r'block_(\d+)/attention/[qkv]', r'blocks.\1.attn.qkv'),
    (r'block_(\d+)/cross_attention/q', r'blocks.\1.cross_attn.q_linear'),
    (r'block_(\d+)/cross_attention/[kv]', r'blocks.\1.cross_attn.kv_linear'),
    ('out', 'final_layer.linear'),
)
_ORIGINAL_DIT = (
    *_ORIGINAL_BLOCK,
    ('embed/time/dense_0', 't_embedder.mlp.0'),
    ('embed/time/dense_1', 't_embedder.mlp.2'),
    ('embed/class', 'y_embedder.embedding_table'),
    (r'block_(\d+)/modulation', r'blocks.\1.adaLN_modulation.1'),
    ('modulation_out', 'final_layer.adaLN_modulation.1'),
)
_ORIGINAL_PIXART = (
    *_ORIGINAL_BLOCK,
    *(
        (f'{ours}/dense_{i}', f'{theirs}.mlp.{2 * i}')
        for ours, theirs in {
            'time_embed': 't_embedder',
            'resolution_embed': 'csize_embedder',
            'ratio_embed': 'ar_embedder',
        }.items()
        for i in range(2)
    ),
    (r'caption/dense_0', 'y_embedder.y_proj.fc1'),
    (r'caption/dense_1', 'y_embedder.y_proj.fc2'),
    ('modulation', 't_block.1'),
)
_TABLE = 'scale_shift_table'

# Stored positions may have been rounded to half precision: eps(float16) / 2 of at most 1.
_POSITION_TOLERANCE = 1e-3


def dit_from_diffusers(config: Mapping[str, Any]) -> DiT:
    """The network that a `config.json` of diffusers' `DiTTransformer2DModel` describes.

    Timestep frequencies and epsilons are those of diffusers. To compute what the original code
    does with the same weights, clone it with `frequency_shift=0.0, mlp_epsilon=1e-6`.

    Raises:
      ValueError: a setting, or a value of one, that `DiT` has no counterpart of.
    """
    settings = read_settings(
        _of_today(config, _DIT_CLASS, 'ada_norm_zero'),
        class_name=_DIT_CLASS,
        defaults=_DIT_DEFAULTS,
        fixed={**_FIXED, 'norm_type': ('ada_norm_zero',), 'cross_attention_dim': (None,)},
        without_effect=_WITHOUT_EFFECT,
    )
    if not isinstance(settings['num_embeds_ada_norm'], int):
        raise unsupported(
            'num_embeds_ada_norm', settings['num_embeds_ada_norm'], ('a number',),
            class_name=_DIT_CLASS,
        )  # fmt: skip
    return DiT(
        **_shared_settings(settings),
        num_classes=settings['num_embeds_ada_norm'],
        frequency_shift=1.0,
        mlp_epsilon=settings['norm_eps'],
    )


def pixart_from_diffusers(config: Mapping[str, Any]) -> PixArt:
    """The network that a `config.json` of diffusers' `PixArtTransformer2DModel` describes.

    Raises:
      ValueError: a setting, or a value of one, that `PixArt` has no counterpart of.
    """
    settings = read_settings(
        _of_today(config, _PIXART_CLASS, 'ada_norm_single'),
        class_name=_PIXART_CLASS,
        defaults=_PIXART_DEFAULTS,
        fixed={
            **_FIXED,
            'norm_type': ('ada_norm_single',),
            'attention_type': ('default', None),
            'norm_eps': (1e-6,),
        },
        without_effect={*_WITHOUT_EFFECT, 'num_embeds_ada_norm'},
    )
    shared = _shared_settings(settings)
    width = shared['num_heads'] * shared['head_dim']
    if settings['cross_attention_dim'] != width:
        raise unsupported(
            'cross_attention_dim', settings['cross_attention_dim'], (width,),
            class_name=_PIXART_CLASS,
        )  # fmt: skip
    size = settings['sample_size']
    conditions, scale = settings['use_additional_conditions'], settings['interpolation_scale']
    return PixArt(
        **shared,
        position_scale=float(max(size // 64, 1) if scale is None else scale),
        caption_channels=settings['caption_channels'],
        size_conditions=size == 128 if conditions is None else conditions,
    )


def dit_from_original(tensors: Mapping[str, np.ndarray], *, head_dim: int = 72) -> DiT:
    """The network of an original DiT checkpoint, from the names and shapes of its tensors.

    Args:
      tensors: the state dict.
      head_dim: the one thing that no shape tells: 72 in DiT-XL, 64 in DiT-S, -B and -L.

    Raises:
      ValueError: a tensor that every such checkpoint has is missing, or `head_dim` does not fit.
    """
    width, in_channels, patch_size, _ = _shape(tensors, 'x_embedder.proj.weight', 4)
    positions = _shape(tensors, 'pos_embed', 3)[1]
    return DiT(
        in_channels=in_channels,
        out_channels=_shape(tensors, 'final_layer.linear.weight', 2)[0] // patch_size**2,
        num_layers=_num_blocks(tensors),
        num_heads=_num_heads(width, head_dim),
        head_dim=head_dim,
        patch_size=patch_size,
        sample_size=round(positions**0.5) * patch_size,
        num_classes=_shape(tensors, 'y_embedder.embedding_table.weight', 2)[0] - 1,
    )


def pixart_from_original(
    tensors: Mapping[str, np.ndarray],
    *,
    sample_size: int,
    position_scale: float,
    head_dim: int = 72,
) -> PixArt:
    """The network of an original PixArt checkpoint, from the names and shapes of its tensors.

    Args:
      tensors: the state dict (`checkpoint['state_dict']`).
      sample_size: side of the latents in training, an eighth of the image's.
      position_scale: PixArt's `pe_interpolation`: 0.5 (Sigma) or 1 (alpha) for 256 pixels, 1 for
        512, 2 for 1024, 4 for 2048.
      head_dim: channels of a head, which no shape tells.

    Raises:
      ValueError: a tensor that every such checkpoint has is missing, or `head_dim` does not fit.
    """
    width, in_channels, patch_size, _ = _shape(tensors, 'x_embedder.proj.weight', 4)
    return PixArt(
        in_channels=in_channels,
        out_channels=_shape(tensors, 'final_layer.linear.weight', 2)[0] // patch_size**2,
        num_layers=_num_blocks(tensors),
        num_heads=_num_heads(width, head_dim),
        head_dim=head_dim,
        patch_size=patch_size,
        sample_size=sample_size,
        position_scale=position_scale,
        caption_channels=_shape(tensors, 'y_embedder.y_proj.fc1.weight', 2)[1],
        size_conditions='csize_embedder.mlp.0.weight' in tensors,
    )


def dit_params_from_diffusers(
    tensors: Mapping[str, np.ndarray], network: DiT, **options: Any
) -> PyTree:
    """Parameters of `network` from the state dict of a `DiTTransformer2DModel`.

    Every block there has an embedding of its own. A network that shares one takes the first, after
    checking that the others are copies of it.

    Args:
      tensors: the checkpoint.
      network: its network.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape; or one that is no
        copy of the first block's.
    """
    names = {name: name for name in tensors}
    if not network.embedding_per_block:
        first = 'transformer_blocks.0.norm1.emb.'
        for name in [name for name in names if name.startswith(first)]:
            for i in range(1, network.num_layers):
                copy = name.replace('.0.', f'.{i}.', 1)
                if copy not in names:
                    continue
                if not np.array_equal(tensors[name], tensors[copy]):
                    raise ValueError(
                        f'{copy!r} is no copy of {name!r}: these blocks were trained apart; '
                        f'read them with embedding_per_block=True.'
                    )
                del names[copy]
    return read_params(tensors, _dit_shapes(network), diffusers_dit_source, names=names, **options)


def dit_params_from_original(
    tensors: Mapping[str, np.ndarray], network: DiT, **options: Any
) -> PyTree:
    """Parameters of `network` from a state dict of the original DiT code.

    Args:
      tensors: the checkpoint.
      network: its network, for example that of `dit_from_original`.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape; stored positions
        that are not those of `network`; a network with `embedding_per_block`.
    """
    if network.embedding_per_block:
        raise ValueError('embedding_per_block=True: original checkpoints have one embedding.')
    names = {name: name for name in tensors if name != 'pos_embed'}
    if 'pos_embed' in tensors:
        side = network.sample_size // network.patch_size
        width = network.num_heads * network.head_dim
        positions = position_features((side, side), width, base_size=side, scale=1.0)
        stored = np.asarray(tensors['pos_embed'], np.float32)
        if stored.shape != (1, *positions.shape):
            raise ValueError(
                f"'pos_embed' has shape {stored.shape}, expected {(1, *positions.shape)}."
            )
        error = np.abs(stored[0] - np.asarray(positions)).max()
        if not error <= _POSITION_TOLERANCE:
            raise ValueError(
                f"'pos_embed' differs by {error:.2g} from the sinusoids that DiT computes; learned "
                f'positions are not supported.'
            )
    return read_params(tensors, _dit_shapes(network), original_dit_source, names=names, **options)


def pixart_params_from_diffusers(
    tensors: Mapping[str, np.ndarray], network: PixArt, **options: Any
) -> PyTree:
    """Parameters of `network` from the state dict of a `PixArtTransformer2DModel`.

    Args:
      tensors: the checkpoint.
      network: its network.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    return read_params(tensors, _pixart_shapes(network), diffusers_pixart_source, **options)


def pixart_params_from_original(
    tensors: Mapping[str, np.ndarray], network: PixArt, **options: Any
) -> PyTree:
    """Parameters of `network` from a state dict of the original PixArt code.

    Two buffers are passed over: `pos_embed`, which the code computes anew for every image size, and
    `y_embedder.y_embedding`, the null caption, which is an input (`null_caption`).

    Args:
      tensors: the checkpoint (`checkpoint['state_dict']`).
      network: its network, for example that of `pixart_from_original`.
      **options: `dtype` and `put` of `torch_weights.read_params`.

    Raises:
      ValueError: naming a tensor that is missing, left over or of another shape.
    """
    names = {name: name for name in tensors if name not in ('pos_embed', _NULL_CAPTION)}
    return read_params(
        tensors, _pixart_shapes(network), original_pixart_source, names=names, **options
    )


def original_positions(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the positions in an original PixArt checkpoint tell of its network.

    Returns:
      'sample_size' and 'position_scale' of `pixart_from_original`; nothing where the checkpoint
      has no positions, or those of no published scale.
    """
    if 'pos_embed' not in tensors:
        return {}
    patch_size = _shape(tensors, 'x_embedder.proj.weight', 4)[2]
    _, count, width = _shape(tensors, 'pos_embed', 3)
    side = round(count**0.5)
    found = np.asarray(tensors['pos_embed'], np.float32)[0]
    for scale in (0.5, 1.0, 2.0, 4.0):
        wanted = position_features((side, side), width, base_size=side, scale=scale)
        if wanted.shape == found.shape and np.abs(found - wanted).max() < _POSITION_TOLERANCE:
            return {'sample_size': side * patch_size, 'position_scale': scale}
    return {}


_NULL_CAPTION = 'y_embedder.y_embedding'


def caption_length(tensors: Mapping[str, np.ndarray]) -> int | None:
    """Tokens of a caption of an original PixArt checkpoint; None where it has no null caption."""
    return _shape(tensors, _NULL_CAPTION, 2)[0] if _NULL_CAPTION in tensors else None


def null_caption(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The text [T, E] that stands for no caption in an original PixArt checkpoint.

    Raises:
      ValueError: the checkpoint has none.
    """
    _shape(tensors, _NULL_CAPTION, 2)
    return np.asarray(tensors[_NULL_CAPTION], np.float32)


def diffusers_from_dit_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `DiTTransformer2DModel` with these parameters."""
    tensors = write_tensors(params, diffusers_dit_source)
    first = 'transformer_blocks.0.'
    for name in [name for name in tensors if name.startswith(f'{first}norm1.emb.')]:
        for i in range(1, sum(path.startswith('block_') for path in params)):
            tensors.setdefault(name.replace('.0.', f'.{i}.', 1), tensors[name])
    return tensors


def diffusers_from_pixart_params(params: PyTree) -> dict[str, np.ndarray]:
    """The state dict of the `PixArtTransformer2DModel` with these parameters."""
    return write_tensors(params, diffusers_pixart_source)


def diffusers_dit_source(path: str) -> Source:
    """Where a `DiTTransformer2DModel` holds the parameter at `path` of a `DiT`."""
    path = path.replace('embed/', 'embed_0/', 1) if path.startswith('embed/') else path
    return Source(rename(path, _DIFFUSERS_DIT))


def diffusers_pixart_source(path: str) -> Source:
    """Where a `PixArtTransformer2DModel` holds the parameter at `path` of a `PixArt`."""
    if path.endswith(_TABLE):
        return Source(path.replace('block_', 'transformer_blocks.').replace('/', '.'))
    return Source(rename(path, _DIFFUSERS_PIXART))


def original_dit_source(path: str) -> Source:
    """Where the original code holds the parameter at `path` of a `DiT`."""
    return _original_source(path, _ORIGINAL_DIT)


def original_pixart_source(path: str) -> Source:
    """Where the original code holds the parameter at `path` of a `PixArt`."""
    if path == _TABLE:
        return Source(f'final_layer.{_TABLE}')
    if path.endswith(_TABLE):
        return Source(path.replace('block_', 'blocks.').replace('/', '.'))
    return _original_source(path, _ORIGINAL_PIXART)


def _original_source(path: str, table: tuple[tuple[str, str], ...]) -> Source:
    name = rename(path, table)
    if '.attn.qkv.' in name:
        return Source(name, part='qkv'.index(path.split('/')[-2]), parts=3)
    if '.kv_linear.' in name:
        return Source(name, part='kv'.index(path.split('/')[-2]), parts=2)
    return Source(name)


def _of_today(config: Mapping[str, Any], class_name: str, norm_type: str) -> Mapping[str, Any]:
    """`config` under the class that took over those of the old one with `norm_type`."""
    if config.get('_class_name') != _OLD_CLASS:
        return config
    if config.get('norm_type') != norm_type:
        raise unsupported('norm_type', config.get('norm_type'), (norm_type,), class_name=_OLD_CLASS)
    return {**config, '_class_name': class_name}


def _shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    in_channels, out_channels = settings['in_channels'], settings['out_channels']
    return {
        'in_channels': in_channels,
        'out_channels': in_channels if out_channels is None else out_channels,
        'num_layers': settings['num_layers'],
        'num_heads': settings['num_attention_heads'],
        'head_dim': settings['attention_head_dim'],
        'patch_size': settings['patch_size'],
        'sample_size': settings['sample_size'],
    }


def _shape(tensors: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f'1 tensors missing, e.g. {name!r}: is this the original layout?')
    shape = tuple(tensors[name].shape)
    if len(shape) != rank:
        raise ValueError(f'{name!r} has shape {shape}, expected {rank} axes.')
    return shape


def _num_blocks(tensors: Mapping[str, np.ndarray]) -> int:
    return len({name.split('.')[1] for name in tensors if name.startswith('blocks.')})


def _num_heads(width: int, head_dim: int) -> int:
    if width % head_dim:
        raise ValueError(f'head_dim={head_dim} does not divide the width {width} of the network.')
    return width // head_dim


def _latent(network: DiT | PixArt) -> jax.ShapeDtypeStruct:
    side = network.patch_size
    return jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)


def _dit_shapes(network: DiT) -> PyTree:
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    return parameter_shapes(network, _latent(network), number, number)


def _pixart_shapes(network: PixArt) -> PyTree:
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    width = network.caption_channels or network.num_heads * network.head_dim
    text = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    sizes = {}
    if network.size_conditions:
        sizes = {
            'resolution': jax.ShapeDtypeStruct((1, 2), jnp.float32),
            'aspect_ratio': jax.ShapeDtypeStruct((1,), jnp.float32),
        }
    return parameter_shapes(network, _latent(network), number, text, **sizes)
