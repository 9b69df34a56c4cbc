"""Rows of one large array, written by several processes as they come, and found after a kill.

Each file holds some rows and their indices, and appears under its name when it is complete. Which
process wrote a row, and how many rows a file holds, makes no difference to what `merge` returns.
"""

import os
import tempfile
import time
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


def missing(folder: Path, num_rows: int) -> np.ndarray:
    """The indices of 0..num_rows - 1 without a row, ascending."""
    is_there = np.zeros(num_rows, bool)
    for part in _parts(folder):
        indices = part['indices']
        is_there[indices[indices < num_rows]] = True
    return np.flatnonzero(~is_there)


def merge(folder: Path, num_rows: int, *, patience_s: float = 0) -> np.ndarray:
    """All rows in order.

    Args:
      folder: of the array.
      num_rows: how many it has.
      patience_s: how long to wait for files of other hosts, which a shared disk may show late.

    Raises:
      ValueError: one is missing; says which.
    """
    began = time.monotonic()
    while len(absent := missing(folder, num_rows)):
        if time.monotonic() - began >= patience_s:
            raise ValueError(
                f'{folder}: row {absent[0]} of {num_rows} is missing; do all processes write '
                f'there, and is the disk one that all hosts share?'
            )
        time.sleep(0.1)
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
