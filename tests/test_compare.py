"""A comparison of two small students: what it leaves, that it goes on, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from dmq_jax import compare, teachers
from dmq_jax.config import (
    AdaptConfig,
    CalibrateConfig,
    Config,
    EvaluateConfig,
    FullFinetuningConfig,
    MeshConfig,
    QuantConfig,
    ReportConfig,
    SampleConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TuneQDMConfig,
)
from dmq_jax.models.ddpm_unet import DDPMUNet
from tests import tiny


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    network = DDPMUNet(
        channels=(8,), in_channels=1, layers_per_block=1, num_groups=4, down_attention=(False,),
        mid_attention=False, num_class_embeds=tiny.NUM_CLASSES + 1,
    )  # fmt: skip
    teacher = folder / 'teacher.safetensors'
    teachers.save_teacher(teacher, tiny.random_denoiser(network))
    features, reference = map(str, tiny.write_evaluation(folder))
    sampler = SamplerConfig(num_steps=2)

    def student(bits):
        options = {'weight_observer': 'minmax', 'activation_observer': 'minmax'}
        return StudentConfig(
            quant=QuantConfig(weight_bits=bits, activation_bits=bits, coverage='full', **options)
        )

    # Of the teacher's own images: nothing of a user's is needed.
    tuned = dataclasses.replace(
        student(3), method=TuneQDMConfig(),
        adapt=AdaptConfig(num_iterations=2, images='teacher', num_images=6, batch_size=4),
    )  # fmt: skip
    tuned_float = StudentConfig(
        method=FullFinetuningConfig(), quant=QuantConfig(weight_bits=32, activation_bits=32),
        adapt=tuned.adapt,
    )  # fmt: skip
    return Config(
        mesh=MeshConfig(data=1),
        teacher=TeacherConfig(path=str(teacher)),
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
    for setting in ('W8A8 full', 'W3A3 full'):
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
    with pytest.raises(Stopped):
        compare.run(config, tmp_path)
    partial = json.loads((tmp_path / 'table.json').read_text())['rows']
    assert [row['name'] for row in partial] == ['teacher', 'rtn_w8a8']
    before = json.loads((tmp_path / 'cells' / 'rtn_w3a3.costs.json').read_text())
    compare.run(config, tmp_path)
    rows, whole = (
        json.loads((folder / 'table.json').read_text())['rows'] for folder in (tmp_path, workdir)
    )
    assert [row['fd'] for row in rows] == [row['fd'] for row in whole]
    # What was spent before the stop counts.
    assert rows[2]['cell_seconds'] > before['cell_seconds'] > 0


def test_a_comparison_of_nothing_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match='at least one student'):
        compare.run(dataclasses.replace(config, students={}), tmp_path)
