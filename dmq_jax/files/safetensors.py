"""Single and sharded `.safetensors` files as a lazy mapping from name to array.

A sharded checkpoint is an `*.safetensors.index.json` (`{'weight_map': {tensor: file}}`, the layout
of the Hugging Face hub) beside its files. Only the headers are read when a checkpoint is opened,
once; files are mapped into memory, and each array is read when it is asked for.
"""

import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INDEX_SUFFIX = '.safetensors.index.json'


# Names of the format; shorter types than a byte are packed, which no reader here needs.
_DTYPES = {
    'BOOL': np.dtype(bool),
    'C64': np.dtype('complex64'),
    **{
        f'{kind.upper()}{8 * size}': np.dtype(f'<{kind}{size}')
        for kind, size in itertools.product('iu', (1, 2, 4, 8))
    },
    **{f'F{8 * size}': np.dtype(f'<f{size}') for size in (2, 4, 8)},
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip


class _Place(NamedTuple):
    """Where a tensor lies."""

    data: mmap.mmap
    offset: int
    kind: str
    shape: tuple[int, ...]


class SafetensorsReader(Mapping[str, np.ndarray]):
    """Tensors by name; nothing is kept once it has been handed out.

    Attributes:
      path: the file or the index that was opened.
      metadata: the free text of the file, `{}` where there is none; of an index, its `metadata`.
    """

    def __init__(self, path: Path, places: dict[str, _Place], metadata: dict[str, Any]):
        self.path = path
        self.metadata = metadata
        self._places = places

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise KeyError(f'{self.path}: no tensor {name!r} among {len(self._places)}.')
        return self._places[name]

    def __getitem__(self, name: str) -> np.ndarray:
        """The array called `name`.

        Raises:
          KeyError: no tensor of that name.
          ValueError: a dtype that NumPy has no word for.
        """
        return self.view(name).copy()

    def view(self, name: str) -> np.ndarray:
        """The same as a part of the file, which must outlive it unchanged.

        Raises:
          KeyError: no tensor of that name.
          ValueError: a dtype that NumPy has no word for.
        """
        data, offset, kind, shape = self._place(name)
        if kind not in _DTYPES:
            raise ValueError(f'{self.path}: {name!r} is of dtype {kind}, which is not supported.')
        if math.prod(shape) == 0:
            return np.zeros(shape, _DTYPES[kind])
        return np.frombuffer(data, _DTYPES[kind], math.prod(shape), offset).reshape(shape)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the array called `name`, of which nothing is read.

        Raises:
          KeyError: no tensor of that name.
        """
        return self._place(name).shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


def open_safetensors(path: str | os.PathLike) -> SafetensorsReader:
    """The tensors of a `.safetensors` file or of an `.safetensors.index.json` and its shards.

    Raises:
      FileNotFoundError: no such file, or a shard that the index names is not there.
      ValueError: a file that is no safetensors file or is cut off, an index without `weight_map`,
        or an index that disagrees with its shards.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such file; expected a .safetensors or an {INDEX_SUFFIX} file.'
        )
    if path.suffix == '.json':
        return _open_index(path)
    return SafetensorsReader(path, *_read_header(path))


def read_weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor that an index of shards names, all of them beside the index.

    Raises:
      FileNotFoundError: a shard is not there.
      ValueError: no index, or one that names files elsewhere.
    """
    return _read_index(path)['weight_map']


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not a JSON file ({error}).') from error
    if not isinstance(index, dict) or not isinstance(index.get('weight_map'), dict):
        raise ValueError(f"{path}: not an index of shards; expected {{'weight_map': {{...}}}}.")
    shards = list(index['weight_map'].values())
    for shard in shards:
        # A checkpoint comes from elsewhere: it may name files beside itself only.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f'{path}: shard {shard!r} is not a plain file name.')
    for shard in sorted(set(shards)):
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(
                f'{path}: shard {shard!r} is missing beside it; download all its shards.'
            )
    return index


def _open_index(path: Path) -> SafetensorsReader:
    index = _read_index(path)
    weight_map = index['weight_map']
    places: dict[str, _Place] = {}
    for shard in sorted(set(weight_map.values())):
        held, _ = _read_header(path.parent / shard)
        listed = {name for name, where in weight_map.items() if where == shard}
        if held.keys() != listed:
            name = min(held.keys() ^ listed)
            raise ValueError(
                f'{path}: {name!r} is {"listed for" if name in listed else "not listed for"} '
                f'{shard}, which {"lacks" if name in listed else "holds"} it: mixed downloads?'
            )
        places |= held
    places = {name: places[name] for name in weight_map}
    return SafetensorsReader(path, places, index.get('metadata') or {})


def _read_header(path: Path) -> tuple[dict[str, _Place], dict[str, Any]]:
    """Where the tensors of a file lie, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        # It checks that the tensors fill the file, each with its shape, and none over another.
        with safe_open(path, framework='numpy') as file:
            names, metadata = file.keys(), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f'{path}: not a complete safetensors file ({error}).') from error
    with path.open('rb') as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    return {
        name: _Place(
            data, start + header[name]['data_offsets'][0], header[name]['dtype'],
            tuple(header[name]['shape']),
        )
        for name in names
    }, metadata  # fmt: skip
