import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from dmq_jax.metrics import inception
from dmq_jax.metrics.inception import (
    TAPS,
    extract,
    extract_batches,
    load_inception,
    make_extractor,
    resize_bilinear_tf1,
)

torch = pytest.importorskip('torch', reason='torch is the reference of the network')

from tests.oracles import inception as oracle  # noqa: E402

ROOT = Path(__file__).parents[2]
# Forty-eight float32 layers in another order of summation, batch normalisation folded; relative
# to the largest feature (seen: 2e-6).
NETWORK_TOLERANCE = 1e-5
# The same program on another batch shape.
BATCH_TOLERANCE = 1e-5


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def random_images(count, height=75, width=75, seed=0):
    """Smooth enough that a resize is not only noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    smooth = oracle.resize(coarse, (height, width)) + rng.normal(0, 20, (count, height, width, 3))
    return np.clip(smooth, 0, 255).astype(np.uint8)


# ---- Resize


# (height, width), size of the result.
RESIZED = [
    ((32, 32), (299, 299)),
    ((64, 100), (299, 299)),
    ((256, 256), (299, 299)),
    ((512, 333), (299, 299)),
    ((298, 300), (299, 299)),
    ((1, 2), (299, 299)),
    ((299, 17), (299, 299)),
    ((31, 7), (5, 23)),
]


@pytest.mark.parametrize(
    'given, size, transform',
    [
        *(pytest.param(*sizes, jax.jit, id=f'jit-{sizes}') for sizes in RESIZED),
        # Op by op there is nothing that a compiler could contract: both directions are enough.
        *(pytest.param(*RESIZED[i], lambda f, **_: f, id=f'eager-{RESIZED[i]}') for i in (0, 3, 7)),
    ],
)
def test_resize_equals_tensorflow_formula_bit_for_bit(given, size, transform):
    images = np.random.default_rng(0).integers(0, 256, (2, *given, 3), dtype=np.uint8)
    resized = transform(resize_bilinear_tf1, **{'static_argnums': 1})(jnp.asarray(images), size)
    want = oracle.resize(images, size)
    np.testing.assert_array_equal(np.asarray(resized).view(np.int32), want.view(np.int32))


def test_preprocessing_inside_a_larger_program_stays_bit_for_bit():
    images = np.random.default_rng(0).integers(0, 256, (2, 70, 51, 3), dtype=np.uint8)
    scaled = jax.jit(lambda x: (resize_bilinear_tf1(x) - 128.0) * 0.0078125)(images)
    want = (oracle.resize(images, (299, 299)) - np.float32(128)) * np.float32(0.0078125)
    np.testing.assert_array_equal(np.asarray(scaled), want)


def test_an_image_of_the_right_size_is_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        resize_bilinear_tf1(jnp.asarray(images)), images.astype(np.float32)
    )


def test_resize_has_no_half_pixel_centres():
    row = jnp.array([0, 100], jnp.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(resize_bilinear_tf1(row, (1, 4)).ravel(), [0, 50, 100, 100])


# ---- Network


@pytest.fixture(scope='module')
def taps_and_oracle(network, inception_state):
    images = random_images(2)
    taps = jax.jit(network.model.apply)({'params': network.params}, images)
    x = (oracle.resize(images, (299, 299)) - 128) / np.float32(128)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    # float64: what both float32 programs approximate.
    want = oracle.network({name: value.double() for name, value in inception_state.items()}, x)
    return taps, {name: value.numpy() for name, value in want.items()}


@pytest.mark.parametrize('name', TAPS)
def test_every_tap_equals_torch(taps_and_oracle, name):
    taps, want = taps_and_oracle
    assert set(taps) == set(TAPS)
    error = relative_error(taps[name], want[name])
    assert error < NETWORK_TOLERANCE, f'{name}: {error:.2e} >= {NETWORK_TOLERANCE:.2e}'


def test_taps_are_no_constants(taps_and_oracle):
    taps, _ = taps_and_oracle
    for name, values in taps.items():
        spread = np.std(np.asarray(values), axis=0).max() / np.abs(values).max()
        assert spread > 1e3 * NETWORK_TOLERANCE, name


def test_every_product_is_computed_in_full_float32(network):
    images = jax.ShapeDtypeStruct((1, 75, 75, 3), np.uint8)
    jaxpr = jax.make_jaxpr(network.model.apply)({'params': network.params}, images)
    products = [e for e in equations(jaxpr.jaxpr) if 'precision' in e.params]
    assert len(products) == 95
    for equation in products:
        assert set(equation.params['precision']) == {jax.lax.Precision.HIGHEST}, equation


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


# ---- Features of image sets


def test_features_are_named_taps_of_exactly_the_given_images(network, taps_and_oracle):
    _, want = taps_and_oracle
    images = np.concatenate([random_images(2), random_images(1, seed=1)])
    extractor = make_extractor(network)
    compiled = inception._features.jitted()._cache_size()
    parts = list(extract_batches(network, [images[:1], images[1:]], batch_size=2))
    assert [len(part.pool) for part in parts] == [2, 1]
    assert inception._features.jitted()._cache_size() == compiled + 1
    features = extract(network, images, batch_size=2)
    for name, array in features._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(array, joined)
    assert inception._features.jitted()._cache_size() == compiled + 1
    assert (features.pool.shape, features.spatial.shape) == ((3, 2048), (3, 2023))
    assert features.probabilities.shape == (3, 1008)
    assert relative_error(features.pool[:2], want['2048']) < NETWORK_TOLERANCE
    assert relative_error(features.spatial[:2], want['spatial']) < NETWORK_TOLERANCE
    softmax = torch.softmax(torch.from_numpy(want['logits']), 1).numpy()
    # exp turns the absolute error of logits of size ~10 into a relative one.
    assert relative_error(features.probabilities[:2], softmax) < 100 * NETWORK_TOLERANCE
    np.testing.assert_allclose(features.probabilities.sum(1), 1, rtol=1e-5)
    swapped = extractor(jnp.asarray(images[[2, 0]]))
    assert relative_error(swapped.pool, features.pool[[2, 0]]) < BATCH_TOLERANCE


@pytest.mark.parametrize(
    'images, options, text',
    [
        (np.zeros((2, 8, 8, 1), np.uint8), {}, 'grey'),
        (np.zeros((2, 8, 8, 3), np.float32), {}, 'uint8'),
        (np.zeros((2, 0, 8, 3), np.uint8), {}, 'H, W, 3'),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, 'no images'),
        ([np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 9, 8, 3), np.uint8)], {}, 'one size'),
        (np.zeros((2, 8, 8, 3), np.uint8), {'batch_size': 0}, 'batch_size=0'),
    ],
)
def test_wrong_images_are_refused(network, images, options, text):
    with pytest.raises(ValueError, match=text):
        extract(network, images, **options)


# ---- Converting


def test_converted_file_says_where_it_comes_from(inception_files, network):
    with safe_open(inception_files['own.safetensors'], framework='numpy') as file:
        metadata = file.metadata()
    assert metadata['source'] == 'zip.pth'
    assert metadata['source_sha256'] == network.sha256
    assert metadata['network_id'] == network.network_id


def test_convert_checks_its_destination_first(inception_files, tmp_path):
    with pytest.raises(ValueError, match='safetensors'):
        inception.convert(inception_files['zip.pth'], tmp_path / 'x.pth')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        inception.convert(inception_files['zip.pth'], tmp_path / 'none' / 'x.safetensors')


def test_command_converts_and_prints_the_digest(inception_files, tmp_path):
    out = tmp_path / 'x.safetensors'
    command = [sys.executable, '-m', 'dmq_jax.metrics.inception', '--convert']
    command += [str(inception_files['graph.pb']), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{load_inception(out).sha256}  {out}\n'


def test_command_reports_mistakes_in_one_message(tmp_path, monkeypatch, capsys):
    paths = str(tmp_path / 'none'), str(tmp_path / 'x.safetensors')
    monkeypatch.setattr(sys, 'argv', ['inception', '--convert', *paths])
    assert inception.main() == 2
    assert capsys.readouterr().err.startswith(f'Error: {tmp_path}/none: no such file')
