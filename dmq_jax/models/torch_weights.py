"""Torch checkpoints as parameters of our networks, whatever the family.

A family's own module (`ddpm_weights`, `adm_weights`, `ldm_weights`, ...) knows names and settings;
here is what they share, and the only place that transposes checkpoint tensors. A family says, for
every parameter of its network, which tensor of the checkpoint holds it:

    def source(path: str) -> Source:                 # 'mid/attention_0/q/kernel' -> ...
        return Source(rename(path, TABLE))           # a table of regular expressions
        return Source('mid.attn.qkv.weight', part=0, parts=3)           # a third of a fused tensor

and then, with `shapes = parameter_shapes(network, x, t)`, nothing of which is computed,

    params = read_params(tensors, shapes, source)    # strict: every tensor, every shape
    tensors = write_tensors(params, source)          # the inverse
    wanted = expected_tensors(shapes, source)        # names and shapes that a checkpoint must have

`tensors` is any mapping from names to arrays; they may be views of a file mapped into memory. They
are converted a few at a time, and each is handed to `put` as soon as it is ready, so that a caller
who places them on a device there never has two copies of the network. Of a parameter that is spread
over the devices of several processes, a `put` that is a `PartialPut` makes each convert its own
parts, and read no more of the file than holds them.

Torch stores Linear as [O, I] and Conv2d as OIHW; Flax wants [I, O] and HWIO. A 1x1 convolution
([O, I, 1] or [O, I, 1, 1]) whose place is a dense layer is taken as one.

`read_settings` and `choose` do for a `config.json` what `read_params` does for tensors: whatever
has no counterpart here is refused by name.
"""

import collections
import concurrent.futures
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

# Rows (a pattern for the path of a module, its name there); the first match wins.
Table = tuple[tuple[str, str], ...]

# Of memory that XLA takes over without a copy.
_ALIGNMENT = 64
# Tensors that are converted at the same time, each on a core of its own.
_COPIED_AT_ONCE = 4
_OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


class Source(NamedTuple):
    """Where a checkpoint holds a parameter.

    Attributes:
      name: of the tensor.
      part: which of the `parts` equal pieces along the tensor's first axis is meant.
      parts: pieces that share the tensor; the others must have a parameter each.
      heads: the first axis is divided into `heads` first, and each of these into `parts`: with 1
        a fused tensor is (q of all heads, k of all heads, v of all heads), otherwise (q, k, v of
        the first head, q, k, v of the second, ...).
      transposed: kernels are stored in torch's order; False where a file has Flax's.
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 1
    transposed: bool = True


# A part of an array: a slice for every axis.
Index = tuple[slice, ...]
# What a parameter becomes, by its path.
Put = Callable[[str, np.ndarray], Any]


class PartialPut(Protocol):
    """A `Put` that keeps parts of every parameter, and need not be given the rest."""

    def __call__(self, path: str, array: np.ndarray) -> Any:
        """What takes the place of a parameter that is at hand in whole."""

    def indices(self, path: str, shape: tuple[int, ...]) -> list[Index]:
        """The parts of a parameter that are kept here, each once."""

    def join(self, path: str, shape: tuple[int, ...], parts: list[np.ndarray]) -> Any:
        """What takes the place of a parameter of which these are the parts of `indices`."""


def rename(path: str, table: Table) -> str:
    """The name of the parameter at `path`: that of its module in `table`, `.weight` or `.bias`.

    The leaves `kernel`, `scale` and `embedding` are all called `weight` in torch.
    """
    module, _, leaf = path.rpartition('/')
    for pattern, name in table:
        if match := re.fullmatch(pattern, module):
            return f'{match.expand(name)}.{"bias" if leaf == "bias" else "weight"}'
    raise AssertionError(f'{path} is in no row of the table of names')


def without_prefix(tensors: Iterable[str], prefix: str) -> dict[str, str]:
    """The `names` for `read_params` of the tensors under `prefix`, which the file leaves on."""
    return {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}


def without_old_attention(tensors: Iterable[str]) -> dict[str, str]:
    """The `names` for `read_params` of a diffusers file, whichever way it spells attention.

    Before 2023 `to_q` was called `query`, `to_out.0` `proj_attn`; published files still do.
    """
    names = {}
    for name in tensors:
        head, _, leaf = name.rpartition('.')
        block, _, layer = head.rpartition('.')
        is_old = '.attentions.' in name and layer in _OLD_ATTENTION
        names[f'{block}.{_OLD_ATTENTION[layer]}.{leaf}' if is_old else name] = name
    return names


def parameter_shapes(network: nn.Module, *inputs: Any, **named: Any) -> PyTree:
    """Shapes of the parameters, nothing computed; inputs may be `jax.ShapeDtypeStruct`."""
    leaves, structure = jax.tree.flatten((inputs, named))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    # Dictionaries of the caller's own: what is remembered stays as it is.
    return jax.tree.map(lambda leaf: leaf, _traced_shapes(network, shapes, structure))


# To trace a network takes seconds, and whoever reads a checkpoint asks several times.
@functools.lru_cache(maxsize=64)
def _traced_shapes(
    network: nn.Module, leaves: tuple[jax.ShapeDtypeStruct, ...], structure: Any
) -> PyTree:
    inputs, named = jax.tree.unflatten(structure, leaves)
    shapes = jax.eval_shape(
        lambda *a, **k: network.init(jax.random.key(0), *a, **k), *inputs, **named
    )
    return shapes['params']


def expected_tensors(shapes: PyTree, source: Callable[[str], Source]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a checkpoint of these parameters must have.

    Dense kernels are given as [O, I]; a checkpoint may have further axes of length 1.

    Args:
      shapes: the parameters, or anything with their shapes.
      source: from a path such as 'mid/block_0/conv1/kernel' to where it is.
    """
    expected: dict[str, tuple[int, ...]] = {}
    places: dict[str, list[Source]] = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
        where = source(path)
        shape = _to_torch(path, np.broadcast_to(np.False_, leaf.shape), where).shape
        expected[where.name] = (shape[0] * where.parts, *shape[1:]) if shape else ()
        places.setdefault(where.name, []).append(where)
    for name, holders in places.items():
        parts = sorted(where.part for where in holders)
        assert parts == list(range(holders[0].parts)), f'{name}: parameters take parts {parts}'
    return expected


def read_params(
    tensors: Mapping[str, np.ndarray],
    shapes: PyTree,
    source: Callable[[str], Source],
    *,
    names: Mapping[str, str] | None = None,
    dtype: Any = np.float32,
    put: Put | PartialPut | None = None,
) -> PyTree:
    """Parameters of a network from the tensors of a checkpoint, no more and no fewer.

    Args:
      tensors: the checkpoint; each tensor is asked for once per parameter it holds, and once
        for its shape unless the mapping has a method `shape_of(name)`.
      shapes: what `parameter_shapes` says of the network.
      source: from the path of a parameter to where the checkpoint has it.
      names: from a name that `source` gives to the key in `tensors`, where they differ; keys of
        `tensors` that are not among its values are passed over. None: every key, as it is.
      dtype: of the parameters.
      put: what it returns takes the place of an array; see `put_params`.

    Raises:
      ValueError: naming the first tensor that is missing, left over, of another shape or no float,
        or the first parameter that is not finite.
    """
    names = {name: name for name in tensors} if names is None else names
    expected = expected_tensors(shapes, source)
    missing = sorted(expected.keys() - names.keys())
    left_over = sorted(names.keys() - expected.keys())
    if missing:
        near = [names[name] for name in _nearest(missing[0], left_over)]
        raise ValueError(f'{len(missing)} tensors missing, e.g. {missing[0]!r}{_hint(near)}.')
    if left_over:
        near = _nearest(left_over[0], expected)
        raise ValueError(
            f'{len(left_over)} tensors unused, e.g. {names[left_over[0]]!r}{_hint(near)}: '
            f'another network?'
        )
    # Before the first conversion: a file of gigabytes is refused in a second.
    for name, wanted in expected.items():
        found = _shape_of(tensors, names[name])
        ones = (1,) * (len(found) - len(wanted)) if len(wanted) == 2 else ()
        if found != wanted + ones:
            raise ValueError(f'{names[name]!r} has shape {found}, expected {wanted}.')

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
            where = source(path)
            tensor = np.asarray(tensors[names[where.name]])
            if tensor.dtype.kind in 'biuc':
                raise ValueError(
                    f'{names[where.name]!r} is of dtype {tensor.dtype}, expected floating point: '
                    f'quantized already?'
                )
            tensor = _piece(tensor, where)
            tensor = _from_torch(path, tensor, leaf.shape, where)
            assert tensor.shape == leaf.shape, f'{path}: {tensor.shape} is not {leaf.shape}'
            yield path, tensor

    return put_params(read(), dtype=dtype, put=put)


def put_params(
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: Any = np.float32,
    put: Put | PartialPut | None = None,
) -> PyTree:
    """Parameters from arrays by path, in order, which may be views of a file.

    Args:
      arrays: paths and arrays; of each one is read what `put` keeps, a few arrays at a time.
      dtype: of the parameters.
      put: called with path and array; what it returns takes the place of the array. One that is a
        `PartialPut` is given the parts that it keeps.

    Raises:
      ValueError: a parameter has values that are not finite; names it.
    """
    dtype, is_partial = np.dtype(dtype), hasattr(put, 'indices')
    flat = {}
    for path, shape, parts in _copied(arrays, dtype, put.indices if is_partial else _whole):
        if is_partial:
            flat[path] = put.join(path, shape, parts)
        else:
            flat[path] = parts[0] if put is None else put(path, parts[0])
    return traverse_util.unflatten_dict(flat, sep='/')


def write_tensors(params: PyTree, source: Callable[[str], Source]) -> dict[str, np.ndarray]:
    """The checkpoint that `read_params` reads as `params`, dtypes as they are."""
    pieces: dict[str, dict[int, np.ndarray]] = {}
    heads = {}
    for path, array in traverse_util.flatten_dict(params, sep='/').items():
        where = source(path)
        pieces.setdefault(where.name, {})[where.part] = _to_torch(path, np.asarray(array), where)
        heads[where.name] = where.heads
    return {
        name: _fused([found[part] for part in sorted(found)], heads[name])
        for name, found in pieces.items()
    }


def read_settings(
    config: Mapping[str, Any],
    *,
    class_name: str,
    defaults: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    without_effect: Iterable[str] = (),
) -> dict[str, Any]:
    """The settings of a `config.json`, completed by what its class takes where it is silent.

    Args:
      config: the file; names that begin with an underscore are remarks of diffusers.
      class_name: the `_class_name` that it may have.
      defaults: every setting that has a counterpart here.
      fixed: settings that our network has one answer to, with the accepted values.
      without_effect: settings that change nothing at inference.

    Raises:
      ValueError: another class, a setting that is not known, or a value without a counterpart.
    """
    if config.get('_class_name', class_name) != class_name:
        raise ValueError(f'_class_name={config["_class_name"]!r}: expected {class_name}.')
    for name, value in config.items():
        if name in fixed and _hashable(value) not in map(_hashable, fixed[name]):
            raise unsupported(name, value, fixed[name], class_name=class_name)
        known = name in fixed or name in defaults or name in without_effect
        if not known and not name.startswith('_'):
            raise ValueError(f'{name}={value!r}: not a setting of {class_name} that is known here.')
    return {**defaults, **{name: value for name, value in config.items() if name in defaults}}


def choose(name: str, table: Mapping[Any, Any], value: Any, *, class_name: str) -> Any:
    """The entry of `table` for the value of setting `name`.

    Raises:
      ValueError: the table has none.
    """
    if _hashable(value) not in table:
        raise unsupported(name, value, table, class_name=class_name)
    return table[value]


def unsupported(name: str, value: Any, accepted: Iterable[Any], *, class_name: str) -> ValueError:
    """The error for a value that our network has no counterpart of."""
    return ValueError(
        f'{name}={value!r} of {class_name} is not supported; expected '
        f'{" or ".join(repr(a) for a in accepted)}.'
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _whole(path: str, shape: tuple[int, ...]) -> list[Index]:
    return [(slice(None),) * len(shape)]


def _copied(
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
    indices: Callable[[str, tuple[int, ...]], list[Index]],
) -> Iterator[tuple[str, tuple[int, ...], list[np.ndarray]]]:
    """Path, shape and parts of every tensor in order, each copied to `dtype` and row-major order.

    A few tensors are copied at a time.
    """

    def copies(path: str, tensor: np.ndarray, parts: list[Index]) -> list[np.ndarray]:
        made = [_copy(tensor[part], dtype) for part in parts]
        if not all(map(_is_finite, made)):
            raise ValueError(
                f'parameter {path!r} has values that are not finite: is the file damaged, or did '
                f'its weights overflow in half precision?'
            )
        return made

    with concurrent.futures.ThreadPoolExecutor(_COPIED_AT_ONCE) as threads:
        waiting: collections.deque[tuple[Any, ...]] = collections.deque()
        for path, tensor in tensors:
            future = threads.submit(copies, path, tensor, indices(path, tensor.shape))
            waiting.append((path, tensor.shape, future))
            if len(waiting) == _COPIED_AT_ONCE:
                path, shape, future = waiting.popleft()
                yield path, shape, future.result()
        for path, shape, future in waiting:
            yield path, shape, future.result()


def _copy(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`tensor` in memory that a device on the host may take over as it is."""
    if dtype != tensor.dtype and dtype.itemsize <= tensor.dtype.itemsize:
        # NumPy rounds to bfloat16 four times faster in the order in which values are stored.
        tensor = tensor.astype(dtype, order='K')
    size = tensor.size * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    array = raw[start : start + size].view(dtype).reshape(tensor.shape)
    np.copyto(array, tensor, casting='unsafe')
    return array


def _is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity."""
    if array.size == 0:
        return True
    if array.dtype.itemsize == 2:  # NumPy compares numbers of 16 bits one by one
        exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
        return not np.any((array.view(np.uint16) & exponent) == exponent)
    with np.errstate(invalid='ignore'):
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _nearest(name: str, candidates: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, candidates, n=1)


def _hint(near: list[str]) -> str:
    return f' (nearest: {near[0]!r})' if near else ''


def _shape_of(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    if hasattr(tensors, 'shape_of'):
        return tuple(tensors.shape_of(name))
    return tuple(tensors[name].shape)


def _piece(tensor: np.ndarray, where: Source) -> np.ndarray:
    if where.parts == 1:
        return tensor
    split = tensor.reshape(where.heads, where.parts, -1, *tensor.shape[1:])
    return split[:, where.part].reshape(-1, *tensor.shape[1:])


def _fused(pieces: list[np.ndarray], heads: int) -> np.ndarray:
    if len(pieces) == 1:
        return np.asarray(pieces[0], order='C')
    rest = pieces[0].shape[1:]
    split = [piece.reshape(heads, 1, -1, *rest) for piece in pieces]
    return np.concatenate(split, axis=1).reshape(-1, *rest)


def _is_kernel(path: str, where: Source) -> bool:
    return path.endswith('/kernel') and where.transposed


def _from_torch(path: str, tensor: np.ndarray, shape: tuple[int, ...], where: Source) -> np.ndarray:
    if not _is_kernel(path, where):
        return tensor
    if len(shape) == 2:
        tensor = tensor.reshape(tensor.shape[:2])
    return np.moveaxis(tensor, (0, 1), (-1, -2))


def _to_torch(path: str, array: np.ndarray, where: Source) -> np.ndarray:
    return np.moveaxis(array, (-1, -2), (0, 1)) if _is_kernel(path, where) else array
