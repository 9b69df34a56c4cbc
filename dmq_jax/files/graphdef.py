"""Frozen TensorFlow graphs (`GraphDef`, usually `.pb`) without TensorFlow.

A decoder of the protocol-buffer wire format for the five messages a frozen graph is made of, with
field numbers from tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape,types}
.proto. The file is mapped into memory; constants with raw content are views of it.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# tensorflow/core/framework/types.proto: number -> type and the field its listed values are in.
_DTYPES = {
    1: (np.dtype('<f4'), 5),
    2: (np.dtype('<f8'), 6),
    3: (np.dtype('<i4'), 7),
    4: (np.dtype('u1'), 7),
    5: (np.dtype('<i2'), 7),
    6: (np.dtype('i1'), 7),
    9: (np.dtype('<i8'), 10),
    10: (np.dtype('?'), 11),
    14: (np.dtype(ml_dtypes.bfloat16), 13),
    17: (np.dtype('<u2'), 7),
    19: (np.dtype('<f2'), 13),
}
_DTYPE_NAMES = {7: 'string', 8: 'complex64', 18: 'complex128', 20: 'resource'}
# One protocol-buffer message is at most 2 GiB, so no constant that was ever written is larger.
_MAX_BYTES = 2**31


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation of a graph.

    Attributes:
      name: unique in the graph, e.g. 'mixed_3/conv/Conv2D'.
      op: what it computes, e.g. 'Conv2D', 'Const'.
      inputs: names of the nodes it reads, with TensorFlow's ':1' and '^' marks.
      attrs: settings by name: int, float, bool, bytes, a tuple of int (shape; -1 unknown), or a
        list of those; a tensor, a function and a dtype are kept as encoded bytes, bytes and int.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any]


class GraphDef(Mapping[str, np.ndarray]):
    """The constants of a graph by node name, decoded when asked for, and its nodes.

    Attributes:
      path: the file.
      nodes: every node by name, in file order.
    """

    def __init__(self, path: Path, nodes: dict[str, Node]):
        self.path = path
        self.nodes = nodes
        self._constants = [name for name, node in nodes.items() if node.op == 'Const']

    def __getitem__(self, name: str) -> np.ndarray:
        """The value of the Const node `name`, read-only.

        Raises:
          KeyError: no constant of that name.
          ValueError: a value that is damaged or of a type that is no number, e.g. a string.
        """
        node = self.nodes.get(name)
        if node is None or node.op != 'Const':
            found = f'its op is {node.op!r}' if node else f'{len(self)} constants in the graph'
            raise KeyError(f'{self.path}: no constant {name!r} ({found}).')
        try:
            if not isinstance(node.attrs.get('value'), memoryview):
                raise _WireError('no tensor in its attribute "value"')
            return _decode_tensor(node.attrs['value'])
        except _WireError as error:
            raise ValueError(f'{self.path}: constant {name!r}: {error}.') from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._constants)

    def __len__(self) -> int:
        return len(self._constants)

    def __contains__(self, name: object) -> bool:
        return name in self.nodes and self.nodes[name].op == 'Const'


def open_graphdef(path: str | os.PathLike) -> GraphDef:
    """The nodes and constants of a frozen graph.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GraphDef, cut off or damaged; says what and at which node.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; expected a frozen TensorFlow graph (.pb).')
    if path.stat().st_size == 0:
        raise ValueError(f'{path}: the file is empty; expected a frozen TensorFlow graph (.pb).')
    with path.open('rb') as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    nodes: dict[str, Node] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                node = _decode_node(_expect(value, memoryview, 'a node'))
                if node.name in nodes:
                    raise _WireError(f'two nodes are called {node.name!r}')
                nodes[node.name] = node
    except _WireError as error:
        where = f'after {len(nodes)} nodes, the last of which is {[*nodes][-1]!r}' if nodes else ''
        raise ValueError(
            f'{path}: not a complete GraphDef: {error} {where}'.rstrip() + '. Expected a frozen '
            'TensorFlow graph; copy the file again.'
        ) from error
    if not nodes:
        raise ValueError(f'{path}: no node in it; expected a frozen TensorFlow graph (.pb).')
    return GraphDef(path, nodes)


class _WireError(Exception):
    """What is wrong with encoded data, without the file's name."""


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value: int for a varint, the encoded bytes for everything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire_type = key >> 3, key & 7
        if field == 0:
            raise _WireError('field number 0')
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise _WireError(f'wire type {wire_type} in field {field}')
        if length > len(data) - position:
            raise _WireError(
                f'field {field} claims {length} bytes where {len(data) - position} are left'
            )
        yield field, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _WireError('the data ends inside a number')
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise _WireError('a number longer than 10 bytes')


def _expect(value: int | memoryview, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise _WireError(f'{what} of the wrong wire type')
    return value


def _text(value: int | memoryview, what: str) -> str:
    try:
        return str(_expect(value, memoryview, what), 'utf-8')
    except UnicodeDecodeError as error:
        raise _WireError(f'{what} that is no UTF-8 text') from error


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _decode_node(data: memoryview) -> Node:
    name = op = ''
    inputs, attrs = [], {}
    for field, value in _fields(data):
        if field == 1:
            name = _text(value, 'a node name')
        elif field == 2:
            op = _text(value, 'an op')
        elif field == 3:
            inputs.append(_text(value, 'an input'))
        elif field == 5:
            key, encoded = '', memoryview(b'')
            for entry_field, entry in _fields(_expect(value, memoryview, 'an attribute')):
                if entry_field == 1:
                    key = _text(entry, 'the name of an attribute')
                elif entry_field == 2:
                    encoded = _expect(entry, memoryview, 'the value of an attribute')
            attrs[key] = _decode_attr(encoded)
    return Node(name, op, tuple(inputs), attrs)


def _decode_attr(data: memoryview) -> Any:
    result = None
    for field, value in _fields(data):
        if field == 1:
            items = []
            for item_field, item in _fields(_expect(value, memoryview, 'a list')):
                if isinstance(item, memoryview) and item_field in (3, 5, 6):
                    position = 0
                    while position < len(item):
                        number, position = _varint(item, position)
                        items.append(_scalar(item_field, number))
                elif isinstance(item, memoryview) and item_field == 4:
                    items.extend(_numbers(item, np.dtype('<f4')).tolist())
                else:
                    items.append(_scalar(item_field, item))
            result = items
        else:
            result = _scalar(field, value)
    return result


def _scalar(field: int, value: int | memoryview) -> Any:
    """One value of AttrValue or of its ListValue, which number their fields alike."""
    if field == 2:
        return bytes(_expect(value, memoryview, 'a string'))
    if field == 3:
        return _signed(_expect(value, int, 'an integer'))
    if field == 4:
        encoded = _expect(value, memoryview, 'a float')
        if len(encoded) != 4:
            raise _WireError(f'a float of {len(encoded)} bytes')
        return struct.unpack('<f', encoded)[0]
    if field == 5:
        return bool(_expect(value, int, 'a boolean'))
    if field == 6:
        return _expect(value, int, 'a type')
    if field == 7:
        return _decode_shape(_expect(value, memoryview, 'a shape'))
    return value


def _decode_shape(data: memoryview) -> tuple[int, ...] | None:
    """Sizes, -1 for unknown; None for a shape of unknown rank."""
    sizes = []
    for field, value in _fields(data):
        if field == 3 and value:
            return None
        if field == 2:
            size = 0
            for dim_field, dim in _fields(_expect(value, memoryview, 'a dimension')):
                if dim_field == 1:
                    size = _signed(_expect(dim, int, 'a size'))
            sizes.append(size)
    return tuple(sizes)


def _numbers(data: memoryview, dtype: np.dtype) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise _WireError(f'{len(data)} bytes are no whole number of {dtype} values')
    return np.frombuffer(data, dtype)


def _decode_tensor(data: memoryview) -> np.ndarray:
    dtype_number, shape, content = 0, (), None
    listed: dict[int, list[np.ndarray]] = {}
    for field, value in _fields(data):
        if field == 1:
            dtype_number = _expect(value, int, 'a type')
        elif field == 2:
            shape = _decode_shape(_expect(value, memoryview, 'a shape'))
        elif field == 4:
            content = _expect(value, memoryview, 'the content')
        elif field in (5, 6):
            dtype = np.dtype('<f4' if field == 5 else '<f8')
            listed.setdefault(field, []).append(
                _numbers(_expect(value, memoryview, 'a value'), dtype)
            )
        elif field in (7, 10, 11, 13):
            listed.setdefault(field, []).append(_varints(value))
    if dtype_number not in _DTYPES:
        name = _DTYPE_NAMES.get(dtype_number, 'unknown')
        raise _WireError(f'values of TensorFlow type {dtype_number} ({name}) are not read')
    dtype, values_field = _DTYPES[dtype_number]
    if shape is None or any(size < 0 for size in shape):
        raise _WireError(f'a constant of unknown shape {shape}')
    count = math.prod(shape)
    if len(shape) > 32 or count * dtype.itemsize > _MAX_BYTES:
        raise _WireError(f'the shape {shape} is beyond the 2 GiB of a GraphDef')
    if content is not None and len(content):
        if len(content) != count * dtype.itemsize:
            raise _WireError(
                f'{len(content)} bytes for {dtype} {shape}, expected {count * dtype.itemsize}'
            )
        array = np.frombuffer(content, dtype).reshape(shape)
    else:
        array = _spread(_as_dtype(listed.get(values_field, []), dtype), shape, count)
    array.flags.writeable = False
    return array


def _varints(value: int | memoryview) -> np.ndarray:
    if isinstance(value, int):
        return np.array([_signed(value)], np.int64)
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(_signed(number))
    return np.array(numbers, np.int64)


def _as_dtype(parts: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    values = np.concatenate(parts) if parts else np.zeros(0, dtype)
    if values.dtype.kind == 'i' and dtype.kind not in 'iub' and len(values):
        # half_val holds the bits of a 16-bit float in an integer.
        limits, stored = (0, 2**16 - 1), np.dtype('<u2')
    elif dtype.kind in 'iu':
        info = np.iinfo(dtype)
        limits, stored = (info.min, info.max), dtype
    else:
        return values.astype(dtype)
    if len(values) and not limits[0] <= values.min() <= values.max() <= limits[1]:
        raise _WireError(f'values {values.min()}..{values.max()} do not fit in {dtype}')
    return values.astype(stored).view(dtype)


def _spread(values: np.ndarray, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Listed values as a tensor: the last stands for all that follow, none at all for zeros."""
    if len(values) > count:
        raise _WireError(f'{len(values)} values for the shape {shape}, expected {count}')
    if len(values) == count:
        return values.reshape(shape)
    if len(values) <= 1:
        # A view: a fill takes no memory.
        return np.broadcast_to(values.sum(dtype=values.dtype), shape).view()
    return np.pad(values, (0, count - len(values)), mode='edge').reshape(shape)
