"""Files written by `torch.save`, read without torch and without running anything they contain.

Both containers are known: the zip archive of torch 1.6 and later, and the older sequence of
pickles followed by raw storages. The pickle inside is interpreted here, opcode by opcode, by a
machine that can build numbers, text, plain containers and NumPy arrays, and calls nothing but the
functions of the table `_GLOBALS`; Python's own `pickle` never sees the data. Tensors are read-only
views of the file mapped into memory wherever the file holds them uncompressed, so opening a
checkpoint costs what its pickle costs, and tensors that share a storage share memory.

Types: OrderedDict becomes dict, a Parameter its tensor, torch.Size a tuple, torch.device a str,
a torch dtype the NumPy dtype (`ml_dtypes` for bfloat16 and 8-bit floats).
"""

import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# A view may repeat its storage (torch's `expand`); beyond this it is an attack on our memory.
_MAX_REPEATED = 2**28
# Keys are hashed by recursion, without a limit of Python's: a deep one would end the process, and
# one that holds itself many times over would not end.
_MAX_KEY_DEPTH = 3
_MAX_KEY_LENGTH = 64
# Items that calls may copy, per byte of the file: what a file copies it also has to contain, but
# short texts and sizes may be shared.
_COPIES_PER_BYTE = 16
# deflate cannot do better, so a member that claims more is lying.
_MAX_DEFLATE_RATIO = 1032

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


def load(path: str | os.PathLike, *, ignore: Sequence[str] = ()) -> Any:
    """The object that was given to `torch.save`, its tensors as read-only NumPy arrays.

    Args:
      path: .pt, .pth, .ckpt, .bin or any other name; the content decides.
      ignore: packages or full names, e.g. ('pytorch_lightning', 'argparse.Namespace'), whose
        objects become `Ignored` in place of being refused.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no file of torch.save, damaged or cut off, or one that asks for a function or
        class outside the allow-list; says which. Nothing of the file has run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; expected a file written by torch.save.')
    if path.stat().st_size == 0:
        raise ValueError(f'{path}: the file is empty; expected a file written by torch.save.')
    with path.open('rb') as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        if data[:4] == b'PK\x03\x04':
            return _load_zip(path, data, ignore)
        if data[:1] in (b'\x80', b'L'):  # pickle protocols 2 to 5, and a number in 0 and 1
            return _load_legacy(data, ignore)
        raise _FileError(f'it begins with {data[:16]!r}, as no file of torch.save does')
    except _FileError as error:
        raise ValueError(f'{path}: {error}.') from error


def release(array: np.ndarray) -> None:
    """Gives back the memory of the file behind `array`, which may be read again all the same.

    A mapped file stays in memory as far as it has been read; whoever goes through a large one and
    copies what it needs calls this in between.
    """
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, 'base', None)
    # Of memory without a file, which is never read-only, this would be the end.
    if base is not None and memoryview(base).readonly and hasattr(base, 'madvise'):
        base.madvise(mmap.MADV_DONTNEED)


class _FileError(Exception):
    """What is wrong with a file, without its name."""


# ---- The pickle machine


class _Function(NamedTuple):
    """A name of the allow-list that may be called, and what is called in its place."""

    call: Callable[..., Any]


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Inert(NamedTuple):
    """A name that may be mentioned, e.g. as an argument, but not called."""

    name: str


class _State:
    """An object whose pickle sets its state after making it; replaced when that has happened."""

    def __init__(self, kind: str, value: Any):
        self.kind = kind
        self.value = value
        self.memo_keys: list[int] = []


_MARK = object()
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_PLAIN = (str, bytes, int, float, complex, bool, type(None))


class _Machine:
    """Interprets one pickle; everything it refuses, it refuses before building it."""

    def __init__(self, resolve_storage: Callable[[Any], Any], ignore: Sequence[str]):
        self.resolve_storage = resolve_storage
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_copies_left = 0

    def run(self, data: mmap.mmap, start: int) -> tuple[Any, int]:
        """The object of the pickle at `start`, and where the pickle ends."""
        data.seek(start)
        self.num_copies_left = _COPIES_PER_BYTE * len(data)
        name = 'its first'
        try:
            for opcode, argument, _ in pickletools.genops(data):
                name = opcode.name
                if name == 'STOP':
                    result = self._pop()
                    if isinstance(result, _State):
                        result = self._finished(result)
                    return result, data.tell()
                self._step(name, argument)
        except _FileError:
            raise
        except (
            ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            MemoryError, RecursionError, struct.error,
        ) as error:  # fmt: skip
            # The interpreter of a damaged pickle may meet any of these at any operation.
            raise _FileError(
                f'the pickle in it is damaged or cut off (at operation {name}: {error}); copy '
                'the file again'
            ) from error
        raise _FileError('the pickle in it is cut off; copy the file again')

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if (handler := _HANDLERS.get(name)) is not None:
            handler(self)
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _SINGLETONS:
            stack.append(_SINGLETONS[name])
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            self._remember(argument)
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name == 'GLOBAL':
            stack.append(self._find(*argument.split(' ', 1)))
        elif name == 'INST':
            arguments = self._pop_mark()
            stack.append(self._call(self._find(*argument.split(' ', 1)), arguments))
        elif name == 'PERSID':
            stack.append(self.resolve_storage(argument))
        elif name not in ('PROTO', 'FRAME'):
            raise _FileError(f'the pickle in it uses the operation {name}, which torch.save never')

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _FileError('the pickle in it is damaged (nothing on its stack)')
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        items = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise _FileError('the pickle in it is damaged (no mark on its stack)')

    def _top(self, *kinds: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kinds):
            raise _FileError('the pickle in it fills something that is no container')
        return self.stack[-1]

    def _remember(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise _FileError('the pickle in it is damaged (nothing on its stack)')
        self.memo[key] = self.stack[-1]
        if isinstance(self.stack[-1], _State):
            self.stack[-1].memo_keys.append(key)

    def _find(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full in _GLOBALS:
            return _GLOBALS[full]
        if any(full == prefix or full.startswith(f'{prefix}.') for prefix in self.ignore):
            return Ignored(full)
        raise _FileError(
            f'its pickle asks for {full!r}, which is not on the list of harmless names; nothing '
            'was run. If you trust the file and do not need that object, pass '
            f"ignore=('{module}',); otherwise save only the state_dict with torch and read that"
        )

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Ignored):
            return Ignored(function.name)
        if not isinstance(function, _Function):
            raise _FileError(f'its pickle calls {function!r:.100}, which is no function')
        self.num_copies_left -= sum(len(a) for a in arguments if isinstance(a, _SIZED))
        if self.num_copies_left < 0:
            raise _FileError('its pickle makes more than the file holds')
        return function.call(*(self._finished(a) for a in arguments))

    def _finished(self, value: Any) -> Any:
        """An object whose state never came, as it is."""
        return value.value if isinstance(value, _State) and value.kind == 'dtype' else value

    def append(self) -> None:
        self.extend_with([self._pop()])

    def appends(self) -> None:
        self.extend_with(self._pop_mark())

    def extend_with(self, items: list[Any]) -> None:
        container = self._top(list, Ignored)
        if isinstance(container, list):
            container.extend(items)

    def additems(self) -> None:
        items = self._pop_mark()
        container = self._top(set, Ignored)
        if isinstance(container, set):
            container.update(_checked_keys(items))

    def setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self.update_with([key, value])

    def setitems(self) -> None:
        self.update_with(self._pop_mark())

    def update_with(self, items: list[Any]) -> None:
        container = self._top(dict, Ignored)
        if isinstance(container, dict):
            container.update(_dictionary(items))

    def build(self) -> None:
        state = self._pop()
        target = self._top(object)
        if isinstance(target, _State):
            finished = _with_state(target, state)
            self.stack[-1] = finished
            for key in target.memo_keys:
                self.memo[key] = finished
        # The state of an OrderedDict is what nn.Module keeps beside it: versions of modules.
        elif not isinstance(target, dict | Ignored | np.ndarray):
            raise _FileError(f'its pickle sets the state of a {type(target).__name__}')

    def tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise _FileError('its pickle calls a function without a tuple of arguments')
        self.stack.append(self._call(function, arguments))

    def newobj_ex(self) -> None:
        keywords = self._pop()
        if keywords != {} and not isinstance(self.stack[-2], Ignored):
            raise _FileError('its pickle calls a function with keywords')
        self.reduce()

    def obj(self) -> None:
        function, *arguments = self._pop_mark()
        self.stack.append(self._call(function, arguments))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _FileError('its pickle asks for a name that is no text')
        self.stack.append(self._find(module, name))


def _dictionary(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise _FileError('the pickle in it is damaged (a key without a value)')
    return dict(zip(_checked_keys(items[::2]), items[1::2], strict=True))


def _checked_keys(keys: list[Any]) -> list[Any]:
    for key in keys:
        _check_key(key, _MAX_KEY_DEPTH)
    return keys


def _check_key(key: Any, depth: int) -> None:
    if isinstance(key, tuple | frozenset) and depth and len(key) <= _MAX_KEY_LENGTH:
        for item in key:
            _check_key(item, depth - 1)
    elif not isinstance(key, (*_PLAIN, np.generic, np.dtype, Ignored)):
        raise _FileError(f'its pickle uses a {type(key).__name__} as a key, or a very large one')


_HANDLERS: dict[str, Callable[[_Machine], None]] = {
    'MARK': lambda m: m.stack.append(_MARK),
    'POP': lambda m: m.stack.pop(),
    'POP_MARK': lambda m: m._pop_mark(),
    'DUP': lambda m: m.stack.append(m.stack[-1]),
    'MEMOIZE': lambda m: m._remember(len(m.memo)),
    'EMPTY_LIST': lambda m: m.stack.append([]),
    'EMPTY_DICT': lambda m: m.stack.append({}),
    'EMPTY_SET': lambda m: m.stack.append(set()),
    'EMPTY_TUPLE': lambda m: m.stack.append(()),
    'LIST': lambda m: m.stack.append(m._pop_mark()),
    'TUPLE': lambda m: m.stack.append(tuple(m._pop_mark())),
    'DICT': lambda m: m.stack.append(_dictionary(m._pop_mark())),
    'FROZENSET': lambda m: m.stack.append(frozenset(_checked_keys(m._pop_mark()))),
    'TUPLE1': lambda m: m.tuple_of(1),
    'TUPLE2': lambda m: m.tuple_of(2),
    'TUPLE3': lambda m: m.tuple_of(3),
    'APPEND': _Machine.append,
    'APPENDS': _Machine.appends,
    'ADDITEMS': _Machine.additems,
    'SETITEM': _Machine.setitem,
    'SETITEMS': _Machine.setitems,
    'BUILD': _Machine.build,
    'REDUCE': _Machine.reduce,
    'NEWOBJ': _Machine.reduce,
    'NEWOBJ_EX': _Machine.newobj_ex,
    'OBJ': _Machine.obj,
    'STACK_GLOBAL': _Machine.stack_global,
    'BINPERSID': lambda m: m.stack.append(m.resolve_storage(m._pop())),
}
_SINGLETONS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = set(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING '
    'SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE '
    'BINUNICODE BINUNICODE8'.split()
)

# ---- What the names of the allow-list build


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A view of a one-dimensional storage; refuses what would leave it.

    `rest` is requires_grad, hooks and, from torch 2, marks of a conjugate or negative view.
    """
    if len(rest) > 2 and isinstance(rest[2], dict) and any(rest[2].values()):
        raise _FileError(
            f'a tensor is a view with marks {rest[2]!r:.100}; save its resolve_conj().resolve_neg()'
        )
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise _FileError('its pickle makes a tensor of something that is no storage')
    if not _are_sizes((offset,)) or not _are_sizes(size) or not _are_sizes(stride):
        raise _FileError(
            f'a tensor has offset {offset!r:.50}, size {size!r:.100} and stride {stride!r:.100}; '
            'expected integers of 0 or more'
        )
    if len(size) != len(stride) or len(size) > 32:
        raise _FileError(f'a tensor has {len(size)} dimensions and {len(stride)} strides')
    count = math.prod(size)
    if count == 0:
        if max(size) >= 2**31:
            raise _FileError(f'an empty tensor has the size {tuple(size)}')
        return np.empty(tuple(size), storage.dtype)
    last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise _FileError(
            f'a tensor of size {tuple(size)}, stride {tuple(stride)} and offset {offset} leaves '
            f'its storage of {len(storage)} values'
        )
    if count > max(len(storage), _MAX_REPEATED):
        raise _FileError(f'a tensor of size {tuple(size)} repeats {len(storage)} values')
    steps = [step * storage.itemsize if s > 1 else 0 for s, step in zip(size, stride, strict=True)]
    # NumPy checks the ends once more, against the bytes.
    raw = storage.view(np.uint8)
    view = np.ndarray(tuple(size), storage.dtype, raw, offset * storage.itemsize, steps)
    # Contiguous as NumPy counts, whatever torch says of dimensions of size 1.
    return view.reshape(tuple(size)) if view.flags.c_contiguous else view


def _are_sizes(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(v) is int and v >= 0 for v in values)


def _rebuild_typed(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """A tensor over untyped bytes: requires_grad, hooks, dtype follow the stride."""
    dtype = rest[2]
    if not isinstance(dtype, np.dtype) or not isinstance(storage, np.ndarray):
        raise _FileError('its pickle makes a tensor of something that is no storage or dtype')
    whole = len(storage) // dtype.itemsize * dtype.itemsize
    rest = (*rest[:2], *rest[3:])
    return _rebuild_tensor(storage[:whole].view(dtype), offset, size, stride, *rest)


def _rebuild_parameter(data: Any, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise _FileError('its pickle makes a Parameter of something that is no tensor')
    return data


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *state: Any) -> np.ndarray:
    if not any(function is known for known in _TENSOR_FUNCTIONS) or not isinstance(
        arguments, tuple
    ):
        raise _FileError('its pickle makes a tensor in an unknown way')
    return function.call(*arguments)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    if not isinstance(items, tuple | list) or not all(
        isinstance(item, tuple | list) and len(item) == 2 for item in items
    ):
        raise _FileError('its pickle makes a dict of something that is no list of pairs')
    return _dictionary([part for item in items for part in item])


def _default_dict(_: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _ordered_dict(items)


def _collection(kind: type) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple | set | frozenset):
            raise _FileError(f'its pickle makes a {kind.__name__} of a {type(items).__name__}')
        return kind(_checked_keys(list(items)) if kind in (set, frozenset) else items)

    return make


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise _FileError('its pickle makes a complex number of something else')
    return complex(real, imaginary)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise _FileError('its pickle encodes something that is no latin1 text')
    return text.encode('latin1')


def _bytearray(data: Any = b'', encoding: Any = 'latin-1') -> bytearray:
    if isinstance(data, str) and encoding == 'latin-1':
        data = data.encode('latin-1')
    if not isinstance(data, bytes | bytearray):
        raise _FileError('its pickle makes a bytearray of something else')
    return bytearray(data)


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise _FileError('its pickle makes a torch.device of something else')
    return kind if index is None else f'{kind}:{index}'


def _numpy_dtype(text: Any, *_: Any) -> _State:
    if isinstance(text, bytes):
        text = text.decode('latin-1')
    if not isinstance(text, str) or not re.fullmatch(
        r'[<>=|]?(b1|[iuf][1248]|c8|c16|[SU]\d+)', text
    ):
        raise _FileError(f'its pickle has a NumPy array of type {text!r:.100}')
    return _State('dtype', np.dtype(text))


def _numpy_array(*_: Any) -> _State:
    return _State('array', None)


def _with_state(target: _State, state: Any) -> Any:
    """The dtype or the array that `target` becomes by the state NumPy pickled."""
    if not isinstance(state, tuple):
        raise _FileError('its pickle has a NumPy object without its state')
    if target.kind == 'dtype':
        order = state[1].decode('latin-1') if isinstance(state[1], bytes) else state[1]
        if order not in ('<', '>', '=', '|'):
            raise _FileError(f'its pickle has a NumPy type of byte order {order!r:.20}')
        return target.value.newbyteorder(order)
    _, shape, dtype, is_fortran, content = state
    return _array_of(content, dtype, shape, 'F' if is_fortran else 'C')


def _array_of(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = dtype.value if isinstance(dtype, _State) and dtype.kind == 'dtype' else dtype
    if isinstance(content, str):
        content = content.encode('latin-1')
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes | bytearray):
        raise _FileError('its pickle has a NumPy array of objects')
    if not _are_sizes(shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise _FileError(
            f'its pickle has a NumPy array {dtype} {shape!r:.100} of {len(content)} bytes'
        )
    if dtype.itemsize == 0 or not content:
        return np.zeros(shape, dtype)
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, content: Any = b'') -> np.generic:
    return _array_of(content, dtype, (), 'C')[()]


def _numpy_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if order not in ('C', 'F'):
        raise _FileError('its pickle has a NumPy array of unknown order')
    return _array_of(content, dtype, shape, order)


_TENSOR_FUNCTIONS = (
    _Function(_rebuild_tensor),
    _Function(_rebuild_typed),
    _Function(_rebuild_parameter),
)
_GLOBALS: Mapping[str, Any] = {
    **{f'torch.{name}': dtype for name, dtype in _DTYPES.items()},
    **{
        f'{module}.{name}Storage': _StorageType(_DTYPES[dtype])
        for module in ('torch', 'torch.cuda', 'torch.storage')
        for name, dtype in _STORAGES.items()
    },
    'torch._utils._rebuild_tensor': _TENSOR_FUNCTIONS[0],
    'torch._utils._rebuild_tensor_v2': _TENSOR_FUNCTIONS[0],
    'torch._utils._rebuild_tensor_v3': _TENSOR_FUNCTIONS[1],
    'torch._utils._rebuild_parameter': _TENSOR_FUNCTIONS[2],
    'torch._utils._rebuild_parameter_with_state': _TENSOR_FUNCTIONS[2],
    'torch._tensor._rebuild_from_type_v2': _Function(_rebuild_from_type),
    'torch.Tensor': _Inert('torch.Tensor'),
    'torch.nn.parameter.Parameter': _Inert('torch.nn.parameter.Parameter'),
    'torch.nn.parameter.Buffer': _Inert('torch.nn.parameter.Buffer'),
    'torch.Size': _Function(_collection(tuple)),
    'torch.device': _Function(_device),
    'collections.OrderedDict': _Function(_ordered_dict),
    'collections.defaultdict': _Function(_default_dict),
    '_codecs.encode': _Function(_encode),
    **{
        f'{module}.{kind.__name__}': _Function(_collection(kind))
        for module in ('builtins', '__builtin__')
        for kind in (list, tuple, set, frozenset)
    },
    **{
        f'{module}.{name}': value
        for module in ('builtins', '__builtin__')
        for name, value in {
            'dict': _Function(_ordered_dict),
            'complex': _Function(_complex),
            'bytearray': _Function(_bytearray),
            'int': _Inert('int'),
            'float': _Inert('float'),
        }.items()
    },
    'numpy.dtype': _Function(_numpy_dtype),
    'numpy.ndarray': _Inert('numpy.ndarray'),
    **{
        f'numpy.{package}.{name}': _Function(function)
        for package in ('core', '_core')
        for name, function in {
            'multiarray._reconstruct': _numpy_array,
            'multiarray.scalar': _numpy_scalar,
            'numeric._frombuffer': _numpy_from_buffer,
        }.items()
    },
}

# ---- The two containers


class _StorageKey(NamedTuple):
    """A persistent id of torch.save: one storage, maybe a part of it."""

    dtype: np.dtype
    key: str
    count: int
    view: tuple[int, int] | None


def _storage_key(persistent_id: Any) -> _StorageKey:
    if (
        not isinstance(persistent_id, tuple)
        or len(persistent_id) not in (5, 6)
        or persistent_id[0] not in ('storage', b'storage')
        or not isinstance(persistent_id[1], _StorageType)
        or not isinstance(persistent_id[2], str | int)
        or not _are_sizes((persistent_id[4],))
    ):
        raise _FileError('the pickle in it names a storage in an unknown way')
    view = persistent_id[5] if len(persistent_id) == 6 else None
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3 or not _are_sizes(view[1:]):
            raise _FileError('the pickle in it names a part of a storage in an unknown way')
        if view[1] + view[2] > persistent_id[4]:
            raise _FileError('the pickle in it names a part that leaves its storage')
        view = view[1:]
    _, storage_type, key, _, count = persistent_id[:5]
    return _StorageKey(storage_type.dtype, str(key), count, view)


def _storage(raw: Any, dtype: np.dtype, is_swapped: bool) -> np.ndarray:
    """Bytes as values of `dtype` in the order of this machine's memory."""
    array = np.frombuffer(raw, np.uint8)
    if is_swapped and dtype.itemsize > 1:
        # Real and imaginary part are turned one by one.
        width = dtype.itemsize // (2 if dtype.kind == 'c' else 1)
        array = array.reshape(-1, width)[:, ::-1].reshape(-1)
    array = array.view(dtype)
    array.flags.writeable = False
    return array


class _Member(NamedTuple):
    """Where an archive keeps a file; `size` is that of its content, before compression."""

    start: int
    stored_size: int
    size: int
    is_deflated: bool
    crc: int


def _load_zip(path: Path, data: mmap.mmap, ignore: Sequence[str]) -> Any:
    members = _zip_members(path, data)
    roots = [name[: -len('data.pkl')] for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
    if len(roots) != 1:
        raise _FileError(f'{len(roots)} files */data.pkl in the archive; expected one')
    root = roots[0]
    if f'{root}constants.pkl' in members:
        raise _FileError(
            'a TorchScript archive, which holds code; save its state_dict() with torch.save'
        )
    order = b'little'
    if f'{root}byteorder' in members:
        order = bytes(_content(data, members[f'{root}byteorder'], 'byteorder'))
        if order not in (b'little', b'big'):
            raise _FileError(f'the byte order is {order!r:.30}; expected little or big')
    storages: dict[tuple[str, np.dtype], np.ndarray] = {}

    def resolve(persistent_id: Any) -> np.ndarray:
        wanted = _storage_key(persistent_id)
        name, num_bytes = f'{root}data/{wanted.key}', wanted.count * wanted.dtype.itemsize
        if name not in members:
            raise _FileError(f'the archive lacks the storage {name!r}')
        if num_bytes > members[name].size:
            raise _FileError(
                f'the storage {name!r} has {members[name].size} bytes, expected {num_bytes}'
            )
        if (name, wanted.dtype) not in storages:
            raw = _content(data, members[name], name)
            whole = len(raw) // wanted.dtype.itemsize * wanted.dtype.itemsize
            storages[name, wanted.dtype] = _storage(raw[:whole], wanted.dtype, order == b'big')
        return _part(storages[name, wanted.dtype][: wanted.count], wanted)

    pickle_member = members[f'{root}data.pkl']
    if not pickle_member.is_deflated:
        return _Machine(resolve, ignore).run(data, pickle_member.start)[0]
    unpacked = _content(data, pickle_member, 'data.pkl')
    with mmap.mmap(-1, max(len(unpacked), 1)) as copy:
        copy.write(unpacked)
        return _Machine(resolve, ignore).run(copy, 0)[0]


def _part(storage: np.ndarray, wanted: _StorageKey) -> np.ndarray:
    if wanted.view is None:
        return storage
    offset, size = wanted.view
    return storage[offset : offset + size]


def _zip_members(path: Path, data: mmap.mmap) -> dict[str, _Member]:
    """The files of an archive, every claim of its directory checked against the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise _FileError(f'not a complete zip archive ({error}); copy the file again') from error
    members: dict[str, _Member] = {}
    taken = []
    for info in infos:
        name = info.filename
        if name.startswith('/') or '\\' in name or '..' in name.split('/'):
            raise _FileError(f'the archive has a file {name!r:.200}, which leaves its folder')
        if name in members:
            raise _FileError(f'the archive has two files {name!r:.200}')
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise _FileError(f'{name!r:.200} in the archive is encrypted or oddly compressed')
        at = info.header_offset
        if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b'PK\x03\x04':
            raise _FileError(f'{name!r:.200} is not where the directory of the archive says')
        # The local header pads the data to a multiple of 64; the directory does not know.
        start = at + 30 + sum(struct.unpack('<HH', data[at + 26 : at + 30]))
        is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
        end = start + info.compress_size
        if end > len(data):
            raise _FileError(f'{name!r:.200} ends beyond the end of the file; copy the file again')
        limit = info.compress_size * (_MAX_DEFLATE_RATIO if is_deflated else 1)
        if info.file_size > limit or (not is_deflated and info.file_size != info.compress_size):
            raise _FileError(
                f'{name!r:.200} claims {info.file_size} bytes in {info.compress_size} bytes'
            )
        members[name] = _Member(start, info.compress_size, info.file_size, is_deflated, info.CRC)
        taken.append((at, end, name))
    taken.sort()
    for (_, end, name), (begin, _, other) in zip(taken, taken[1:], strict=False):
        if begin < end:
            raise _FileError(f'{name!r:.200} and {other!r:.200} overlap in the archive')
    return members


def _content(data: mmap.mmap, member: _Member, name: str) -> memoryview:
    """The bytes of a file of the archive: a view of the mapping unless they are compressed."""
    stored = memoryview(data)[member.start : member.start + member.stored_size]
    if not member.is_deflated:
        return stored
    try:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, member.size + 1)
    except zlib.error as error:
        raise _FileError(f'{name!r} does not unpack ({error}); copy the file again') from error
    if len(unpacked) != member.size or zlib.crc32(unpacked) != member.crc:
        raise _FileError(f'{name!r} unpacks to something else; copy the file again')
    return memoryview(unpacked)


def _load_legacy(data: mmap.mmap, ignore: Sequence[str]) -> Any:
    position, header = 0, []
    for _ in range(3):
        value, position = _Machine(_no_storage, ()).run(data, position)
        header.append(value)
        if header[0] != _LEGACY_MAGIC:
            raise _FileError(
                'a pickle, but not one of torch.save (its magic number is missing); save a '
                'state_dict with torch.save, or arrays as .npz or .safetensors'
            )
    if header[1] != _LEGACY_VERSION or not isinstance(header[2], dict):
        raise _FileError(f'the version is {header[1]!r:.50}; expected {_LEGACY_VERSION}')
    is_swapped = header[2].get('little_endian') is False

    # Where a storage lies is known only after the pickle that uses it, so it is read twice: for
    # the types and lengths of the storages, then for the object.
    wanted: dict[str, _StorageKey] = {}

    def note(persistent_id: Any) -> np.ndarray:
        key = _storage_key(persistent_id)
        known = wanted.setdefault(key.key, key)
        if (known.dtype, known.count) != (key.dtype, key.count):
            raise _FileError(f'the storage {key.key!r:.50} has two types or lengths')
        if key.count * key.dtype.itemsize > len(data):
            raise _FileError('it ends before its storages do; copy the file again')
        # Of the right type and length, which is all that this reading needs.
        return _part(np.frombuffer(data, key.dtype, key.count), key)

    _, end = _Machine(note, ignore).run(data, position)
    keys, end = _Machine(_no_storage, ()).run(data, end)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(wanted):
        raise _FileError('its list of storages is not that of its pickle; copy the file again')
    storages = {}
    for key in map(str, keys):
        if end + 8 > len(data):
            raise _FileError('it ends before its storages do; copy the file again')
        count = int.from_bytes(data[end : end + 8], 'big' if is_swapped else 'little', signed=True)
        start, end = end + 8, end + 8 + count * wanted[key].dtype.itemsize
        if count != wanted[key].count:
            raise _FileError(
                f'the storage {key!r:.50} has {count} values, expected {wanted[key].count}'
            )
        if end > len(data):
            raise _FileError('it ends before its storages do; copy the file again')
        raw = memoryview(data)[start:end]
        storages[key] = _storage(raw, wanted[key].dtype, is_swapped)

    def resolve(persistent_id: Any) -> np.ndarray:
        key = _storage_key(persistent_id)
        return _part(storages[key.key], key)

    return _Machine(resolve, ignore).run(data, position)[0]


def _no_storage(_: Any) -> None:
    raise _FileError('the pickle in it names a storage where there is none')
