"""Both containers, written by hand: no torch is needed to read them, nor to test that."""

import mmap
import pickle
import struct
import zipfile

import numpy as np
import pytest

from dmq_jax.files.torch_files.containers import load_legacy, load_zip
from dmq_jax.files.torch_files.objects import FileError

VALUES = np.arange(6, dtype='<f4')
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def tensor_pickle(*, legacy, key='0', count=6, kind='Float'):
    """{'w': the storage as a matrix [2, 3]}, in opcodes of protocol 2."""
    identity = f"(S'storage'\nctorch\n{kind}Storage\nS'{key}'\nS'cpu'\nI{count}\n"
    identity += 'NtQ' if legacy else 'tQ'
    tensor = f'ctorch._utils\n_rebuild_tensor_v2\n({identity}I0\n(I2\nI3\nt(I3\nI1\ntI00\n'
    return f"\u0080\u0002}}S'w'\n{tensor}ccollections\nOrderedDict\n)RtRs.".encode('latin-1')


def archive(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def read_zip(path):
    with path.open('rb') as file:
        return load_zip(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), ())


def legacy_bytes(*, magic=MAGIC, keys=('0',), count=6, content=None):
    head = [pickle.dumps(value, 2) for value in (magic, VERSION, {'little_endian': True})]
    body = [tensor_pickle(legacy=True), pickle.dumps(list(keys), 2), struct.pack('<q', count)]
    return b''.join(head + body) + (VALUES.tobytes() if content is None else content)


def read_legacy(tmp_path, whole):
    (tmp_path / 'f.pt').write_bytes(whole)
    with (tmp_path / 'f.pt').open('rb') as file:
        return load_legacy(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), ())


@pytest.mark.parametrize('root', ['archive', 'a name of its own'])
@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_has_one_folder_of_any_name(tmp_path, root, compression):
    files = {f'{root}/data.pkl': tensor_pickle(legacy=False), f'{root}/data/0': VALUES.tobytes()}
    found = read_zip(archive(tmp_path / 'f.pt', files, compression))
    np.testing.assert_array_equal(found['w'], VALUES.reshape(2, 3))
    assert not found['w'].flags.writeable


@pytest.mark.parametrize(
    'files, text',
    [
        ({'a/data.pkl': b'N.', 'b/data.pkl': b'N.'}, '2 files'),
        ({'a/other': b''}, '0 files'),
        ({'a/data.pkl': b'N.', 'a/constants.pkl': b''}, 'TorchScript'),
        ({'a/data.pkl': b'N.', 'a/byteorder': b'middle'}, 'byte order'),
        ({'a/data.pkl': tensor_pickle(legacy=False)}, "lacks the storage 'a/data/0'"),
        ({'a/data.pkl': tensor_pickle(legacy=False), 'a/data/0': b'1234'}, '4 bytes, expected 24'),
        ({'a/data.pkl': tensor_pickle(legacy=False, kind='Strange')}, 'StrangeStorage'),
    ],
)
def test_an_archive_that_is_none_of_torch_is_refused(tmp_path, files, text):
    with pytest.raises(FileError, match=text):
        read_zip(archive(tmp_path / 'f.pt', files))


def test_the_layout_before_zip_is_pickles_and_raw_storages(tmp_path):
    found = read_legacy(tmp_path, legacy_bytes())
    np.testing.assert_array_equal(found['w'], VALUES.reshape(2, 3))


@pytest.mark.parametrize(
    'change, text',
    [
        ({'magic': 5}, 'magic number is missing'),
        ({'keys': ()}, 'list of storages'),
        ({'keys': ('0', '1')}, 'list of storages'),
        ({'count': 5}, '5 values, expected 6'),
        ({'count': -1}, 'values, expected 6'),
        ({'content': b'1234'}, 'ends before its storages'),
    ],
)
def test_a_legacy_file_that_contradicts_itself_is_refused(tmp_path, change, text):
    with pytest.raises(FileError, match=text):
        read_legacy(tmp_path, legacy_bytes(**change))
