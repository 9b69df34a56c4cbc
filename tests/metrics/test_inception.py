import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors import safe_open

from dmq_jax.metrics import inception, inception_weights
from dmq_jax.metrics.inception import (
    TAPS,
    extract,
    extract_batches,
    load_inception,
    make_extractor,
    network_id,
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


@pytest.fixture(scope='module')
def state():
    return oracle.random_state()


@pytest.fixture(scope='module')
def files(state, tmp_path_factory):
    """The same weights in every kind of file."""
    folder = tmp_path_factory.mktemp('weights')
    paths = {
        name: folder / name for name in ('zip.pth', 'legacy.pth', 'graph.pb', 'own.safetensors')
    }
    torch.save(state, paths['zip.pth'])
    counted = state | {'Conv2d_1a_3x3.bn.num_batches_tracked': torch.tensor(0)}
    torch.save(counted, paths['legacy.pth'], _use_new_zipfile_serialization=False)
    paths['graph.pb'].write_bytes(oracle.graphdef(state))
    inception.convert(paths['zip.pth'], paths['own.safetensors'])
    return paths


@pytest.fixture(scope='module')
def network(files):
    return load_inception(files['zip.pth'])


@pytest.fixture(scope='module')
def flat(network):
    return traverse_util.flatten_dict(dict(network.params), sep='/')


# ---- Resize


@pytest.mark.parametrize(
    'height, width, size',
    [
        (32, 32, (299, 299)),
        (64, 100, (299, 299)),
        (256, 256, (299, 299)),
        (512, 333, (299, 299)),
        (298, 300, (299, 299)),
        (1, 2, (299, 299)),
        (299, 17, (299, 299)),
        (31, 7, (5, 23)),
    ],
)
@pytest.mark.parametrize('transform', [jax.jit, lambda f, **_: f], ids=['jit', 'eager'])
def test_resize_equals_tensorflow_formula_bit_for_bit(height, width, size, transform):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
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
def taps_and_oracle(network, state):
    images = random_images(2)
    taps = jax.jit(network.model.apply)({'params': network.params}, images)
    x = (oracle.resize(images, (299, 299)) - 128) / np.float32(128)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    # float64: what both float32 programs approximate.
    want = oracle.network({name: value.double() for name, value in state.items()}, x)
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


def test_folding_equals_normalisation_in_float64():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 1, 5, 4)).astype(np.float32)
    gamma, beta, mean = rng.normal(size=(3, 4)).astype(np.float32)
    variance = rng.uniform(1e-4, 3, 4).astype(np.float32)
    x = rng.normal(size=(6, 5))
    folded_kernel, bias = inception_weights.fold(kernel, gamma, beta, mean, variance)
    y = x @ kernel[0, 0].astype(np.float64)
    want = gamma * (y - mean) / np.sqrt(variance.astype(np.float64) + 0.001) + beta
    assert relative_error(x @ folded_kernel[0, 0].astype(np.float64) + bias, want) < 1e-6


# ---- Features of image sets


def test_features_are_named_taps_of_exactly_the_given_images(network, taps_and_oracle):
    _, want = taps_and_oracle
    images = np.concatenate([random_images(2), random_images(1, seed=1)])
    extractor = make_extractor(network)
    compiled = inception._compiled_features()._cache_size()
    parts = list(extract_batches(network, [images[:1], images[1:]], batch_size=2))
    assert [len(part.pool) for part in parts] == [2, 1]
    assert inception._compiled_features()._cache_size() == compiled + 1
    features = extract(network, images, batch_size=2)
    for name, array in features._asdict().items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(array, joined)
    assert inception._compiled_features()._cache_size() == compiled + 1
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


# ---- Weights


def test_layer_names_are_those_of_tensorflow_and_torchvision(flat):
    layers = {path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')}
    assert layers - {'softmax'} == set(inception_weights.TORCH_NAMES)
    assert len(layers) == 95
    assert set(inception_weights.TORCH_NAMES.values()) == set(oracle.LAYERS)
    for ours, theirs in inception_weights.TORCH_NAMES.items():
        assert inception_weights.tensorflow_scope(ours) == oracle.tf_scope(theirs)


@pytest.mark.parametrize('kind', ['legacy.pth', 'graph.pb', 'own.safetensors'])
def test_every_kind_of_file_gives_the_same_parameters(files, network, flat, kind):
    other = load_inception(files[kind])
    assert network_id(other) == network_id(network)
    for name, leaf in traverse_util.flatten_dict(dict(other.params), sep='/').items():
        np.testing.assert_array_equal(leaf, flat[name], err_msg=name)
    assert len(other.sha256) == 64
    assert other.sha256 != network.sha256
    assert other.path == files[kind]


def test_converted_file_says_where_it_comes_from(files, network):
    with safe_open(files['own.safetensors'], framework='numpy') as file:
        metadata = file.metadata()
    assert metadata['source'] == 'zip.pth'
    assert metadata['source_sha256'] == network.sha256
    assert metadata['network_id'] == network_id(network)


def test_weights_are_found_by_the_environment(files, monkeypatch):
    monkeypatch.setenv('DMQ_INCEPTION_WEIGHTS', str(files['own.safetensors']))
    assert load_inception().path == files['own.safetensors']


def test_without_weights_the_error_says_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.delenv('DMQ_INCEPTION_WEIGHTS', raising=False)
    for arguments in ((), (tmp_path / 'none.pth',)):
        with pytest.raises(FileNotFoundError) as caught:
            load_inception(*arguments)
        for text in (
            'classify_image_graph_def.pb',
            'pt_inception-2015-12-05-6726825d.pth',
            'weights-inception-2015-12-05-6726825d.pth',
            '.safetensors',
            'DMQ_INCEPTION_WEIGHTS',
        ):
            assert text in str(caught.value)


def test_gamma_is_left_out_where_the_graph_says_so(state, flat, tmp_path):
    path = tmp_path / 'graph.pb'
    path.write_bytes(oracle.graphdef(state, scale_after_normalization=False))
    kernel = load_inception(path).params['conv']['kernel']
    gamma = state['Conv2d_1a_3x3.bn.weight'].numpy()
    np.testing.assert_allclose(
        kernel * gamma[None, None, None], flat['conv/kernel'], rtol=4 * np.finfo(np.float32).eps
    )


@pytest.mark.parametrize(
    'options, text',
    [
        ({'epsilon': 0.01}, 'conv/batchnorm has variance_epsilon'),
        ({'last_pool': 'AvgPool'}, 'mixed_10/tower_2/pool is AvgPool, expected MaxPool'),
    ],
)
def test_a_graph_of_another_network_is_refused(state, tmp_path, options, text):
    path = tmp_path / 'graph.pb'
    path.write_bytes(oracle.graphdef(state, **options))
    with pytest.raises(ValueError, match=text):
        load_inception(path)


def test_a_graph_with_other_convolutions_is_refused(state, files, tmp_path):
    extra = oracle.const('aux/conv2d_params', np.zeros((1, 1, 1, 1), np.float32))
    path = tmp_path / 'graph.pb'
    path.write_bytes(files['graph.pb'].read_bytes() + extra)
    with pytest.raises(ValueError, match="left over, e.g. 'aux/conv2d_params'"):
        load_inception(path)
    path.write_bytes(oracle.const('c', np.zeros(1, np.float32)))
    with pytest.raises(ValueError, match='472 tensors are missing'):
        load_inception(path)


NAME = 'Mixed_7c.branch_pool.bn.bias'


@pytest.mark.parametrize(
    'change, text',
    [
        ({NAME: None}, f"1 tensors are missing, e.g. '{NAME}'"),
        ({'other': torch.zeros(1)}, "left over, e.g. 'other'"),
        ({NAME: torch.zeros(3)}, rf"'{NAME}' has shape \(3,\), expected \(192,\)"),
        ({NAME: torch.full((192,), torch.nan)}, "not finite, e.g. in 'mixed_10/tower_2_conv/bias'"),
        ({'fc.weight': torch.zeros(1000, 2048)}, "torchvision's inception_v3"),
        ({'AuxLogits.fc.bias': torch.zeros(1)}, "torchvision's inception_v3"),
        ({NAME: 'text'}, 'not a dict of tensors'),
    ],
)
def test_wrong_state_dicts_are_refused(state, tmp_path, change, text):
    path = tmp_path / 'state.pth'
    changed = {name: value for name, value in (state | change).items() if value is not None}
    torch.save(changed, path)
    with pytest.raises(ValueError, match=text):
        load_inception(path)


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'\x0a\x05'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / 'weights'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'weights: '):
        load_inception(path)


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / 'x.safetensors'
    save_file({'x': np.zeros(1, np.float32)}, path)
    with pytest.raises(ValueError, match='format is None'):
        load_inception(path)
    save_file({'x': np.zeros(1, np.float32)}, path, {'format': inception_weights.FORMAT})
    with pytest.raises(ValueError, match='189 tensors are missing'):
        load_inception(path)


def test_convert_checks_its_destination_first(files, tmp_path):
    with pytest.raises(ValueError, match='safetensors'):
        inception.convert(files['zip.pth'], tmp_path / 'x.pth')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        inception.convert(files['zip.pth'], tmp_path / 'none' / 'x.safetensors')


def run_command(*arguments):
    command = [sys.executable, '-m', 'dmq_jax.metrics.inception', *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_converts_and_prints_the_digest(files, tmp_path):
    out = tmp_path / 'x.safetensors'
    done = run_command('--convert', files['graph.pb'], out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{load_inception(out).sha256}  {out}\n'


def test_command_reports_mistakes_in_one_message(tmp_path):
    done = run_command('--convert', tmp_path / 'none', tmp_path / 'x.safetensors')
    assert done.returncode == 2
    assert done.stderr.startswith(f'Error: {tmp_path}/none: no such file')
