"""Float teachers: the bundled ones, our own format, and the checkpoints that people have.

`load_teacher` takes a name, a file or a folder; what it holds is told by its content. A teacher is
read in whole or refused: a missing, left-over or misshapen tensor is an error that names it. Files
are mapped into memory, and every tensor is converted and placed on its device before the next one
is read, so that loading takes little more memory than the teacher.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from dmq_jax import assets
from dmq_jax.checkpoints import folders, opening, single
from dmq_jax.checkpoints.options import Options
from dmq_jax.denoisers import (
    Denoiser,
    DenoiserInfo,
    float_denoiser,
    info_settings,
    make_info,
    make_network,
    network_settings,
    param_shapes,
)
from dmq_jax.files.safetensors import SafetensorsReader, open_safetensors
from dmq_jax.networks import Network
from dmq_jax.runtime import checkpoint

FORMAT = 'dmq_jax.teacher.1'
ORBAX_FORMAT = 'dmq_jax.teacher.orbax.1'
# A folder with these is a teacher in orbax' format.
_ORBAX_SETTINGS, _ORBAX_PARAMS = 'teacher.json', 'params'
_EXPORT = 'dmq_jax.export.1'
_BUNDLED = 'teacher.safetensors'
# Folders of a diffusers checkpoint that hold the network.
_COMPONENTS = ('unet', 'transformer')


def save_teacher(
    path: str | os.PathLike, teacher: Denoiser, metadata: dict[str, Any] | None = None
) -> None:
    """Writes a float teacher as one safetensors file, weights in float16, or in orbax' format.

    Args:
      path: the file, whose folder must exist; one without an ending becomes a folder that orbax
        writes, weights as they are.
      teacher: a float denoiser; the decoder of one of latents is not written.
      metadata: facts about its training, JSON values.
    """
    from safetensors.numpy import save_file

    described = {
        'network': json.dumps(network_settings(teacher.network)),
        'info': json.dumps(info_settings(teacher.info)),
        'training': json.dumps(metadata or {}),
    }
    if not Path(path).suffix:
        Path(path).mkdir(parents=True, exist_ok=True)
        checkpoint.save_tree(Path(path) / _ORBAX_PARAMS, teacher.params)
        text = json.dumps({'format': ORBAX_FORMAT, **described}, indent=2)
        (Path(path) / _ORBAX_SETTINGS).write_text(text + '\n')
        return
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaf, np.float16))
        for name, leaf in traverse_util.flatten_dict(teacher.params, sep='/').items()
    }
    save_file(tensors, path, {'format': FORMAT, **described})


def load_teacher(
    path: str | os.PathLike,
    num_classes: int | None = None,
    *,
    kind: str = 'auto',
    **options: Any,
) -> Denoiser:
    """A float teacher: a bundled name, a file of ours, or a checkpoint of another project.

    Known are folders saved by diffusers (components in subfolders or at the root; safetensors,
    sharded, .bin, variants such as fp16), state dicts of DDIM and of guided diffusion (ADM),
    checkpoints of CompVis (latent diffusion, Stable Diffusion), and those of DiT and PixArt, as
    safetensors or as torch.save wrote them; and the folder of `save_teacher`. No torch is needed,
    and nothing in a file is run.

    Args:
      path: name, file or folder.
      num_classes: classes of a diffusers folder of a U-Net. Row `num_classes` of its class table is
        then the null class; None takes every row for a class, which leaves no null class. All
        other files know theirs: None, or the same number.
      kind: one of `checkpoints.opening.KINDS`; 'auto' tells it by the tensors.
      **options: of `checkpoints.options.Options`: `settings` (what the file does not tell: a JSON
        file or a published name), `components` (a diffusers folder with what it lacks), `ema`,
        `dtype`, `prompts`, `negative_prompt`, `low_res` (the small images of an upsampler).

    Raises:
      FileNotFoundError: no such bundled name, file or folder, or a part that is missing.
      ValueError: a file or folder that is not a teacher or not of this kind, settings without a
        counterpart here, tensors that do not fit the network, or a number of classes that is not
        the teacher's.
    """
    chosen = Options(num_classes=num_classes, **options)
    file = assets.find(path, _BUNDLED)
    if kind not in ('auto', *opening.KINDS):
        raise ValueError(f'teacher.kind={kind!r}: expected auto, {", ".join(opening.KINDS)}.')
    if file.name == 'model_index.json':
        file = file.parent
    if file.is_dir():
        return _load_folder(_checkpoint_in(file), kind, chosen)
    if not file.is_file():
        raise FileNotFoundError(
            f'teacher.path={str(path)!r}: expected a bundled name '
            f'({", ".join(assets.names(_BUNDLED))}), a .safetensors file written by '
            f'dmq_jax.train_teacher, a checkpoint (.ckpt, .pt, .pth, .safetensors), or a diffusers '
            f'folder.'
        )
    if kind == 'dmq_jax' or (kind == 'auto' and _is_ours(file)):
        return _load_ours(file, chosen)
    tensors = opening.open_tensors(file, ema=chosen.ema)
    if kind == 'auto':
        kind = opening.recognise(tensors, file)
    else:
        opening.check_kind(kind, tensors, file)
    if kind == 'diffusers':
        # One component: its settings lie beside it, those of the process beside its folder.
        return folders.load(_checkpoint_in(file.parent), chosen)
    return single.load(kind, tensors, chosen)


def _checkpoint_in(folder: Path) -> Path:
    """The folder that is meant: of the hub's cache the snapshot, of one component the whole.

    Raises:
      ValueError: a folder of the cache with several snapshots, none of them the main one.
    """
    if (folder / 'snapshots').is_dir():
        reference = folder / 'refs' / 'main'
        if reference.is_file():
            return folder / 'snapshots' / reference.read_text().strip()
        found = sorted((folder / 'snapshots').iterdir())
        if len(found) != 1:
            raise ValueError(
                f'{folder}: {len(found)} snapshots and no refs/main; expected one; name a folder '
                f'in snapshots/.'
            )
        return found[0]
    is_part = folder.name in _COMPONENTS and (folder / 'config.json').is_file()
    return folder.parent if is_part and (folder.parent / 'scheduler').is_dir() else folder


def _load_folder(folder: Path, kind: str, options: Options) -> Denoiser:
    if (folder / 'manifest.json').is_file():
        raise ValueError(
            f'{folder}: a quantized network, not a float teacher; load it with dmq_jax.load.'
        )
    if (folder / _ORBAX_SETTINGS).is_file() and kind in ('auto', 'dmq_jax'):
        return _load_orbax(folder, options)
    if kind not in ('auto', 'diffusers'):
        raise ValueError(
            f'teacher.kind={kind!r}, but {folder} is a folder: expected a file, or kind '
            f"'diffusers'."
        )
    return folders.load(folder, options)


def _is_ours(file: Path) -> bool:
    """Whether a file says that we wrote it; so does one that lost its metadata, by its names."""
    if not opening.is_safetensors(file):
        return False
    tensors = open_safetensors(file)
    says_so = str(tensors.metadata.get('format')).startswith('dmq_jax.')
    return says_so or any(name.endswith('/kernel') for name in tensors)


def _load_ours(file: Path, options: Options) -> Denoiser:
    tensors = open_safetensors(file)
    found = tensors.metadata.get('format')
    if found != FORMAT:
        hint = '; load it with dmq_jax.load' if found == _EXPORT else ''
        raise ValueError(f'{file}: format is {found!r}, expected {FORMAT!r}{hint}.')
    network = make_network(json.loads(tensors.metadata['network']))
    info = make_info(json.loads(tensors.metadata['info']))
    return _ours(tensors, network, info, options, source=str(file))


def _load_orbax(folder: Path, options: Options) -> Denoiser:
    file = folder / _ORBAX_SETTINGS
    try:
        described = json.loads(file.read_text(encoding='utf-8'))
        if described['format'] != ORBAX_FORMAT:
            raise ValueError(f'format is {described["format"]!r}, expected {ORBAX_FORMAT!r}')
        network = make_network(json.loads(described['network']))
        info = make_info(json.loads(described['info']))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: not what save_teacher wrote ({error}).') from error
    tensors = traverse_util.flatten_dict(checkpoint.load_tree(folder / _ORBAX_PARAMS), sep='/')
    return _ours(tensors, network, info, options, source=str(folder))


def _ours(
    tensors: Mapping[str, Any],
    network: Network,
    info: DenoiserInfo,
    options: Options,
    *,
    source: str,
) -> Denoiser:
    if options.num_classes not in (None, info.num_classes):
        raise ValueError(
            f'teacher.num_classes={options.num_classes}: {source} says that it has '
            f'{info.num_classes}; expected None.'
        )
    check_tensors(network, info, tensors, source=source)
    if isinstance(tensors, SafetensorsReader):
        tensors = opening.Tensors(tensors.path, tensors, {name: name for name in tensors})
    return float_denoiser(network, options.params(tensors.items()), info)


def check_tensors(
    network: Network,
    info: DenoiserInfo,
    tensors: SafetensorsReader | Mapping[str, Any],
    *,
    source: str,
) -> None:
    """Refuses tensors that are not exactly the parameters of `network`.

    Raises:
      ValueError: naming the first missing, left-over or misshapen tensor.
    """
    expected = param_shapes(network, info)
    expected = traverse_util.flatten_dict(expected, sep='/')
    missing = sorted(expected.keys() - tensors.keys())
    left_over = sorted(tensors.keys() - expected.keys())
    if missing:
        raise ValueError(
            f'{source}: {len(missing)} tensors missing, e.g. {missing[0]!r}'
            f'{_nearest(missing[0], left_over)}.'
        )
    if left_over:
        raise ValueError(
            f'{source}: {len(left_over)} tensors unused, e.g. {left_over[0]!r}'
            f'{_nearest(left_over[0], expected)}: other network?'
        )
    for name, leaf in expected.items():
        has_shapes = isinstance(tensors, SafetensorsReader)
        shape = tensors.shape_of(name) if has_shapes else tuple(tensors[name].shape)
        if shape != leaf.shape:
            raise ValueError(f'{source}: {name!r} has shape {shape}, expected {leaf.shape}.')


def _nearest(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1)
    return f' (nearest: {near[0]!r})' if near else ''
