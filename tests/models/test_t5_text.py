import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import text_weights as weights
from dmq_jax.models.t5_text import T5Encoder, distance_buckets
from dmq_jax.models.torch_weights import expected_tensors
from tests.models.comparison import random_like, relative_error

# Norm of the difference over the norm of the output; float32 on our side, sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    from tests.oracles import text_encoders

    return text_encoders


def assert_close(out, reference, tolerance=TOLERANCE):
    error = relative_error(out, reference)
    assert error < tolerance, f'{error:.2e} >= {tolerance:.0e}'


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


# Heads wider together than the network, and distances beyond the last class.
SMALL = T5Encoder(
    vocabulary_size=30, width=12, head_dim=8, num_heads=2, hidden=20, num_layers=2, num_buckets=8,
    max_distance=10,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 14)).astype(np.int32)
MASK = (np.arange(14)[None] < np.array([[14], [5]])).astype(np.int32)


def random_params(network=SMALL):
    return random_like(weights.text_shapes(network), scale=0.3)


def test_the_encoder_equals_torch(oracle):
    shapes = expected_tensors(weights.text_shapes(SMALL), weights.t5_source)
    tensors = oracle.random_tensors(shapes)
    params = weights.t5_params_from_transformers(tensors, SMALL)
    out = jit(SMALL.apply)({'params': params}, TOKENS, MASK)
    reference = oracle.t5(tensors, TOKENS, MASK, num_heads=2, num_buckets=8, max_distance=10)
    assert_close(out, reference)


def test_transformers_computes_the_same():
    pytest.importorskip('torch', reason='torch is the oracle here')
    transformers = pytest.importorskip('transformers', reason='transformers is the oracle here')
    import torch

    config = {
        'vocab_size': 30, 'd_model': 12, 'd_kv': 8, 'd_ff': 20, 'num_layers': 2, 'num_heads': 2,
        'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 10,
        'feed_forward_proj': 'gated-gelu',
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3).add_(0.3 * torch.randn(parameter.shape))
        ids, mask = torch.from_numpy(TOKENS).long(), torch.from_numpy(MASK)
        reference = model(ids, attention_mask=mask).last_hidden_state
    network = weights.t5_from_transformers(config)
    assert network == SMALL
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    params = weights.t5_params_from_transformers(tensors, network)
    assert_close(jit(network.apply)({'params': params}, TOKENS, MASK), reference)


@pytest.mark.parametrize('num_buckets, max_distance', [(32, 128), (8, 10)])
def test_distances_are_classed_as_in_torch(oracle, num_buckets, max_distance):
    out = distance_buckets(200, num_buckets, max_distance)
    reference = {d: oracle.distance_bucket(d, num_buckets, max_distance) for d in range(-199, 200)}
    expected = np.array([[reference[j - i] for j in range(200)] for i in range(200)])
    np.testing.assert_array_equal(out, expected)
    assert set(out.reshape(-1)) == set(range(num_buckets)) - {num_buckets // 2}


def test_padding_changes_nothing():
    params, apply = random_params(), jit(SMALL.apply)
    out = apply({'params': params}, TOKENS, MASK)
    other = np.where(MASK == 1, TOKENS, 7)
    changed = apply({'params': params}, other, MASK)
    np.testing.assert_array_equal(changed[MASK == 1], out[MASK == 1])
    short = jit(SMALL.apply)({'params': params}, TOKENS[1:, :5])
    assert_close(out[1:, :5], short)


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    params, half = random_params(), SMALL.clone(dtype=jnp.bfloat16)
    shapes = weights.text_shapes(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    out = jit(half.apply)({'params': params}, TOKENS, MASK)
    assert out.dtype == jnp.bfloat16
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep.
    assert_close(out, jit(SMALL.apply)({'params': params}, TOKENS, MASK), tolerance=5e-2)


def test_every_layer_has_a_path_of_its_own():
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert len(paths) == len(set(paths)) == 2 * 7
    assert {'block_0/q', 'block_1/gate', 'block_1/dense_1'} <= set(paths)
