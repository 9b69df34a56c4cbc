"""Values from integers, gradients of the float product: both against the float layer itself."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant import integer, products, winograd
from dmq_jax.quant.layers import fake_quantized
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

# float32 sums of some hundred products in another order.
TOLERANCE = 1e-5
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time
WEIGHT_SPECS = {
    'symmetric': QuantSpec(bits=4, symmetric=True, per_channel=True),
    'asymmetric': QuantSpec(bits=4, symmetric=False, per_channel=True),
    'groups': QuantSpec(bits=3, symmetric=True, per_channel=True, group_size=4),
    'eight_bits': QuantSpec(bits=8, symmetric=False, per_channel=True),
}
LAYERS = {
    'conv': (nn.Conv(6, (3, 3), padding=1), (2, 5, 7, 8)),
    'strided': (nn.Conv(6, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1))), (2, 6, 8, 8)),
    'pointwise': (nn.Conv(6, (1, 1)), (2, 4, 4, 8)),
    'dense': (nn.Dense(6), (5, 8)),
}


def relative_gap(tree, reference):
    """Distance of two trees relative to the norm of the second."""
    leaves = [np.concatenate([np.ravel(a) for a in jax.tree.leaves(t)]) for t in (tree, reference)]
    return np.linalg.norm(leaves[0] - leaves[1]) / np.linalg.norm(leaves[1])


@pytest.mark.parametrize(
    'num_devices, kernel_size, strides, by_winograd',
    [(1, 3, 1, True), (8, 3, 1, False), (1, 3, 2, False), (1, 1, 1, False)],
)
def test_the_kernel_gradient_is_the_one_that_jax_derives(
    num_devices, kernel_size, strides, by_winograd, monkeypatch
):
    monkeypatch.setattr(jax, 'device_count', lambda: num_devices)
    taken, original = [], winograd.kernel_gradient
    monkeypatch.setattr(
        winograd, 'kernel_gradient', lambda *args: taken.append(1) or original(*args)
    )
    rng = np.random.default_rng(0)
    geometry = (strides,) * 2, ((1, 1), (1, 1))
    x, kernel = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((4, 16, 14, 32), (kernel_size, kernel_size, 32, 40))
    )

    @jax.jit
    def gradients(x, kernel):
        y, pull_back = jax.vjp(lambda k: products.product(x, k, geometry), kernel)
        g = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return products.kernel_gradient(x, kernel, g, geometry), pull_back(g)[0]

    ours, derived = gradients(x, kernel)
    assert relative_gap(ours, derived) < TOLERANCE
    assert bool(taken) == by_winograd


def bound_layer(kind, weight_spec, *, each_image):
    """A layer with everything its quantized forms need: codes, rows, inputs, plan."""
    module, shape = LAYERS[kind]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0.5, 1.0, shape), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes
    )
    kernel_shape = params['kernel'].shape
    qmin, qmax = weight_spec.grid
    groups = kernel_shape[-2] // weight_spec.group_size if weight_spec.group_size else 1
    table = (1,) * (len(kernel_shape) - 2) + (groups, kernel_shape[-1])
    zero_point = np.zeros(table) if weight_spec.symmetric else rng.integers(1, qmax, table)
    weight = {
        'codes': jnp.asarray(rng.integers(qmin, qmax + 1, kernel_shape), jnp.float32),
        'scale': jnp.asarray(rng.uniform(0.05, 0.2, table), jnp.float32),
        'zero_point': jnp.asarray(zero_point, jnp.float32),
    }
    lead = shape[:1] if each_image else ()
    rows = {
        'scale': jnp.asarray(rng.uniform(0.1, 0.2, lead), jnp.float32),
        'zero_point': jnp.asarray(rng.integers(2, 6, lead), jnp.float32),
    }
    spec = LayerSpec(weight=weight_spec, inputs=QuantSpec(bits=4, symmetric=False))
    return module, spec, params, weight, rows, x


def value_and_gradients(module, spec, params, weight, rows, x, *, as_codes):
    """The layer's output, and gradients of its product with noise for weight, rows and input."""

    def run(weight, rows, x):
        variables = {'params': params, 'quant': {'layer': {'input': rows}}}
        if as_codes:
            variables['quant']['layer']['weight'] = weight
        else:
            groups = params['kernel'].shape[-2] // weight['scale'].shape[-2]
            scale, zero_point = (
                jnp.repeat(weight[n], groups, axis=-2) for n in ('scale', 'zero_point')
            )
            kernel = (weight['codes'] - zero_point) * scale
            variables['params'] = {'kernel': kernel, 'bias': params['bias']}

        class Network(nn.Module):
            @nn.compact
            def __call__(self, x):
                return module.clone(name='layer', parent=self)(x)

        variables['params'] = {'layer': variables['params']}
        with fake_quantized({'layer': spec}):
            return Network().apply(variables, x)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(weight, rows, x):
        y, pull_back = jax.vjp(run, weight, rows, x)
        g = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
        return y, pull_back(jnp.asarray(g))

    return both(weight, rows, x)


@pytest.mark.parametrize(
    'kind, weights',
    [*(('conv', weights) for weights in WEIGHT_SPECS), *((k, 'symmetric') for k in LAYERS)][1:],
)
def test_a_layer_of_codes_has_value_and_gradients_of_the_float_layer(kind, weights):
    layer = bound_layer(kind, WEIGHT_SPECS[weights], each_image=True)
    y, gradients = value_and_gradients(*layer, as_codes=True)
    y_float, gradients_float = value_and_gradients(*layer, as_codes=False)
    assert relative_gap(y, y_float) < TOLERANCE
    assert relative_gap(gradients, gradients_float) < TOLERANCE
    # The parts differ in size, and the small ones must be right as well.
    for part, part_float in zip(gradients, gradients_float, strict=True):
        for name in part if isinstance(part, dict) else ():
            if name != 'zero_point' or np.any(part_float[name]):
                assert relative_gap(part[name], part_float[name]) < TOLERANCE, name
    assert relative_gap(gradients[2], gradients_float[2]) < TOLERANCE


@pytest.mark.parametrize('weights', WEIGHT_SPECS)
def test_codes_wait_for_the_backward_pass_as_bytes(weights):
    module, spec, params, weight, rows, x = bound_layer(
        'conv', WEIGHT_SPECS[weights], each_image=False
    )

    def layer(x, weight, bias):
        found = {'params': {'bias': bias}, 'quant': {'input': rows, 'weight': weight}}
        return integer.straight_through_layer(module.bind(found), x, rows, weight, spec)

    y, pull_back = jax.vjp(layer, x, weight, params['bias'])
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape == weight['codes'].shape]
    assert {leaf.dtype.itemsize for leaf in kept} == {1}
    # Nothing as large as the input is kept beside it.
    assert sum(leaf.size >= x.size for leaf in jax.tree.leaves(pull_back)) == 1
    g = jnp.asarray(np.random.default_rng(2).standard_normal(y.shape), jnp.float32)
    np.testing.assert_allclose(
        pull_back(g)[2], np.asarray(g, np.float64).sum((0, 1, 2)), rtol=1e-4, atol=1e-5
    )


def test_float_inputs_with_quantized_weights_are_float_products():
    module, spec, params, weight, rows, x = bound_layer(
        'conv', WEIGHT_SPECS['symmetric'], each_image=False
    )
    layer = module, LayerSpec(weight=spec.weight, inputs=None), params, weight, rows, x
    y, gradients = value_and_gradients(*layer, as_codes=True)
    y_float, gradients_float = value_and_gradients(*layer, as_codes=False)
    assert relative_gap(y, y_float) < TOLERANCE
    assert relative_gap(gradients, gradients_float) < TOLERANCE


def test_the_value_is_that_of_integers_bit_for_bit():
    module, spec, params, weight, rows, x = bound_layer(
        'conv', WEIGHT_SPECS['symmetric'], each_image=False
    )
    y, _ = value_and_gradients(module, spec, params, weight, rows, x, as_codes=True)
    codes = np.clip(np.round(np.asarray(x / rows['scale'])) + rows['zero_point'], 0, 15)
    padded = np.pad(codes - np.asarray(rows['zero_point']), ((0, 0), (1, 1), (1, 1), (0, 0)))
    acc = sum(
        padded[:, i : i + 5, j : j + 7].astype(np.int64)
        @ np.asarray(weight['codes'][i, j]).astype(np.int64)
        for i in range(3)
        for j in range(3)
    )
    # Multiplied in the order of the layer: exact sums, then two float32 products and the bias.
    expected = acc.astype(np.float32) * np.asarray(weight['scale']).reshape(-1)
    expected = expected * np.asarray(rows['scale']) + np.asarray(params['bias'])
    np.testing.assert_array_equal(y, expected)
