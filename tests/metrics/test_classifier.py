import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import dmq_jax
from dmq_jax.metrics import classifier
from dmq_jax.metrics.classifier import Classifier, FeatureNetwork, extract
from dmq_jax.metrics.frechet import frechet_distance

# float32 convolutions of at most 144 products, whose order depends on the batch shape.
BATCH_TOLERANCE = 64 * np.finfo(np.float32).eps
# Features kept in float16: half a unit in the last of 11 bits.
FLOAT16_TOLERANCE = 2.0**-11


@pytest.fixture(scope='module')
def network():
    model = Classifier(num_classes=4, features=16, widths=(8, 16), mean=(0.3,), std=(0.4,))
    params = jax.jit(model.init)(jax.random.key(0), random_images(1))['params']
    params = jax.tree.map(lambda a: a.astype(np.float16).astype(np.float32), params)
    return FeatureNetwork(model, params, {'test_accuracy': 0.5})


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / 'network.safetensors'
    classifier.save_classifier(path, network)
    return path


def random_images(count, size=16, num_channels=1, seed=0):
    shape = (count, size, size, num_channels)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def assert_close(got, expected, tolerance):
    error = np.max(np.abs(got - expected)) / np.max(np.abs(expected))
    assert error <= tolerance, f'{error:.2e} > {tolerance:.2e}'


def test_features_have_the_stated_shapes_and_types(network):
    features, probabilities = extract(network, random_images(5), batch_size=2)
    assert features.shape == (5, 16) and features.dtype == np.float32
    assert probabilities.shape == (5, 4) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)
    assert features.std(axis=0).max() > 0


@pytest.mark.parametrize('num_channels, size', [(1, 32), (3, 20)])
def test_any_size_and_number_of_channels_works(num_channels, size):
    model = Classifier(num_classes=3, features=8, widths=(8,))
    images = random_images(2, size, num_channels)
    params = jax.jit(model.init)(jax.random.key(1), images)['params']
    features, _ = extract(FeatureNetwork(model, params), images, batch_size=2)
    assert features.shape == (2, 8) and np.isfinite(features).all()


def test_default_network_costs_less_than_8_million_multiply_adds():
    model = Classifier(num_classes=10)
    image = random_images(1, 32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    cost = jax.jit(lambda p: model.apply({'params': p}, image)).lower(params).cost_analysis()
    assert 1e6 < cost['flops'] / 2 < 8e6


def test_normalisation_happens_inside(network):
    other = Classifier(
        **{n: getattr(network.model, n) for n in classifier.ARCHITECTURE}
        | {'mean': (0.3 - 10 / 255,)}
    )
    images = random_images(3) // 2
    shifted = extract(network, images + np.uint8(10), 3)[0]
    assert_close(extract(FeatureNetwork(other, network.params), images, 3)[0], shifted, 1e-5)


@pytest.mark.parametrize('batch_size', [1, 3, 7, 20])
def test_features_do_not_depend_on_the_batch(network, batch_size):
    images = random_images(7)
    whole, _ = extract(network, images, batch_size=7)
    features, _ = extract(network, images, batch_size=batch_size)
    assert_close(features, whole, BATCH_TOLERANCE)


def test_the_last_batch_is_padded_without_a_trace(network):
    images = random_images(6)
    padded = extract(network, images[:5], batch_size=3)
    full = extract(network, images, batch_size=3)
    for got, expected in zip(padded, full, strict=True):
        np.testing.assert_array_equal(got, expected[:5])


def test_permuting_the_images_permutes_the_features(network):
    images, order = random_images(6), np.array([3, 1, 5, 0, 4, 2])
    features, _ = extract(network, images, batch_size=6)
    permuted, _ = extract(network, images[order], batch_size=6)
    np.testing.assert_array_equal(permuted, features[order])


def test_chunks_of_an_iterable_do_not_matter(network):
    images = random_images(9)
    chunks = iter([images[:1], images[1:1], images[1:8], images[8:]])
    for got, expected in zip(extract(network, chunks, 4), extract(network, images, 4), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_all_batches_share_one_compilation(network):
    classifier.apply_classifier.clear_cache()
    extract(network, random_images(11), batch_size=4)
    extract(network, random_images(2), batch_size=4)
    assert classifier.apply_classifier._cache_size() == 1


def test_file_round_trip_is_exact_for_float16_weights(network, saved):
    loaded = classifier.load_classifier(saved)
    assert loaded.model == network.model
    assert loaded.metadata == network.metadata
    jax.tree.map(np.testing.assert_array_equal, loaded.params, dict(network.params))
    assert classifier.network_id(loaded) == classifier.network_id(network)
    images = random_images(4)
    np.testing.assert_array_equal(extract(loaded, images, 4)[0], extract(network, images, 4)[0])
    assert {t.dtype for t in safetensors.numpy.load_file(saved).values()} == {np.dtype('float16')}


def test_weights_beyond_float16_are_refused(network, tmp_path):
    for bad in (1e6, np.nan):
        params = jax.tree.map(np.array, dict(network.params))
        params['logits']['bias'][0] = bad
        with pytest.raises(ValueError, match='logits/bias'):
            classifier.save_classifier(
                tmp_path / 'bad.safetensors', FeatureNetwork(network.model, params)
            )


def test_files_that_are_not_classifiers_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match='train_classifier'):
        classifier.load_classifier(tmp_path / 'absent.safetensors')
    foreign = tmp_path / 'foreign.safetensors'
    safetensors.numpy.save_file({'a': np.zeros(2)}, foreign)
    with pytest.raises(ValueError, match='the format is None'):
        classifier.load_classifier(foreign)
    with safetensors.safe_open(saved, framework='numpy') as file:
        header = file.metadata()
    tensors = safetensors.numpy.load_file(saved)
    del tensors['logits/bias']
    safetensors.numpy.save_file(tensors, saved, header)
    with pytest.raises(ValueError, match=r"1 tensors differ.*'logits/bias': None, expected \(4,\)"):
        classifier.load_classifier(saved)
    assert json.loads(header['metadata']) == {'test_accuracy': 0.5}


@pytest.mark.parametrize(
    'images, message',
    [
        (np.zeros((2, 16, 16, 1), np.float32), 'float32.*expected uint8'),
        (np.zeros((2, 16, 16), np.uint8), 'expected uint8'),
        (np.zeros((2, 16, 16, 3), np.uint8), '3 channels: expected 1'),
        ([np.zeros((1, 16, 16, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8)], 'one size'),
        ([], 'no images'),
    ],
)
def test_bad_images_are_refused(network, images, message):
    with pytest.raises(ValueError, match=message):
        extract(network, images, batch_size=2)


def test_batch_size_must_be_positive(network):
    with pytest.raises(ValueError, match='batch_size=0'):
        extract(network, random_images(1), batch_size=0)


def test_reference_round_trip(network, tmp_path):
    images = random_images(12)
    reference = classifier.make_reference(network, images, num_features=5, batch_size=4)
    features, _ = extract(network, images, batch_size=4)
    assert_close(reference.features, features[:5], FLOAT16_TOLERANCE)
    np.testing.assert_allclose(reference.statistics.mean, features.mean(axis=0), rtol=1e-6)
    path = tmp_path / 'reference.npz'
    classifier.save_reference(path, reference)
    loaded = classifier.load_reference(path, network)
    np.testing.assert_array_equal(loaded.features, reference.features)
    np.testing.assert_array_equal(loaded.statistics.cov, reference.statistics.cov)
    assert loaded.statistics.count == 12
    assert frechet_distance(loaded.statistics, reference.statistics) < 1e-9


def test_reference_of_another_network_is_refused(network, tmp_path):
    path = tmp_path / 'reference.npz'
    classifier.save_reference(path, classifier.make_reference(network, random_images(4), 4, 4))
    other = FeatureNetwork(network.model, jax.tree.map(lambda a: a * 2, dict(network.params)))
    with pytest.raises(ValueError, match='made with the feature network'):
        classifier.load_reference(path, other)
    with pytest.raises(FileNotFoundError, match='make_reference'):
        classifier.load_reference(tmp_path / 'absent.npz', network)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ValueError, match=r"\['count', 'cov', 'features', 'network_id'\]"):
        classifier.load_reference(path, network)


def test_bundled_reference_belongs_to_the_bundled_network():
    assets = Path(dmq_jax.__file__).parent / 'assets'
    network = classifier.load_classifier(assets / 'fashion_mnist_classifier.safetensors')
    reference = classifier.load_reference(assets / 'fashion_mnist_reference.npz', network)
    assert network.metadata['test_accuracy'] > 0.92
    assert reference.statistics.count == 60_000
    assert reference.features.shape == (10_000, network.model.features)
    # The first 10,000 images are a sample of the 60,000: means differ by |std| / sqrt(10,000).
    spread = np.sqrt(np.diag(reference.statistics.cov) / len(reference.features))
    offset = np.abs(reference.features.mean(axis=0) - reference.statistics.mean)
    assert (offset < 5 * spread).all()
