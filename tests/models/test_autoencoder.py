import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import autoencoder as module
from dmq_jax.models import autoencoder_weights as weights
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder, tiled_decode
from tests.models.comparison import random_like, relative_error

# Norm of the difference over the norm of the output; both sides float32, sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from tests.oracles import autoencoders

    return autoencoders


def assert_close(out, reference, tolerance=TOLERANCE):
    error = relative_error(out, reference)
    assert error < tolerance, f'{error:.2e} >= {tolerance:.0e}'


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def applied(network, params, method, *arguments, **options):
    def run(*arguments):
        return network.apply({'params': params}, *arguments, method=method, **options)

    return jit(run)(*arguments)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


KL_CHANGES = {
    'plain': {},
    'no 1x1 convolutions, no attention, shifted': {
        'use_quant_conv': False,
        'use_post_quant_conv': False,
        'mid_block_add_attention': False,
        'shift_factor': 0.1,
    },
    'attention in a level, other channels': {
        'down_block_types': ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D'],
        'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D'],
        'in_channels': 1,
        'out_channels': 2,
    },
}


@pytest.mark.parametrize('changes', KL_CHANGES.values(), ids=KL_CHANGES)
def test_the_gaussian_autoencoder_equals_diffusers(oracle, changes):
    config = {**oracle.KL, **changes}
    model = oracle.random_autoencoder(oracle.AutoencoderKL, config)
    network = weights.kl_from_diffusers(config)
    params = weights.autoencoder_params_from_diffusers(oracle.state(model), network)
    images = normal(2, 8, 12, network.in_channels)
    mean, log_variance = oracle.encode(model, images)

    def both(variables, images, latents):
        return (
            network.apply(variables, images, method='encode'),
            network.apply(variables, latents, method='decode'),
        )

    moments, decoded = jit(both)({'params': params}, images, mean)
    assert_close(moments.mean, mean)
    assert_close(moments.log_variance, log_variance)
    assert_close(decoded, oracle.decode(model, mean))


def test_the_autoencoder_with_a_codebook_equals_diffusers(oracle):
    model = oracle.random_autoencoder(oracle.VQModel, oracle.VQ)
    network = weights.vq_from_diffusers(oracle.VQ)
    params = weights.autoencoder_params_from_diffusers(oracle.state(model), network)
    images = normal(2, 8, 12, 3)
    (latents,) = oracle.encode(model, images)

    def all_three(variables, images, latents):
        return (
            network.apply(variables, images, method='encode'),
            network.apply(variables, latents, method='decode'),
            network.apply(variables, latents, method='decode', force_not_quantize=True),
        )

    encoded, quantized, plain = jit(all_three)({'params': params}, images, latents)
    assert_close(encoded, latents)
    assert_close(quantized, oracle.decode(model, latents))
    assert_close(plain, oracle.decode(model, latents, force_not_quantize=True))
    assert relative_error(plain, quantized) > 100 * TOLERANCE


SMALL = AutoencoderKL(channels=(8, 16), layers_per_block=1, num_groups=4)
SMALL_VQ = VQAutoencoder(
    channels=(8, 16), layers_per_block=1, num_groups=4, codebook_size=20, codebook_channels=4
)


def random_params(network):
    return random_like(weights.autoencoder_shapes(network), scale=0.1, seed=2)


def test_the_nearest_row_of_the_codebook_is_that_of_a_search():
    params = random_params(SMALL_VQ)
    latents = 0.1 * normal(2, 5, 6, 4)
    rows = applied(SMALL_VQ, params, 'nearest', latents)
    table = params['codebook']['embedding'].astype(np.float64)
    distances = ((np.asarray(latents, np.float64)[..., None, :] - table) ** 2).sum(-1)
    np.testing.assert_array_equal(rows, distances.argmin(-1))


def test_a_row_of_the_codebook_is_its_own_nearest():
    params = random_params(SMALL_VQ)
    latents = params['codebook']['embedding'].reshape(1, 4, 5, 4)
    rows = applied(SMALL_VQ, params, 'nearest', latents)
    np.testing.assert_array_equal(rows.reshape(-1), np.arange(20))
    quantized = applied(SMALL_VQ, params, 'decode', latents)
    plain = applied(SMALL_VQ, params, 'decode', latents, force_not_quantize=True)
    np.testing.assert_array_equal(quantized, plain)


def test_a_call_is_encode_then_decode():
    def both(variables, images):
        latents = SMALL_VQ.apply(variables, images, method='encode')
        return (
            SMALL_VQ.apply(variables, images),
            SMALL_VQ.apply(variables, latents, method='decode'),
        )

    whole, parts = jit(both)({'params': random_params(SMALL_VQ)}, normal(1, 8, 8, 3))
    assert_close(whole, parts)


def test_unscaling_undoes_scaling():
    network, latents = SMALL.clone(scaling_factor=0.13, shift_factor=0.5), normal(2, 3, 3, 4)
    scaled = module.scale_latents(network, latents)
    np.testing.assert_allclose(scaled, (latents - 0.5) * 0.13, rtol=1e-6)
    np.testing.assert_allclose(module.unscale_latents(network, scaled), latents, atol=1e-6)


def test_drawn_latents_have_the_moments_of_their_gaussian():
    mean = jnp.full((1, 64, 64, 1), 3.0)
    moments = module.Moments(mean, jnp.full_like(mean, 2 * np.log(0.5)))
    drawn = module.sample_latents(moments, jax.random.key(0))
    # 4096 draws: standard errors are 0.5 / 64 of the mean and 0.5 / 90 of the deviation.
    assert abs(drawn.mean() - 3.0) < 4 * 0.5 / 64
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / 90


def test_the_variance_of_a_gaussian_is_bounded():
    params = random_params(SMALL)
    params['quant']['bias'] = np.repeat(np.float32([0, 100]), 4)
    assert np.all(applied(SMALL, params, 'encode', normal(1, 4, 4, 3)).log_variance == 20)


def decoder(network, params):
    return jit(lambda z: network.apply({'params': params}, z, method='decode'))


def test_one_tile_is_the_plain_decoder():
    decode = decoder(SMALL, random_params(SMALL))
    latents = normal(2, 4, 6, 4)
    out = tiled_decode(decode, latents, tile_size=6, overlap=2)
    np.testing.assert_array_equal(out, decode(latents))


@pytest.mark.parametrize('size', [(7, 5), (8, 16), (9, 3), (4, 17)])
@pytest.mark.parametrize('overlap', [0, 1, 2])
def test_tiles_of_a_decoder_that_works_pixel_by_pixel_leave_no_trace(size, overlap):
    def decode(latents):
        return jnp.repeat(jnp.repeat(jnp.sin(latents[..., :3]), 2, axis=1), 2, axis=2)

    latents = normal(2, *size, 4)
    out = tiled_decode(decode, latents, tile_size=4, overlap=overlap)
    # A weighted mean of equal values: a few roundings in float32.
    np.testing.assert_allclose(out, decode(latents), atol=1e-6)


# The norms of a tile see half of the image: means over as many pixels differ by a few percent
# (seen: 1.1 %).
TILED_TOLERANCE = 0.03


def test_tiles_differ_little_from_the_plain_decoder_and_have_no_seams():
    network = SMALL.clone(mid_attention=False)
    params = {'params': random_params(network)}

    def decode(latents):
        return network.apply(params, latents, method='decode')

    # Alike everywhere, so that the norms of a tile are about those of the image.
    latents = normal(1, 48, 24, 4)
    whole = jit(decode)(latents)
    tiled = jit(lambda z: tiled_decode(decode, z, tile_size=24, overlap=6))(latents)
    error = relative_error(tiled, whole)
    assert error < TILED_TOLERANCE, f'{error:.2e}'
    # From row to row what differs moves far less than the image, seams included (seen: 9 %).
    step, image = (
        np.square(np.diff(np.asarray(x, np.float64), axis=1)).mean((0, 2, 3)) ** 0.5
        for x in (tiled - whole, whole)
    )
    assert step.max() < 0.2 * image.mean()


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    params, images = random_params(SMALL), normal(1, 8, 8, 3)
    half = SMALL.clone(dtype=jnp.bfloat16)
    shapes = weights.autoencoder_shapes(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    out = applied(half, params, '__call__', images)
    assert out.dtype == jnp.bfloat16
    # eps(bfloat16) = 8e-3 per layer, some twenty layers deep.
    assert_close(out, applied(SMALL, params, '__call__', images), tolerance=5e-2)


@pytest.mark.parametrize('network', [SMALL, SMALL_VQ], ids=['KL', 'VQ'])
def test_every_layer_has_a_path_of_its_own(network):
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense | nn.Conv):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert len(paths) == len(set(paths))
    wanted = {'encoder/conv_in', 'encoder/mid/attention_0/q', 'quant', 'decoder/up_0/upsample'}
    assert wanted <= set(paths)


@pytest.mark.parametrize(
    'network, shape, text',
    [
        (SMALL, (1, 8, 9, 3), 'images of 8x9: both sides must be multiples of 2'),
        (SMALL_VQ, (1, 8, 8, 4), 'images have 4 channels: expected 3'),
        (SMALL.clone(attention=(True,)), (1, 8, 8, 3), r'attention=\(True,\): expected 2 entries'),
    ],
)
def test_what_does_not_fit_is_refused(network, shape, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))


def test_other_latents_are_refused():
    for network, wanted in [(SMALL, 4), (SMALL_VQ, 4)]:
        with pytest.raises(ValueError, match=f'latents have 5 channels: expected {wanted}'):
            network.apply({'params': {}}, jnp.zeros((1, 2, 2, 5)), method='decode')


@pytest.mark.parametrize('tile_size, overlap', [(4, 3), (4, -1), (0, 0)])
def test_tiles_that_overlap_more_than_half_are_refused(tile_size, overlap):
    with pytest.raises(ValueError, match=f'overlap={overlap}: expected 0 to'):
        tiled_decode(lambda z: z, jnp.zeros((1, 9, 9, 1)), tile_size=tile_size, overlap=overlap)
