"""Rows of one large array, written by several processes as they come, and found after a kill.

Each file holds some rows and their indices, and appears under its name when it is complete. Which
process wrote a row, and how many rows a file holds, makes no difference to what `merge` returns.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_ENDING = '.npz'


def write(folder: Path, indices: np.ndarray, rows: np.ndarray) -> None:
    """Stores rows of the array; none is fine.

    Args:
      folder: of this array alone; there already.
      indices: the place of each row.
      rows: as many.
    """
    if not len(indices):
        return
    name = f'{indices[0]:09d}-{indices[-1]:09d}-{len(indices)}{_ENDING}'
    # Same folder, since os.replace is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=folder, prefix='.')
    with open(handle, 'wb') as file:
        np.savez(file, indices=np.asarray(indices, np.int64), rows=rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)


def first_missing(folder: Path, num_rows: int) -> int:
    """The smallest index without a row; `num_rows` if all are there."""
    is_there = np.zeros(num_rows + 1, bool)
    for part in _parts(folder):
        indices = part['indices']
        is_there[indices[indices < num_rows]] = True
    return int(np.argmin(is_there))


def merge(folder: Path, num_rows: int) -> np.ndarray:
    """All rows in order.

    Raises:
      ValueError: one is missing; says which.
    """
    missing = first_missing(folder, num_rows)
    if missing < num_rows:
        raise ValueError(
            f'{folder}: row {missing} of {num_rows} is missing; do all processes write there, and '
            f'is the disk one that all hosts share?'
        )
    result = None
    for part in _parts(folder):
        rows = part['rows']
        if result is None:
            result = np.empty((num_rows, *rows.shape[1:]), rows.dtype)
        fits = part['indices'] < num_rows
        result[part['indices'][fits]] = rows[fits]
    return result


def _parts(folder: Path) -> Iterator[np.lib.npyio.NpzFile]:
    for path in sorted(folder.glob(f'[0-9]*{_ENDING}')):
        with np.load(path, allow_pickle=False) as part:
            yield part
