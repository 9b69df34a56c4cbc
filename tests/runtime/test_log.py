"""Laws of dmq_jax/runtime/log.py."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.runtime import log


def test_every_scalar_is_a_line_at_once(tmp_path):
    writer = log.make_writer(tmp_path)
    writer.write_scalars(20, {'loss': jnp.float32(0.5), 'rate': 3})
    assert log.read_metrics(tmp_path) == [{'step': 20, 'loss': 0.5, 'rate': 3}]
    writer.close()


def test_a_resumed_run_appends_and_its_later_values_count(tmp_path):
    for start in (1, 2):
        with log.make_writer(tmp_path) as writer:
            for step in (start, start + 1):
                writer.write_scalars(step, {'loss': 10 * start + step})
    assert log.read_metrics(tmp_path) == [
        {'step': 1, 'loss': 11},
        {'step': 2, 'loss': 22},
        {'step': 3, 'loss': 23},
    ]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    with log.make_writer(tmp_path) as writer:
        writer.write_scalars(1, {'loss': 1})
    with open(tmp_path / log.METRICS_FILE, 'a') as file:
        file.write('{"step": 2, "lo')
    assert log.read_metrics(tmp_path) == [{'step': 1, 'loss': 1}]
    with log.make_writer(tmp_path) as writer:
        writer.write_scalars(3, {'loss': 3})
    assert [line['step'] for line in log.read_metrics(tmp_path)] == [1, 3]


def test_a_nan_can_be_recorded_and_read(tmp_path):
    with log.make_writer(tmp_path) as writer:
        writer.write_scalars(1, {'loss': float('nan')})
    assert math.isnan(log.read_metrics(tmp_path)[0]['loss'])


def test_no_metrics_is_no_lines(tmp_path):
    assert log.read_metrics(tmp_path) == []


@pytest.mark.skipif(
    importlib.util.find_spec('tensorflow') is not None,
    reason='with TensorFlow the events are written by clu',
)
def test_scalars_and_images_reach_tensorboard(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip('tensorboardX', reason='events need tensorboardX')
    seen = []
    monkeypatch.setattr(
        tensorboard.SummaryWriter,
        'add_image',
        lambda self, name, image, step, dataformats: seen.append((name, image.shape, step)),
    )
    with log.make_writer(tmp_path) as writer:
        writer.write_scalars(1, {'loss': 1.0})
        writer.write_images(1, {'grid': np.zeros((4, 6, 3), np.uint8)})
    (events,) = (tmp_path / 'tensorboard').iterdir()
    assert b'loss' in events.read_bytes()
    assert seen == [('grid', (4, 6, 3), 1)]


def test_images_of_one_and_three_channels_are_written(tmp_path):
    with log.make_writer(tmp_path) as writer:
        for channels in (1, 3):
            name = f'grid_{channels}'
            writer.write_images(1, {name: np.zeros((4, 6, channels), np.uint8)})
    (events,) = (tmp_path / 'tensorboard').iterdir()
    assert all(name in events.read_bytes() for name in (b'grid_1', b'grid_3'))


@pytest.mark.parametrize('image', [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_images_that_are_not_uint8_pictures_are_refused(tmp_path, image):
    with log.make_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=re.escape('expected uint8 [H, W, 1 or 3]')):
            writer.write_images(1, {'grid': image})


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(log.jax, 'process_index', lambda: 1)
    with log.make_writer(tmp_path / 'run') as writer:
        writer.write_scalars(1, {'loss': 1})
        writer.write_images(1, {'grid': np.zeros((2, 2, 1), np.uint8)})
    log.write_json(tmp_path / 'metrics.json', {})
    assert list(tmp_path.iterdir()) == []


def test_importing_the_module_loads_no_writer_and_making_one_no_pytorch(tmp_path):
    script = (
        'import sys; from dmq_jax.runtime import log; '
        'assert not {"tensorboardX", "clu", "tensorflow"} & set(sys.modules); '
        'log.make_writer(sys.argv[1]).close(); '
        'assert "tensorflow" in sys.modules or "torch" not in sys.modules'
    )
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path)], env=environment)
    assert done.returncode == 0


@dataclasses.dataclass
class Point:
    """A value with fields."""

    x: int


def test_json_takes_what_a_run_produces(tmp_path):
    values = {'fid': np.float64(2.5), 'n': jnp.arange(2), 'path': Path('a'), 'point': Point(1)}
    log.write_json(tmp_path / 'deep' / 'metrics.json', values)
    assert json.loads((tmp_path / 'deep' / 'metrics.json').read_text()) == {
        'fid': 2.5,
        'n': [0, 1],
        'path': 'a',
        'point': {'x': 1},
    }


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / 'metrics.json'
    log.write_json(path, {'fid': 1})
    with pytest.raises(TypeError, match='has no JSON form'):
        log.write_json(path, {'fid': object()})

    def full_disk(_):
        raise OSError('no space')

    monkeypatch.setattr(log.os, 'fsync', full_disk)
    with pytest.raises(OSError, match='no space'):
        log.write_json(path, {'fid': 2})
    assert json.loads(path.read_text()) == {'fid': 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with the module's file in it, not yet committed."""
    monkeypatch.setattr(log, '__file__', str(tmp_path / 'log.py'))
    for name in ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'log.py').write_text('1')

    def git(*arguments):
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
        command = ['git', '-C', str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git('init')
    return git


def test_the_revision_is_the_commit_and_says_when_files_differ(repository, tmp_path):
    assert log.git_revision() == 'unknown'
    repository('add', 'log.py')
    repository('commit', '-m', 'first')
    head = repository('rev-parse', 'HEAD')
    (tmp_path / 'untracked').write_text('')
    assert log.git_revision() == head
    (tmp_path / 'log.py').write_text('2')
    assert log.git_revision() == f'{head}-dirty'


def test_the_revision_is_unknown_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(log, '__file__', str(tmp_path / 'log.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert log.git_revision() == 'unknown'


def test_versions_name_what_decides_the_numbers():
    versions = log.versions()
    assert set(versions) == {
        'python', 'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'numpy', 'dmq_jax',
    }  # fmt: skip
    assert versions['numpy'] == np.__version__
