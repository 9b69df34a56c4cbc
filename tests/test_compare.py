"""A comparison of two small students: what it leaves, that it goes on, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from dmq_jax import compare, teachers
from dmq_jax.config import (
    CalibrateConfig,
    Config,
    EvaluateConfig,
    MeshConfig,
    QuantConfig,
    ReportConfig,
    SampleConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
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
        students={'rtn_w8a8': student(8), 'rtn_w3a3': student(3)},
    )


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp('compare')
    compare.run(config, folder)
    return folder


def test_every_network_has_a_row_measured_like_the_others(workdir):
    table = json.loads((workdir / 'table.json').read_text())
    assert [row['name'] for row in table['rows']] == ['teacher', 'rtn_w8a8', 'rtn_w3a3']
    assert all(np.isfinite(row['fd']) for row in table['rows'])
    teacher, eight, three = table['rows']
    assert teacher['psnr_to_teacher'] is None
    assert eight['psnr_to_teacher'] > three['psnr_to_teacher']
    assert table['protocol']['num_images'] == 12


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
    compare.run(config, tmp_path)
    rows, whole = (
        json.loads((folder / 'table.json').read_text())['rows'] for folder in (tmp_path, workdir)
    )
    assert [row['fd'] for row in rows] == [row['fd'] for row in whole]


def test_a_comparison_of_nothing_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match='at least one student'):
        compare.run(dataclasses.replace(config, students={}), tmp_path)
