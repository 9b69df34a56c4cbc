import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import text_weights as weights
from dmq_jax.models.clip_text import CLIPText
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


SMALL = CLIPText(
    vocabulary_size=30, width=16, hidden=24, num_layers=3, num_heads=2, max_length=9, projection=6
)
# The highest token ends a text; the first is padded with it, the second with 0.
TOKENS = np.array([[28, 3, 4, 29, 29, 29, 29], [28, 7, 1, 2, 5, 29, 0]], np.int32)


def random_params(network):
    return random_like(weights.text_shapes(network), scale=0.3)


@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu'])
def test_all_outputs_equal_torch(oracle, activation):
    network = SMALL.clone(activation=activation)
    shapes = expected_tensors(weights.text_shapes(network), weights.clip_source)
    tensors = oracle.random_tensors(shapes)
    params = weights.clip_params_from_transformers(tensors, network)
    out = jit(network.apply)({'params': params}, TOKENS)
    states = oracle.clip(tensors, TOKENS, 2, activation)
    assert_close(out.last, states[-1])
    assert_close(out.penultimate, states[-3])
    ends = states[-1][[0, 1], [3, 5]]
    assert_close(out.pooled, ends @ tensors['text_projection.weight'].T)


def open_clip_tensors(oracle, network=SMALL):
    shapes = expected_tensors(weights.text_shapes(network), weights.open_clip_source)
    return oracle.random_tensors(shapes)


def test_the_layout_of_open_clip_equals_torch(oracle):
    network = SMALL.clone(activation='gelu')
    tensors = open_clip_tensors(oracle)
    params = weights.clip_params_from_open_clip(tensors, network)
    out = jit(network.apply)({'params': params}, TOKENS)
    for name, reference in oracle.open_clip(tensors, TOKENS, 2, layers=3).items():
        assert_close(getattr(out, name), reference)


def test_stable_diffusion_2_normalizes_the_penultimate_layer(oracle):
    tensors = open_clip_tensors(oracle)
    network = weights.clip_from_open_clip(tensors, without_last_layer=True).clone(num_heads=2)
    assert network == SMALL.clone(activation='gelu', num_layers=2, projection=None)
    params = weights.clip_params_from_open_clip(tensors, network)
    out = jit(network.apply)({'params': params}, TOKENS)
    reference = oracle.open_clip(tensors, TOKENS, 2, layers=2)
    assert_close(out.last, reference['last'])


@pytest.mark.parametrize('has_projection', [True, False])
def test_transformers_computes_the_same(has_projection):
    pytest.importorskip('torch', reason='torch is the oracle here')
    transformers = pytest.importorskip('transformers', reason='transformers is the oracle here')
    import torch

    config = {
        'vocab_size': 30, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 3,
        'num_attention_heads': 2, 'max_position_embeddings': 9, 'projection_dim': 6,
        'eos_token_id': 29, 'bos_token_id': 28,
    }  # fmt: skip
    name = 'CLIPTextModelWithProjection' if has_projection else 'CLIPTextModel'
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.CLIPTextConfig(**config)).eval()
    with torch.no_grad():
        reference = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
    network = weights.clip_from_transformers({**config, 'architectures': [name]})
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    params = weights.clip_params_from_transformers(tensors, network)
    out = jit(network.apply)({'params': params}, TOKENS)
    assert_close(out.last, reference.last_hidden_state)
    assert_close(out.penultimate, reference.hidden_states[-2])
    assert_close(out.pooled, reference.text_embeds if has_projection else reference.pooler_output)


def test_nothing_depends_on_what_comes_later():
    params = random_params(SMALL)
    apply = jit(SMALL.apply)
    other = TOKENS.copy()
    other[:, 4:] = 11
    out, changed = (apply({'params': params}, tokens) for tokens in (TOKENS, other))
    np.testing.assert_array_equal(out.last[:, :4], changed.last[:, :4])
    assert relative_error(changed.last[:, 4:], out.last[:, 4:]) > 0.01


def test_the_end_of_a_text_is_its_first_end_token_or_else_the_highest():
    params = random_params(SMALL)
    tokens = np.array([[1, 5, 3, 5, 29]], np.int32)
    network = SMALL.clone(projection=None)
    del params['projection']
    for end_token, place in [(5, 1), (None, 4)]:
        out = jit(network.clone(end_token=end_token).apply)({'params': params}, tokens)
        # Two programs of one sum: the last bit of float32 may differ.
        np.testing.assert_allclose(out.pooled, out.last[:, place], rtol=0, atol=1e-6)
        others = [out.last[:, i] for i in range(5) if i != place]
        assert min(np.max(np.abs(out.pooled - other)) for other in others) > 0.01


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    params, half = random_params(SMALL), SMALL.clone(dtype=jnp.bfloat16)
    shapes = weights.text_shapes(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    out = jit(half.apply)({'params': params}, TOKENS)
    assert {x.dtype for x in out} == {jnp.dtype(jnp.bfloat16)}
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep.
    assert_close(out.last, jit(SMALL.apply)({'params': params}, TOKENS).last, tolerance=5e-2)


def test_every_layer_has_a_path_of_its_own():
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert len(paths) == len(set(paths)) == 3 * 6 + 1
    assert {'block_0/q', 'block_2/dense_1', 'projection'} <= set(paths)


@pytest.mark.parametrize(
    'changes, length, text',
    [
        ({'activation': 'relu'}, 4, "activation='relu': expected 'quick_gelu' or 'gelu'"),
        ({'num_heads': 3}, 4, 'num_heads=3 does not divide width=16'),
        ({}, 10, 'texts of 10 tokens: expected at most 9'),
    ],
)
def test_what_does_not_fit_is_refused(changes, length, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(
            SMALL.clone(**changes).init, jax.random.key(0), jnp.zeros((1, length), jnp.int32)
        )
