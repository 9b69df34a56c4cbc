import jax
import numpy as np
import pytest

from dmq_jax.checkpoints.options import Options, place, read_settings, unknown_settings
from tests import tiny_checkpoints as tiny

PUBLISHED = {'small': {'width': 8}, 'large': {'width': 16}}


def test_nothing_said_is_nothing_known():
    assert read_settings(Options(), PUBLISHED) == (None, None, {})


def test_a_published_name_gives_its_settings_and_no_process():
    assert read_settings(Options(settings='small'), PUBLISHED) == ('small', {'width': 8}, {})


def test_a_file_gives_what_it_holds(tmp_path):
    file = tiny.settings_file(tmp_path, network={'width': 4}, process={'image_size': 32})
    found = read_settings(Options(settings=file), PUBLISHED)
    assert found == (None, {'width': 4}, {'image_size': 32})
    only = tiny.settings_file(tmp_path, process={'image_size': 32})
    assert read_settings(Options(settings=only), PUBLISHED)[1] is None


@pytest.mark.parametrize(
    'text, what', [('{', 'not a JSON file'), ('[]', 'expected'), ('{"unet": {}}', 'expected')]
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, what):
    file = tmp_path / 'settings.json'
    file.write_text(text)
    with pytest.raises(ValueError, match=f'settings.json: {what}'):
        read_settings(Options(settings=str(file)), PUBLISHED)


def test_a_name_that_is_neither_names_those_that_are():
    with pytest.raises(FileNotFoundError, match="'smal': neither .* are small, large"):
        read_settings(Options(settings='smal'), PUBLISHED)


def test_weights_go_where_they_are_told_and_shapes_nowhere():
    array = np.ones((2, 3), np.float32)
    assert isinstance(Options().reading()['put']('a', array), jax.Array)
    assert Options(put=lambda path, array: path).reading()['put']('a', array) == 'a'
    shape = Options(shapes_only=True, put=place).reading()['put']('a', array)
    assert shape == jax.ShapeDtypeStruct((2, 3), np.float32)
    assert Options(dtype='bfloat16').reading()['dtype'].name == 'bfloat16'


def test_a_placed_array_keeps_the_memory_that_it_was_made_of():
    array = np.arange(1 << 16, dtype=np.float32)
    placed = [place('a', array + i) for i in range(4)]
    for i, each in enumerate(placed):
        np.testing.assert_array_equal(each, array + i)


def test_what_is_not_known_says_how_to_tell_it(tmp_path):
    assert 'model.pt: no heads; give teacher.settings' in str(
        unknown_settings(tmp_path / 'model.pt', 'no heads')
    )
