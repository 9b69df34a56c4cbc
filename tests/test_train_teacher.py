import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmq_jax import config as config_lib
from dmq_jax import teachers, train_classifier, train_teacher
from dmq_jax.metrics import classifier
from dmq_jax.runtime import log
from tests import tiny

NUM_ITERATIONS, CHECKPOINT_EVERY = 4, 2


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'bars.npz'
    images, labels = tiny.real_images(48)
    np.savez(path, train_images=images, train_labels=labels,
             test_images=images[:12], test_labels=labels[:12])  # fmt: skip
    return path


def make_config(data, **changes):
    return config_lib.from_config_dict(
        {
            'name': 'bars',
            'dataset': {'path': str(data), 'image_size': 12, 'num_classes': 3},
            'network': {
                'channels': (8,), 'attention': (False,), 'num_groups': 4, 'patch_size': 2,
                'head_dim': None,
            },
            'classifier': {'num_epochs': 1, 'batch_size': 16},
            'num_iterations': NUM_ITERATIONS, 'batch_size': 8, 'warmup_iterations': 2,
            'log_every': 3, 'checkpoint_every': CHECKPOINT_EVERY, 'preview_every': 100,
            'mesh': {'data': 2},
            **changes,
        },
        config_lib.TrainTeacherConfig,
    )  # fmt: skip


@pytest.fixture(scope='module')
def folders(data, tmp_path_factory):
    """Of a whole run, and what a kill after the first checkpoint would have left of it."""
    workdir, killed = (tmp_path_factory.mktemp(name) for name in ('whole', 'killed'))
    save = train_teacher.Checkpoints.save

    def save_and_copy(self, step, tree):
        save(self, step, tree)
        if step == CHECKPOINT_EVERY:
            self.wait()
            shutil.copytree(workdir, killed, dirs_exist_ok=True)

    # One of two stages is sooner compiled than one of three.
    train_small = functools.partial(train_classifier.run, features=8, widths=(8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher.Checkpoints, 'save', save_and_copy)
        patch.setattr(train_classifier, 'run', train_small)
        train_teacher.run(make_config(data), workdir)
    return workdir, killed


@pytest.fixture(scope='module')
def uninterrupted(folders):
    return folders[0]


def test_an_interrupted_training_ends_with_the_same_weights(data, folders):
    _, killed = folders
    assert [line['step'] for line in log.read_metrics(killed)] == [2]
    assert not (killed / 'bars_teacher.safetensors').exists()
    # What only decides how often something is written may change.
    train_teacher.run(make_config(data, log_every=1), killed)
    expected, found = (load_file(path / 'bars_teacher.safetensors') for path in folders)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [line['step'] for line in log.read_metrics(killed)] == [2, 3, 4]


def test_every_file_is_there_and_they_belong_together(uninterrupted):
    teacher = teachers.load_teacher(uninterrupted / 'bars_teacher.safetensors')
    assert teacher.info.image_shape == (12, 12, 1)
    assert teacher.info.num_classes == 3 and teacher.network.num_class_embeds == 4
    network = classifier.load_classifier(uninterrupted / 'bars_classifier.safetensors')
    reference = classifier.load_reference(uninterrupted / 'bars_reference.npz', network)
    assert reference.statistics.count == 48
    assert json.loads((uninterrupted / 'config.json').read_text())['name'] == 'bars'
    lines = log.read_metrics(uninterrupted)
    # Every log_every, and at each checkpoint, so that none holds weights that are not finite.
    assert [line['step'] for line in lines] == [2, 3, 4]
    assert all(np.isfinite(line['loss']) for line in lines)


def test_other_options_in_the_same_folder_are_refused(data, uninterrupted):
    with pytest.raises(ValueError, match='label_dropout was 0.1, now 0.5'):
        train_teacher.run(make_config(data, label_dropout=0.5), uninterrupted)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    data, uninterrupted, tmp_path, monkeypatch
):
    for name in ('bars_classifier.safetensors',):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    losses = iter([0.5, np.inf])

    def diverging(state, images, labels, indices):
        return state._replace(step=state.step + 1), np.float32(next(losses))

    monkeypatch.setattr(train_teacher, 'make_untrained', lambda config, channels: tiny.teacher())
    monkeypatch.setattr(train_teacher, 'make_train_step', lambda config, denoiser: diverging)
    with pytest.raises(FloatingPointError, match=r'at step 2; lower learning_rate'):
        train_teacher.run(make_config(data), tmp_path)
    assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


@pytest.mark.parametrize(
    'arrays, text',
    [
        ({'arr_0': np.zeros((4, 8, 8, 1), np.uint8)}, 'no labels; a class-conditional teacher'),
        (
            {'train_images': np.zeros((4, 8, 8, 1), np.uint8), 'train_labels': np.arange(4)},
            r'labels 0\.\.3, expected 0\.\.2 \(dataset.num_classes\)',
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, arrays, text):
    np.savez(tmp_path / 'bad.npz', **arrays)
    config = config_lib.DatasetConfig(path=str(tmp_path / 'bad.npz'), image_size=8, num_classes=3)
    with pytest.raises(ValueError, match=text):
        train_teacher.load_dataset(config, 'train')


def test_smaller_images_are_padded(data):
    config = config_lib.DatasetConfig(path=str(data), image_size=12, num_classes=3)
    dataset = train_teacher.load_dataset(config, 'test')
    assert dataset.images.shape == (12, 12, 12, 1)
    assert dataset.images[:, 2:-2, 2:-2].any() and not dataset.images[:, :2].any()


@pytest.mark.parametrize('prediction', ['eps', 'v'])
def test_the_loss_of_a_perfect_network_is_zero(prediction):
    info = dataclasses.replace(tiny.INFO, prediction=prediction)
    images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 1)).astype(np.float32)
    seen = []

    def perfect(params, x_t, t, labels):
        """Knows the images, and so the noise."""
        alpha_cumprod = train_teacher.alphas_cumprod(info.schedule)[t][:, None, None, None]
        alpha, sigma = np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod)
        eps = (np.asarray(x_t, np.float64) - alpha * images) / sigma
        seen.append((np.asarray(t), np.asarray(labels)))
        target = eps if prediction == 'eps' else alpha * eps - sigma * images
        return jax.numpy.asarray(target, jax.numpy.float32)

    denoiser = tiny.teacher()._replace(predict=perfect, info=info)
    labels = jax.numpy.arange(6) % 3
    loss = train_teacher.diffusion_loss(
        denoiser, None, images, labels, jax.random.key(0), label_dropout=0.5
    )
    # eps divides by sigma >= 0.03, which magnifies float32 rounding of x_t.
    assert loss < 1e-8
    t, classes = seen[0]
    assert t.min() >= 0 and t.max() < info.schedule.num_train_timesteps and len(set(t)) > 1
    assert ((classes == labels) | (classes == info.num_classes)).all()
    assert (classes == info.num_classes).any() and (classes != info.num_classes).any()
