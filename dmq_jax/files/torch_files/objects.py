"""The allow-list: every name a file of `torch.save` may mention, and what is built in its place.

Types: OrderedDict becomes dict, a Parameter its tensor, torch.Size a tuple, torch.device a str,
a torch dtype the NumPy dtype (`ml_dtypes` for bfloat16 and 8-bit floats).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# A view may repeat its storage (torch's `expand`); beyond this it is an attack on our memory.
_MAX_REPEATED = 2**28
# Keys are hashed by recursion, without a limit of Python's: a deep one would end the process, and
# one that holds itself many times over would not end.
_MAX_KEY_DEPTH = 3
_MAX_KEY_LENGTH = 64
_PLAIN = (str, bytes, int, float, complex, bool, type(None))

_DTYPES = {
    **{
        name: np.dtype(name)
        for name in (
            'float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 '
            'complex64 complex128 bool'
        ).split()
    },
    'half': np.dtype('float16'),
    'float': np.dtype('float32'),
    'double': np.dtype('float64'),
    'short': np.dtype('int16'),
    'int': np.dtype('int32'),
    'long': np.dtype('int64'),
    'cfloat': np.dtype('complex64'),
    'cdouble': np.dtype('complex128'),
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in (
            'bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu'
        ).split()
    },
}
_STORAGES = {
    'Half': 'float16',
    'BFloat16': 'bfloat16',
    'Float': 'float32',
    'Double': 'float64',
    'Char': 'int8',
    'Short': 'int16',
    'Int': 'int32',
    'Long': 'int64',
    'Byte': 'uint8',
    'Bool': 'bool',
    'ComplexFloat': 'complex64',
    'ComplexDouble': 'complex128',
    'Untyped': 'uint8',
}


class Ignored:
    """Stands for an object of an ignored package; holds nothing and does nothing.

    Attributes:
      name: full name of the class or function the file asked for.
    """

    __slots__ = ('name',)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f'Ignored({self.name!r})'


class FileError(Exception):
    """What is wrong with a file, without its name."""


class Function(NamedTuple):
    """A name of the allow-list that may be called, and what is called in its place."""

    call: Callable[..., Any]


class StorageType(NamedTuple):
    """A class of storages, by the type of their values."""

    dtype: np.dtype


class Inert(NamedTuple):
    """A name that may be mentioned, e.g. as an argument, but not called."""

    name: str


class State:
    """An object whose pickle sets its state after making it; replaced when that has happened."""

    def __init__(self, kind: str, value: Any):
        self.kind = kind
        self.value = value
        self.memo_keys: list[int] = []


def make_dictionary(items: list[Any]) -> dict[Any, Any]:
    """Of keys and values in turn."""
    if len(items) % 2:
        raise FileError('the pickle in it is damaged (a key without a value)')
    return dict(zip(checked_keys(items[::2]), items[1::2], strict=True))


def checked_keys(keys: list[Any]) -> list[Any]:
    """The keys, none of which is costly to hash."""
    for key in keys:
        _check_key(key, _MAX_KEY_DEPTH)
    return keys


def _check_key(key: Any, depth: int) -> None:
    if isinstance(key, tuple | frozenset) and depth and len(key) <= _MAX_KEY_LENGTH:
        for item in key:
            _check_key(item, depth - 1)
    elif not isinstance(key, (*_PLAIN, np.generic, np.dtype, Ignored)):
        raise FileError(f'its pickle uses a {type(key).__name__} as a key, or a very large one')


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A view of a one-dimensional storage; refuses what would leave it.

    `rest` is requires_grad, hooks and, from torch 2, marks of a conjugate or negative view.
    """
    if len(rest) > 2 and isinstance(rest[2], dict) and any(rest[2].values()):
        raise FileError(
            f'a tensor is a view with marks {rest[2]!r:.100}; save its resolve_conj().resolve_neg()'
        )
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise FileError('its pickle makes a tensor of something that is no storage')
    if not are_sizes((offset,)) or not are_sizes(size) or not are_sizes(stride):
        raise FileError(
            f'a tensor has offset {offset!r:.50}, size {size!r:.100} and stride {stride!r:.100}; '
            'expected integers of 0 or more'
        )
    if len(size) != len(stride) or len(size) > 32:
        raise FileError(f'a tensor has {len(size)} dimensions and {len(stride)} strides')
    count = math.prod(size)
    if count == 0:
        if max(size) >= 2**31:
            raise FileError(f'an empty tensor has the size {tuple(size)}')
        return np.empty(tuple(size), storage.dtype)
    last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise FileError(
            f'a tensor of size {tuple(size)}, stride {tuple(stride)} and offset {offset} leaves '
            f'its storage of {len(storage)} values'
        )
    if count > max(len(storage), _MAX_REPEATED):
        raise FileError(f'a tensor of size {tuple(size)} repeats {len(storage)} values')
    steps = [step * storage.itemsize if s > 1 else 0 for s, step in zip(size, stride, strict=True)]
    # NumPy checks the ends once more, against the bytes.
    raw = storage.view(np.uint8)
    view = np.ndarray(tuple(size), storage.dtype, raw, offset * storage.itemsize, steps)
    # Contiguous as NumPy counts, whatever torch says of dimensions of size 1.
    return view.reshape(tuple(size)) if view.flags.c_contiguous else view


def are_sizes(values: Any) -> bool:
    """Whether it is a tuple or list of integers of 0 or more."""
    return isinstance(values, tuple | list) and all(type(v) is int and v >= 0 for v in values)


def _rebuild_typed(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A tensor over untyped bytes: requires_grad, hooks, dtype follow the stride."""
    dtype = rest[2]
    if not isinstance(dtype, np.dtype) or not isinstance(storage, np.ndarray):
        raise FileError('its pickle makes a tensor of something that is no storage or dtype')
    whole = len(storage) // dtype.itemsize * dtype.itemsize
    rest = (*rest[:2], *rest[3:])
    return _rebuild_tensor(storage[:whole].view(dtype), offset, size, stride, *rest)


def _rebuild_parameter(data: Any, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise FileError('its pickle makes a Parameter of something that is no tensor')
    return data


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *state: Any) -> np.ndarray:
    if not any(function is known for known in _TENSOR_FUNCTIONS) or not isinstance(
        arguments, tuple
    ):
        raise FileError('its pickle makes a tensor in an unknown way')
    return function.call(*arguments)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    if not isinstance(items, tuple | list) or not all(
        isinstance(item, tuple | list) and len(item) == 2 for item in items
    ):
        raise FileError('its pickle makes a dict of something that is no list of pairs')
    return make_dictionary([part for item in items for part in item])


def _default_dict(_: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _ordered_dict(items)


def _collection(kind: type) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | frozenset):
            raise FileError(f'its pickle makes a {kind.__name__} of a {type(items).__name__}')
        return kind(checked_keys(list(items)) if kind in (set, frozenset) else items)

    return make


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise FileError('its pickle makes a complex number of something else')
    return complex(real, imaginary)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise FileError('its pickle encodes something that is no latin1 text')
    return text.encode('latin1')


def _empty_bytes() -> bytes:
    """How Python 3 writes bytes of length 0 there."""
    return b''


def _bytearray(data: Any = b'', encoding: Any = 'latin-1') -> bytearray:
    if isinstance(data, str) and encoding == 'latin-1':
        data = data.encode('latin-1')
    if not isinstance(data, bytes | bytearray):
        raise FileError('its pickle makes a bytearray of something else')
    return bytearray(data)


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise FileError('its pickle makes a torch.device of something else')
    return kind if index is None else f'{kind}:{index}'


def _numpy_dtype(text: Any, *_: Any) -> State:
    if isinstance(text, bytes):
        text = text.decode('latin-1')
    if not isinstance(text, str) or not re.fullmatch(
        r'[<>=|]?(b1|[iuf][1248]|c8|c16|[SU]\d+)', text
    ):
        raise FileError(f'its pickle has a NumPy array of type {text!r:.100}')
    return State('dtype', np.dtype(text))


def _numpy_array(*_: Any) -> State:
    return State('array', None)


def with_state(target: State, state: Any) -> Any:
    """The dtype or the array that `target` becomes by the state NumPy pickled."""
    if not isinstance(state, tuple):
        raise FileError('its pickle has a NumPy object without its state')
    if target.kind == 'dtype':
        order = state[1].decode('latin-1') if isinstance(state[1], bytes) else state[1]
        if order not in ('<', '>', '=', '|'):
            raise FileError(f'its pickle has a NumPy type of byte order {order!r:.20}')
        return target.value.newbyteorder(order)
    _, shape, dtype, is_fortran, content = state
    return _array_of(content, dtype, shape, 'F' if is_fortran else 'C')


def _array_of(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = dtype.value if isinstance(dtype, State) and dtype.kind == 'dtype' else dtype
    if isinstance(content, str):
        content = content.encode('latin-1')
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes | bytearray):
        raise FileError('its pickle has a NumPy array of objects')
    if not are_sizes(shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise FileError(
            f'its pickle has a NumPy array {dtype} {shape!r:.100} of {len(content)} bytes'
        )
    if dtype.itemsize == 0 or not content:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, content: Any = b'') -> np.generic:
    return _array_of(content, dtype, (), 'C')[()]


def _numpy_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if order not in ('C', 'F'):
        raise FileError('its pickle has a NumPy array of unknown order')
    return _array_of(content, dtype, shape, order)


_TENSOR_FUNCTIONS = (
    Function(_rebuild_tensor),
    Function(_rebuild_typed),
    Function(_rebuild_parameter),
)
GLOBALS: Mapping[str, Any] = {
    **{f'torch.{name}': dtype for name, dtype in _DTYPES.items()},
    **{
        f'{module}.{name}Storage': StorageType(_DTYPES[dtype])
        for module in ('torch', 'torch.cuda', 'torch.storage')
        for name, dtype in _STORAGES.items()
    },
    'torch._utils._rebuild_tensor': _TENSOR_FUNCTIONS[0],
    'torch._utils._rebuild_tensor_v2': _TENSOR_FUNCTIONS[0],
    'torch._utils._rebuild_tensor_v3': _TENSOR_FUNCTIONS[1],
    'torch._utils._rebuild_parameter': _TENSOR_FUNCTIONS[2],
    'torch._utils._rebuild_parameter_with_state': _TENSOR_FUNCTIONS[2],
    'torch._tensor._rebuild_from_type_v2': Function(_rebuild_from_type),
    'torch.Tensor': Inert('torch.Tensor'),
    'torch.nn.parameter.Parameter': Inert('torch.nn.parameter.Parameter'),
    'torch.nn.parameter.Buffer': Inert('torch.nn.parameter.Buffer'),
    'torch.Size': Function(_collection(tuple)),
    'torch.device': Function(_device),
    'collections.OrderedDict': Function(_ordered_dict),
    'collections.defaultdict': Function(_default_dict),
    '_codecs.encode': Function(_encode),
    **{
        f'{module}.{kind.__name__}': Function(_collection(kind))
        for module in ('builtins', '__builtin__')
        for kind in (list, tuple, set, frozenset)
    },
    **{
        f'{module}.{name}': value
        for module in ('builtins', '__builtin__')
        for name, value in {
            'dict': Function(_ordered_dict),
            'complex': Function(_complex),
            'bytearray': Function(_bytearray),
            'bytes': Function(_empty_bytes),
            'int': Inert('int'),
            'float': Inert('float'),
        }.items()
    },
    'numpy.dtype': Function(_numpy_dtype),
    'numpy.ndarray': Inert('numpy.ndarray'),
    **{
        f'numpy.{package}.{name}': Function(function)
        for package in ('core', '_core')
        for name, function in {
            'multiarray._reconstruct': _numpy_array,
            'multiarray.scalar': _numpy_scalar,
            'numeric._frombuffer': _numpy_from_buffer,
        }.items()
    },
}
