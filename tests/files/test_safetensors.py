import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmq_jax.files.safetensors import open_safetensors

ARRAYS = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'b': np.array([1, -2], np.int8),
    'c': np.array(1.5, np.float16),
    'd': np.array([1.5, -3], ml_dtypes.bfloat16),
}


def write_single(folder, metadata=None):
    path = folder / 'model.safetensors'
    save_file(ARRAYS, path, metadata)
    return path


def write_sharded(folder, **changes):
    """Two shards and their index; `changes` replaces or drops (None) entries of the weight map."""
    shards = {'model-1-of-2.safetensors': ('a', 'b'), 'model-2-of-2.safetensors': ('c', 'd')}
    weight_map = {}
    for file, names in shards.items():
        save_file({name: ARRAYS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    weight_map = {k: v for k, v in {**weight_map, **changes}.items() if v is not None}
    path = folder / 'model.safetensors.index.json'
    path.write_text(json.dumps({'metadata': {'total_size': 34}, 'weight_map': weight_map}))
    return path


@pytest.mark.parametrize('write', [write_single, write_sharded])
def test_every_array_is_read_as_it_was_written(tmp_path, write):
    reader = open_safetensors(write(tmp_path))
    assert set(reader) == set(ARRAYS)
    assert len(reader) == len(ARRAYS)
    for name, array in ARRAYS.items():
        assert reader[name].dtype == array.dtype
        np.testing.assert_array_equal(reader[name], array)


def test_metadata_is_that_of_the_file_or_of_the_index(tmp_path):
    assert open_safetensors(write_single(tmp_path)).metadata == {}
    assert open_safetensors(write_single(tmp_path, {'x': 'y'})).metadata == {'x': 'y'}
    assert open_safetensors(write_sharded(tmp_path)).metadata == {'total_size': 34}


def test_arrays_are_read_when_asked_for(tmp_path):
    path = write_single(tmp_path)
    reader = open_safetensors(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    assert any(reader[name].tobytes() != array.tobytes() for name, array in ARRAYS.items())


def test_an_unknown_name_is_a_key_error(tmp_path):
    reader = open_safetensors(write_single(tmp_path))
    assert 'z' not in reader
    with pytest.raises(KeyError, match="no tensor 'z' among 4"):
        reader['z']


def test_a_missing_file_or_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.safetensors: no such file'):
        open_safetensors(tmp_path / 'absent.safetensors')
    path = write_sharded(tmp_path)
    (tmp_path / 'model-2-of-2.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match="shard 'model-2-of-2.safetensors' is missing"):
        open_safetensors(path)


@pytest.mark.parametrize('length', [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, length):
    path = write_single(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match='not a complete safetensors file'):
        open_safetensors(path)


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'e': 'model-1-of-2.safetensors'}, "'e' is listed for .* lacks it"),
        ({'b': None}, "'b' is not listed for .* holds it"),
        ({'e': '../elsewhere.safetensors'}, 'not a plain file name'),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        open_safetensors(write_sharded(tmp_path, **changes))


@pytest.mark.parametrize(
    'content, text',
    [('{', 'not a JSON file'), ('[]', 'not an index'), ('{"weight_map": 3}', 'not an index')],
)
def test_what_is_no_index_is_refused(tmp_path, content, text):
    path = tmp_path / 'model.safetensors.index.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        open_safetensors(path)


def test_a_shape_is_known_without_reading_the_tensor(tmp_path, monkeypatch):
    file = tmp_path / 'a.safetensors'
    save_file({'a': np.zeros((2, 3), np.float32), 'b': np.zeros((), np.int32)}, file)
    reader = open_safetensors(file)
    monkeypatch.setattr(type(reader), '__getitem__', None)
    assert reader.shape_of('a') == (2, 3) and reader.shape_of('b') == ()
    with pytest.raises(KeyError, match="no tensor 'c'"):
        reader.shape_of('c')
