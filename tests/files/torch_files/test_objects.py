"""The allow-list by itself, without a file and without torch."""

import numpy as np
import pytest

from dmq_jax.files.torch_files import objects
from dmq_jax.files.torch_files.objects import GLOBALS, FileError, Function, Inert, StorageType


def rebuild(storage, *arguments):
    return GLOBALS['torch._utils._rebuild_tensor_v2'].call(storage, *arguments)


def storage_of(count):
    values = np.arange(count, dtype=np.float32)
    values.flags.writeable = False
    return values


@pytest.mark.parametrize(
    'offset, size, stride, wanted',
    [
        (0, (2, 3), (3, 1), [[0, 1, 2], [3, 4, 5]]),
        (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),  # transposed
        (2, (2,), (2,), [2, 4]),
        (5, (), (), 5),
        (0, (2, 2), (0, 1), [[0, 1], [0, 1]]),  # expanded
        (0, (1, 2), (99, 1), [[0, 1]]),  # a stride that nothing goes along
    ],
)
def test_a_tensor_is_the_view_of_its_storage(offset, size, stride, wanted):
    storage = storage_of(6)
    array = rebuild(storage, offset, size, stride)
    np.testing.assert_array_equal(array, wanted)
    assert array.shape == tuple(size) and np.shares_memory(array, storage)
    assert not array.flags.writeable


@pytest.mark.parametrize('function', [f for f in GLOBALS.values() if isinstance(f, Function)])
def test_no_function_takes_what_it_does_not_expect(function):
    # Whatever a pickle hands over ends in one of the errors that the machine turns into its own.
    for arguments in ((), (object(),), (object(), object(), object(), object())):
        try:
            made = function.call(*arguments)
        except (FileError, TypeError, ValueError, IndexError, AttributeError):
            continue
        assert isinstance(
            made, dict | list | tuple | set | frozenset | bytes | bytearray | objects.State
        )


def test_the_list_names_arrays_and_plain_containers_and_nothing_that_acts():
    for name, entry in GLOBALS.items():
        assert isinstance(entry, Function | Inert | StorageType | np.dtype), name
        module = name.rpartition('.')[0]
        assert module.split('.')[0] in (
            'torch', 'collections', '_codecs', 'builtins', '__builtin__', 'numpy',
        )  # fmt: skip
    for name in ('builtins.eval', 'builtins.getattr', 'os.system', 'torch.load', 'builtins.type'):
        assert name not in GLOBALS


@pytest.mark.parametrize(
    'values, is_so',
    [((), True), ((0, 3), True), ([1], True), ((-1,), False), ((True,), False), ('12', False),
     ((1.0,), False), (3, False)],
)  # fmt: skip
def test_sizes_are_integers_of_zero_or_more(values, is_so):
    assert objects.are_sizes(values) is is_so


def test_keys_are_plain_and_shallow():
    assert objects.make_dictionary(['a', 1, ('b', 2), 3]) == {'a': 1, ('b', 2): 3}
    deep = ((((('x',),),),),)
    for keys in ([deep], [[1]], [tuple(range(65))]):
        with pytest.raises(FileError, match='as a key'):
            objects.checked_keys(keys)
    with pytest.raises(FileError, match='a key without a value'):
        objects.make_dictionary(['a'])


def test_scalars_of_numpy_are_read_from_their_bytes():
    dtype = GLOBALS['numpy.dtype'].call('f8', False, True)
    dtype = objects.with_state(dtype, (3, '<', None, None, None, -1, -1, 0))
    value = GLOBALS['numpy.core.multiarray.scalar'].call(dtype, np.float64(0.25).tobytes())
    assert value == 0.25 and value.dtype == np.float64
    with pytest.raises(FileError, match="type 'O8'"):
        GLOBALS['numpy.dtype'].call('O8', False, True)
