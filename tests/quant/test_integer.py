import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.tap import Product, Tap
from dmq_jax.quant import codes as codes_lib
from dmq_jax.quant import integer, layers, numerics, observers
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec, dequantize, expand, pack, scale_shape
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time
INPUTS = QuantSpec(bits=4, symmetric=False)
SPEC = LayerSpec(weight=None, inputs=INPUTS)
calibrate_weight = jax.jit(
    observers.calibrate_weight, static_argnums=1, compiler_options=FAST_COMPILE
)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 6, 2)).astype(np.float32))
WIDE = jnp.asarray(np.concatenate([X, np.asarray(X) - np.float32(0.4)], axis=-1))


class Single(nn.Module):
    """One layer at the path 'layer'."""

    layer: nn.Module

    @nn.compact
    def __call__(self, *inputs):
        return self.layer(*inputs)


def rows_for(spec, batch, *, per_sample, seed=0):
    """Powers of two as scales: then products and sums below 2^24 are exact in float32."""
    rng = np.random.default_rng(seed)
    shape = (batch,) if per_sample else ()
    low = 0 if not spec.symmetric else None
    zero_point = np.zeros(shape) if low is None else rng.integers(0, spec.grid[1] + 1, shape)
    scale = 2.0 ** rng.integers(-5, -2, shape) * 16 / 2**spec.bits
    return {
        'scale': jnp.asarray(scale, jnp.float32),
        'zero_point': jnp.asarray(zero_point, jnp.float32),
    }


def shifted_codes(x, rows, spec):
    """(code - zero point, scale), int64 and float64, by the oracle."""
    scale, zero = (
        np.asarray(rows[name], np.float64).reshape((-1,) + (1,) * (x.ndim - 1))
        for name in ('scale', 'zero_point')
    )
    codes = oracle.quantize(np.asarray(x), scale, zero, *spec.grid)
    return codes - np.rint(zero).astype(np.int64), scale


def random_weight(shape, spec, seed=0):
    rng = np.random.default_rng(seed)
    size = scale_shape(shape, spec)
    scale = 2.0 ** rng.integers(-4, -1, size)
    zero_point = np.zeros(size) if spec.symmetric else rng.integers(0, spec.grid[1] + 1, size)
    codes = rng.integers(spec.grid[0], spec.grid[1] + 1, shape)
    return pack(codes, scale, zero_point, spec=spec), codes, scale, zero_point


def run_integer(module, spec, inputs, roles, *, weight=None, params=None):
    entry = dict(roles)
    if weight is not None:
        entry['weight'] = codes_lib.integer_weight(weight)
    variables = {'params': {'layer': params or {}}, 'quant': {'layer': entry}}
    return in_mode(layers.integer, module, spec, variables, inputs)


def in_mode(mode, module, spec, variables, inputs):
    """One program: operation by operation, each is a program of its own."""

    def run(variables, inputs):
        with mode({'layer': spec}):
            return Single(module).apply(variables, *inputs)

    return jax.jit(run, compiler_options=FAST_COMPILE)(variables, inputs)


def group_sums(product, x, codes, scale, zero_point):
    """Sum over groups of scale times the int64 accumulator of the group."""
    groups = scale.shape[-2]
    size = codes.shape[-2] // groups
    total = 0.0
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        one = (..., slice(g, g + 1), slice(None))
        w = codes[..., part, :] - np.asarray(zero_point[one], np.int64)
        total = total + product(x[..., part], w) * scale[one].reshape(-1)
    return total


SYMMETRIES = [(True, True), (False, True), (True, False), (False, False)]


def weight_spec(bits, symmetric, group_size=None):
    return QuantSpec(bits=bits, symmetric=symmetric, per_channel=True, group_size=group_size)


# Every second combination has groups of two inputs and a row for each image.
@pytest.mark.parametrize('weight_symmetric, input_symmetric', SYMMETRIES)
@pytest.mark.parametrize(
    'weight_bits, input_bits, per_sample, group_size',
    [(2, 2, True, 2), (7, 7, False, None), (8, 8, True, 2), (4, 8, False, None)],
)
def test_integer_dense_equals_int64(
    weight_bits, input_bits, weight_symmetric, input_symmetric, per_sample, group_size
):
    spec = LayerSpec(
        weight=weight_spec(weight_bits, weight_symmetric, group_size),
        inputs=QuantSpec(bits=input_bits, symmetric=input_symmetric),
    )
    x = np.asarray(X[:, 0])  # [B, 6, 2]
    x = jnp.asarray(np.concatenate([x, x + np.float32(0.3), -x], axis=-1))  # K = 6
    rows = rows_for(spec.inputs, 3, per_sample=per_sample)
    weight, *parts = random_weight((6, 5), spec.weight)
    got = run_integer(nn.Dense(5, use_bias=False), spec, [x], {'input': rows}, weight=weight)
    codes, scale = shifted_codes(x, rows, spec.inputs)
    np.testing.assert_array_equal(got, group_sums(oracle.dense, codes, *parts) * scale)


GEOMETRIES = {
    'padded': {'padding': 1},
    'strided_asymmetric': {'strides': (2, 2), 'padding': ((0, 1), (0, 1))},
    'same': {'strides': 2, 'padding': 'SAME'},
    'valid': {'strides': (1, 2), 'padding': 'VALID'},
}
PADDINGS = {
    'padded': ((1, 1), ((1, 1), (1, 1))),
    'strided_asymmetric': ((2, 2), ((0, 1), (0, 1))),
    'same': ((2, 2), ((0, 1), (0, 1))),  # 6 pixels, 3 taps, stride 2: one in all, after
    'valid': ((1, 2), ((0, 0), (0, 0))),
}


def check_integer_conv(spec, geometry, *, per_sample):
    x = WIDE  # C = 4
    rows = rows_for(spec.inputs, 3, per_sample=per_sample)
    weight, *parts = random_weight((3, 3, 4, 5), spec.weight)
    module = nn.Conv(5, (3, 3), use_bias=False, **GEOMETRIES[geometry])
    got = run_integer(module, spec, [x], {'input': rows}, weight=weight)
    codes, scale = shifted_codes(x, rows, spec.inputs)
    strides, padding = PADDINGS[geometry]
    # Padding with zeros of `code - zero point`: exactly 0.0.
    want = group_sums(lambda a, w: oracle.conv(a, w, strides, padding), codes, *parts) * scale
    np.testing.assert_array_equal(got, want)


# Each width, symmetry, kind of row and grouping at least once; Dense above has all combinations.
@pytest.mark.parametrize(
    'weight, inputs, per_sample',
    [
        (weight_spec(2, True), QuantSpec(bits=2, symmetric=True), False),
        (weight_spec(4, False), QuantSpec(bits=4, symmetric=False), True),
        (weight_spec(7, True, 2), QuantSpec(bits=7, symmetric=False), False),
        (weight_spec(8, False), QuantSpec(bits=8, symmetric=True), True),
        (weight_spec(8, True), QuantSpec(bits=8, symmetric=False), True),
        (weight_spec(8, False, 2), QuantSpec(bits=8, symmetric=False), True),
        (weight_spec(4, False), QuantSpec(bits=8, symmetric=False), False),
    ],
)
def test_integer_conv_equals_int64(weight, inputs, per_sample):
    spec = LayerSpec(weight=weight, inputs=inputs)
    check_integer_conv(spec, 'strided_asymmetric', per_sample=per_sample)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_integer_conv_follows_every_geometry(geometry):
    spec = LayerSpec(weight=weight_spec(8, False), inputs=QuantSpec(bits=8, symmetric=False))
    check_integer_conv(spec, geometry, per_sample=False)


@pytest.mark.parametrize('per_sample', [False, True])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 7, 8])
def test_integer_product_equals_int64(bits, symmetric, per_sample):
    spec = QuantSpec(bits=bits, symmetric=symmetric)
    # [B, heads, M, K] and [B, heads, N, K]
    lhs, rhs = X.reshape(3, 2, 6, 6), X[:, ::-1].reshape(3, 2, 6, 6)[:, :, :4]
    lhs_rows = rows_for(spec, 3, per_sample=per_sample)
    rhs_rows = rows_for(spec, 3, per_sample=per_sample, seed=1)
    got = run_integer(
        Product(), LayerSpec(weight=None, inputs=spec), [lhs, rhs],
        {'lhs': lhs_rows, 'rhs': rhs_rows},
    )  # fmt: skip
    a, a_scale = shifted_codes(lhs, lhs_rows, spec)
    b, b_scale = shifted_codes(rhs, rhs_rows, spec)
    np.testing.assert_array_equal(got, np.einsum('bhmk,bhnk->bhmn', a, b) * a_scale * b_scale)


def test_a_tap_in_integer_mode_is_rounded():
    rows = rows_for(INPUTS, 3, per_sample=True)
    got = run_integer(Tap(), SPEC, [X], {'input': rows})
    codes, scale = shifted_codes(X, rows, INPUTS)
    np.testing.assert_array_equal(got, codes * scale)


def per_tensor_weights():
    return QuantSpec(bits=4, symmetric=False)


@pytest.mark.parametrize(
    'weight, inputs',
    [
        (weight_spec(4, True), INPUTS),
        (weight_spec(8, False), QuantSpec(bits=8, symmetric=False)),
        (per_tensor_weights(), INPUTS),
        (weight_spec(4, False, 2), None),
        (weight_spec(8, False), None),
        (None, INPUTS),
    ],
)
@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_integer_mode_equals_fake_mode(kind, weight, inputs):
    spec = LayerSpec(weight=weight, inputs=inputs)
    x = WIDE
    module, shape = nn.Dense(5), (4, 5)
    if kind == 'conv':
        module, shape = nn.Conv(5, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1))), (3, 3, 4, 5)
    rng = np.random.default_rng(3)
    bias = jnp.asarray(rng.standard_normal(5).astype(np.float32))
    kernel = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    tensor = None
    if weight is not None:
        scale, zero_point = calibrate_weight(kernel, weight)
        codes = rng.integers(weight.grid[0], weight.grid[1] + 1, shape)
        tensor = pack(codes, scale, zero_point, spec=weight)
        kernel = dequantize(tensor)
    params = {'bias': bias} | ({} if weight is not None else {'kernel': kernel})
    roles = {}
    if inputs is not None:
        low, high = jnp.min(x, axis=(1, 2, 3)), jnp.max(x, axis=(1, 2, 3))
        scale, zero_point = observers.compute_scale(low, high, inputs)
        roles = {'input': {'scale': scale, 'zero_point': zero_point}}
    got = run_integer(module, spec, [x], roles, weight=tensor, params=params)
    variables = {
        'params': {'layer': {'kernel': kernel, 'bias': bias}}, 'quant': {'layer': roles}
    }  # fmt: skip
    want = in_mode(layers.fake_quantized, module, spec, variables, [x])
    # The integer sum is exact; the float one rounds each of its 36 or fewer terms once.
    terms = np.prod(shape[:-1]) * float(jnp.abs(kernel).max()) * float(jnp.abs(x).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * terms * EPS)


def test_an_integer_layer_keeps_the_dtype_of_its_network():
    spec = LayerSpec(weight=weight_spec(4, True), inputs=INPUTS)
    weight, *_ = random_weight((2, 5), spec.weight)
    rows = rows_for(INPUTS, 3, per_sample=False)
    bias = jnp.zeros(5, jnp.bfloat16)
    module = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    got = run_integer(module, spec, [X], {'input': rows}, weight=weight, params={'bias': bias})
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_narrow_weights_stay_packed_in_memory(bits):
    tensor, *_ = random_weight((6, 5), weight_spec(bits, False))
    np.testing.assert_array_equal(codes_lib.integer_weight(tensor)['codes'], tensor.packed)


def test_weights_are_unpacked_after_their_input_with_the_same_result(monkeypatch):
    spec = LayerSpec(weight=weight_spec(4, True), inputs=INPUTS)
    weight, *_ = random_weight((2, 5), spec.weight)
    rows = rows_for(INPUTS, 3, per_sample=False)
    args = nn.Dense(5, use_bias=False), spec, [X], {'input': rows}
    want = run_integer(*args, weight=weight)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    codes = codes_lib.integer_weight(weight)['codes']
    np.testing.assert_array_equal(integer._after(X, codes), codes)
    np.testing.assert_array_equal(run_integer(*args, weight=weight), want)


@pytest.mark.parametrize('bits', [7, 8])
def test_the_weights_of_integer_mode_stand_for_the_same_numbers(bits):
    spec = weight_spec(bits, False, 2)
    tensor, codes, scale, zero_point = random_weight((6, 5), spec)
    entry = codes_lib.integer_weight(tensor)
    assert entry['codes'].dtype == jnp.int8 and entry['codes'].shape == (5, 6)
    zeros = np.repeat(np.asarray(entry['zero_point']), 2, axis=0)
    want = codes - np.repeat(zero_point, 2, axis=0)
    np.testing.assert_array_equal(np.asarray(entry['codes'], np.int64).T - zeros, want)


@pytest.mark.parametrize(
    'options, text',
    [
        ({'feature_group_count': 2, 'kernel_size': (3, 3)}, 'grouped or dilated'),
        ({'kernel_dilation': 2, 'kernel_size': (3, 3)}, 'grouped or dilated'),
        ({'input_dilation': (1, 2), 'kernel_size': (3, 3)}, 'grouped or dilated'),
        ({'padding': 'CIRCULAR', 'kernel_size': (3, 3)}, "padding='CIRCULAR'; expected 'SAME'"),
        ({'kernel_size': (3,)}, '1 spatial axes; integers need 2'),
    ],
)
def test_convolutions_without_an_integer_form_are_refused(options, text):
    spec = LayerSpec(weight=weight_spec(4, True), inputs=INPUTS)
    weight, *_ = random_weight((3, 3, 4, 4), spec.weight)
    rows = rows_for(INPUTS, 1, per_sample=False)
    module = nn.Conv(4, use_bias=False, **options)
    with pytest.raises(NotImplementedError, match=f'layer: {text}'):
        run_integer(module, spec, [jnp.zeros((1, 6, 6, 4))], {'input': rows}, weight=weight)


def test_a_sum_that_might_overflow_is_refused():
    spec = LayerSpec(weight=weight_spec(8, False), inputs=QuantSpec(bits=8, symmetric=False))
    x = jnp.zeros((1, 33026))  # 33026 * 255 * 255 is the first above 2^31
    rows = rows_for(spec.inputs, 1, per_sample=False)
    weight, *_ = random_weight((33026, 1), spec.weight)
    with pytest.raises(ValueError, match='may exceed int32'):
        run_integer(nn.Dense(1, use_bias=False), spec, [x], {'input': rows}, weight=weight)


# -- training: codes in the collection -----------------------------------------------------------


@pytest.mark.parametrize(
    'kind, weight, inputs',
    [
        ('dense', weight_spec(4, True, 2), INPUTS),
        ('dense', weight_spec(8, False), None),
        ('conv', weight_spec(4, False), INPUTS),
        ('conv', weight_spec(8, False), QuantSpec(bits=8, symmetric=False)),
    ],
)
def test_codes_in_the_collection_train_as_a_rounded_kernel_does(kind, weight, inputs):
    spec = LayerSpec(weight=weight, inputs=inputs)
    x = WIDE
    module, shape = nn.Dense(5), (4, 5)
    if kind == 'conv':
        module, shape = nn.Conv(5, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1))), (3, 3, 4, 5)
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    w_scale, w_zero = calibrate_weight(kernel, weight)
    roles = {}
    if inputs is not None:
        scale, zero_point = observers.compute_scale(jnp.min(x), jnp.max(x), inputs)
        roles = {'input': {'scale': 0.9 * scale, 'zero_point': zero_point}}
    output = jax.eval_shape(
        Single(module).apply, {'params': {'layer': {'kernel': kernel, 'bias': jnp.ones(5)}}}, x
    )
    direction = jnp.asarray(rng.standard_normal(output.shape).astype(np.float32))

    def loss(learnt, in_collection):
        kernel, w_scale, x, roles = learnt
        expanded = [expand(a, shape) for a in (w_scale, w_zero)]
        codes = numerics.quantize(kernel, *expanded, *weight.grid)
        params, entry = {'bias': jnp.ones(5)}, dict(roles)
        if in_collection:
            entry['weight'] = {'codes': codes, 'scale': w_scale, 'zero_point': w_zero}
        else:
            params['kernel'] = numerics.dequantize(codes, *expanded)
        with layers.fake_quantized({'layer': spec}):
            y = Single(module).apply({'params': {'layer': params}, 'quant': {'layer': entry}}, x)
        return jnp.sum(y * direction), y

    gradient = jax.jit(
        jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=FAST_COMPILE
    )
    learnt = (kernel, w_scale, x, roles)
    (got, got_y), (want, want_y) = gradient(learnt, True), gradient(learnt, False)
    # Sums of 36 or fewer products, exact in integers, rounded in float32.
    limit = 2 * np.prod(shape[:-1]) * EPS * float(jnp.abs(kernel).max() * jnp.abs(x).max())
    np.testing.assert_allclose(got_y, want_y, rtol=0, atol=limit)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 sums over pixels in another order, against the size of the whole gradient.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * (1 + float(jnp.abs(b).max())))


FROZEN_WEIGHTS = [
    QuantSpec(bits=2, symmetric=True, per_channel=True),
    QuantSpec(bits=4, symmetric=False, per_channel=True, group_size=1),
    QuantSpec(bits=8, symmetric=False, per_channel=True),
]


@pytest.mark.parametrize('inputs', [None, QuantSpec(bits=4, symmetric=False)], ids=str)
@pytest.mark.parametrize('weight', FROZEN_WEIGHTS, ids=str)
@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_integers_that_stand_still_train_what_is_around_them_alike(kind, weight, inputs):
    layer = {'dense': nn.Dense(5), 'conv': nn.Conv(5, (3, 3), strides=2)}[kind]
    module, spec = Single(layer), LayerSpec(weight=weight, inputs=inputs)
    shape = (2, 5) if kind == 'dense' else (3, 3, 2, 5)
    tensor, codes, scale, zero_point = random_weight(shape, weight)
    rng = np.random.default_rng(3)
    params = {'layer': {'bias': jnp.asarray(rng.standard_normal(5), jnp.float32)}}
    factors = {
        'input': jnp.asarray(rng.uniform(0.5, 2, 2), jnp.float32),
        'output': jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32),
    }
    floats = {'codes': codes, 'scale': scale, 'zero_point': zero_point}
    floats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), floats)
    entry = codes_lib.integer_weight(tensor)
    rows = {} if inputs is None else {'input': rows_for(inputs, 3, per_sample=False)}

    def loss(arguments, entry):
        x, factors = arguments
        quant = {'layer': {**rows, 'weight': entry, 'channels': factors}}
        with layers.fake_quantized({'layer': spec}):
            y = module.apply({'params': params, 'quant': quant}, x)
        return jnp.sum(jnp.sin(y))

    run = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)
    (got, gradients), (want, expected) = run((X, factors), entry), run((X, factors), floats)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # The same sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected
    )


@pytest.mark.parametrize('zero_point', [0, 300])
@pytest.mark.parametrize('value_bits', [4, 8])
def test_a_softmax_of_16_bits_is_exact(value_bits, zero_point):
    rng = np.random.default_rng(2)
    inputs = QuantSpec(bits=value_bits, symmetric=value_bits == 4)
    spec = LayerSpec(weight=None, inputs=inputs, lhs=QuantSpec(bits=16, symmetric=False))
    lhs = rng.dirichlet(np.full(40, 0.1), (2, 3)).astype(np.float32)  # [B, M, K]
    rhs = rng.standard_normal((2, 5, 40)).astype(np.float32)
    rhs_rows = rows_for(inputs, 2, per_sample=True)
    lhs_rows = {
        'scale': jnp.asarray([2.0**-16, 2.0**-15]),
        'zero_point': jnp.asarray([0.0, zero_point]),
    }
    got = run_integer(Product(), spec, [lhs, rhs], {'lhs': lhs_rows, 'rhs': rhs_rows})
    a, a_scale = shifted_codes(lhs, lhs_rows, spec.lhs)
    b, b_scale = shifted_codes(rhs, rhs_rows, inputs)
    assert a.max() > 2**14
    want = a @ b.swapaxes(-1, -2) * a_scale * b_scale
    # Sums of three exact ones, rounded to float32 each.
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * EPS * np.abs(want).max())

    variables = {'params': {}, 'quant': {'layer': {'lhs': lhs_rows, 'rhs': rhs_rows}}}
    fake = in_mode(layers.fake_quantized, Product(), spec, variables, [lhs, rhs])
    np.testing.assert_allclose(got, fake, rtol=0, atol=16 * EPS * np.abs(want).max())


@pytest.mark.parametrize('softmax_bits', [3, 4, 8, 16])
@pytest.mark.parametrize('value_bits', [4, 8])
def test_a_softmax_on_powers_or_on_an_even_grid_is_exact_as_each_row_says(softmax_bits, value_bits):
    rng = np.random.default_rng(0)
    spec = LayerSpec(
        weight=None, inputs=QuantSpec(bits=value_bits, symmetric=False),
        lhs=QuantSpec(bits=softmax_bits, symmetric=False),
    )  # fmt: skip
    lhs = rng.dirichlet(np.full(9, 0.1), (2, 3)).astype(np.float32)  # [B, M, K]
    rhs = rng.standard_normal((2, 5, 9)).astype(np.float32)
    rhs_rows = rows_for(spec.inputs, 2, per_sample=True)
    largest = min(2**softmax_bits - 1, 27)
    # The first image on powers, the second on an even grid: one program.
    lhs_rows = {
        'scale': jnp.asarray([1.0, 2.0**-softmax_bits]), 'zero_point': jnp.zeros(2),
        'powers': jnp.asarray([0.5, 0.0]),
    }  # fmt: skip
    got = run_integer(Product(), spec, [lhs, rhs], {'lhs': lhs_rows, 'rhs': rhs_rows})
    b, b_scale = shifted_codes(rhs, rhs_rows, spec.inputs)
    with np.errstate(divide='ignore'):
        q = np.clip(np.rint(-np.log2(lhs[0].astype(np.float64) / 0.5)), 0, largest)
    # Python integers: 2^27 times 255 times 9 in int64.
    powers = 2 ** (largest - q.astype(np.int64)) @ b[0].T
    codes = np.clip(np.rint(lhs[1] * 2.0**softmax_bits), 0, 2**softmax_bits - 1).astype(np.int64)
    want = np.stack([powers * (0.5 * 2.0**-largest), codes @ b[1].T * 2.0**-softmax_bits])
    want = want * b_scale
    # Sums of up to five exact ones, rounded to float32 each.
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * EPS * np.abs(want).max())

    variables = {'params': {}, 'quant': {'layer': {'lhs': lhs_rows, 'rhs': rhs_rows}}}
    fake = in_mode(layers.fake_quantized, Product(), spec, variables, [lhs, rhs])
    np.testing.assert_allclose(got, fake, rtol=0, atol=16 * EPS * np.abs(want).max())


@pytest.mark.parametrize('softmax_bits', [3, 4, 8])
def test_a_softmax_on_powers_of_the_root_of_two_is_exact(softmax_bits):
    rng = np.random.default_rng(1)
    inputs = QuantSpec(bits=8, symmetric=False)
    spec = LayerSpec(
        weight=None, inputs=inputs, lhs=QuantSpec(bits=softmax_bits, symmetric=False)
    )  # fmt: skip
    lhs = rng.dirichlet(np.full(9, 0.1), (2, 3)).astype(np.float32)
    rhs = rng.standard_normal((2, 5, 9)).astype(np.float32)
    rhs_rows = rows_for(inputs, 2, per_sample=True)
    lhs_rows = {
        'scale': jnp.ones(2), 'zero_point': jnp.zeros(2), 'roots': jnp.asarray([1.0, 0.5])
    }  # fmt: skip
    got = run_integer(Product(), spec, [lhs, rhs], {'lhs': lhs_rows, 'rhs': rhs_rows})
    b, b_scale = shifted_codes(rhs, rhs_rows, inputs)
    top = min(2**softmax_bits - 1, 54)
    scale = np.array([1.0, 0.5])[:, None, None]
    with np.errstate(divide='ignore'):
        q = np.clip(np.rint(-2 * np.log2(lhs.astype(np.float64) / scale)), 0, top)
    values = np.where(q < top, 2.0 ** (-q / 2), 0.0) * scale
    want = np.einsum('bmk,bnk->bmn', values, b.astype(np.float64)) * b_scale
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * EPS * np.abs(want).max())
    variables = {'params': {}, 'quant': {'layer': {'lhs': lhs_rows, 'rhs': rhs_rows}}}
    fake = in_mode(layers.fake_quantized, Product(), spec, variables, [lhs, rhs])
    np.testing.assert_allclose(fake, want, rtol=0, atol=16 * EPS * np.abs(want).max())
