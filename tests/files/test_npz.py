import io
import zipfile

import numpy as np
import pytest

from dmq_jax.files import npz


def random_array(shape=(7, 4, 5, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_member(path, data, compression=zipfile.ZIP_STORED, name='arr_0.npy'):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr(name, data)


def member_bytes(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('num_rows', [1, 3, 7, 100])
def test_parts_are_the_array_in_order(tmp_path, save, num_rows):
    array = random_array()
    save(tmp_path / 'a.npz', array, labels=np.arange(7))
    parts = list(npz.iterate_rows(tmp_path / 'a.npz', 'arr_0', num_rows))
    assert [len(part) for part in parts[:-1]] == [num_rows] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), array)
    assert sorted(npz.array_names(tmp_path / 'a.npz')) == ['arr_0', 'labels']
    np.testing.assert_array_equal(npz.read_array(tmp_path / 'a.npz', 'labels'), np.arange(7))


@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32, '>f8', np.int64])
def test_every_version_of_the_header_is_read(tmp_path, version, dtype):
    array = random_array((3, 2)).astype(dtype)
    write_member(tmp_path / 'a.npz', member_bytes(array, version))
    assert npz.read_header(tmp_path / 'a.npz', 'arr_0') == (array.dtype, (3, 2), False)
    np.testing.assert_array_equal(npz.read_array(tmp_path / 'a.npz', 'arr_0'), array)


def test_small_arrays_are_read_in_either_order(tmp_path):
    array = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / 'a.npz', c=array, fortran=np.asfortranarray(array), number=np.float64(5))
    for name, wanted in (('c', array), ('fortran', array), ('number', 5.0)):
        np.testing.assert_array_equal(npz.read_array(tmp_path / 'a.npz', name), wanted)


def test_streams_that_hand_out_few_bytes_at_a_time_are_read_whole(tmp_path, monkeypatch):
    array = random_array((50, 64, 64, 3))
    np.savez_compressed(tmp_path / 'a.npz', array)
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, 'read', lambda self, n=-1: read(self, min(n, 1000) if n > 0 else n)
    )
    monkeypatch.setattr(
        zipfile.ZipExtFile, 'readinto', lambda self, b: _readinto(self.read(len(b)), b)
    )
    parts = npz.iterate_rows(tmp_path / 'a.npz', 'arr_0', 8)
    np.testing.assert_array_equal(np.concatenate(list(parts)), array)


def _readinto(data, buffer):
    buffer[: len(data)] = data
    return len(data)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('num_rows', [2, 7])
def test_a_flipped_byte_is_found_before_the_last_rows_are_handed_out(
    tmp_path, compression, num_rows
):
    path = tmp_path / 'a.npz'
    write_member(path, member_bytes(random_array()), compression)
    data = bytearray(path.read_bytes())
    data[250] ^= 0xFF
    path.write_bytes(data)
    count = 0
    with pytest.raises(ValueError, match='a.npz: no readable .npz|a.npz: arr_0'):
        for part in npz.iterate_rows(path, 'arr_0', num_rows):
            count += len(part)
    assert count < 7


def test_a_file_cut_off_anywhere_is_an_error(tmp_path):
    path = tmp_path / 'a.npz'
    np.savez(path, random_array())
    data = path.read_bytes()
    for length in (0, 10, 200, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match='a.npz: no readable .npz'):
            list(npz.iterate_rows(path, 'arr_0', 2))


@pytest.mark.parametrize(
    'data, message',
    [
        (member_bytes(random_array())[:-1], r'rows from 6 on need 60 bytes, 59 are there'),
        (member_bytes(random_array())[:300], r'is cut off: rows from 2 on'),
        (member_bytes(random_array()) + b'!', r'more data than its shape \(7, 4, 5, 3\)'),
        (member_bytes(random_array())[:40], 'ends in its header'),
        (b'PNG' * 20, 'expected an .npy member'),
        (b'\x93NUMPY\x09\x00' + bytes(80), 'expected an .npy member'),
        (b'\x93NUMPY\x02\x00\xff\xff\xff\xff' + bytes(80), 'header of 4294967295 bytes'),
        (b'\x93NUMPY\x01\x00\x03\x00{1}', r"damaged header b'\{1\}'"),
        (member_bytes(np.asfortranarray(random_array())), 'in Fortran order: expected C order'),
    ],
)
def test_damaged_members_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / 'a.npz'
    write_member(path, data)
    with pytest.raises(ValueError, match=f'a.npz: arr_0 .*{message}'):
        list(npz.iterate_rows(path, 'arr_0', 2))


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / 'a.npz', np.array([print, {}], object))
    with pytest.raises(ValueError, match='holds Python objects'):
        list(npz.iterate_rows(tmp_path / 'a.npz', 'arr_0', 1))


def test_absent_files_and_arrays_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='b.npz: no such file'):
        npz.array_names(tmp_path / 'b.npz')
    np.savez(tmp_path / 'a.npz', images=np.zeros(3))
    with pytest.raises(ValueError, match=r"a.npz: no array 'arr_0' among \['images.npy'\]"):
        npz.read_header(tmp_path / 'a.npz', 'arr_0')
    (tmp_path / 'c.npz').write_text('words')
    with pytest.raises(ValueError, match='c.npz: no readable .npz'):
        npz.array_names(tmp_path / 'c.npz')


def test_numpy_reads_what_is_written(tmp_path):
    array, other = random_array(), np.eye(3)
    header = npz.ArrayHeader(array.dtype, array.shape, False)
    path = tmp_path / 'a.npz'
    npz.write_arrays(path, {'arr_0': (header, lambda: iter(np.split(array, [2, 2]))), 'mu': other})
    with np.load(path) as file:
        assert file.files == ['arr_0', 'mu']
        np.testing.assert_array_equal(file['arr_0'], array)
        np.testing.assert_array_equal(file['mu'], other)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    'parts, message',
    [
        ([np.zeros((3, 2), np.uint8)], '3 rows given, expected 4'),
        ([np.zeros((4, 3), np.uint8)], r'rows of uint8 \(3,\) given'),
        ([np.zeros((4, 2))], 'rows of float64'),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, parts, message):
    path = tmp_path / 'a.npz'
    path.write_text('old')
    header = npz.ArrayHeader(np.dtype(np.uint8), (4, 2), False)
    with pytest.raises(ValueError, match=message):
        npz.write_arrays(path, {'arr_0': (header, lambda: iter(parts))})
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
