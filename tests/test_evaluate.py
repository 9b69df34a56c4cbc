import dataclasses

import numpy as np
import pytest

from dmq_jax import evaluate, train_classifier
from dmq_jax.config import EvaluateConfig
from dmq_jax.metrics import classifier, similarity
from dmq_jax.runtime import mesh
from tests import tiny

KEYS = {'fd', 'precision', 'recall', 'class_accuracy', 'psnr_to_teacher', 'ssim_to_teacher'}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    features, statistics = tiny.write_evaluation(tmp_path_factory.mktemp('evaluation'))
    return evaluate.load_reference(
        EvaluateConfig(features=str(features), reference=str(statistics))
    )


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    features, _ = tiny.write_evaluation(tmp_path_factory.mktemp('network'))
    return classifier.load_classifier(features)


def test_images_compared_with_themselves_are_perfect(reference):
    images, labels = tiny.real_images()
    metrics = evaluate.run(images, labels, reference, images)
    assert metrics.keys() == KEYS
    assert metrics['psnr_to_teacher'] == similarity.MAX_PSNR
    # The reference keeps float64 statistics of these very images.
    assert abs(metrics['fd']) < 1e-4
    assert metrics['precision'] == metrics['recall'] == 1.0


# Another number of images per device is another program, of other sums in float32.
TOLERANCE = 1e-4


def test_metrics_do_not_depend_on_the_devices(reference):
    images, labels = tiny.real_images(seed=1)
    meshes = None, mesh.make_mesh(1), mesh.make_mesh(4, 2)
    found = [evaluate.run(images, labels, reference, images, device_mesh=m) for m in meshes]
    # The SSIM of such small images is None.
    one, *others = ({n: v for n, v in m.items() if v is not None} for m in found)
    assert len(one) == len(KEYS) - 1
    for metrics in others:
        assert metrics == pytest.approx(one, rel=TOLERANCE)


def test_other_images_are_worse(reference):
    images, labels = tiny.real_images(seed=1)
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    good = evaluate.run(images, labels, reference, images)
    bad = evaluate.run(noise, labels, reference, images)
    assert bad['fd'] > good['fd']
    assert bad['psnr_to_teacher'] < 20 < good['psnr_to_teacher']
    assert bad['precision'] < good['precision']


def test_class_accuracy_is_the_share_recognised_as_their_class(reference, network):
    images, labels = tiny.real_images()
    _, probabilities = classifier.extract(network, images)
    recognised = probabilities.argmax(axis=-1)
    assert evaluate.run(images, recognised, reference)['class_accuracy'] == 1.0
    wrong = np.where(np.arange(60) < 15, (recognised + 1) % 3, recognised)
    assert evaluate.run(images, wrong, reference)['class_accuracy'] == 0.75


def test_a_trained_classifier_recognises_real_images():
    images, labels = tiny.real_images(96)
    trained = train_classifier.run(
        images, labels, test_images=images, test_labels=labels, features=8, widths=(8,),
        batch_size=16, num_epochs=4, learning_rate=1e-2, max_shift=0,
    )  # fmt: skip
    statistics = classifier.make_reference(trained.network, images)
    reference = evaluate.bundled_reference(trained.network, statistics, 'FD')
    fresh, labels = tiny.real_images(30, seed=5)
    assert evaluate.run(fresh, labels, reference)['class_accuracy'] > 0.8


def test_what_is_not_given_or_not_possible_is_none(reference):
    images, _ = tiny.real_images()
    metrics = evaluate.run(images, None, reference)
    assert metrics.keys() == KEYS
    assert metrics['class_accuracy'] is metrics['psnr_to_teacher'] is None
    # 8x8 is smaller than the window of the SSIM.
    assert evaluate.run(images, None, reference, images)['ssim_to_teacher'] is None


def test_ssim_of_images_as_large_as_its_window(reference):
    images, labels = tiny.real_images(12, side=12)
    assert evaluate.run(images, labels, reference, images)['ssim_to_teacher'] == pytest.approx(1)


def test_the_bundled_reference_names_its_distance():
    reference = evaluate.load_reference(EvaluateConfig())
    assert reference.name == 'FD-FMNIST'
    assert reference.num_classes == 10
    assert reference.num_images == 60_000


@pytest.mark.parametrize('change', [{'reference': 'nowhere.npz'}, {'features': 'nowhere'}])
def test_absent_files_are_named(change):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        evaluate.load_reference(EvaluateConfig(**change))


@pytest.mark.parametrize(
    'info, num_images, text',
    [
        ({'image_shape': (8, 8, 3)}, 10, 'images of 3 channels.*expects 1'),
        ({'num_classes': 7}, 10, '7 classes, the feature network of config.evaluate 3'),
        ({}, 3, 'sample.num_images=3: precision and recall need more than 3'),
    ],
)
def test_what_could_not_be_measured_is_refused_at_once(reference, info, num_images, text):
    with pytest.raises(ValueError, match=text):
        evaluate.check(reference, dataclasses.replace(tiny.INFO, **info), num_images)
    evaluate.check(reference, dataclasses.replace(tiny.INFO, num_classes=None), 10)
