"""The two containers of `torch.save`: a zip archive, and pickles followed by raw storages.

The zip archive is that of torch 1.6 and later. Storages are views of the mapped file wherever it
holds them uncompressed.
"""

import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmq_jax.files.torch_files.machine import Machine
from dmq_jax.files.torch_files.objects import FileError, StorageType, are_sizes

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# deflate cannot do better, so a member that claims more is lying.
_MAX_DEFLATE_RATIO = 1032


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
        or not isinstance(persistent_id[1], StorageType)
        or not isinstance(persistent_id[2], str | int)
        or not are_sizes((persistent_id[4],))
    ):
        raise FileError('the pickle in it names a storage in an unknown way')
    view = persistent_id[5] if len(persistent_id) == 6 else None
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3 or not are_sizes(view[1:]):
            raise FileError('the pickle in it names a part of a storage in an unknown way')
        if view[1] + view[2] > persistent_id[4]:
            raise FileError('the pickle in it names a part that leaves its storage')
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


def load_zip(path: Path, data: mmap.mmap, ignore: Sequence[str]) -> Any:
    """The object of the archive at `path`, mapped as `data`; see `load`.

    Raises:
      FileError: damaged, or holding what is not on the allow-list.
    """
    members = _zip_members(path, data)
    roots = [name[: -len('data.pkl')] for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
    if len(roots) != 1:
        raise FileError(f'{len(roots)} files */data.pkl in the archive; expected one')
    root = roots[0]
    if f'{root}constants.pkl' in members:
        raise FileError(
            'a TorchScript archive, which holds code; save its state_dict() with torch.save'
        )
    order = b'little'
    if f'{root}byteorder' in members:
        order = bytes(_content(data, members[f'{root}byteorder'], 'byteorder'))
        if order not in (b'little', b'big'):
            raise FileError(f'the byte order is {order!r:.30}; expected little or big')
    storages: dict[tuple[str, np.dtype], np.ndarray] = {}

    def resolve(persistent_id: Any) -> np.ndarray:
        wanted = _storage_key(persistent_id)
        name, num_bytes = f'{root}data/{wanted.key}', wanted.count * wanted.dtype.itemsize
        if name not in members:
            raise FileError(f'the archive lacks the storage {name!r}')
        if num_bytes > members[name].size:
            raise FileError(
                f'the storage {name!r} has {members[name].size} bytes, expected {num_bytes}'
            )
        if (name, wanted.dtype) not in storages:
            raw = _content(data, members[name], name)
            whole = len(raw) // wanted.dtype.itemsize * wanted.dtype.itemsize
            storages[name, wanted.dtype] = _storage(raw[:whole], wanted.dtype, order == b'big')
        return _part(storages[name, wanted.dtype][: wanted.count], wanted)

    pickle_member = members[f'{root}data.pkl']
    if not pickle_member.is_deflated:
        return Machine(resolve, ignore).run(data, pickle_member.start)[0]
    unpacked = _content(data, pickle_member, 'data.pkl')
    with mmap.mmap(-1, max(len(unpacked), 1)) as copy:
        copy.write(unpacked)
        return Machine(resolve, ignore).run(copy, 0)[0]


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
        raise FileError(f'not a complete zip archive ({error}); copy the file again') from error
    members: dict[str, _Member] = {}
    taken = []
    for info in infos:
        name = info.filename
        if name.startswith('/') or '\\' in name or '..' in name.split('/'):
            raise FileError(f'the archive has a file {name!r:.200}, which leaves its folder')
        if name in members:
            raise FileError(f'the archive has two files {name!r:.200}')
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise FileError(f'{name!r:.200} in the archive is encrypted or oddly compressed')
        at = info.header_offset
        if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b'PK\x03\x04':
            raise FileError(f'{name!r:.200} is not where the directory of the archive says')
        # The local header pads the data to a multiple of 64; the directory does not know.
        start = at + 30 + sum(struct.unpack('<HH', data[at + 26 : at + 30]))
        is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
        end = start + info.compress_size
        if end > len(data):
            raise FileError(f'{name!r:.200} ends beyond the end of the file; copy the file again')
        limit = info.compress_size * (_MAX_DEFLATE_RATIO if is_deflated else 1)
        if info.file_size > limit or (not is_deflated and info.file_size != info.compress_size):
            raise FileError(
                f'{name!r:.200} claims {info.file_size} bytes in {info.compress_size} bytes'
            )
        members[name] = _Member(start, info.compress_size, info.file_size, is_deflated, info.CRC)
        taken.append((at, end, name))
    taken.sort()
    for (_, end, name), (begin, _, other) in zip(taken, taken[1:], strict=False):
        if begin < end:
            raise FileError(f'{name!r:.200} and {other!r:.200} overlap in the archive')
    return members


def _content(data: mmap.mmap, member: _Member, name: str) -> memoryview:
    """The bytes of a file of the archive: a view of the mapping unless they are compressed."""
    stored = memoryview(data)[member.start : member.start + member.stored_size]
    if not member.is_deflated:
        return stored
    try:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, member.size + 1)
    except zlib.error as error:
        raise FileError(f'{name!r} does not unpack ({error}); copy the file again') from error
    if len(unpacked) != member.size or zlib.crc32(unpacked) != member.crc:
        raise FileError(f'{name!r} unpacks to something else; copy the file again')
    return memoryview(unpacked)


def load_legacy(data: mmap.mmap, ignore: Sequence[str]) -> Any:
    """The object of a mapped file in the layout before torch 1.6; see `load`.

    Raises:
      FileError: as `load_zip`.
    """
    position, header = 0, []
    for _ in range(3):
        value, position = Machine(_no_storage, ()).run(data, position)
        header.append(value)
        if header[0] != _LEGACY_MAGIC:
            raise FileError(
                'a pickle, but not one of torch.save (its magic number is missing); save a '
                'state_dict with torch.save, or arrays as .npz or .safetensors'
            )
    if header[1] != _LEGACY_VERSION or not isinstance(header[2], dict):
        raise FileError(f'the version is {header[1]!r:.50}; expected {_LEGACY_VERSION}')
    is_swapped = header[2].get('little_endian') is False

    # Where a storage lies is known only after the pickle that uses it, so it is read twice: for
    # the types and lengths of the storages, then for the object.
    wanted: dict[str, _StorageKey] = {}

    def note(persistent_id: Any) -> np.ndarray:
        key = _storage_key(persistent_id)
        known = wanted.setdefault(key.key, key)
        if (known.dtype, known.count) != (key.dtype, key.count):
            raise FileError(f'the storage {key.key!r:.50} has two types or lengths')
        if key.count * key.dtype.itemsize > len(data):
            raise FileError('it ends before its storages do; copy the file again')
        # Of the right type and length, which is all that this reading needs.
        return _part(np.frombuffer(data, key.dtype, key.count), key)

    _, end = Machine(note, ignore).run(data, position)
    keys, end = Machine(_no_storage, ()).run(data, end)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(wanted):
        raise FileError('its list of storages is not that of its pickle; copy the file again')
    storages = {}
    for key in map(str, keys):
        if end + 8 > len(data):
            raise FileError('it ends before its storages do; copy the file again')
        count = int.from_bytes(data[end : end + 8], 'big' if is_swapped else 'little', signed=True)
        start, end = end + 8, end + 8 + count * wanted[key].dtype.itemsize
        if count != wanted[key].count:
            raise FileError(
                f'the storage {key!r:.50} has {count} values, expected {wanted[key].count}'
            )
        if end > len(data):
            raise FileError('it ends before its storages do; copy the file again')
        raw = memoryview(data)[start:end]
        storages[key] = _storage(raw, wanted[key].dtype, is_swapped)

    def resolve(persistent_id: Any) -> np.ndarray:
        key = _storage_key(persistent_id)
        return _part(storages[key.key], key)

    return Machine(resolve, ignore).run(data, position)[0]


def _no_storage(_: Any) -> None:
    raise FileError('the pickle in it names a storage where there is none')
