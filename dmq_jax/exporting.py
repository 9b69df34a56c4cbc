"""Learnt state -> packed integers and a manifest, and back to a denoiser that runs them.

An export needs neither the method, nor the low-rank updates, nor the teacher: it holds packed
codes, scales, zero points, tables over timesteps, the parameters left in float, and
`manifest.json`, which says how to read the rest. The tensors are written as safetensors, which any
language reads, and as an orbax checkpoint.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int

from dmq_jax import denoisers
from dmq_jax.files.safetensors import open_safetensors
from dmq_jax.methods.base import (
    Bound,
    Correction,
    Tables,
    with_kernels,
    with_leaves,
    without_kernels,
)
from dmq_jax.quant.codes import integer_weight
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantizedTensor, QuantSpec, dequantize, pack
from dmq_jax.runtime import checkpoint, log
from kernels import choices

FORMAT = 'dmq_jax.export.1'
_DECODER = 'decoder.safetensors'
# As one program a shape: operation by operation, those of a network take seconds to compile.
_integer_weight = jax.jit(integer_weight, static_argnums=1)
_dequantize = jax.jit(dequantize)


class Exported(NamedTuple):
    """A quantized network by itself.

    Attributes:
      network: the float Flax module it is a quantization of.
      info: schedule, prediction type, image shape, classes.
      plan: what is quantized, and how.
      lookup: how the row of a table is found.
      timesteps: of the rows of the tables.
      weights: packed kernels by path.
      tables: scales and zero points of the activations.
      params: everything left in float.
      decoder: of its latents, in float; None for a network that draws images.
      channels: factors of single channels by path; see `methods.base.Bound`.
      channel_timesteps: of the rows of `channels`.
      branches: products in float beside those of integers; see `methods.base.Bound`.
      correction: of the prediction; None: none.
    """

    network: Any
    info: denoisers.DenoiserInfo
    plan: dict[str, LayerSpec]
    lookup: str
    timesteps: Int[np.ndarray, 'S']
    weights: dict[str, QuantizedTensor]
    tables: Tables
    params: Any
    decoder: denoisers.Decoder | None = None
    channels: Mapping[str, Mapping[str, np.ndarray]] = {}
    channel_timesteps: Float[np.ndarray, 'E'] | None = None
    branches: Mapping[str, Mapping[str, np.ndarray]] = {}
    correction: Correction | None = None


def make(
    teacher: denoisers.Denoiser,
    plan: dict[str, LayerSpec],
    bound: Bound,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
) -> Exported:
    """Packs what `method.bind` returned."""
    bound = jax.device_get(bound)
    weights = {
        path: pack(weight.codes, weight.scale, weight.zero_point, spec=plan[path].weight)
        for path, weight in bound.weights.items()
    }
    params = with_leaves(jax.device_get(teacher.params), bound.params)
    tables = {
        path: {
            role: {
                name: np.round(entry).astype(np.int32)
                if name == 'zero_point'
                else np.asarray(entry, np.float32)
                for name, entry in table.items()
            }
            for role, table in roles.items()
        }
        for path, roles in bound.tables.items()
    }
    return Exported(
        network=teacher.network,
        info=teacher.info,
        plan=plan,
        lookup=lookup,
        timesteps=np.asarray(timesteps, np.int32),
        weights=weights,
        tables=tables,
        params=without_kernels(params, weights),
        decoder=teacher.decoder and teacher.decoder._replace(read_encoder=None),
        channels=jax.tree.map(lambda a: np.asarray(a, np.float32), dict(bound.channels)),
        channel_timesteps=bound.channel_timesteps,
        branches=jax.tree.map(lambda a: np.asarray(a, np.float16), dict(bound.branches)),
        correction=jax.tree.map(lambda a: np.asarray(a, np.float32), bound.correction),
    )


def denoiser(exported: Exported, mode: str = 'integer') -> denoisers.Denoiser:
    """The exported network, ready to sample.

    Args:
      exported: from `make` or `load`.
      mode: 'integer' multiplies int8 codes into int32; 'fake' does the same in float.

    Raises:
      ValueError: an unknown mode.
    """
    if mode not in ('integer', 'fake'):
        raise ValueError(f"mode={mode!r}: expected 'integer' or 'fake'.")
    as_float32 = functools.partial(jax.tree.map, lambda a: np.asarray(a, np.float32))
    of_channels = exported.channel_timesteps
    params = {
        'tables': as_float32(exported.tables),
        'timesteps': exported.timesteps,
        'channels': dict(exported.channels),
        'channel_timesteps': np.zeros(1, np.float32) if of_channels is None else of_channels,
        'branches': as_float32(dict(exported.branches)),
    }
    if exported.correction is not None:
        params['correction'] = exported.correction._asdict()
    if mode == 'integer':
        params['params'] = exported.params
        params['weights'] = {
            path: _integer_weight(weight, exported.plan[path].inputs)
            for path, weight in exported.weights.items()
        }
    else:
        kernels = {path: _dequantize(w) for path, w in exported.weights.items()}
        params['params'] = with_kernels(exported.params, kernels)
    # Copies: a CPU would go on reading the file that they were loaded from.
    params = jax.tree.map(lambda a: np.array(a) if isinstance(a, np.ndarray) else a, params)
    params = jax.device_put(params)
    predict = denoisers.QuantizedPredict(
        exported.network, tuple(exported.plan.items()), exported.lookup, mode
    )
    return denoisers.Denoiser(predict, params, exported.info, exported.network, exported.decoder)


class Implementation(NamedTuple):
    """What computes one layer of an export.

    Attributes:
      name: the back ends of its kernels, such as 'xla'; 'float' where only one operand is
        quantized, or none is multiplied.
      reason: why each was chosen.
    """

    name: str
    reason: str


def implementations(exported: Exported, batch_size: int = 8) -> dict[str, Implementation]:
    """What runs each quantized layer on this platform, by path; nothing is computed.

    Args:
      exported: from `make` or `load`.
      batch_size: images per call; decides sizes, and with them choices.
    """
    calls: dict[str, list[choices.Call]] = {}
    params = jax.eval_shape(lambda: denoiser(exported).params)
    inputs = denoisers.example_inputs(exported.info, batch_size)
    predict = denoisers.QuantizedPredict(
        exported.network, tuple(exported.plan.items()), exported.lookup, 'integer'
    )
    jax.eval_shape(lambda *arguments: predict(*arguments, calls=calls), params, *inputs)
    return {path: _implementation(made) for path, made in calls.items()}


def _implementation(calls: list[choices.Call]) -> Implementation:
    if not calls:
        return Implementation('float', 'no product of two quantized operands')
    names = dict.fromkeys(call.implementation for call in calls)
    reasons = dict.fromkeys(f'{call.op} {call.problem.mode}: {call.reason}' for call in calls)
    return Implementation(', '.join(names), ' | '.join(reasons))


def size_bytes(exported: Exported) -> int:
    """Bytes of codes, scales, zero points, tables, float parameters; of no decoder of latents."""
    tensors = _tensors(exported)
    return sum(a.nbytes for a in tensors.values())


def _tensors(exported: Exported) -> dict[str, np.ndarray]:
    """Every array, by the name it has in the file."""
    tensors = {'timesteps': exported.timesteps}
    for path, weight in exported.weights.items():
        tensors[f'weights/{path}/packed'] = np.asarray(weight.packed)
        tensors[f'weights/{path}/scale'] = np.asarray(weight.scale)
        if not weight.spec.symmetric:
            tensors[f'weights/{path}/zero_point'] = np.asarray(weight.zero_point).astype(np.uint8)
    for path, roles in exported.tables.items():
        for role, table in roles.items():
            for name, entry in table.items():
                # Codes of up to 8 bits: a byte holds every zero point; of 16 bits, two.
                bits = exported.plan[path].activation(role).bits
                whole = np.uint8 if bits <= 8 else np.uint16
                kept = whole if name == 'zero_point' else np.float32
                tensors[f'tables/{path}/{role}/{name}'] = np.asarray(entry).astype(kept)
    if exported.channel_timesteps is not None:
        tensors['channel_timesteps'] = np.asarray(exported.channel_timesteps, np.float32)
    for path, factors in exported.channels.items():
        for end, factor in factors.items():
            tensors[f'channels/{path}/{end}'] = np.asarray(factor)
    for path, branch in exported.branches.items():
        for name, half in branch.items():
            tensors[f'branches/{path}/{name}'] = np.asarray(half)
    if exported.correction is not None:
        for name, table in exported.correction._asdict().items():
            tensors[f'correction/{name}'] = np.asarray(table)
    for name, leaf in traverse_util.flatten_dict(exported.params, sep='/').items():
        tensors[f'params/{name}'] = np.asarray(leaf, np.float32)
    return tensors


def save(path: str | os.PathLike, exported: Exported, facts: dict[str, Any] | None = None) -> None:
    """Writes `model.safetensors`, `orbax/` and `manifest.json` into the folder `path`.

    The decoder of latents, where there is one, becomes `decoder.safetensors`.

    Args:
      path: a folder, made if absent.
      exported: what to write.
      facts: JSON values kept in the manifest, such as the method and its duration.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(a) for name, a in _tensors(exported).items()}
    save_file(tensors, path / 'model.safetensors', {'format': FORMAT})
    checkpoint.save_tree(path / 'orbax', traverse_util.unflatten_dict(tensors, sep='/'))
    if exported.decoder is not None:
        flat = traverse_util.flatten_dict(jax.device_get(exported.decoder.params), sep='/')
        decoder = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
        network = json.dumps(denoisers.network_settings(exported.decoder.network))
        save_file(decoder, path / _DECODER, {'format': FORMAT, 'network': network})
    manifest = {
        'format': FORMAT,
        'network': denoisers.network_settings(exported.network),
        'info': denoisers.info_settings(exported.info),
        'lookup': exported.lookup,
        'plan': {p: dataclasses.asdict(spec) for p, spec in exported.plan.items()},
        'shapes': {p: list(w.shape) for p, w in exported.weights.items()},
        'tensors': {name: list(a.shape) for name, a in tensors.items()},
        'packing': 'split along the contraction axis: kernels/packing.py',
        'size_bytes': size_bytes(exported),
        'revision': log.git_revision(),
        'versions': log.versions(),
        'facts': facts or {},
    }
    log.write_json(path / 'manifest.json', manifest)


def is_export(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder made by an export."""
    return (Path(path) / 'manifest.json').is_file()


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the export in the folder `path`.

    Raises:
      FileNotFoundError: no export there.
      ValueError: another format.
    """
    file = Path(path) / 'manifest.json'
    if not file.is_file():
        raise FileNotFoundError(f'{path}: no manifest.json; expected a folder made by an export.')
    manifest = json.loads(file.read_text())
    if manifest.get('format') != FORMAT:
        raise ValueError(f'{file}: format is {manifest.get("format")!r}, expected {FORMAT!r}.')
    return manifest


def load(path: str | os.PathLike) -> Exported:
    """Reads an export: `model.safetensors`, or `orbax/` where that file is absent.

    Raises:
      FileNotFoundError: no export there.
      ValueError: another format, a file that is cut off, or other tensors than the manifest names.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if (path / 'model.safetensors').is_file():
        tensors = dict(open_safetensors(path / 'model.safetensors'))
    else:
        tensors = traverse_util.flatten_dict(checkpoint.load_tree(path / 'orbax'), sep='/')
    shapes = {name: list(a.shape) for name, a in tensors.items()}
    for name in sorted(shapes.keys() | manifest['tensors'].keys()):
        found, expected = shapes.get(name), manifest['tensors'].get(name)
        if found != expected:
            raise ValueError(
                f'{path}: tensor {name!r} has shape {found}, the manifest says {expected} (None: '
                f'no such tensor); the export is damaged, make it again.'
            )
    plan = {p: _layer_spec(spec) for p, spec in manifest['plan'].items()}
    weights, tables, params = {}, {}, {}
    beside: dict[str, dict[str, dict[str, np.ndarray]]] = {'channels': {}, 'branches': {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition('/')
        if kind == 'params':
            params[rest] = tensor
        elif kind == 'tables':
            layer, role, field = rest.rsplit('/', 2)
            tables.setdefault(layer, {}).setdefault(role, {})[field] = tensor
        elif kind in beside:
            layer, field = rest.rsplit('/', 1)
            beside[kind].setdefault(layer, {})[field] = tensor
    for layer, shape in manifest['shapes'].items():
        packed, scale = (tensors[f'weights/{layer}/{f}'] for f in ('packed', 'scale'))
        zero_point = tensors.get(f'weights/{layer}/zero_point', np.zeros(scale.shape, np.uint8))
        weights[layer] = QuantizedTensor(
            packed, scale, zero_point.astype(np.int32), plan[layer].weight, tuple(shape)
        )
    correction = None
    if 'correction/gain' in tensors:
        correction = Correction(**{n: tensors[f'correction/{n}'] for n in Correction._fields})
    return Exported(
        network=denoisers.make_network(manifest['network']),
        info=denoisers.make_info(manifest['info']),
        plan=plan,
        lookup=manifest['lookup'],
        timesteps=tensors['timesteps'],
        weights=weights,
        tables=tables,
        params=traverse_util.unflatten_dict(params, sep='/'),
        decoder=_load_decoder(path / _DECODER),
        channel_timesteps=tensors.get('channel_timesteps'),
        correction=correction,
        **beside,
    )


def _load_decoder(file: Path) -> denoisers.Decoder | None:
    if not file.is_file():
        return None
    tensors = open_safetensors(file)
    network = denoisers.make_network(json.loads(tensors.metadata['network']))
    return denoisers.Decoder(network, traverse_util.unflatten_dict(dict(tensors), sep='/'))


def _layer_spec(settings: dict[str, Any]) -> LayerSpec:
    # An export of an earlier release has no entry 'lhs'.
    specs = {
        name: None if settings.get(name) is None else QuantSpec(**settings[name])
        for name in ('weight', 'inputs', 'lhs')
    }
    return LayerSpec(**(settings | specs))
