import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.ldm_unet import ClassEmbedder, LDMUNet
from dmq_jax.models.ldm_weights import (
    ldm_shapes,
    network_from_diffusers,
    params_from_compvis,
    params_from_diffusers,
)
from tests.models.comparison import random_like, relative_error

# Norm of the difference over the norm of the output, both in float32 and each summing in its own
# order (seen: 8e-7 at most).
TOLERANCE = 1e-5

TINY = LDMUNet(
    channels=(8, 16), num_blocks=1, depth=(0, 1), num_heads=(1, 2), context_dim=6, num_groups=4
)


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    from tests.oracles import numbered_unet

    return numbered_unet


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def random_inputs(network, shape=(8, 12)):
    rng = np.random.default_rng(0)
    floats = functools.partial(rng.standard_normal, dtype=np.float32)
    x, t = floats((2, *shape, network.in_channels)), np.array([7, 993], np.int32)
    named = {}
    if network.context_dim is not None:
        named['context'] = floats((2, 5, network.context_dim))
    if network.added_dim is not None:
        named['pooled'] = floats((2, network.pooled_dim))
        named['sizes'] = np.array([[64, 48, 0, 3, 64, 64], [96, 64, 8, 0, 64, 48]], np.int32)
    return x, t, named


COMPVIS = {
    'attention without context, as in the VQ models of LSUN': {
        'depth': (0, 1),
        'context_dim': None,
        'in_channels': 3,
        'out_channels': 3,
    },
    'the same with scale and shift and resampling blocks, as in that of churches': {
        'depth': (1, 1),
        'context_dim': None,
        'scale_shift': True,
        'resblock_updown': True,
    },
    'transformers of two blocks, a level without': {
        'num_blocks': 2,
        'depth': (0, 2),
        'mid_depth': 2,
    },
}


@pytest.mark.parametrize('changes', COMPVIS.values(), ids=COMPVIS)
def test_the_network_equals_compvis(oracle, changes):
    network = TINY.clone(**changes)
    unet = oracle.randomized(
        oracle.NumberedUNet(
            network.channels,
            width=network.channels[0],
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            blocks=network.num_blocks,
            attend_at=[i for i, depth in enumerate(network.depth) if depth],
            heads=dict(zip(network.channels, network.num_heads, strict=True)).get,
            groups=network.num_groups,
            context=network.context_dim,
            depth=network.mid_depth,
            updown=network.resblock_updown,
            scale_shift=network.scale_shift,
        )
    )
    tensors = {f'model.diffusion_model.{k}': v for k, v in oracle.state(unet).items()}
    params = params_from_compvis(tensors, network)
    x, t, named = random_inputs(network)
    out = jit(network.apply)({'params': params}, x, t, **named)
    error = relative_error(out, oracle.predict(unet, x, t, **named))
    assert error < TOLERANCE, f'{error:.2e}'


SD1 = {
    'sample_size': 8,
    'in_channels': 4,
    'out_channels': 4,
    'block_out_channels': [8, 16],
    'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
    'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
    'layers_per_block': 1,
    'norm_num_groups': 4,
    'attention_head_dim': 2,
    'cross_attention_dim': 6,
}
DIFFUSERS = {
    'Stable Diffusion 1': SD1,
    'Stable Diffusion 2, and another epsilon, time features and channels': {
        **SD1,
        'attention_head_dim': [1, 4],
        'use_linear_projection': True,
        'upcast_attention': True,
        'norm_eps': 1e-2,
        'flip_sin_to_cos': False,
        'freq_shift': 1,
        'in_channels': 9,
    },
    'SDXL': {
        **SD1,
        'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D'],
        'up_block_types': ['CrossAttnUpBlock2D', 'UpBlock2D'],
        'attention_head_dim': [1, 2],
        'transformer_layers_per_block': [1, 2],
        'use_linear_projection': True,
        'addition_embed_type': 'text_time',
        'addition_time_embed_dim': 8,
        'projection_class_embeddings_input_dim': 53,
    },
}


@pytest.mark.parametrize('config', DIFFUSERS.values(), ids=DIFFUSERS)
def test_the_network_equals_diffusers(oracle, config):
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from_numpy = oracle.torch.from_numpy
    unet = oracle.randomized(diffusers.UNet2DConditionModel(**config))
    network = network_from_diffusers(config)
    params = params_from_diffusers(oracle.state(unet), network)
    x, t, named = random_inputs(network)
    out = jit(network.apply)({'params': params}, x, t, **named)
    added = None
    if 'pooled' in named:
        added = {
            'text_embeds': from_numpy(named['pooled']),
            'time_ids': from_numpy(named['sizes']),
        }
    with oracle.torch.no_grad():
        reference = unet(
            from_numpy(x.transpose(0, 3, 1, 2).copy()),
            from_numpy(t),
            from_numpy(named['context']),
            added_cond_kwargs=added,
        ).sample
    error = relative_error(out, reference.numpy().transpose(0, 2, 3, 1))
    assert error < TOLERANCE, f'{error:.2e}'


SDXL_LIKE = TINY.clone(added_dim=53, size_features=8)


def random_params(shapes):
    return random_like(shapes, scale=0.1, seed=2)


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    network = SDXL_LIKE.clone(channels=(8,), depth=(1,), num_heads=(2,), dtype=jnp.bfloat16)
    params = random_params(ldm_shapes(network))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    x, t, named = random_inputs(network)
    out = jit(network.apply)({'params': params}, x, t, **named)
    assert out.dtype == jnp.bfloat16
    reference = jit(network.clone(dtype=jnp.float32).apply)({'params': params}, x, t, **named)
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep (seen: 4e-3).
    error = relative_error(out, reference)
    assert error < 3e-2, f'{error:.2e}'


def test_a_class_is_a_context_of_one_token():
    embedder = ClassEmbedder(num_classes=3, width=6)
    table = np.arange(18, dtype=np.float32).reshape(3, 6)
    out = embedder.apply({'params': {'class_embed': {'embedding': table}}}, jnp.array([2, 0]))
    np.testing.assert_array_equal(out, table[[2, 0], None])


def test_every_layer_has_a_path_of_its_own():
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense | nn.Conv):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    x, t, named = random_inputs(SDXL_LIKE)
    params = ldm_shapes(SDXL_LIKE)
    with nn.intercept_methods(record):
        jax.eval_shape(SDXL_LIKE.apply, {'params': params}, x, t, **named)
    assert len(paths) == len(set(paths))
    wanted = {
        'conv_in', 'added_embed/dense_0', 'down_0/downsample', 'down_1/attention_0/proj_in',
        'down_1/attention_0/block_0/attn2/k', 'mid/attention_0/block_0/ff_in', 'up_0/upsample',
    }  # fmt: skip
    assert wanted <= set(paths)


IMAGE = (2, 8, 8, 4)
CONTEXT = {'context': jnp.zeros((2, 5, 6))}


@pytest.mark.parametrize(
    'changes, shape, named, text',
    [
        ({'depth': (1,)}, IMAGE, CONTEXT, r'depth=\(1,\): expected 2 entries'),
        ({}, (2, 8, 7, 4), CONTEXT, 'image of 8x7: both sides must be multiples of 2'),
        ({}, (2, 8, 8, 3), CONTEXT, 'image has 3 channels: expected 4'),
        ({}, IMAGE, {}, 'context is missing: expected width 6'),
        ({}, IMAGE, {'context': jnp.zeros((2, 5, 7))}, 'context is 7 wide: expected width 6'),
        ({'context_dim': None}, IMAGE, CONTEXT, 'context is 6 wide: expected none'),
        ({'context_dim': None, 'mid_depth': 2}, IMAGE, {}, 'mid_depth=2: without a context'),
        ({}, IMAGE, {**CONTEXT, 'sizes': jnp.zeros((2, 6))}, 'sizes is 6 wide: expected none'),
        ({'added_dim': 1540}, IMAGE, CONTEXT, 'pooled is missing: expected width 4'),
        ({'num_heads': (1, 3)}, IMAGE, CONTEXT, 'num_heads=3 does not divide 16 channels'),
    ],
)
def test_what_does_not_fit_is_refused(changes, shape, named, text):
    network = TINY.clone(**changes)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(
            network.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, int), **named
        )
