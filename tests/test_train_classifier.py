import functools
import io

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from dmq_jax import train_classifier
from dmq_jax.metrics.classifier import load_classifier, save_classifier

CHANCE = 1 / 3
TINY = {'features': 8, 'widths': (8,), 'batch_size': 16, 'num_epochs': 6, 'learning_rate': 1e-2}


def toy_data(count, seed):
    """Noise with a bright bar: on top, in the middle or at the bottom."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.uint8)
    images = rng.integers(0, 60, (count, 12, 12, 1))
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 120
    return images.astype(np.uint8), labels


def train(**overrides):
    images, labels = toy_data(96, 0)
    test_images, test_labels = toy_data(60, 1)
    arguments = {'test_images': test_images, 'test_labels': test_labels, 'max_shift': 1}
    return train_classifier.run(images, labels, **(TINY | arguments | overrides))


@pytest.fixture(scope='module')
def trained():
    return train()


@pytest.fixture(scope='module')
def again():
    """The same, watched by a bar, and that bar."""
    with Progress(console=Console(file=io.StringIO())) as progress:
        return train(progress=progress), progress


def test_accuracy_on_new_images_is_far_above_chance(trained):
    assert trained.test_accuracy > 2 * CHANCE
    assert trained.network.metadata['test_accuracy'] == round(trained.test_accuracy, 4)


def test_equal_arguments_give_equal_weights_and_another_seed_others(trained, again):
    same, other = (result.network.params for result in (again[0], train(seed=1)))
    jax.tree.map(np.testing.assert_array_equal, same, trained.network.params)
    assert np.abs(same['stem']['kernel'] - other['stem']['kernel']).max() > 0


def test_result_is_exactly_what_its_file_holds(trained, tmp_path):
    save_classifier(tmp_path / 'network.safetensors', trained.network)
    loaded = load_classifier(tmp_path / 'network.safetensors')
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.network.params)


def test_normalisation_is_that_of_the_training_images(trained):
    images, _ = toy_data(96, 0)
    assert trained.network.model.mean == pytest.approx([images.mean() / 255], abs=1e-4)
    assert trained.network.model.std == pytest.approx([images.std() / 255], abs=1e-4)


def test_a_diverging_loss_is_an_error_that_names_the_step():
    with pytest.raises(FloatingPointError, match=r'the loss of step \d+ is (nan|inf)'):
        train(learning_rate=float('inf'))


def test_the_first_bad_step_is_named():
    with pytest.raises(FloatingPointError, match='step 52 is inf'):
        train_classifier.check_losses(np.array([1.0, 2.0, np.inf, np.nan]), first_step=50)
    assert train_classifier.check_losses(np.array([1.0, 2.0]), first_step=50) is None


def test_progress_reaches_the_last_step(again):
    (task,) = again[1].tasks
    assert task.completed == task.total == TINY['num_epochs'] * 96 // TINY['batch_size']
    assert 'loss' in task.description


def augment(images, seed, **options):
    function = functools.partial(train_classifier.augment, **options)
    return np.asarray(jax.jit(function)(images, jax.random.key(seed)))


def test_augmentation_moves_by_at_most_max_shift():
    image = np.zeros((64, 9, 9, 1), np.uint8)
    image[:, 4, 4] = 255
    moved = augment(image, 0, max_shift=2, flip=False)
    positions = np.argwhere(moved == 255)
    assert len(positions) == 64
    offsets = positions[:, 1:3] - 4
    assert offsets.min() == -2 and offsets.max() == 2
    assert len(np.unique(offsets, axis=0)) > 5


def test_flip_mirrors_some_images_and_no_shift_keeps_the_rest():
    images = toy_data(32, 2)[0]
    flipped = augment(images, 1, max_shift=0, flip=True)
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (flipped == images).all(axis=(1, 2, 3))
    assert (mirrored | unchanged).all()
    assert 0 < mirrored.sum() < 32
    same = augment(images, 1, max_shift=0, flip=False)
    np.testing.assert_array_equal(same, images)


@pytest.mark.parametrize(
    'overrides, message',
    [
        ({'batch_size': 1000}, r'batch_size=1000: expected 1\.\.96'),
        ({'num_epochs': 0}, 'num_epochs=0'),
        ({'num_classes': 2}, r'labels lie in 0\.\.2: expected 0\.\.1'),
        ({'test_labels': np.zeros(59, np.uint8)}, 'test labels are .*expected 60 integers'),
        ({'test_images': np.zeros((60, 12, 12, 1))}, 'test images are float64'),
    ],
)
def test_data_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        train(**overrides)
