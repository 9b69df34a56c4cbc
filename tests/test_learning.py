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
ADAPTED = StudentConfig(
    method=TuneQDMConfig(), adapt=AdaptConfig(num_iterations=3, images='teacher', num_images=8)
)


@pytest.fixture
def context(tmp_path):
    config = Config(
        calibrate=tiny.CALIBRATE, sampler=tiny.SAMPLER, students={'one': STUDENT, 'two': ADAPTED}
    )
    (tmp_path / 'calibration').mkdir()
    (tmp_path / 'calibration' / 'complete.json').write_text(json.dumps({'made': 'with this'}))
    return learning.make_run(config, tmp_path, tiny.teacher(), device_mesh=mesh.make_mesh(1))


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


def test_images_that_the_teacher_draws_are_named_by_all_they_depend_on(context):
    images = learning.student_options(context, ADAPTED)['images']
    assert images['num_images'] == 8 and images['teacher'] == context.teacher_id
    more = learning.student_options(context, changed(ADAPTED, 'adapt', num_images=9))
    assert more['images']['num_images'] == 9
    assert learning.student_options(context, STUDENT)['images'] is None


def test_images_of_a_file_are_named_by_what_they_are(context, tmp_path):
    file = tmp_path / 'images.npz'
    student = changed(ADAPTED, 'adapt', images=str(file))
    seen = []
    for value in (0, 0, 1):
        np.savez(file, arr_0=np.full((4, 8, 8, 1), value, np.uint8))
        seen.append(learning.student_options(context, student)['images'])
    assert seen[0] == seen[1] != seen[2]


def test_images_that_are_not_to_be_forgotten_are_named_as_well(context, tmp_path):
    file = tmp_path / 'images.npz'
    np.savez(file, arr_0=np.full((4, 8, 8, 1), 7, np.uint8))
    without = learning.student_options(context, ADAPTED)
    assert 'class_images' not in without
    assert not {'class_images', 'prior_weight'} & set(without['student']['adapt'])
    student = changed(ADAPTED, 'adapt', class_images=str(file))
    options = learning.student_options(context, student)
    assert options['images'] == without['images']
    assert isinstance(options['class_images'], str)
    assert options['student']['adapt']['prior_weight'] == 1.0
    drawn = changed(ADAPTED, 'adapt', images=str(file), class_images='teacher')
    options = learning.student_options(context, drawn)
    assert options['class_images'] == without['images']
    assert options['student']['adapt']['num_images'] == 8


def test_each_set_of_images_is_as_large_as_the_teachers_and_has_its_labels(context, tmp_path):
    folder = [tmp_path / f'{name}.npz' for name in ('own', 'class')]
    for file, value in zip(folder, (0, 255), strict=True):
        np.savez(file, arr_0=np.full((4, 6, 6, 1), value, np.uint8))
    own, others = map(str, folder)
    config = changed(ADAPTED, 'adapt', images=own, label=2).adapt
    assert learning.adapt_images(context, config)['prior'] is None
    config = dataclasses.replace(config, class_images=others)
    found = learning.adapt_images(context, config)
    for (images, labels), value in (
        ((found['images'], found['labels']), -1), (found['prior'], 1)
    ):  # fmt: skip
        assert images.shape == (4, 8, 8, 1) and images[0, 4, 4, 0] == value
        np.testing.assert_array_equal(labels, [2] * 4)


def test_class_images_that_the_teacher_cannot_have_are_refused_by_their_name(context, tmp_path):
    np.savez(tmp_path / 'class.npz', arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    student = changed(ADAPTED, 'adapt', class_images=str(tmp_path / 'class.npz'))
    config = dataclasses.replace(context.config, students={'two': student})
    with pytest.raises(ValueError, match=r'adapt\.class_images=.*images of 3 channels; expected 1'):
        learning.make_run(config, tmp_path, tiny.teacher(), device_mesh=mesh.make_mesh(1))


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
