"""Weights of the FID network in every kind of file, written here with random numbers."""

import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.metrics import inception_weights
from dmq_jax.metrics.inception import load_inception

torch = pytest.importorskip('torch', reason='torch writes its kinds of file')

from tests.oracles import inception as oracle  # noqa: E402


@pytest.fixture(scope='module')
def flat(network):
    return traverse_util.flatten_dict(dict(network.params), sep='/')


def test_folding_equals_normalisation_in_float64():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 1, 5, 4)).astype(np.float32)
    gamma, beta, mean = rng.normal(size=(3, 4)).astype(np.float32)
    variance = rng.uniform(1e-4, 3, 4).astype(np.float32)
    x = rng.normal(size=(6, 5))
    folded_kernel, bias = inception_weights.fold(kernel, gamma, beta, mean, variance)
    y = x @ kernel[0, 0].astype(np.float64)
    want = gamma * (y - mean) / np.sqrt(variance.astype(np.float64) + 0.001) + beta
    got = x @ folded_kernel[0, 0].astype(np.float64) + bias
    # Rounding of kernel and bias to float32, six terms.
    assert np.max(np.abs(got - want)) < 1e-6 * np.max(np.abs(want))


def test_layer_names_are_those_of_tensorflow_and_torchvision(flat):
    layers = {path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')}
    assert layers - {'softmax'} == set(inception_weights.TORCH_NAMES)
    assert len(layers) == 95
    assert set(inception_weights.TORCH_NAMES.values()) == set(oracle.LAYERS)
    for ours, theirs in inception_weights.TORCH_NAMES.items():
        assert inception_weights.tensorflow_scope(ours) == oracle.tf_scope(theirs)


@pytest.mark.parametrize('kind', ['legacy.pth', 'graph.pb', 'own.safetensors'])
def test_every_kind_of_file_gives_the_same_parameters(inception_files, network, flat, kind):
    other = load_inception(inception_files[kind])
    assert other.network_id == network.network_id
    for name, leaf in traverse_util.flatten_dict(dict(other.params), sep='/').items():
        np.testing.assert_array_equal(leaf, flat[name], err_msg=name)
    assert len(other.sha256) == 64
    assert other.sha256 != network.sha256
    assert other.path == inception_files[kind]


def test_weights_are_found_by_the_environment(inception_files, monkeypatch):
    monkeypatch.setenv('DMQ_INCEPTION_WEIGHTS', str(inception_files['own.safetensors']))
    assert load_inception().path == inception_files['own.safetensors']


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


def test_gamma_is_left_out_where_the_graph_says_so(inception_state, flat, tmp_path):
    path = tmp_path / 'graph.pb'
    path.write_bytes(oracle.graphdef(inception_state, scale_after_normalization=False))
    kernel = load_inception(path).params['conv']['kernel']
    gamma = inception_state['Conv2d_1a_3x3.bn.weight'].numpy()
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
def test_a_graph_of_another_network_is_refused(inception_state, tmp_path, options, text):
    path = tmp_path / 'graph.pb'
    path.write_bytes(oracle.graphdef(inception_state, **options))
    with pytest.raises(ValueError, match=text):
        load_inception(path)


def test_a_graph_with_other_convolutions_is_refused(inception_state, inception_files, tmp_path):
    extra = oracle.const('aux/conv2d_params', np.zeros((1, 1, 1, 1), np.float32))
    path = tmp_path / 'graph.pb'
    path.write_bytes(inception_files['graph.pb'].read_bytes() + extra)
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
def test_wrong_state_dicts_are_refused(inception_state, tmp_path, change, text):
    path = tmp_path / 'state.pth'
    changed = {
        name: value for name, value in (inception_state | change).items() if value is not None
    }
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
