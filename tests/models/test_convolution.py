import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.convolution import convolve, convolve_enlarged, upsampled

CHANNELS = 512


def operands(side, channels=CHANNELS, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, side, side, channels))
    kernel = rng.standard_normal((3, 3, channels, 4)) / np.sqrt(9 * channels)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def layer(strides=1, padding=1, *, ours=True, **settings):
    if ours:
        settings['conv_general_dilated'] = convolve
    return nn.Conv(4, (3, 3), strides, padding=padding, use_bias=False, **settings)


def products(function, *inputs):
    return str(jax.make_jaxpr(function)(*inputs)).count('conv_general_dilated')


@pytest.mark.parametrize('side', [1, 5, 16])
def test_few_pixels_of_many_channels_are_one_product_equal_to_the_convolution(side):
    x, kernel = operands(side)

    def value(ours, x, kernel):
        out = layer(ours=ours).apply({'params': {'kernel': kernel}}, x)
        return jnp.sum(jnp.sin(out)), out

    mine, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(value, ours), (0, 1), has_aux=True))(x, kernel)
        for ours in (True, False)
    )
    assert products(functools.partial(value, True), x, kernel) == 0
    # Sums of 4608 products in another order (seen: 1e-6 of the largest entry).
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


@pytest.mark.parametrize(
    'side, channels, options',
    [
        (17, CHANNELS, {}),
        (8, CHANNELS // 2, {}),
        (8, CHANNELS, {'strides': 2}),
        (8, CHANNELS, {'padding': ((0, 1), (0, 1))}),
        (8, CHANNELS, {'kernel_dilation': 2}),
        (8, CHANNELS, {'input_dilation': 2}),
        (8, CHANNELS, {'feature_group_count': 2}),
    ],
)
def test_any_other_convolution_is_left_to_xla(side, channels, options):
    x, kernel = operands(side, channels)
    kernel = kernel[:, :, : channels // options.get('feature_group_count', 1)]
    mine, theirs = (
        layer(ours=ours, **options).apply({'params': {'kernel': kernel}}, x)
        for ours in (True, False)
    )
    np.testing.assert_array_equal(mine, theirs)


def test_the_dtype_stays():
    x, kernel = operands(4, dtype=jnp.bfloat16)
    out = layer(dtype=jnp.bfloat16).apply({'params': {'kernel': kernel}}, x)
    assert out.dtype == jnp.bfloat16


def enlarged_layer(*, ours, width=4):
    convolution = convolve_enlarged if ours else convolve
    return nn.Conv(width, (3, 3), padding=1, conv_general_dilated=convolution)


@pytest.mark.parametrize('sides', [(16, 16), (17, 31)])
def test_an_enlarged_image_is_convolved_before_it_is_enlarged(sides):
    x = jax.random.normal(jax.random.key(0), (2, *sides, 8))
    params = enlarged_layer(ours=True).init(jax.random.key(1), upsampled(x))

    def value(ours, x, params):
        # Rounding, as the hook does it, leaves the pixels of a block equal.
        out = enlarged_layer(ours=ours).apply(
            params, jnp.round(8 * upsampled(x)) / 8 + upsampled(x)
        )
        return jnp.sum(jnp.sin(out)), out

    mine, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(value, ours), (0, 1), has_aux=True))(x, params)
        for ours in (True, False)
    )
    # Two weights are added before they are multiplied (seen: 1e-6 of the largest entry).
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    flops = [
        jax.jit(enlarged_layer(ours=ours).apply)
        .lower(params, upsampled(x))
        .cost_analysis()['flops']
        for ours in (True, False)
    ]
    assert flops[0] < 0.6 * flops[1]


@pytest.mark.parametrize('side, dtype', [(15, jnp.float32), (16, jnp.bfloat16)])
def test_small_images_and_narrow_numbers_are_enlarged_first(side, dtype):
    x = upsampled(jax.random.normal(jax.random.key(0), (1, side, side, 8), dtype))
    layers = [enlarged_layer(ours=ours).copy(dtype=dtype) for ours in (True, False)]
    params = layers[0].init(jax.random.key(1), x)
    np.testing.assert_array_equal(*(layer.apply(params, x) for layer in layers))
