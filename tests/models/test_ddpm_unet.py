import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import ddpm_unet
from dmq_jax.models.ddpm_unet import DDPMUNet, depth_to_space, space_to_depth
from dmq_jax.models.ddpm_weights import network_from_diffusers, params_from_diffusers
from tests.models.comparison import relative_error

# Norm of the difference over the norm of the output. Both sides round in float32 and sum in their
# own order: torch itself is 1.8e-6 from its float64 result at full width. Seen here: 2.4e-6 at full
# width, 1.0e-6 at most in the small networks, 3.9e-7 in a block, and 5.4e-6 in the timestep
# features, where one rounding of a frequency is multiplied by t = 999.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from tests.oracles import diffusers_unet

    return diffusers_unet


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def assert_close(out, reference, tolerance=TOLERANCE):
    error = relative_error(out, reference)
    assert error < tolerance, f'{error:.2e} >= {tolerance:.0e}'


def random_inputs(config, shape, batch_size=2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch_size, *shape, config['in_channels'])).astype(np.float32)
    t = np.array([7, 993][:batch_size], np.int32)
    rows = config.get('num_class_embeds')
    y = None if rows is None else rng.integers(0, rows, batch_size, dtype=np.int32)
    return x, t, y


def both(oracle, config, shape, batch_size=2):
    """Outputs here and there, for the same weights and inputs."""
    unet = oracle.random_unet(config)
    network = network_from_diffusers(config)
    params = params_from_diffusers(oracle.state(unet), network)
    x, t, y = random_inputs(config, shape, batch_size)
    out = jit(network.apply)({'params': params}, x, t, y)
    return out, oracle.predict(unet, x, t, y)


def test_the_cifar10_network_equals_diffusers_at_full_width(oracle):
    assert_close(*both(oracle, oracle.CIFAR10, (32, 32), batch_size=1))


def test_the_cifar10_network_is_the_default(oracle):
    network = DDPMUNet(up_attention=(False, False, True, False), out_channels=3)
    assert network_from_diffusers(oracle.CIFAR10) == network


def test_the_default_network_has_the_size_of_the_published_one():
    shapes = jax.eval_shape(
        DDPMUNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32)
    )
    leaves = jax.tree.leaves(shapes['params'])
    assert len(leaves) == 328
    assert sum(leaf.size for leaf in leaves) == 35_746_307


VARIANTS = {
    'plain': {},
    'classes, heads, symmetric downsampling': {
        'num_class_embeds': 5,
        'attention_head_dim': 8,
        'downsample_padding': 1,
    },
    'other time features, epsilon and channels, no attention in the middle': {
        'flip_sin_to_cos': True,
        'freq_shift': 0,
        'norm_eps': 1e-2,
        'add_attention': False,
        'in_channels': 1,
        'out_channels': 2,
    },
    'scale and shift, three levels, attention differs up and down': {
        'resnet_time_scale_shift': 'scale_shift',
        'attn_norm_num_groups': 4,
        'block_out_channels': [8, 16, 24],
        'down_block_types': ['AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
        'up_block_types': ['UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
    },
}


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_every_setting_equals_diffusers(oracle, changes):
    assert_close(*both(oracle, {**oracle.SMALL, **changes}, (8, 12)))


@pytest.fixture(scope='module')
def pair(oracle):
    """A small network of diffusers with heads of 8 channels, and the parameters of ours."""
    config = {**oracle.SMALL, 'attention_head_dim': 8}
    unet = oracle.random_unet(config)
    return unet, params_from_diffusers(oracle.state(unet), network_from_diffusers(config))


BLOCK = {'num_groups': 4, 'epsilon': 1e-6, 'dtype': jnp.float32}
LEVEL = {**BLOCK, 'scale_shift': False, 'head_dim': 8}


def features(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def run_torch(oracle, module, x, *arguments):
    """The module's output on NHWC `x`, its first if there are several; and the others."""
    with oracle.torch.no_grad():
        out = module(oracle.to_torch(x), *arguments)
    first, *rest = out if isinstance(out, tuple) else (out,)
    return oracle.from_torch(first), [oracle.from_torch(r) for r in (rest[0] if rest else ())]


@pytest.mark.parametrize('cos_first', [False, True])
@pytest.mark.parametrize('frequency_shift', [0, 1])
def test_timestep_features_equal_diffusers(oracle, cos_first, frequency_shift):
    from diffusers.models.embeddings import get_timestep_embedding

    t = np.array([0, 1, 500, 999], np.int32)
    reference = get_timestep_embedding(
        oracle.torch.from_numpy(t), 128, cos_first, frequency_shift
    ).numpy()
    out = ddpm_unet.timestep_features(jnp.asarray(t), 128, cos_first, frequency_shift)
    assert_close(out, reference)


def test_the_time_embedding_equals_diffusers(oracle, pair):
    unet, params = pair
    x = features(2, 16)
    module = ddpm_unet.TimeEmbedding(64, jnp.float32)
    out = jit(module.apply)({'params': params['time_embed']}, x)
    assert_close(out, unet.time_embedding(oracle.torch.from_numpy(x)).detach().numpy())


def test_a_residual_block_equals_diffusers(oracle, pair):
    unet, params = pair
    x, embedding = features(2, 4, 6, 16), features(2, 64)
    module = ddpm_unet.ResBlock(32, scale_shift=False, **BLOCK)
    out = jit(module.apply)({'params': params['down_1']['block_0']}, x, embedding)
    reference, _ = run_torch(
        oracle, unet.down_blocks[1].resnets[0], x, oracle.torch.from_numpy(embedding)
    )
    assert_close(out, reference)


def test_attention_equals_diffusers(oracle, pair):
    unet, params = pair
    x = features(2, 4, 6, 32)
    module = ddpm_unet.Attention(8, **BLOCK)
    out = jit(module.apply)({'params': params['down_1']['attention_0']}, x)
    assert_close(out, run_torch(oracle, unet.down_blocks[1].attentions[0], x)[0])


def test_a_level_down_and_its_skips_equal_diffusers(oracle, pair):
    unet, params = pair
    x, embedding = features(2, 8, 12, 16), features(2, 64)
    module = ddpm_unet.DownLevel(
        16, 1, attention=False, downsample=True, padding='asymmetric', **LEVEL
    )
    out, skips = jit(module.apply)({'params': params['down_0']}, x, embedding)
    reference, rest = run_torch(oracle, unet.down_blocks[0], x, oracle.torch.from_numpy(embedding))
    assert_close(out, reference)
    assert len(skips) == len(rest) == 2
    for ours, theirs in zip(skips, rest, strict=True):
        assert_close(ours, theirs)


def test_the_middle_equals_diffusers(oracle, pair):
    unet, params = pair
    x, embedding = features(2, 4, 6, 32), features(2, 64)
    module = ddpm_unet.Middle(32, attention=True, **LEVEL)
    out = jit(module.apply)({'params': params['mid']}, x, embedding)
    assert_close(out, run_torch(oracle, unet.mid_block, x, oracle.torch.from_numpy(embedding))[0])


def test_a_level_up_equals_diffusers(oracle, pair):
    unet, params = pair
    x, embedding = features(2, 4, 6, 32), features(2, 64)
    skips = [2 * features(2, 4, 6, 16), features(2, 4, 6, 32)]
    module = ddpm_unet.UpLevel(32, 2, attention=True, upsample=True, **LEVEL)
    out = jit(module.apply)({'params': params['up_0']}, x, skips, embedding)
    reference, _ = run_torch(
        oracle,
        unet.up_blocks[0],
        x,
        tuple(map(oracle.to_torch, skips)),
        oracle.torch.from_numpy(embedding),
    )
    assert_close(out, reference)


def test_group_norm_survives_a_large_mean():
    x = (features(1, 8, 8, 64) + 100).astype(np.float32)
    wide = x.astype(np.float64).reshape(1, 64, 8, 8)
    centred = wide - wide.mean((1, 3), keepdims=True)
    reference = (centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-6)).reshape(
        x.shape
    )
    params = {'norm': {'scale': np.ones(64, np.float32), 'bias': np.zeros(64, np.float32)}}

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ddpm_unet.GroupNorm(8, 1e-6, jnp.float32, name='norm')(x)

    out = Norm().apply({'params': params}, x)
    # The mean is known to 100 eps(float32) = 1.2e-5 (seen: 1.2e-5); cancellation makes it 1.2e-3.
    assert_close(out, reference, tolerance=1e-4)


TINY = DDPMUNet(
    channels=(8, 16), in_channels=1, layers_per_block=1, down_attention=(False, True), num_groups=4
)


def tiny(**changes):
    """A tiny network, random parameters, inputs."""
    network = TINY.clone(**changes)
    x, t = features(2, 8, 8, network.in_channels), np.array([3, 700], np.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, t)['params']
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )
    return network, params, x, t


def test_a_batch_equals_its_parts_and_a_scalar_t_stands_for_all():
    network, params, x, t = tiny()
    apply = jit(network.apply)
    whole = apply({'params': params}, x, t)
    for i in range(2):
        part = apply({'params': params}, x[i : i + 1], t[i])
        assert_close(part, whole[i : i + 1])


@pytest.mark.parametrize('size', [1, 2, 3])
def test_depth_to_space_undoes_space_to_depth(size):
    x = features(2, 6, 12, 5)
    folded = space_to_depth(x, size)
    assert folded.shape == (2, 6 // size, 12 // size, 5 * size**2)
    np.testing.assert_array_equal(depth_to_space(folded, size), x)


def test_space_to_depth_keeps_a_block_of_pixels_together():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(space_to_depth(x, 2)[0, 0, 1], [2, 3, 6, 7])


def test_patches_are_the_network_without_patches_on_the_folded_image():
    network, params, x, t = tiny(patch_size=2)
    out = jit(network.apply)({'params': params}, x, t)
    plain = network.clone(patch_size=1, in_channels=4)
    folded = jit(plain.apply)({'params': params}, space_to_depth(x, 2), t)
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, depth_to_space(folded, 2))


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    network, params, x, t = tiny(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = jit(network.apply)({'params': params}, x, t)
    assert out.dtype == jnp.bfloat16
    reference = jit(network.clone(dtype=jnp.float32).apply)({'params': params}, x, t)
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep (seen: 7.5e-3).
    assert_close(out, reference, tolerance=3e-2)


def test_every_layer_has_a_path_of_its_own():
    network, params, x, t = tiny()
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense | nn.Conv):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(network.apply, {'params': params}, x, t)
    assert len(paths) == len(set(paths))
    assert {'conv_in', 'down_1/attention_0/q', 'mid/block_1/conv2', 'up_0/upsample'} <= set(paths)


@pytest.mark.parametrize(
    'changes, shape, labels, text',
    [
        ({'down_attention': (True,)}, (2, 8, 8, 1), None, '1 levels down'),
        ({'up_attention': (True,)}, (2, 8, 8, 1), None, '1 up'),
        ({'pad_downsample': 'same'}, (2, 8, 8, 1), None, "pad_downsample='same'"),
        ({}, (2, 8, 9, 1), None, 'image of 8x9: both sides must be multiples of 2'),
        ({'patch_size': 3}, (2, 8, 8, 1), None, 'multiples of 6'),
        ({}, (2, 8, 8, 3), None, 'image has 3 channels: expected 1'),
        ({'num_class_embeds': 3}, (2, 8, 8, 1), None, 'y is missing'),
        ({}, (2, 8, 8, 1), [0, 1], 'y is given'),
        ({'head_dim': 5}, (2, 8, 8, 1), None, 'head_dim=5 does not divide 16'),
    ],
)
def test_what_does_not_fit_is_refused(changes, shape, labels, text):
    y = None if labels is None else jnp.asarray(labels)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(
            TINY.clone(**changes).init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, int), y
        )
