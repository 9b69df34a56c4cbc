import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.adm_weights import adm_shapes, params_from_adm
from tests.models.comparison import random_like, relative_error

# Norm of the difference over the norm of the output, both in float32 and each summing in its own
# order (seen: 1.1e-6 at most).
TOLERANCE = 1e-5

TINY = ADMUNet(
    channels=(8, 16), num_blocks=1, attention=(False, True), num_heads=(1, 4), num_groups=4
)


@pytest.fixture(scope='module')
def oracle():
    pytest.importorskip('torch', reason='torch is the oracle here')
    from tests.oracles import numbered_unet

    return numbered_unet


def jit(function):
    """Compiled in a hurry: these functions run once."""
    return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})


def original(oracle, network, new_order):
    """The same network in torch, random."""
    return oracle.randomized(
        oracle.NumberedUNet(
            network.channels,
            width=network.time_features or network.channels[0],
            in_channels=network.in_channels + network.low_res_channels,
            out_channels=network.out_channels,
            blocks=network.num_blocks,
            attend_at=[i for i, attention in enumerate(network.attention) if attention],
            heads=dict(zip(network.channels, network.num_heads, strict=True)).get,
            groups=network.num_groups,
            classes=network.num_classes,
            updown=network.resblock_updown,
            scale_shift=network.scale_shift,
            new_order=new_order,
        )
    )


def random_inputs(network, shape=(8, 12)):
    rng = np.random.default_rng(0)
    images = functools.partial(rng.standard_normal, dtype=np.float32)
    x, t = images((2, *shape, network.in_channels)), np.array([7, 993], np.int32)
    named = {}
    if network.num_classes is not None:
        named['y'] = rng.integers(0, network.num_classes, 2, dtype=np.int32)
    if network.low_res_channels:
        named['low_res'] = images((2, shape[0] // 4, shape[1] // 4, network.low_res_channels))
    return x, t, named


VARIANTS = {
    'classes, legacy order of heads': ({'num_classes': 5}, False),
    'no classes, new order of heads': ({'out_channels': 3}, True),
    'three levels, resolution changed by convolutions, shift alone': (
        {
            'channels': (8, 16, 24),
            'num_blocks': 2,
            'num_heads': (1, 2, 3),
            'attention': (True, False, True),
            'resblock_updown': False,
            'scale_shift': False,
        },
        False,
    ),
    'an upsampler, other sinusoids than the width of the first level': (
        {'low_res_channels': 3, 'time_features': 16},
        False,
    ),
}


@pytest.mark.parametrize('changes, new_order', VARIANTS.values(), ids=VARIANTS)
def test_the_network_equals_the_original(oracle, changes, new_order):
    network = TINY.clone(**changes)
    unet = original(oracle, network, new_order)
    params = params_from_adm(oracle.state(unet), network, new_attention_order=new_order)
    x, t, named = random_inputs(network)
    out = jit(network.apply)({'params': params}, x, t, **named)
    error = relative_error(out, oracle.predict(unet, x, t, **named))
    assert error < TOLERANCE, f'{error:.2e}'


def random_params(network):
    return random_like(adm_shapes(network), scale=0.1, seed=2)


def test_bfloat16_computes_what_float32_does_and_keeps_float32_parameters():
    network = TINY.clone(channels=(8,), attention=(True,), num_heads=(2,), dtype=jnp.bfloat16)
    params = random_params(network)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    x, t, named = random_inputs(network)
    out = jit(network.apply)({'params': params}, x, t, **named)
    assert out.dtype == jnp.bfloat16
    reference = jit(network.clone(dtype=jnp.float32).apply)({'params': params}, x, t, **named)
    # eps(bfloat16) = 8e-3 per layer, some ten layers deep (seen: 3e-3).
    error = relative_error(out, reference)
    assert error < 3e-2, f'{error:.2e}'


def test_every_layer_has_a_path_of_its_own():
    paths = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and isinstance(context.module, nn.Dense | nn.Conv):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    x, t, _ = random_inputs(TINY)
    params = adm_shapes(TINY)
    with nn.intercept_methods(record):
        jax.eval_shape(TINY.apply, {'params': params}, x, t)
    assert len(paths) == len(set(paths))
    wanted = {
        'conv_in', 'down_0/downsample/conv1', 'down_1/attention_0/q', 'mid/attention_0/out',
        'mid/block_1/conv2', 'up_0/upsample/time_proj', 'up_1/block_1/conv_shortcut',
    }  # fmt: skip
    assert wanted <= set(paths)


@pytest.mark.parametrize(
    'changes, shape, named, text',
    [
        ({'attention': (True,)}, (2, 8, 8, 3), {}, r'attention=\(True,\): expected 2 entries'),
        ({'num_heads': (1,)}, (2, 8, 8, 3), {}, r'num_heads=\(1,\): expected 2 entries'),
        ({}, (2, 8, 5, 3), {}, 'image of 8x5: both sides must be multiples of 2'),
        ({}, (2, 8, 8, 1), {}, 'image has 1 channels: expected 3'),
        ({'num_classes': 3}, (2, 8, 8, 3), {}, 'y is missing but num_classes=3'),
        ({}, (2, 8, 8, 3), {'y': jnp.zeros(2, int)}, 'y is given but num_classes=None'),
        ({'low_res_channels': 3}, (2, 8, 8, 3), {}, 'low_res has 0 channels: expected 3'),
        ({}, (2, 8, 8, 3), {'low_res': jnp.zeros((2, 4, 4, 3))}, 'has 3 channels: expected 0'),
        ({'num_heads': (1, 3)}, (2, 8, 8, 3), {}, 'num_heads=3 does not divide 16 channels'),
    ],
)
def test_what_does_not_fit_is_refused(changes, shape, named, text):
    network = TINY.clone(**changes)
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(
            network.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, int), **named
        )
