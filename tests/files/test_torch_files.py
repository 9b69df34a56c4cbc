import collections
import io
import mmap
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from dmq_jax.files import torch_files
from dmq_jax.files.torch_files import Ignored, containers, load, machine, objects

torch = pytest.importorskip('torch', reason='torch writes the files that are read here')

CONTAINERS = {'zip': True, 'legacy': False}


@pytest.fixture(params=CONTAINERS)
def container(request):
    return request.param


def save(value, path, container):
    torch.save(value, path, _use_new_zipfile_serialization=CONTAINERS[container])
    return path


def round_trip(value, tmp_path, container, **options):
    return load(save(value, tmp_path / 'file.pt', container), **options)


def bits(tensor):
    """The bytes of a tensor of any type, in its logical order."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


DTYPES = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
    torch.uint16: np.uint16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
}


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path, container, dtype):
    tensor = (torch.arange(-6, 6).reshape(3, 4) * 1.5).abs().to(dtype)
    array = round_trip({'x': tensor}, tmp_path, container)['x']
    assert array.dtype == DTYPES[dtype]
    assert array.shape == (3, 4)
    assert array.tobytes() == bits(tensor)


def test_views_keep_their_shape_and_values(tmp_path, container):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        'transposed': base.permute(2, 0, 1),
        'sliced': base[1:, ::2, 3],
        'offset': base.flatten()[7:],
        'expanded': base[:1].expand(6, 4, 5),
        'scalar': base[2, 3, 4],
        'empty': base[:0],
        'no_storage': torch.empty(0),
        'size_1': base[:, :1].transpose(0, 1),
    }
    arrays = round_trip(views, tmp_path, container)
    for name, view in views.items():
        np.testing.assert_array_equal(arrays[name], view.numpy(), err_msg=name)
        assert arrays[name].shape == tuple(view.shape)


def test_shared_storage_stays_shared_and_cannot_be_written(tmp_path, container):
    base = torch.arange(6.0)
    a, b = round_trip([base, base[2:]], tmp_path, container)
    assert np.shares_memory(a, b)
    with pytest.raises(ValueError, match='read-only'):
        a[0] = 1


def test_zip_tensors_are_views_of_the_mapped_file(tmp_path):
    array = round_trip(torch.arange(1000.0), tmp_path, 'zip')
    base = array
    while not isinstance(base, memoryview | mmap.mmap):
        base = base.base
    assert isinstance(getattr(base, 'obj', base), mmap.mmap)
    assert array.ctypes.data % 64 == 0


def test_state_dict_is_a_plain_dict_in_the_order_of_the_module(tmp_path, container):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    arrays = round_trip(state, tmp_path, container)
    assert type(arrays) is dict
    assert list(arrays) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())


def test_nested_containers_and_metadata_come_back_as_plain_values(tmp_path, container):
    value = {
        'epoch': 3,
        'rates': [1e-4, (True, None, 'ä', b'\x00\xff', 2**70, -1)],
        'size': torch.Size([2, 3]),
        'dtype': torch.bfloat16,
        'device': torch.device('cpu'),
        'parameter': torch.nn.Parameter(torch.ones(2, 2)),
        'set': {1, 2},
        'frozen': frozenset({'a'}),
        'ordered': collections.OrderedDict(a=1),
        'default': collections.defaultdict(list, b=[2]),
        ('key', 1): 1 + 2j,
        'numpy': np.arange(6, dtype='>i4').reshape(2, 3),
        'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        'text': np.array(['ab', 'c']),
        'float': np.float64(1.5),
        'bool': np.bool_(True),
        'numpy_dtype': np.dtype('<f4'),
    }
    got = round_trip(value, tmp_path, container)
    for name in ('numpy', 'fortran', 'text', 'parameter'):
        want = value.pop(name)
        want = want.detach().numpy() if name == 'parameter' else want
        np.testing.assert_array_equal(got[name], want)
        del got[name]
    value |= {'dtype': np.dtype(ml_dtypes.bfloat16), 'device': 'cpu', 'size': (2, 3)}
    assert got == value
    assert type(got['ordered']) is type(got['default']) is dict
    assert type(got['float']) is np.float64


@pytest.mark.parametrize('protocol', range(1, 6))
def test_every_pickle_protocol_is_read(tmp_path, container, protocol):
    value = {'a': torch.arange(3), 'b': [1.5, 'x', b'y', (1, 2, 3, 4)], 'c': {1}, 'd': np.ones(2)}
    path = tmp_path / 'file.pt'
    torch.save(
        value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=CONTAINERS[container]
    )
    got = load(path)
    np.testing.assert_array_equal(got['a'], [0, 1, 2])
    np.testing.assert_array_equal(got['d'], [1, 1])
    assert (got['b'], got['c']) == (value['b'], value['c'])


def test_parameter_with_attributes_is_its_tensor(tmp_path, container):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = 'x'
    np.testing.assert_array_equal(round_trip([parameter], tmp_path, container)[0], [0, 1, 2])


# ---- Hostile and damaged files


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    'function, arguments, name',
    [
        (os.system, ('touch harmed',), f'{os.name}.system'),
        (eval, ('open("harmed", "w")',), '__builtin__.eval'),
        (getattr, ('a', 'upper'), '__builtin__.getattr'),
        (torch.load, ('x',), 'torch.serialization.load'),
    ],
)
def test_code_is_refused_by_name_and_does_not_run(
    tmp_path, monkeypatch, container, function, arguments, name
):
    monkeypatch.chdir(tmp_path)
    path = save([torch.ones(1), Reduced(function, *arguments)], 'file.pt', container)
    with pytest.raises(ValueError, match=f"file.pt: .*'{name}'.*nothing was run"):
        load(path)
    assert not (tmp_path / 'harmed').exists()


def test_ignored_packages_become_placeholders(tmp_path, container):
    class_ = collections.Counter
    value = {'w': torch.ones(2), 'c': class_('aab'), 'f': Reduced(os.system, 'touch harmed')}
    path = save(value, tmp_path / 'file.pt', container)
    with pytest.raises(ValueError, match="'collections.Counter'.*ignore="):
        load(path)
    got = load(path, ignore=('collections.Counter', os.name))
    assert isinstance(got['c'], Ignored)
    assert got['c'].name == 'collections.Counter'
    assert got['f'].name == f'{os.name}.system'
    np.testing.assert_array_equal(got['w'], [1, 1])


def test_ignoring_a_prefix_spares_longer_names(tmp_path, container):
    path = save(Reduced(os.system, 'true'), tmp_path / 'file.pt', container)
    with pytest.raises(ValueError, match='system'):
        load(path, ignore=(os.name[:-1],))


@pytest.mark.parametrize('num_steps', [60])
def test_every_truncation_is_a_value_error(tmp_path, container, num_steps):
    value = {'a': torch.arange(50.0), 'b': [torch.ones(3, 3).t(), np.ones(3)], 'c': 'text'}
    whole = save(value, tmp_path / 'file.pt', container).read_bytes()
    path = tmp_path / 'cut.pt'
    for size in sorted({0, 1, len(whole) - 1, *range(3, len(whole), len(whole) // num_steps)}):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='cut.pt'):
            load(path)


def test_flipped_bytes_give_a_value_error_or_an_object(tmp_path, container):
    value = {'a': torch.arange(3.0), 'b': [np.ones(3), {'x': (1, 2)}]}
    whole = save(value, tmp_path / 'file.pt', container).read_bytes()
    rng = np.random.default_rng(0)
    path, num_refused = tmp_path / 'flipped.pt', 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(min(len(whole), 1500))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError as error:
            assert 'flipped.pt' in str(error)
            num_refused += 1
    assert num_refused > 50


def write_zip(path, pickled, storages=None, compression=zipfile.ZIP_STORED, **extra):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', pickled)
        for name, content in (storages or {}).items():
            archive.writestr(f'archive/data/{name}', content)
        for name, content in extra.items():
            archive.writestr(f'archive/{name}', content)
    return path


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value):
        return value[1:] if isinstance(value, tuple) and value[:1] == ('PID',) else None


def pickled_tensor(offset, size, stride, *, numel=6, storage=torch.FloatStorage, metadata=()):
    """What torch.save would pickle for a tensor it could not have."""
    buffer = io.BytesIO()
    persistent_id = ('PID', 'storage', storage, '0', 'cpu', numel)
    StoragePickler(buffer, 2).dump(
        Reduced(
            torch._utils._rebuild_tensor_v2,
            persistent_id, offset, size, stride, False, {}, *metadata,
        )
    )  # fmt: skip
    return buffer.getvalue()


SIX = np.arange(6, dtype='<f4').tobytes()


def test_hand_written_archive_is_read(tmp_path):
    path = write_zip(tmp_path / 'f.pt', pickled_tensor(1, (2, 2), (2, 1)), {'0': SIX})
    np.testing.assert_array_equal(load(path), [[1, 2], [3, 4]])


def test_deflated_archives_are_read(tmp_path):
    pickled = pickled_tensor(0, (3, 2), (2, 1))
    path = write_zip(tmp_path / 'f.pt', pickled, {'0': SIX}, zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(load(path), np.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize(
    'dtype, storage', [('f4', 'Float'), ('f8', 'Double'), ('c8', 'ComplexFloat')]
)
def test_big_endian_storages_are_turned(tmp_path, dtype, storage):
    values = np.arange(6).astype(f'>{dtype}') * (1 + 2j if dtype == 'c8' else 1)
    content = values.astype(f'>{dtype}').tobytes()
    pickled = pickled_tensor(0, (6,), (1,), storage=getattr(torch, f'{storage}Storage'))
    array = load(write_zip(tmp_path / 'f.pt', pickled, {'0': content}, byteorder='big'))
    np.testing.assert_array_equal(array, values)
    assert array.dtype.isnative


@pytest.mark.parametrize(
    'offset, size, stride, options, text',
    [
        (0, (7,), (1,), {}, 'leaves its storage of 6'),
        (5, (2,), (1,), {}, 'leaves its storage'),
        (0, (2, 2), (2**62, 1), {}, 'leaves its storage'),
        (-1, (2,), (1,), {}, 'integers of 0 or more'),
        (0, (-2,), (1,), {}, 'integers of 0 or more'),
        (0, (2,), (-1,), {}, 'integers of 0 or more'),
        (0, (2,), ('1',), {}, 'integers of 0 or more'),
        (0, (2,), (1, 1), {}, '1 dimensions and 2 strides'),
        (0, (2**40,), (0,), {}, 'repeats 6 values'),
        (0, (2**60, 0), (1, 1), {}, 'empty tensor'),
        (0, (6,), (1,), {'numel': 7}, '24 bytes, expected 28'),
        (0, (6,), (1,), {'numel': 2**62}, '24 bytes, expected'),
        (0, (6,), (1,), {'numel': -1}, 'storage in an unknown way'),
        (0, (6,), (1,), {'storage': dict}, 'storage in an unknown way'),
        (0, (6,), (1,), {'metadata': ({'conj': True},)}, 'resolve_conj'),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, offset, size, stride, options, text):
    path = write_zip(tmp_path / 'f.pt', pickled_tensor(offset, size, stride, **options), {'0': SIX})
    with pytest.raises(ValueError, match=text):
        load(path)


def test_missing_storage_is_named(tmp_path):
    path = write_zip(tmp_path / 'f.pt', pickled_tensor(0, (1,), (1,)))
    with pytest.raises(ValueError, match="lacks the storage 'archive/data/0'"):
        load(path)


@pytest.mark.parametrize('name', ['../evil', '/etc/evil', 'a/../../evil', 'a\\evil'])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    path = write_zip(tmp_path / 'f.pt', pickle.dumps(1))
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr(zipfile.ZipInfo(name), b'')
    with pytest.raises(ValueError, match='leaves its folder'):
        load(path)


def directory_entry(whole, name):
    """Position of the entry of `name` in the central directory."""
    at = whole.index(b'PK\x01\x02')
    while whole[at + 46 : at + 46 + len(name)] != name:
        at = whole.index(b'PK\x01\x02', at + 1)
    return at


def test_a_member_that_claims_more_than_it_has_is_refused(tmp_path):
    path = write_zip(tmp_path / 'f.pt', pickled_tensor(0, (6,), (1,)), {'0': SIX})
    whole = bytearray(path.read_bytes())
    at = directory_entry(whole, b'archive/data/0')
    struct.pack_into('<I', whole, at + 24, 2**31)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='claims 2147483648 bytes in 24'):
        load(path)
    struct.pack_into('<I', whole, at + 20, 2**31)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='ends beyond the end of the file'):
        load(path)


def test_overlapping_members_are_refused(tmp_path):
    path = write_zip(tmp_path / 'f.pt', pickled_tensor(0, (6,), (1,)), {'0': SIX, '1': SIX})
    whole = bytearray(path.read_bytes())
    first, second = (directory_entry(whole, f'archive/data/{i}'.encode()) for i in (0, 1))
    whole[second + 42 : second + 46] = whole[first + 42 : first + 46]
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='overlap'):
        load(path)


def test_a_deflated_bomb_is_refused(tmp_path):
    path = write_zip(
        tmp_path / 'f.pt', pickled_tensor(0, (6,), (1,)), {'0': SIX}, zipfile.ZIP_DEFLATED
    )
    whole = bytearray(path.read_bytes())
    struct.pack_into('<I', whole, directory_entry(whole, b'archive/data/0') + 24, 2**31)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='claims 2147483648 bytes'):
        load(path)


NESTED_KEY = b'\x80\x02}' + b')' + 100_000 * b'\x85' + b'K\x01s.'


@pytest.mark.parametrize(
    'pickled, text',
    [
        (NESTED_KEY, 'as a key'),
        (b'\x80\x02\x82\x01.', 'EXT1'),
        (b'\x80\x05\x97.', 'NEXT_BUFFER'),
        (b'\x80\x04\x8e' + struct.pack('<Q', 2**50) + b'.', 'damaged or cut off'),
        (b'\x80\x02j\xff\xff\xff\xff.', 'damaged'),
        (b'\x80\x02.', 'nothing on its stack'),
        (b'\x80\x02u.', 'no mark'),
        (b'\x80\x02K\x01K\x02R.', 'without a tuple'),
        (b'\x80\x02K\x01)R.', 'which is no function'),
        (b'\x80\x02K\x01}b.', 'sets the state of a int'),
        (b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.', 'sets the state of a Function'),
        (b'\x80\x02ctorch\nfloat32\n}b.', 'sets the state of a '),
        (b'\x80\x02K\x01K\x02a.', 'no container'),
        (b'\x80\x02ccollections\nOrderedDict\nK\x01\x85R.', 'list of pairs'),
        (b'I' + 5000 * b'9' + b'\n.', 'damaged'),
    ],
)
def test_hostile_pickles_are_refused(tmp_path, pickled, text):
    with pytest.raises(ValueError, match=text):
        load(write_zip(tmp_path / 'f.pt', pickled))


def test_a_pickle_cannot_multiply_itself_in_memory(tmp_path):
    # One list of 30,000, copied at four bytes a time.
    pickled = b'\x80\x02cbuiltins\ntuple\nq\x00(' + 30_000 * b'K\x01' + b'l\x85q\x01('
    pickled += 30_000 * b'h\x00h\x01R' + b'l.'
    with pytest.raises(ValueError, match='more than the file holds'):
        load(write_zip(tmp_path / 'f.pt', pickled))


def test_deep_lists_do_not_end_the_process(tmp_path):
    depth = 200_000
    value = load(
        write_zip(tmp_path / 'f.pt', b'\x80\x02' + depth * b']' + (depth - 1) * b'a' + b'.')
    )
    for _ in range(depth - 1):
        [value] = value
    assert value == []


@pytest.mark.parametrize(
    'content, text',
    [
        (b'<!DOCTYPE html>', 'DOCTYPE'),
        (b'', 'empty'),
        (pickle.dumps({'a': 1}), 'magic number is missing'),
        (b'PK\x03\x04' + bytes(100), 'not a complete zip archive'),
    ],
)
def test_other_files_are_refused(tmp_path, content, text):
    path = tmp_path / 'f.pt'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load(path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='torch.save'):
        load(tmp_path / 'none.pt')


def test_torchscript_is_refused(tmp_path):
    path = write_zip(tmp_path / 'f.pt', pickle.dumps(1), **{'constants.pkl': pickle.dumps(())})
    with pytest.raises(ValueError, match='TorchScript'):
        load(path)


def test_nothing_of_python_pickle_is_used():
    modules = (torch_files, containers, machine, objects)
    assert not any(hasattr(module, 'pickle') for module in modules)


def test_memory_that_was_given_back_is_read_again(tmp_path):
    torch = pytest.importorskip('torch', reason='writes the file that is read without it')
    numbers = np.arange(10_000, dtype=np.float32)
    torch.save({'a': torch.from_numpy(numbers)}, tmp_path / 'a.pt')
    array = load(tmp_path / 'a.pt')['a']
    np.testing.assert_array_equal(array, numbers)
    torch_files.release(array)
    np.testing.assert_array_equal(array, numbers)


def test_only_memory_of_a_file_is_given_back():
    anonymous = mmap.mmap(-1, 4096)
    array = np.frombuffer(anonymous, np.uint8)
    array[:] = 7
    torch_files.release(array)
    torch_files.release(np.ones(3))
    assert (array == 7).all()
