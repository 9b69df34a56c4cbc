"""What a student depends on, by which a run knows whether it is made already.

How students are learnt is told by tests/test_api.py and tests/test_pipeline.py.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dmq_jax import learning
from dmq_jax.config import (
    AdaptConfig,
    Config,
    DataConfig,
    EfficientDMConfig,
    FinetuneConfig,
    QDiffusionConfig,
    ReconstructConfig,
    StudentConfig,
    TuneQDMConfig,
)
from dmq_jax.runtime import mesh
from tests import tiny

STUDENT = StudentConfig(method=EfficientDMConfig(), finetune=FinetuneConfig(num_iterations=3))
ADAPTED = StudentConfig(method=TuneQDMConfig(), adapt=AdaptConfig(num_iterations=3))


def made(folder, **data):
    config = Config(
        calibrate=tiny.CALIBRATE, sampler=tiny.SAMPLER, students={'one': STUDENT, 'two': ADAPTED},
        data=DataConfig(**{'path': 'teacher', 'num_images': 8, **data}),
    )  # fmt: skip
    (folder / 'calibration').mkdir(exist_ok=True)
    (folder / 'calibration' / 'complete.json').write_text(json.dumps({'made': 'with this'}))
    return learning.make_run(config, folder, tiny.teacher(), device_mesh=mesh.make_mesh(1))


@pytest.fixture
def context(tmp_path):
    return made(tmp_path)


def changed(student, stage, **options):
    return dataclasses.replace(
        student, **{stage: dataclasses.replace(getattr(student, stage), **options)}
    )


@pytest.mark.parametrize(
    'other',
    [
        changed(STUDENT, 'method', lora_rank=7),
        changed(STUDENT, 'quant', weight_bits=3),
        changed(STUDENT, 'finetune', num_iterations=4),
        changed(STUDENT, 'finetune', batch_size=5),
    ],
)
def test_a_student_depends_on_what_it_learns_and_how(context, other):
    before, after = (learning.student_options(context, s) for s in (STUDENT, other))
    assert before != after


@pytest.mark.parametrize(
    'other',
    [
        dataclasses.replace(STUDENT, title='another name in the report'),
        changed(STUDENT, 'finetune', checkpoint_every=7),
        changed(STUDENT, 'finetune', log_every=7),
        changed(STUDENT, 'finetune', max_to_keep=7),
        changed(STUDENT, 'adapt', remat=''),
    ],
)
def test_a_student_does_not_depend_on_how_often_it_is_saved_or_told_of(context, other):
    before, after = (learning.student_options(context, s) for s in (STUDENT, other))
    assert before == after


def test_a_student_depends_on_the_calibration(context):
    before = learning.student_options(context, STUDENT)
    (context.workdir / 'calibration' / 'complete.json').write_text(json.dumps({'made': 'anew'}))
    assert learning.student_options(context, STUDENT) != before


def named(context):
    """What the images are that a student learns from."""
    return learning.student_options(context, ADAPTED)['images']


def test_images_that_the_teacher_draws_are_named_by_all_they_depend_on(context, tmp_path):
    images = named(context)
    assert images['path']['num_images'] == 8 and images['path']['teacher'] == context.teacher_id
    assert named(made(tmp_path, num_images=9))['path']['num_images'] == 9
    assert learning.student_options(context, STUDENT)['images'] == {}


def test_images_of_a_file_are_named_by_what_they_are_and_by_their_classes(tmp_path):
    file = tmp_path / 'images.npz'
    seen = []
    for value, label in ((0, 1), (0, 1), (1, 1), (1, 2)):
        np.savez(file, arr_0=np.full((4, 8, 8, 1), value, np.uint8))
        # How many were drawn, were there no file, and where it lies, do not matter.
        seen.append(named(made(tmp_path, path=str(file), label=label, num_images=5 + label)))
    assert seen[0] == seen[1] and len({str(images) for images in seen}) == 3


def test_images_that_are_not_to_be_forgotten_are_named_as_well(context, tmp_path):
    file = tmp_path / 'images.npz'
    np.savez(file, arr_0=np.full((4, 8, 8, 1), 7, np.uint8))
    without = learning.student_options(context, ADAPTED)
    assert set(without['images']) == {'path'}
    assert 'prior_weight' not in without['student']['adapt']
    both = made(tmp_path, class_path=str(file))
    options = learning.student_options(both, ADAPTED)
    assert options['images']['path'] == without['images']['path']
    assert isinstance(options['images']['class_path'], str)
    assert options['student']['adapt']['prior_weight'] == 1.0
    drawn = named(made(tmp_path, path=str(file), class_path='teacher'))
    assert drawn['class_path'] == without['images']['path']


def test_a_teacher_is_named_by_its_weights_and_what_they_mean():
    teacher, device_mesh = tiny.teacher(), mesh.make_mesh(1)
    name = learning.teacher_id(teacher, device_mesh)
    copies = jax.tree.map(np.array, teacher.params)
    assert learning.teacher_id(teacher._replace(params=copies), device_mesh) == name
    copies['conv_in']['kernel'][0, 0, 0, 0] += 1
    assert learning.teacher_id(teacher._replace(params=copies), device_mesh) != name
    info = dataclasses.replace(teacher.info, prediction='v')
    assert learning.teacher_id(teacher._replace(info=info), device_mesh) != name


def test_a_student_learns_where_a_stage_has_iterations():
    nothing = dataclasses.replace(STUDENT, finetune=FinetuneConfig(num_iterations=0))
    assert not learning.learns(nothing)
    assert learning.learns(STUDENT) and learning.learns(ADAPTED)
    blocks = StudentConfig(
        method=QDiffusionConfig(), reconstruct=ReconstructConfig(num_iterations=1)
    )
    assert learning.learns(blocks)
