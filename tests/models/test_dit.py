import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import dit_weights
from dmq_jax.models.dit import DiT, PixArt, position_features
from dmq_jax.models.torch_weights import expected_tensors, parameter_shapes
from tests.models.comparison import random_like, relative_error

# Norm of the difference over the norm of the output; float32 on our side, sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from tests.oracles import diffusion_transformers

    return diffusion_transformers


def assert_close(out, reference, tolerance=TOLERANCE):
    error = relative_error(out, reference)
    assert error < tolerance, f'{error:.2e} >= {tolerance:.0e}'


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


T = np.array([7, 993], np.int32)
Y = np.array([2, 5], np.int32)
TEXT = normal(2, 7, 10, seed=1)
MASK = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0]], np.int32)
SIZES = (np.array([[64, 48], [100, 10]], np.float32), np.array([1.5, 0.4], np.float32))


@pytest.mark.parametrize('shared_embedding', [True, False])
def test_dit_equals_diffusers(oracle, shared_embedding):
    model = oracle.random_dit(shared_embedding=shared_embedding)
    network = dit_weights.dit_from_diffusers(oracle.DIT)
    network = network.clone(embedding_per_block=not shared_embedding)
    params = dit_weights.dit_params_from_diffusers(oracle.state(model), network)
    x = normal(2, 8, 8, 3)
    out = jit(network.apply)({'params': params}, x, T, Y)
    assert_close(out, oracle.predict_dit(model, x, T, Y))


SHAPES = {
    'alpha': ({}, (8, 8), True),
    'another shape than in training': ({}, (4, 12), True),
    'no sizes, no mask': ({'use_additional_conditions': False}, (8, 8), False),
    'caption as it comes': (
        {'use_additional_conditions': False, 'caption_channels': None},
        (8, 8),
        True,
    ),
}


@pytest.mark.parametrize('changes, shape, masked', SHAPES.values(), ids=SHAPES)
def test_pixart_equals_diffusers(oracle, changes, shape, masked):
    config = {**oracle.PIXART, **changes}
    model = oracle.random_pixart(config)
    network = dit_weights.pixart_from_diffusers(config)
    params = dit_weights.pixart_params_from_diffusers(oracle.state(model), network)
    x = normal(2, *shape, 3)
    text = TEXT if network.caption_channels else normal(2, 7, 24, seed=1)
    mask = MASK if masked else None
    sizes = SIZES if network.size_conditions else (None, None)
    out = jit(network.apply)({'params': params}, x, T, text, mask, *sizes)
    assert_close(out, oracle.predict_pixart(model, x, T, text, mask, *sizes))


SMALL_DIT = DiT(
    in_channels=3, out_channels=6, num_layers=2, num_heads=2, head_dim=12, sample_size=8,
    num_classes=5,
)  # fmt: skip
SMALL_PIXART = PixArt(
    in_channels=3, out_channels=6, num_layers=2, num_heads=2, head_dim=12, sample_size=8,
    caption_channels=10, size_conditions=True,
)  # fmt: skip


def example_inputs(network):
    x = jnp.zeros((1, 8, 8, 3))
    if isinstance(network, DiT):
        return x, jnp.zeros(1, int), jnp.zeros(1, int)
    sizes = (jnp.zeros((1, 2)), jnp.zeros(1)) if network.size_conditions else ()
    return x, jnp.zeros(1, int), jnp.zeros((1, 3, 10)), None, *sizes


def shapes_of(network):
    return parameter_shapes(network, *example_inputs(network))


def test_the_original_dit_has_frequency_shift_0_and_one_epsilon(oracle):
    expected = expected_tensors(shapes_of(SMALL_DIT), dit_weights.original_dit_source)
    tensors = oracle.random_original(expected)
    tensors['pos_embed'] = oracle.positions(4, 4, 24, 4, 1.0)[None].numpy().astype(np.float32)
    network = dit_weights.dit_from_original(tensors, head_dim=12)
    assert network == SMALL_DIT
    params = dit_weights.dit_params_from_original(tensors, network)
    x = normal(2, 8, 8, 3)
    out = jit(network.apply)({'params': params}, x, T, Y)
    reference = oracle.Original(tensors, 2).dit(x, T, Y, base=4)
    assert_close(out, reference)
    # diffusers' frequencies give another function of the same weights.
    shifted = jit(network.clone(frequency_shift=1.0).apply)({'params': params}, x, T, Y)
    assert relative_error(shifted, reference) > 100 * TOLERANCE


@pytest.mark.parametrize('with_sizes', [True, False])
def test_the_original_pixart_is_read_and_computed(oracle, with_sizes):
    wanted = SMALL_PIXART.clone(size_conditions=with_sizes)
    expected = expected_tensors(shapes_of(wanted), dit_weights.original_pixart_source)
    tensors = oracle.random_original(expected)
    tensors['pos_embed'] = np.zeros((1, 1, 24), np.float32)
    tensors['y_embedder.y_embedding'] = normal(7, 10)
    network = dit_weights.pixart_from_original(
        tensors, sample_size=8, position_scale=2.0, head_dim=12
    )
    assert network == wanted
    params = dit_weights.pixart_params_from_original(tensors, network)
    np.testing.assert_array_equal(
        dit_weights.null_caption(tensors), tensors['y_embedder.y_embedding']
    )
    x = normal(2, 8, 4, 3)
    sizes = SIZES if with_sizes else ()
    out = jit(network.apply)({'params': params}, x, T, TEXT, MASK, *sizes)
    del tensors['pos_embed'], tensors['y_embedder.y_embedding']
    reference = oracle.Original(tensors, 2).pixart(
        x, T, TEXT, MASK, base=4, position_scale=2.0, sizes=SIZES if with_sizes else None
    )
    assert_close(out, reference)


def random_params(network, seed=2):
    return random_like(shapes_of(network), scale=0.1, seed=seed)


def test_padding_of_a_caption_changes_nothing():
    network, x = SMALL_PIXART, normal(2, 8, 8, 3)
    params = random_params(network)
    apply = jit(network.apply)
    out = apply({'params': params}, x, T, TEXT, MASK, *SIZES)
    other = np.where(MASK[..., None] == 1, TEXT, 100 * TEXT)
    np.testing.assert_array_equal(apply({'params': params}, x, T, other, MASK, *SIZES), out)


def test_a_batch_equals_its_parts_and_a_scalar_t_stands_for_all():
    network, x = SMALL_DIT, normal(2, 8, 8, 3)
    params = random_params(network)
    whole = jit(network.apply)({'params': params}, x, T, Y)
    for i in range(2):
        part = jit(network.apply)({'params': params}, x[i : i + 1], T[i], Y[i : i + 1])
        assert_close(part, whole[i : i + 1])


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    x, params = normal(2, 8, 8, 3), random_params(SMALL_PIXART)
    half = SMALL_PIXART.clone(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half))} == {jnp.dtype('float32')}
    out = jit(half.apply)({'params': params}, x, T, TEXT, MASK, *SIZES)
    assert out.dtype == jnp.bfloat16
    reference = jit(SMALL_PIXART.apply)({'params': params}, x, T, TEXT, MASK, *SIZES)
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep.
    assert_close(out, reference, tolerance=5e-2)


def test_positions_of_a_larger_image_span_the_same_range():
    small = position_features((4, 4), 8, base_size=4, scale=1.0).reshape(4, 4, 8)
    large = position_features((8, 8), 8, base_size=4, scale=1.0).reshape(8, 8, 8)
    np.testing.assert_allclose(large[::2, ::2], small, atol=1e-6)


def test_the_first_half_of_a_position_is_the_column():
    grid = np.asarray(position_features((2, 3), 8, base_size=3, scale=1.0)).reshape(2, 3, 8)
    np.testing.assert_array_equal(grid[0, :, :4], grid[1, :, :4])
    np.testing.assert_array_equal(grid[:, 0, 4:], grid[:, 2, 4:])


@pytest.mark.parametrize('network', [SMALL_DIT, SMALL_PIXART], ids=['DiT', 'PixArt'])
def test_every_layer_has_a_path_of_its_own(network):
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense | nn.Conv):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(network.init, jax.random.key(0), *example_inputs(network))
    assert len(paths) == len(set(paths))
    assert {'patches/proj', 'block_1/attention/q', 'block_0/mlp/dense_1', 'out'} <= set(paths)


@pytest.mark.parametrize(
    'network, shape, inputs, text',
    [
        (SMALL_DIT, (2, 8, 8, 4), (Y,), 'latent has 4 channels: expected 3'),
        (SMALL_DIT, (2, 8, 7, 3), (Y,), 'latent of 8x7: both sides must be multiples of patch'),
        (SMALL_DIT.clone(head_dim=3), (2, 8, 8, 3), (Y,), 'a width of 6'),
        (SMALL_PIXART, (2, 8, 8, 3), (TEXT, MASK), 'expected both of resolution and aspect_ratio'),
        (
            SMALL_PIXART.clone(size_conditions=False),
            (2, 8, 8, 3),
            (TEXT, MASK, *SIZES),
            'expected neither of resolution and aspect_ratio, 2 given',
        ),
        (SMALL_PIXART, (2, 8, 8, 3), (TEXT[..., 1:], MASK, *SIZES), 'text has 9 channels'),
    ],
)
def test_what_does_not_fit_is_refused(network, shape, inputs, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape), T, *inputs)
