"""The table and the page of a comparison, from rows made up here."""

import numpy as np
import pytest

from dmq_jax.reporting import comparison
from tests.reporting.finished_run import PROTOCOL, row

ROWS = [
    row('teacher', 1.0),
    row('a', 4.0, 'round_to_nearest', finetune_seconds=0.0),
    row('b', 2.5, 'efficientdm', finetune_seconds=60.0, per_timestep=True),
    row('c', 3.5, 'efficientdm', coverage='full', finetune_seconds=90.0, per_timestep=True),
]
TABLE = {'protocol': PROTOCOL, 'rows': ROWS}


@pytest.fixture
def workdir(tmp_path):
    labels = np.arange(12, dtype=np.int32) % 3
    for index, found in enumerate(ROWS):
        folder = tmp_path / 'samples' / found['name']
        folder.mkdir(parents=True)
        images = np.full((12, 8, 8, 1), 40 * index, np.uint8)
        np.savez(folder / 'images.npz', arr_0=images, labels=labels)
    return tmp_path


def test_the_first_table_has_a_line_per_method_and_a_column_per_setting():
    lines = comparison.markdown(TABLE).splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith('| method'))
    assert lines[heading] == '| method | W4A4 paper | W4A4 full |'
    assert lines[heading + 2] == '| round to nearest, static | 4.000 | – |'
    assert lines[heading + 3] == '| EfficientDM | **2.500** | **3.500** |'


def test_the_second_table_has_every_network_once():
    second = comparison.markdown(TABLE).split('| network')[1].splitlines()[2:]
    assert [line.split(' | ')[1] for line in second] == ['float'] + ['W4A4 paper'] * 2 + [
        'W4A4 full'
    ]


def test_the_page_needs_no_other_file_and_shows_every_setting(workdir):
    text = comparison.page(workdir, TABLE, grid_size=4)
    assert 'src="data:image/png' in text and 'http' not in text.replace('http://www.w3.org', '')
    for words in ('W4A4 paper', 'W4A4 full', 'EfficientDM 2.50', 'megabytes of the file'):
        assert words in text


def test_the_teacher_alone_is_a_table_too(workdir):
    table = TABLE | {'rows': ROWS[:1]}
    assert 'teacher' in comparison.markdown(table)
    assert 'No cell is complete yet' in comparison.page(workdir, table, grid_size=4)
