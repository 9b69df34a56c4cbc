import struct

import numpy as np
import pytest

from dmq_jax.files.graphdef import open_graphdef

pytest.importorskip('torch', reason='the writer of graphs lives beside the torch oracle')

from tests.oracles.inception import const, field, node, tensor, varint  # noqa: E402

FLOAT, INT32, UINT8, INT64, BOOL, HALF = 1, 3, 4, 9, 10, 19


def write(tmp_path, *parts):
    path = tmp_path / 'graph.pb'
    path.write_bytes(b''.join(parts))
    return path


def constant(tmp_path, *tensor_arguments):
    attrs = {'value': field(8, tensor(*tensor_arguments))}
    return open_graphdef(write(tmp_path, node('c', 'Const', (), attrs)))['c']


@pytest.mark.parametrize('dtype', ['float32', 'int32', 'uint8', 'int64', 'bool', 'float16'])
@pytest.mark.parametrize('shape', [(), (3,), (2, 3), (0, 2)])
def test_raw_content_is_read_bit_for_bit(tmp_path, dtype, shape):
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    got = open_graphdef(write(tmp_path, const('c', array)))['c']
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()


def packed_varints(number, values):
    return field(number, b''.join(varint(v) for v in values))


def unpacked(number, values):
    return b''.join(field(number, v) for v in values)


@pytest.mark.parametrize(
    'dtype, values, encoded',
    [
        (FLOAT, [1.5, -2.0, 3.0], field(5, struct.pack('<3f', 1.5, -2, 3))),
        (FLOAT, [1.5, -2.0, 3.0], unpacked(5, [1.5, -2.0, 3.0])),
        (INT32, [1, -2, 300], packed_varints(7, [1, -2, 300])),
        (INT32, [1, -2, 300], unpacked(7, [1, -2, 300])),
        (UINT8, [0, 1, 255], packed_varints(7, [0, 1, 255])),
        (INT64, [1, -(2**60), 3], packed_varints(10, [1, -(2**60), 3])),
        (BOOL, [True, False, True], packed_varints(11, [1, 0, 1])),
        (HALF, [1.5, -2.0, 0.0], packed_varints(13, [0x3E00, 0xC000, 0])),
    ],
)
def test_listed_values_are_read(tmp_path, dtype, values, encoded):
    np.testing.assert_array_equal(constant(tmp_path, dtype, (3,), encoded), values)


def test_one_value_fills_its_shape_without_memory(tmp_path):
    array = constant(tmp_path, FLOAT, (1000, 1000, 100), field(5, 2.5))
    assert array.shape == (1000, 1000, 100)
    assert array.strides == (0, 0, 0)
    assert array[-1, -1, -1] == 2.5


def test_the_last_value_stands_for_the_rest_and_none_for_zeros(tmp_path):
    np.testing.assert_array_equal(
        constant(tmp_path, INT32, (2, 2), packed_varints(7, [1, 5])), [[1, 5], [5, 5]]
    )
    np.testing.assert_array_equal(constant(tmp_path, HALF, (2,)), [0, 0])


def test_constants_are_views_that_cannot_be_written(tmp_path):
    array = open_graphdef(write(tmp_path, const('c', np.ones(3, np.float32))))['c']
    assert not array.flags.owndata
    with pytest.raises(ValueError, match='read-only'):
        array[0] = 2


def test_nodes_keep_ops_inputs_and_attributes(tmp_path):
    attrs = {
        's': field(2, 'SAME'),
        'i': field(3, -5),
        'f': field(4, 0.5),
        'b': field(5, True),
        'type': field(6, FLOAT),
        'shape': field(7, field(2, field(1, 2)) + field(2, field(1, -1))),
        'unknown': field(7, field(3, 1)),
        'strides': field(1, packed_varints(3, [1, 2, 2, 1])),
        'old_strides': field(1, unpacked(3, [1, 2])),
        'floats': field(1, field(4, struct.pack('<2f', 1, 2))),
        'names': field(1, field(2, 'a') + field(2, 'b')),
    }
    graph = open_graphdef(write(tmp_path, node('n', 'Op', ['x:1', '^y'], attrs), field(4, b'v')))
    found = graph.nodes['n']
    assert (found.op, found.inputs) == ('Op', ('x:1', '^y'))
    assert found.attrs == {
        's': b'SAME', 'i': -5, 'f': 0.5, 'b': True, 'type': 1, 'shape': (2, -1), 'unknown': None,
        'strides': [1, 2, 2, 1], 'old_strides': [1, 2], 'floats': [1.0, 2.0], 'names': [b'a', b'b'],
    }  # fmt: skip
    assert list(graph) == []
    with pytest.raises(KeyError, match="'n'.*'Op'"):
        graph['n']


def test_a_string_constant_hinders_only_its_own_reading(tmp_path):
    string = node('s', 'Const', (), {'value': field(8, tensor(7, ()))})
    graph = open_graphdef(write(tmp_path, string, const('c', np.ones(2, np.float32))))
    assert list(graph) == ['s', 'c']
    np.testing.assert_array_equal(graph['c'], [1, 1])
    with pytest.raises(ValueError, match="graph.pb: constant 's'.*string"):
        graph['s']


@pytest.mark.parametrize(
    'arguments, text',
    [
        ((FLOAT, (3,), field(4, bytes(8))), '8 bytes for float32 .*expected 12'),
        ((FLOAT, (1,), field(5, struct.pack('<2f', 1, 2))), '2 values for the shape'),
        ((FLOAT, (2,), field(5, bytes(7))), '7 bytes are no whole number'),
        ((99, (1,)), 'type 99'),
        ((FLOAT, (-1,)), 'unknown shape'),
        ((FLOAT, (2**40, 2**40), field(5, 1.0)), '2 GiB'),
        ((UINT8, (1,), packed_varints(7, [256])), 'do not fit in uint8'),
        ((INT32, (1,), field(7, b'\xff')), 'ends inside a number'),
        ((FLOAT, (1,), field(4, 3)), 'wrong wire type'),
    ],
)
def test_damaged_constants_are_refused(tmp_path, arguments, text):
    with pytest.raises(ValueError, match=f"graph.pb: constant 'c': .*{text}"):
        constant(tmp_path, *arguments)


@pytest.mark.parametrize(
    'content, text',
    [
        (b'', 'empty'),
        (b'\x0a', 'ends inside a number'),
        (b'\x0a\x05ab', 'claims 5 bytes where 2 are left'),
        (b'\x0a' + b'\xff' * 9 + b'\x01', 'claims'),
        (b'\x0a' + b'\xff' * 11, 'longer than 10 bytes'),
        (b'\x0b', 'wire type 3'),
        (b'\x02\x00', 'field number 0'),
        (field(1, 3), 'wrong wire type'),
        (field(1, field(1, b'\xff')), 'no UTF-8'),
        (node('a', 'Op') * 2, "two nodes are called 'a'"),
        (field(4, b'only a version'), 'no node'),
        (node('first', 'Op') + b'\x0a\x7f', "after 1 nodes, the last of which is 'first'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, text):
    with pytest.raises(ValueError, match=f'graph.pb: .*{text}'):
        open_graphdef(write(tmp_path, content))


def test_truncation_inside_a_node_is_always_noticed(tmp_path):
    whole = const('c', np.arange(9, dtype=np.float32)) + node('n', 'Op', ['c'])
    boundary = len(const('c', np.arange(9, dtype=np.float32)))
    for size in range(len(whole)):
        if size != boundary:
            with pytest.raises(ValueError, match='graph.pb'):
                open_graphdef(write(tmp_path, whole[:size]))
    assert list(open_graphdef(write(tmp_path, whole))) == ['c']


def test_flipped_bytes_give_a_value_error_or_an_array(tmp_path):
    whole = const('c', np.arange(9, dtype=np.float32)) + node('n', 'Op', ['c'])
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            for array in open_graphdef(write(tmp_path, damaged)).values():
                assert isinstance(array, np.ndarray)
        except ValueError as error:
            assert 'graph.pb' in str(error)
            num_refused += 1
    assert num_refused > 50


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='frozen TensorFlow graph'):
        open_graphdef(tmp_path / 'none.pb')
