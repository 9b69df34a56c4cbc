"""Single and sharded `.safetensors` files as a lazy mapping from name to array.

A sharded checkpoint is an `*.safetensors.index.json` (`{'weight_map': {tensor: file}}`, the layout
of the Hugging Face hub) beside its files. Only the headers are read when a checkpoint is opened;
each array is read when it is asked for.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

INDEX_SUFFIX = '.safetensors.index.json'


class SafetensorsReader(Mapping[str, np.ndarray]):
    """Tensors by name; nothing is kept once it has been handed out.

    Attributes:
      path: the file or the index that was opened.
      metadata: the free text of the file, `{}` where there is none; of an index, its `metadata`.
    """

    def __init__(self, path: Path, files: dict[str, Path], metadata: dict[str, Any]):
        self.path = path
        self.metadata = metadata
        self._files = files
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """The array called `name`.

        Raises:
          KeyError: no tensor of that name.
        """
        if name not in self._files:
            raise KeyError(f'{self.path}: no tensor {name!r} among {len(self._files)}.')
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the array called `name`, of which nothing is read.

        Raises:
          KeyError: no tensor of that name.
        """
        if name not in self._files:
            raise KeyError(f'{self.path}: no tensor {name!r} among {len(self._files)}.')
        if name not in self._shapes:
            # Opening a file parses its header, which has all of them.
            with _opened(self._files[name]) as file:
                for other in file.keys():  # noqa: SIM118
                    self._shapes[other] = tuple(file.get_slice(other).get_shape())
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


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
    with _opened(path) as file:
        return SafetensorsReader(path, dict.fromkeys(file.keys(), path), file.metadata() or {})


def _open_index(path: Path) -> SafetensorsReader:
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not a JSON file ({error}).') from error
    if not isinstance(index, dict) or not isinstance(index.get('weight_map'), dict):
        raise ValueError(f"{path}: not an index of shards; expected {{'weight_map': {{...}}}}.")
    weight_map = index['weight_map']
    for shard in sorted(set(weight_map.values())):
        # A checkpoint comes from elsewhere: it may name files beside itself only.
        if Path(shard).name != shard:
            raise ValueError(f'{path}: shard {shard!r} is not a plain file name.')
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f'{path}: shard {shard!r} is missing beside it.')
        with _opened(path.parent / shard) as file:
            held = set(file.keys())
        listed = {name for name, where in weight_map.items() if where == shard}
        if held != listed:
            name = min(held ^ listed)
            raise ValueError(
                f'{path}: {name!r} is {"listed for" if name in listed else "not listed for"} '
                f'{shard}, which {"lacks" if name in listed else "holds"} it: mixed downloads?'
            )
    files = {name: path.parent / shard for name, shard in weight_map.items()}
    return SafetensorsReader(path, files, index.get('metadata') or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='numpy') as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f'{path}: not a complete safetensors file ({error}).') from error
