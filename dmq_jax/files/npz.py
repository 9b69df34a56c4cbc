"""Arrays of `.npz` files as streams: larger than memory when read, whole or absent when written.

An `.npz` is a zip of members `NAME.npy`, stored or deflated; the layout of a member is that of
NumPy Enhancement Proposal 1 (versions 1.0, 2.0 and 3.0). Pickled objects are never read.
"""

import ast
import contextlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = b'\x93NUMPY'
# NumPy itself refuses longer headers where pickles are off.
MAX_HEADER_BYTES = 10_000
# Bytes of the length of the header, by version of the format.
LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}


class ArrayHeader(NamedTuple):
    """What a member says about its array before the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool


def array_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays of an `.npz`, in its order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no zip file, or one that is cut off.
    """
    with _readable(path) as archive:
        members = archive.namelist()
    return [name.removesuffix('.npy') for name in members if name.endswith('.npy')]


def read_header(path: str | os.PathLike, name: str) -> ArrayHeader:
    """Type and shape of one array; its data are not read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or without this array.
    """
    with _opened_member(path, name) as file:
        return _parse_header(file, f'{path}: {name}')


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """One array, whole; C or Fortran order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: as `iterate_rows`.
    """
    with _opened_member(path, name) as file:
        where = f'{path}: {name}'
        header = _parse_header(file, where)
        values = np.empty(
            header.shape[::-1] if header.fortran_order else header.shape, header.dtype
        )
        _fill(values, file, where, 0)
        _check_end(file, where, header)
    return values.T if header.fortran_order else values


def iterate_rows(path: str | os.PathLike, name: str, num_rows: int) -> Iterator[np.ndarray]:
    """Yields an array in order, `num_rows` rows at a time, the last time possibly fewer.

    Memory holds the rows that are handed out and no more. The checksum of the zip file covers all
    rows and is compared before the last ones are handed out.

    Args:
      path: the `.npz`.
      name: of the array.
      num_rows: rows of each part.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read or is damaged, without this array, or an array of
        objects, in Fortran order or with more or less data than its shape.
    """
    with _opened_member(path, name) as file:
        where = f'{path}: {name}'
        header = _parse_header(file, where)
        if header.fortran_order and len(header.shape) > 1:
            raise ValueError(
                f'{where} is in Fortran order: expected C order; save np.ascontiguousarray({name}).'
            )
        count, *rest = header.shape
        for start in range(0, count, num_rows):
            rows = np.empty((min(num_rows, count - start), *rest), header.dtype)
            _fill(rows, file, where, start)
            if start + len(rows) == count:
                _check_end(file, where, header)
            yield rows


def write_arrays(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray | tuple[ArrayHeader, Callable[[], Iterator[np.ndarray]]]],
) -> None:
    """Writes an uncompressed `.npz`, whole or not at all.

    Args:
      path: file to write, replaced if it exists; its folder must exist.
      arrays: by name; an array, or a header and a function that yields its rows in parts, of
        which only one at a time is in memory.

    Raises:
      ValueError: if parts do not fit their header.
    """
    path = Path(path)
    # Renamed when complete: an error or a kill leaves no half file under the name.
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with zipfile.ZipFile(partial, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, value in arrays.items():
                with archive.open(f'{name}.npy', 'w', force_zip64=True) as file:
                    if isinstance(value, np.ndarray):
                        np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
                    else:
                        _write_parts(file, f'{path}: {name}', *value)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parts(
    file: io.BufferedIOBase,
    where: str,
    header: ArrayHeader,
    parts: Callable[[], Iterator[np.ndarray]],
) -> None:
    fields = {
        'descr': np.lib.format.dtype_to_descr(header.dtype),
        'fortran_order': False,
        'shape': header.shape,
    }
    np.lib.format.write_array_header_1_0(file, fields)
    count = 0
    for part in parts():
        if part.dtype != header.dtype or part.shape[1:] != header.shape[1:]:
            raise ValueError(
                f'{where}: rows of {part.dtype} {part.shape[1:]} given, expected {header.dtype} '
                f'{header.shape[1:]}.'
            )
        file.write(np.ascontiguousarray(part).data)
        count += len(part)
    if count != header.shape[0]:
        raise ValueError(f'{where}: {count} rows given, expected {header.shape[0]}.')


@contextlib.contextmanager
def _readable(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """The zip file, whose errors become one line that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: no such file; expected an .npz.')
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f'{path}: no readable .npz ({error}); expected an undamaged file of np.savez or '
            'np.savez_compressed. Copy or make it again.'
        ) from error


@contextlib.contextmanager
def _opened_member(path: str | os.PathLike, name: str) -> Iterator[io.BufferedIOBase]:
    with _readable(path) as archive:
        if f'{name}.npy' not in archive.namelist():
            raise ValueError(
                f'{path}: no array {name!r} among {archive.namelist()[:8]}: expected an .npz '
                f'with {name}, as np.savez(path, {name}=...) writes.'
            )
        with archive.open(f'{name}.npy') as file:
            yield file


def _parse_header(file: io.BufferedIOBase, where: str) -> ArrayHeader:
    start = _read_exactly(file, len(MAGIC) + 2, where)
    version = tuple(start[-2:])
    if not start.startswith(MAGIC) or version not in LENGTH_BYTES:
        raise ValueError(
            f'{where} begins with {start!r}: expected an .npy member of version 1.0, 2.0 or 3.0.'
        )
    length = int.from_bytes(_read_exactly(file, LENGTH_BYTES[version], where), 'little')
    if length > MAX_HEADER_BYTES:
        raise ValueError(f'{where} has a header of {length} bytes: it is damaged.')
    text = _read_exactly(file, length, where)
    try:
        fields = ast.literal_eval(text.decode('utf-8' if version == (3, 0) else 'latin-1').strip())
        dtype = np.dtype(fields['descr'])
        shape = tuple(int(size) for size in fields['shape'])
        fortran_order = bool(fields['fortran_order'])
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f'{where} has the damaged header {text[:80]!r}.') from error
    if any(size < 0 for size in shape):
        raise ValueError(f'{where} has the damaged shape {shape}.')
    return ArrayHeader(dtype, shape, fortran_order)


def _read_exactly(file: io.BufferedIOBase, size: int, where: str) -> bytes:
    """Bytes of a stream that may hand out fewer than it was asked for."""
    result = b''
    while len(result) < size:
        if not (part := file.read(size - len(result))):
            raise ValueError(f'{where} ends in its header: it is cut off. Copy or make it again.')
        result += part
    return result


def _fill(rows: np.ndarray, file: io.BufferedIOBase, where: str, start: int) -> None:
    if rows.dtype.hasobject:
        raise ValueError(f'{where} holds Python objects: expected numbers; none are unpickled.')
    view = memoryview(rows.reshape(-1).view(np.uint8))
    done = 0
    while done < len(view):
        if not (num_read := file.readinto(view[done:])):
            raise ValueError(
                f'{where} is cut off: rows from {start} on need {len(view)} bytes, {done} are '
                'there. Copy or make it again.'
            )
        done += num_read


def _check_end(file: io.BufferedIOBase, where: str, header: ArrayHeader) -> None:
    # Reading past the end also makes zipfile compare the checksum.
    if file.read(1):
        raise ValueError(f'{where} has more data than its shape {header.shape} needs.')
