from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import features
from dmq_jax.files.images import array_stream, open_images
from dmq_jax.metrics import inception
from dmq_jax.runtime import mesh
from tests import tiny

# The same program on other batch shapes: float32 sums in another order (seen: 4e-6 of the largest
# feature).
BATCH_TOLERANCE = 2e-5


class Taps(nn.Module):
    """What is taken of Inception, for a thousandth of its work; tests/test_adm.py has itself."""

    @nn.compact
    def __call__(self, images):
        x = images.astype(jnp.float32) / 127.5 - 1
        x = nn.relu(nn.Conv(8, (4, 4), strides=4, name='conv')(x)).reshape(len(x), -1)
        widths = {'2048': 2048, 'spatial': 2023, 'logits': 1008}
        return {name: nn.Dense(width, name=f'tap_{name}')(x) for name, width in widths.items()}


@pytest.fixture(scope='module')
def network(images):
    shapes = jax.eval_shape(Taps().init, jax.random.key(0), images)['params']
    return inception.InceptionNetwork(
        Taps(), tiny.random_like(shapes), '', Path('inception.safetensors'), 'taps'
    )


def random_images(count, seed=0, side=20):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


@pytest.fixture(scope='module')
def images():
    return random_images(11)


def on_one(network, images):
    return features.extract(
        network, [images], num_images=11, description='one', batch_size=8,
        device_mesh=mesh.make_mesh(1),
    )  # fmt: skip


@pytest.fixture(scope='module')
def one_device(network, images):
    return on_one(network, images)


def assert_close(a, b):
    for name in ('pool', 'probabilities'):
        got, want = getattr(a, name), getattr(b, name)
        assert got.shape == want.shape
        gap = np.max(np.abs(got - want)) / np.max(np.abs(want))
        assert gap < BATCH_TOLERANCE, f'{name}: {gap:.1e}'
    assert a.gaussian.count == b.gaussian.count == len(a.pool)


def on_eight(network, images):
    return features.extract(
        network, iter([images[:5], images[5:]]), num_images=None, description='eight',
        batch_size=8, device_mesh=mesh.make_mesh(8),
    )  # fmt: skip


def test_every_image_counts_once_on_one_device_and_on_eight(network, images, one_device):
    eight = on_eight(network, images)
    assert len(eight.pool) == 11
    assert_close(eight, one_device)


@pytest.mark.slow  # the test before, and tests/metrics/test_inception.py
def test_inception_itself_says_the_same_on_one_device_and_on_eight(images, tmp_path):
    network = inception.load_inception(tiny.write_inception(tmp_path / 'inception.safetensors'))
    assert_close(on_eight(network, images), on_one(network, images))


def test_the_gaussians_are_those_of_the_features(one_device):
    pool = one_device.pool.astype(np.float64)
    # Sums of 11 numbers in float64, in another order.
    np.testing.assert_allclose(one_device.gaussian.mean, pool.mean(0), rtol=1e-12)
    np.testing.assert_allclose(one_device.gaussian.cov, np.cov(pool, rowvar=False), atol=1e-12)
    assert one_device.spatial_gaussian.mean.shape == (2023,)


def test_features_once_extracted_are_read_back(network, images, one_device, tmp_path, monkeypatch):
    kept = tmp_path / 'features'
    options = {'kept_in': kept, 'batch_size': 8}
    first = features.of_stream(network, array_stream(images, 'a'), **options)
    assert_close(first, one_device)
    np.savez(tmp_path / 'same.npz', images)
    features.of_stream(network, open_images(tmp_path / 'same.npz'), **options)
    monkeypatch.setattr(inception, 'extract_batches', None)
    again = features.of_stream(network, array_stream(images, 'another name'), **options)
    for got, want in zip(again[:2], first[:2], strict=True):
        np.testing.assert_array_equal(got, want)
    for got, want in zip(again[2:], first[2:], strict=True):
        np.testing.assert_array_equal(got.cov, want.cov)
        assert got.count == want.count == 11
    np.savez(tmp_path / 'same.npz', images[::-1])
    with pytest.raises(TypeError):  # other content: the network is asked
        features.of_stream(network, open_images(tmp_path / 'same.npz'), **options)


def test_broken_weights_are_named(network, images):
    params = dict(network.params)
    params['conv'] = {name: leaf * np.nan for name, leaf in params['conv'].items()}
    with pytest.raises(ValueError, match=r'not finite.*inception\.safetensors'):
        features.extract(
            network._replace(params=params), [images], num_images=11, description='x',
            batch_size=8,
        )  # fmt: skip


def test_one_image_has_no_covariance(network, images):
    with pytest.raises(ValueError, match='1 images; a covariance needs at least 2'):
        features.extract(network, [images[:1]], num_images=1, description='x', batch_size=8)


@pytest.mark.parametrize('announced', [5, 20])
def test_a_wrong_number_of_images_is_noticed(network, images, announced):
    with pytest.raises(ValueError, match=f'{announced}.*announced'):
        features.extract(network, [images], num_images=announced, description='x', batch_size=8)


def test_a_batch_that_devices_do_not_divide_is_refused(network, images):
    with pytest.raises(ValueError, match='batch_size=6 is not divisible by 8 devices'):
        features.extract(
            network, [images], num_images=11, description='x', batch_size=6,
            device_mesh=mesh.make_mesh(8),
        )  # fmt: skip
