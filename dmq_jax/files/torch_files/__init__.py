"""Files written by `torch.save`, read without torch and without running anything they contain.

Both containers are known, see `containers`. The pickle inside is interpreted by a `machine` of our
own, which calls nothing but the functions of a table, see `objects`. Tensors are read-only views of
the file mapped into memory wherever the file holds them uncompressed, so opening a checkpoint costs
what its pickle costs, and tensors that share a storage share memory.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmq_jax.files.torch_files.containers import load_legacy, load_zip
from dmq_jax.files.torch_files.objects import FileError, Ignored

__all__ = ['Ignored', 'load', 'release']


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
            return load_zip(path, data, ignore)
        if data[:1] in (b'\x80', b'L'):  # pickle protocols 2 to 5, and a number in 0 and 1
            return load_legacy(data, ignore)
        raise FileError(f'it begins with {data[:16]!r}, as no file of torch.save does')
    except FileError as error:
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
