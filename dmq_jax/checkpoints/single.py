"""Single files of DDIM, ADM, DiT, PixArt and CompVis as denoisers.

Such a file holds tensors and hardly a setting. Names and shapes tell most of a network; the rest is
looked up among the published ones, if exactly one of them has these tensors, or given by the user
(`teacher.settings`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from dmq_jax.checkpoints import process as process_lib
from dmq_jax.checkpoints import strangers, text
from dmq_jax.checkpoints.decoders import decoder_from_compvis, decoder_from_folder
from dmq_jax.checkpoints.opening import Tensors
from dmq_jax.checkpoints.options import Options, place, read_settings, unknown_settings
from dmq_jax.checkpoints.small_images import with_small_images
from dmq_jax.denoisers import Decoder, Denoiser, DenoiserInfo, float_denoiser
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.models import adm_weights, ddpm_weights, dit_weights, ldm_weights
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.models.torch_weights import expected_tensors, without_prefix
from dmq_jax.networks import TABLE, Conditioned, Network, unwrapped

_DDPM_PROCESS = {
    'beta_schedule': 'linear', 'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02,
}  # fmt: skip
# DDIM's networks have attention where the image is 16 pixels wide (arXiv:2006.11239, appendix B).
_DDIM_ATTENTION_SIDE = 16
# Channels of a head of DiT-XL; of DiT-L, -B and -S (arXiv:2212.09748, table 1), by width.
_DIT_HEAD_DIMS = {1152: 72, 1024: 64, 768: 64, 384: 64}
_LATENT_FACTOR = 8
_UNET, _AVERAGE = 'model.diffusion_model.', 'model_ema.diffusion_model'
_REFINER = 'conditioner.embedders.0.model.'
_CLASS_TABLE = 'cond_stage_model.embedding.weight'
# Tensors of a CompVis checkpoint that belong to no network: tables of the process, and counters.
_BUFFERS = (
    'betas', 'alphas_cumprod', 'sqrt_', 'log_one_minus', 'posterior_', 'lvlb_weights', 'logvar',
    'scale_factor', 'denoiser.', 'scheduler.',
)  # fmt: skip
_SD_PROCESS = {
    'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'beta_start': 0.00085,
    'beta_end': 0.012, 'scaling_factor': 0.18215,
}  # fmt: skip
# Side of the latents in training, which no tensor tells, by published name; and what else the
# configuration of the original says of the process.
_COMPVIS_PROCESSES: dict[str, dict[str, Any]] = {
    **{name: {'image_size': 64} for name in ('cin256-v2', 'lsun_bedrooms', 'celebahq', 'ffhq')},
    'lsun_churches': {'image_size': 32},
    'sd-v1': {**_SD_PROCESS, 'image_size': 64},
    'sd-v2': {**_SD_PROCESS, 'image_size': 96, 'prediction_type': 'v_prediction'},
    'sd-v2-base': {**_SD_PROCESS, 'image_size': 64},
    'sdxl': {**_SD_PROCESS, 'image_size': 128, 'scaling_factor': 0.13025},
}
_COMPVIS_NETWORKS = {
    **ldm_weights.PUBLISHED,
    'sd-v2-base': ldm_weights.PUBLISHED['sd-v2'],
}


def load_ddim(tensors: Tensors, options: Options) -> Denoiser:
    """A state dict of the DDIM code: CIFAR-10, CelebA, LSUN, or any of its networks."""
    _, given, process = read_settings(options, {})
    network = _ddim_network(tensors, given or {})
    side = process.pop('image_size', None)
    levels = [i for i, here in enumerate(network.down_attention) if here]
    if side is None:
        if len(levels) != 1:
            raise unknown_settings(
                tensors.path, f'attention on levels {levels} does not tell the size of the images '
                f"('image_size' in \"process\")",
            )  # fmt: skip
        side = _DDIM_ATTENTION_SIDE * 2 ** levels[0]
    params = ddpm_weights.params_from_ddim(tensors, network, **options.reading())
    return _finish(network, params, options, {**_DDPM_PROCESS, **process}, side=side)


def _ddim_network(tensors: Tensors, given: Mapping[str, Any]) -> DDPMUNet:
    def count(pattern: Callable[[int], str]) -> int:
        return next(i for i in range(100) if pattern(i) not in tensors)

    levels = count(lambda i: f'down.{i}.block.0.conv1.weight')
    blocks = count(lambda j: f'down.0.block.{j}.conv1.weight')
    first, in_channels = tensors.shape_of('conv_in.weight')[:2]
    channels = tuple(tensors.shape_of(f'down.{i}.block.0.conv1.weight')[0] for i in range(levels))

    def attention(way: str) -> tuple[bool, ...]:
        return tuple(f'{way}.{i}.attn.0.q.weight' in tensors for i in range(levels))

    if not channels or channels[0] != first:
        raise unknown_settings(
            tensors.path, f'the first level is {channels[:1]} wide, the convolution before it '
            f'{first}, which is not supported',
        )  # fmt: skip
    return DDPMUNet(
        **{
            'channels': channels,
            'in_channels': in_channels,
            'out_channels': tensors.shape_of('conv_out.weight')[0],
            'layers_per_block': blocks,
            'down_attention': attention('down'),
            'up_attention': attention('up')[::-1],
            'mid_attention': 'mid.attn_1.q.weight' in tensors,
            'head_dim': None,
            'num_groups': 32,
            'epsilon': 1e-6,
            'pad_downsample': 'asymmetric',
            'cos_first': False,
            'frequency_shift': 1,
            **given,
        }
    )


def load_adm(tensors: Tensors, options: Options) -> Denoiser:
    """A state dict of guided diffusion; its flags are looked up or given."""
    name, flags, process = read_settings(options, adm_weights.PUBLISHED)
    if flags is None:
        name, flags = find_published(tensors, 'adm')
    network = adm_weights.network_from_adm(flags)
    new_order = bool(flags.get('use_new_attention_order', False))
    params = adm_weights.params_from_adm(
        tensors, network, new_attention_order=new_order, **options.reading()
    )
    # The README of guided diffusion: cosine for 64 pixels, linear for all others.
    noise = flags.get('noise_schedule', 'cosine' if name == '64x64_diffusion' else 'linear')
    schedule = {'linear': 'linear', 'cosine': 'squaredcos_cap_v2'}.get(noise, noise)
    defaults = {**_DDPM_PROCESS, 'beta_schedule': schedule}
    defaults['num_train_timesteps'] = flags.get('diffusion_steps', 1000)
    process = {**defaults, **process}
    side = process.pop('image_size', None) or flags.get('large_size') or flags.get('image_size', 64)
    learned_variance = network.out_channels == 2 * network.in_channels
    num_classes = network.num_classes
    if network.low_res_channels:
        network, params, num_classes = with_small_images(network, params, options, side=side)
    elif options.low_res is not None:
        raise ValueError(
            f'teacher.low_res={options.low_res!r}, but this network enlarges nothing; expected '
            f'None.'
        )
    return _finish(
        network, params, options, process,
        side=side, learned_variance=learned_variance, num_classes=num_classes,
    )  # fmt: skip


def _adm_layout(flags: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    network = adm_weights.network_from_adm(flags)
    new_order = bool(flags.get('use_new_attention_order', False))

    def source(path: str) -> Any:
        return adm_weights.adm_source(path, network=network, new_attention_order=new_order)

    wanted = expected_tensors(adm_weights.adm_shapes(network), source)
    return (network, new_order), wanted


def load_dit(tensors: Tensors, options: Options) -> Denoiser:
    """An original DiT checkpoint; its autoencoder is a file of its own (`components`)."""
    _, given, process = read_settings(options, {})
    width = tensors.shape_of('x_embedder.proj.weight')[0]
    head_dim = (given or {}).get('head_dim', _DIT_HEAD_DIMS.get(width))
    if head_dim is None:
        raise unknown_settings(
            tensors.path, f"a width of {width} is that of no published DiT, so 'head_dim' in "
            f'"network" is needed',
        )  # fmt: skip
    network = dit_weights.dit_from_original(tensors, head_dim=head_dim)
    params = dit_weights.dit_params_from_original(tensors, network, **options.reading())
    return _finish(
        network, params, options, {**_DDPM_PROCESS, **process}, side=network.sample_size,
        learned_variance=network.out_channels == 2 * network.in_channels,
        num_classes=network.num_classes, decoder=decoder_from_folder(options),
    )  # fmt: skip


def load_pixart(tensors: Tensors, options: Options) -> Denoiser:
    """An original PixArt checkpoint; text encoder and autoencoder come from `components`."""
    _, given, process = read_settings(options, {})
    settings = {'head_dim': 72, **dit_weights.original_positions(tensors), **(given or {})}
    if not {'sample_size', 'position_scale'} <= settings.keys():
        raise unknown_settings(
            tensors.path, "no tensor tells 'sample_size' and 'position_scale' in \"network\" (128 "
            'and 2.0 for 1024 pixels; 32 and 0.5 for 256 pixels of Sigma, 1.0 of alpha)',
        )  # fmt: skip
    network = dit_weights.pixart_from_original(tensors, **settings)
    params = dit_weights.pixart_params_from_original(tensors, network, **options.reading())
    side, decoder = network.sample_size, decoder_from_folder(options)
    network, params, num_prompts, encode_prompts = text.with_prompts(
        network, params,
        lambda: text.encoders_from_folder(
            options.components, tensors.path, options.dtype,
            length=dit_weights.caption_length(tensors),
        ), options,
        size=(side * _pixels_of_a_latent(decoder),) * 2,
    )  # fmt: skip
    return _finish(
        network, params, options, {**_DDPM_PROCESS, **process}, side=side,
        learned_variance=network.network.out_channels == 2 * network.network.in_channels,
        num_classes=num_prompts, decoder=decoder, encode_prompts=encode_prompts,
    )  # fmt: skip


def load_compvis(tensors: Tensors, options: Options) -> Denoiser:
    """A checkpoint of latent diffusion or of Stable Diffusion, all its parts in one file."""
    name, config, process = read_settings(options, _COMPVIS_NETWORKS)
    unet, has_weights = _unet_of(tensors)
    if config is None:
        name, config = find_published(unet, 'compvis', without_dots=not has_weights)
        if name == 'sd-v2':
            raise unknown_settings(
                tensors.path, "the tensors of 'sd-v2' (768 pixels, predicts v) and 'sd-v2-base' "
                '(512 pixels, predicts eps) are the same',
            )  # fmt: skip
    network = ldm_weights.network_from_compvis(config)
    is_text = network.context_dim is not None and _CLASS_TABLE not in tensors
    ema = options.ema
    if ema is None:
        # The scripts of latent diffusion sample from the average, those of Stable Diffusion don't.
        ema = not has_weights or (
            not is_text and any(name.startswith('model_ema.') for name in tensors)
        )
    if not (ema or has_weights):
        raise ValueError('teacher.ema=False, but this file has the moving average alone.')
    _check_left_over(tensors)
    try:
        params = ldm_weights.params_from_compvis(tensors, network, ema=ema, **options.reading())
    except ValueError as error:
        if not ema:
            raise
        hint = ' (teacher.ema=False takes the weights themselves)' if has_weights else ''
        raise ValueError(f'of the moving average, model_ema.{hint}: {error}') from error
    process = {**_COMPVIS_PROCESSES.get(name or '', {}), **process}
    side = process.pop('image_size', config.get('image_size'))
    if not isinstance(side, int):
        raise unknown_settings(tensors.path, 'no \'image_size\' of the latents in "process"')
    scaling = float(process.pop('scaling_factor', 1.0))
    if 'scale_factor' in tensors:
        scaling = float(np.asarray(tensors['scale_factor'], np.float64))
    decoder = decoder_from_compvis(tensors, scaling) or decoder_from_folder(options)
    schedule = process_lib.schedule_from_buffers(tensors)
    num_classes = encode_prompts = None
    if is_text:
        network, params, num_classes, encode_prompts = text.with_prompts(
            network, params, lambda: text.encoders_from_compvis(tensors, options), options,
            size=(side * _pixels_of_a_latent(decoder),) * 2,
        )  # fmt: skip
    elif network.context_dim is not None:
        network, params, num_classes = _with_class_table(tensors, network, params)
    return _finish(
        network, params, options, process, side=side, num_classes=num_classes, decoder=decoder,
        schedule=schedule, encode_prompts=encode_prompts,
    )  # fmt: skip


def _unet_of(tensors: Tensors) -> tuple[Tensors, bool]:
    """The U-Net's tensors, and True; or, without dots in their names, those of its average alone.

    Raises:
      ValueError: a U-Net that is given more than noisy latents.
    """
    if any(name.startswith(_REFINER) for name in tensors):
        raise strangers.refiner()
    unet = tensors
    if f'{_UNET}input_blocks.0.0.weight' in tensors:
        unet = _stripped(tensors, _UNET)
    elif f'{_AVERAGE}input_blocks00weight' in tensors:
        return _stripped(tensors, _AVERAGE), False
    if 'out.2.weight' in unet:
        in_channels = unet.shape_of('input_blocks.0.0.weight')[1]
        strangers.check_channels(in_channels, unet.shape_of('out.2.weight')[0])
    return unet, True


def _pixels_of_a_latent(decoder: Decoder | None) -> int:
    return decoder.factor if decoder else _LATENT_FACTOR


def _with_class_table(
    tensors: Tensors, network: Any, params: PyTree
) -> tuple[Network, PyTree, int]:
    """The network behind its table of classes, whose last row is the null class."""
    _, embedding = ldm_weights.class_embedder_from_compvis(tensors, put=place)
    table = embedding['class_embed']['embedding'][:, None, :]
    rows, _, width = table.shape
    network = Conditioned(network, rows=(('context', (1, width)),), num_rows=rows)
    return network, {**params, TABLE: {'context': table}}, rows - 1


def _check_left_over(tensors: Tensors) -> None:
    known = (
        _UNET, 'model_ema.', 'first_stage_model.', 'cond_stage_model.',
        'conditioner.', *_BUFFERS,
    )  # fmt: skip
    if 'input_blocks.0.0.weight' in tensors:
        return  # the U-Net alone: its reader takes every tensor
    left_over = [name for name in tensors if not name.startswith(known)]
    if left_over:
        raise ValueError(
            f'{len(left_over)} tensors unused, e.g. {left_over[0]!r}: expected names that begin '
            f'with {", ".join(known[:4])} and tables of the process.'
        )


def _compvis_layout(config: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    network = ldm_weights.network_from_compvis(config)

    def source(path: str) -> Any:
        return ldm_weights.compvis_source(path, network=network)

    return network, expected_tensors(ldm_weights.ldm_shapes(network), source)


def find_published(
    tensors: Tensors, kind: str, *, without_dots: bool = False
) -> tuple[str, dict[str, Any]]:
    """The published network that has exactly these tensors, and its settings.

    Args:
      tensors: of the U-Net alone.
      kind: 'adm' or 'compvis'.
      without_dots: their names have lost their dots, as those of a moving average do.

    Raises:
      ValueError: none or more than one, which the tensors do not tell apart.
    """
    table, layout = {
        'adm': (adm_weights.PUBLISHED, _adm_layout),
        'compvis': (ldm_weights.PUBLISHED, _compvis_layout),
    }[kind]
    found: dict[Any, str] = {}
    key = {'adm': 'num_channels', 'compvis': 'model_channels'}[kind]
    width = tensors.shape_of('time_embed0weight' if without_dots else 'time_embed.0.weight')[1]
    for name, settings in table.items():
        # Most are ruled out by their width alone, without being traced.
        if settings.get(key) != width:
            continue
        network, wanted = layout(settings)
        if without_dots:
            wanted = {tensor.replace('.', ''): shape for tensor, shape in wanted.items()}
        if network not in found and _has_shapes(tensors, wanted):
            found[network] = name
    if len(found) == 1:
        name = next(iter(found.values()))
        return name, dict(table[name])
    what = 'no published network has these tensors'
    if found:
        what = f'more than one published network has these tensors ({", ".join(found.values())})'
    some = {**next(iter(table.values())), key: width}
    raise unknown_settings(
        tensors.path, f'{what} ({len(tensors)}, {width} channels), and they do not tell the rest '
        f'(heads of attention, image size)',
        example={'network': {'image_size': 64, **some}, 'process': {}},
    )  # fmt: skip


def _has_shapes(tensors: Any, wanted: Mapping[str, tuple[int, ...]]) -> bool:
    if wanted.keys() != set(tensors):
        return False
    for name, shape in wanted.items():
        found = tensors.shape_of(name)
        if found[: len(shape)] != shape or any(side != 1 for side in found[len(shape) :]):
            return False
    return True


def _stripped(tensors: Tensors, prefix: str) -> Tensors:
    return Tensors(tensors.path, tensors, without_prefix(tensors, prefix))


def _finish(
    network: Network,
    params: PyTree,
    options: Options,
    process: Mapping[str, Any],
    *,
    side: int,
    num_classes: int | None = None,
    learned_variance: bool = False,
    decoder: Decoder | None = None,
    schedule: Schedule | None = None,
    encode_prompts: Callable[[Sequence[str]], dict[str, Any]] | None = None,
) -> Denoiser:
    """The denoiser of what was read."""
    module = unwrapped(network)
    if options.num_classes not in (None, num_classes):
        raise ValueError(
            f'teacher.num_classes={options.num_classes}: this checkpoint has {num_classes}; '
            f'expected None.'
        )
    strangers.check_channels(module.in_channels, getattr(module, 'out_channels', None))
    if schedule is None:
        schedule, prediction = process_lib.process_from_settings(process, 'teacher.settings')
    else:
        prediction = process_lib.prediction_from_settings(process, 'teacher.settings')
    info = DenoiserInfo(
        schedule=schedule,
        prediction=prediction,
        image_shape=(side, side, module.in_channels),
        num_classes=num_classes,
        learned_variance=learned_variance,
        is_latent=isinstance(module, DiT | PixArt | LDMUNet),
    )
    return float_denoiser(network, params, info)._replace(
        decoder=decoder, encode_prompts=encode_prompts
    )


LOADERS: dict[str, Callable[[Tensors, Options], Denoiser]] = {
    'ddim': load_ddim,
    'adm': load_adm,
    'dit': load_dit,
    'pixart': load_pixart,
    'compvis': load_compvis,
}


def load(kind: str, tensors: Tensors, options: Options) -> Denoiser:
    """The denoiser in a single file of the kind given.

    Raises:
      ValueError: tensors that do not fit, or too little said of them; names the file.
    """
    try:
        return LOADERS[kind](tensors, options)
    except ValueError as error:
        path: Path = tensors.path
        if str(path) in str(error):
            raise
        raise ValueError(f'{path}: {error}') from error
