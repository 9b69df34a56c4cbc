"""A comparison of two small students: what it leaves, that it goes on, and what it refuses."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from dmq_jax import command_line, compare, exporting, scale_sets, teachers
from dmq_jax.config import (
    AdaptConfig,
    CalibrateConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FullFinetuningConfig,
    MeshConfig,
    QuantConfig,
    ReportConfig,
    RuleConfig,
    SampleConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TuneQDMConfig,
)
from dmq_jax.models.dit import DiT
from tests import test_pipeline as story
from tests import tiny


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    # A transformer of one block compiles in less than half the time of the smallest U-Net.
    network = DiT(
        in_channels=1, out_channels=1, num_layers=1, num_heads=1, head_dim=8, sample_size=8,
        num_classes=tiny.NUM_CLASSES,
    )  # fmt: skip
    teacher = folder / 'teacher.safetensors'
    teachers.save_teacher(teacher, tiny.random_denoiser(network))
    features, reference = map(str, tiny.write_evaluation(folder))
    sampler = SamplerConfig(num_steps=2)

    def student(bits):
        options = {'weight_observer': 'minmax', 'activation_observer': 'minmax'}
        # Few layers: there is less to compile.
        rules = (
            RuleConfig(pattern='patches/proj|block_0/mlp/dense_0'),
            RuleConfig(pattern='.*', weight_bits=32, activation_bits=32),
        )
        return StudentConfig(
            quant=QuantConfig(
                weight_bits=bits, activation_bits=bits, coverage='rules', rules=rules, **options
            )
        )

    # Of the teacher's own images: nothing of a user's is needed.
    tuned = dataclasses.replace(
        student(3), method=TuneQDMConfig(),
        adapt=AdaptConfig(num_iterations=2, batch_size=4),
    )  # fmt: skip
    tuned_float = StudentConfig(
        method=FullFinetuningConfig(), quant=QuantConfig(weight_bits=32, activation_bits=32),
        adapt=tuned.adapt,
    )  # fmt: skip
    return Config(
        mesh=MeshConfig(data=1),
        teacher=TeacherConfig(path=str(teacher)),
        data=DataConfig(path='teacher', num_images=6),
        evaluate=EvaluateConfig(features=features, reference=reference),
        sampler=sampler,
        calibrate=CalibrateConfig(
            num_images=8, batch_size=8, values_per_tensor=32, sampler=sampler
        ),
        sample=SampleConfig(num_images=12, batch_size=4),
        report=ReportConfig(grid_size=2),
        students={
            'rtn_w8a8': student(8),
            'rtn_w3a3': student(3),
            'tuned': tuned,
            'float': tuned_float,
        },
    )


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('compare')
    compare.run(config, folder)
    return folder


def begun(workdir, folder, *, cells, students=()):
    """A copy of a comparison without some cells, and without anything of some students."""
    shutil.copytree(workdir, folder, dirs_exist_ok=True)
    for name in ('table.json', *(f'cells/{cell}.costs.json' for cell in cells)):
        (folder / name).unlink()
    removed = [folder / 'cells' / cell for cell in cells]
    removed += [folder / kind / name for kind in ('samples', 'students') for name in students]
    for path in removed:
        shutil.rmtree(path)
    return folder


def test_every_network_has_a_row_measured_like_the_others(workdir):
    table = json.loads((workdir / 'table.json').read_text())
    assert [row['name'] for row in table['rows']] == [
        'teacher',
        'rtn_w8a8',
        'rtn_w3a3',
        'tuned',
        'float',
    ]
    assert all(np.isfinite(row['fd']) for row in table['rows'])
    teacher, eight, three, tuned, tuned_float = table['rows']
    assert teacher['psnr_to_teacher'] is None
    assert eight['psnr_to_teacher'] > three['psnr_to_teacher']
    assert tuned['psnr_to_teacher'] != three['psnr_to_teacher']
    # Two small steps away from the teacher, and nothing rounded.
    assert tuned_float['psnr_to_teacher'] > three['psnr_to_teacher']
    assert tuned_float['size_mb'] == pytest.approx(teacher['size_mb'], rel=0.2)
    assert table['protocol']['num_images'] == 12


def test_every_row_tells_what_it_took(workdir):
    table = json.loads((workdir / 'table.json').read_text())
    for row in table['rows']:
        assert row['cell_seconds'] > 0 and row['peak_mb'] > 10, row['name']
    teacher, eight, _, tuned, _ = table['rows']
    assert teacher['trained_parameters'] is teacher['training_mb'] is None
    assert eight['trained_parameters'] == 0 and eight['training_mb'] is eight['set_mb'] is None
    assert 10 < tuned['training_mb'] <= tuned['peak_mb']
    # The scales, in float32.
    assert tuned['set_mb'] == pytest.approx(4e-6 * tuned['trained_parameters'])
    for title in ('all s', 'peak MB', 'set MB'):
        assert title in (workdir / 'table.md').read_text()
        assert title in (workdir / 'compare.html').read_text()


def test_what_was_tuned_lies_beside_its_integers_as_a_set_for_them(workdir):
    students = sorted(path.parent.parent.name for path in workdir.rglob('export/set.safetensors'))
    assert students == ['tuned']
    folder = workdir / 'students/tuned/export'
    model = exporting.load(folder)
    # As another adaptation of these integers has it.
    bare = model._replace(channels={}, channel_timesteps=None)
    found = scale_sets.load(folder / 'set.safetensors', bare)
    assert found.channels
    jax.tree.map(np.testing.assert_array_equal, dict(found.channels), dict(model.channels))


def test_images_of_the_teacher_to_learn_from_are_not_those_that_are_evaluated(workdir):
    def read(path):
        with np.load(path) as arrays:
            return arrays['arr_0']

    learnt = read(workdir / 'adapt_images' / '6' / 'images.npz')
    drawn = read(workdir / 'samples' / 'teacher' / 'images.npz')
    assert learnt.shape == (6, *drawn.shape[1:])
    assert not any(np.array_equal(a, b) for a in learnt for b in drawn)


def test_table_and_page_show_every_setting(workdir):
    markdown, page = ((workdir / n).read_text() for n in ('table.md', 'compare.html'))
    for setting in ('W8A8 rules', 'W3A3 rules'):
        assert setting in markdown and setting in page


def test_a_second_call_makes_no_cell_again(workdir, config, monkeypatch):
    before = (workdir / 'table.json').read_text()

    def fail(*arguments):
        raise AssertionError('measured again')

    monkeypatch.setattr(compare.pipeline, 'measure_network', fail)
    compare.run(config, workdir)
    assert (workdir / 'table.json').read_text() == before


def test_cells_made_before_a_stop_are_kept(workdir, config, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    original, made = compare.pipeline.measure_network, []

    def measure(context, reference, name, *images):
        if name == 'rtn_w3a3' and not made:
            made.append(name)
            raise Stopped
        return original(context, reference, name, *images)

    monkeypatch.setattr(compare.pipeline, 'measure_network', measure)
    two = {name: config.students[name] for name in ('rtn_w8a8', 'rtn_w3a3')}
    config = dataclasses.replace(config, students=two)
    begun(workdir, tmp_path, cells=('teacher', *two))
    with pytest.raises(Stopped):
        compare.run(config, tmp_path)
    partial = json.loads((tmp_path / 'table.json').read_text())['rows']
    assert [row['name'] for row in partial] == ['teacher', 'rtn_w8a8']
    before = json.loads((tmp_path / 'cells' / 'rtn_w3a3.costs.json').read_text())
    compare.run(config, tmp_path)
    rows, whole = (
        json.loads((folder / 'table.json').read_text())['rows'] for folder in (tmp_path, workdir)
    )
    assert [row['fd'] for row in rows] == [row['fd'] for row in whole[:3]]
    # What was spent before the stop counts.
    assert rows[2]['cell_seconds'] > before['cell_seconds'] > 0


def test_a_comparison_of_nothing_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match='at least one student'):
        compare.run(dataclasses.replace(config, students={}), tmp_path)


@pytest.mark.parametrize('names', [['rtn_w8a9'], ['teacher', 'rtn']])
def test_a_cell_that_is_none_is_refused(config, tmp_path, names):
    with pytest.raises(ValueError, match='--cells has no .* expected some of teacher, rtn_w8a8'):
        compare.run(config, tmp_path, names)


def test_cells_made_one_by_one_are_those_made_together(config, workdir, tmp_path):
    # The last first: the table keeps its order. One of them is made from the start.
    names = 'rtn_w3a3', 'rtn_w8a8', 'teacher'
    begun(workdir, tmp_path, cells=config.students.keys() | {'teacher'}, students=names[:1])
    for name in names:
        compare.run(config, tmp_path, [name])
    rows, whole = (
        json.loads((folder / 'table.json').read_text())['rows'] for folder in (tmp_path, workdir)
    )
    assert [row['name'] for row in rows] == ['teacher', 'rtn_w8a8', 'rtn_w3a3']
    assert [row['fd'] for row in rows] == [row['fd'] for row in whole[:3]]


def test_a_cell_that_another_process_makes_is_refused(config, workdir):
    with (
        compare.artefacts.sole_user(workdir / 'cells' / 'rtn_w8a8.lock'),
        pytest.raises(ValueError, match='in use by process'),
    ):
        compare.run(config, workdir, ['rtn_w8a8'])


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, '-m', 'dmq_jax.compare', *map(str, arguments)], cwd=story.ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='two workers need two cores')
def test_workers_make_the_same_table_and_go_on_where_they_were_stopped(tmp_path):
    file, workdir = story.make_files(tmp_path), tmp_path / 'spread'
    arguments = f'--config={file}', f'--workdir={workdir}', '--workers=2'
    process, began = command(*arguments), time.monotonic()
    while not (workdir / 'cells' / 'edm.log').is_file():
        assert process.poll() is None and time.monotonic() - began < 200, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == compare.hosts.REQUEUE, errors
    assert errors.count('asked to stop') == 1
    process = command(*arguments)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, (said, errors)
    assert 'table.md' in said
    rows = json.loads((workdir / 'table.json').read_text())['rows']
    assert [row['name'] for row in rows] == ['teacher', 'edm', 'rtn']
    alone = tmp_path / 'alone'
    compare.run(story.read_config(file), alone)
    for one, other in zip(
        rows, json.loads((alone / 'table.json').read_text())['rows'], strict=True
    ):
        # A different number of threads adds floats in another order.
        assert one['fd'] == pytest.approx(other['fd'], rel=0.02)


CONFIG_FILE = """
import pickle
from pathlib import Path
from dmq_jax.config.conversion import to_config_dict


def get_config(arg=None):
    return to_config_dict(pickle.loads(Path({pickled!r}).read_bytes()))
"""


def test_a_cell_that_fails_is_named_and_the_others_are_there(config, workdir, tmp_path):
    file, folder = tmp_path / 'run.py', tmp_path / 'spread'
    (tmp_path / 'config.pickle').write_bytes(pickle.dumps(config))
    file.write_text(CONFIG_FILE.format(pickled=str(tmp_path / 'config.pickle')))
    begun(workdir, folder, cells=('rtn_w8a8', 'rtn_w3a3'), students=('rtn_w8a8', 'rtn_w3a3'))
    code = """
import sys
if '--cells=rtn_w8a8' in sys.argv:
    raise ValueError('of rtn_w8a8')
from dmq_jax import compare
compare.main()
"""
    arguments = f'--config={file}', f'--workdir={folder}'
    wanted = 'tries again: rtn_w8a8.\n  rtn_w8a8: ValueError: of rtn_w8a8'
    with pytest.raises(ValueError, match=wanted):
        compare.spread(config, folder, 1, [sys.executable, '-c', code, *arguments])
    rows = json.loads((folder / 'table.json').read_text())['rows']
    # A ConfigDict sorts its names.
    assert [row['name'] for row in rows] == ['teacher', 'float', 'rtn_w3a3', 'tuned']


def test_workers_beside_cells_are_refused(config, tmp_path, monkeypatch):
    for name, value in (('_WORKERS', 2), ('_CELLS', ['rtn_w3a3'])):
        monkeypatch.setattr(compare, name, types.SimpleNamespace(value=value))
    with pytest.raises(ValueError, match='--workers=2 beside --cells: use one of them') as caught:
        compare.join_and_run(config, tmp_path)
    assert command_line._is_users(caught.value)
