import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import tap
from dmq_jax.quant import layers, numerics, observers
from dmq_jax.quant.layers import at_timestep
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec, dequantize, expand, pack, scale_shape
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time
INPUTS = QuantSpec(bits=4, symmetric=False)
SPEC = LayerSpec(weight=None, inputs=INPUTS)


class Product(nn.Module):
    """A user's own product: only the name counts."""

    @nn.compact
    def __call__(self, lhs, rhs):
        return jnp.einsum('...mk,...nk->...mn', lhs, rhs)


class Tap(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


class Network(nn.Module):
    """A convolution, an attention product and a dense layer; knows no quantization."""

    block: type[nn.Module] = None

    @nn.compact
    def __call__(self, x, t):
        t = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (x.shape[0], 1))
        shift = nn.Dense(4, name='time')(t.astype(jnp.float32))
        h = nn.Conv(4, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)), name='conv')(x)
        h = Tap(name='tap')(jnp.tanh(h + 0.01 * shift[:, None, None, :]))
        h = (self.block or Block)(name='block')(h)
        return nn.Dense(2, name='out')(h)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h):
        rows = h.reshape(h.shape[0], -1, h.shape[-1])
        scores = Product(name='scores')(nn.Dense(4, name='q')(rows), nn.Dense(4, name='k')(rows))
        mixed = Product(name='mix')(jax.nn.softmax(scores), rows.swapaxes(1, 2))
        return h + mixed.reshape(h.shape)


ROLES = {
    'time': ('input',), 'conv': ('input',), 'tap': ('input',), 'block/q': ('input',),
    'block/k': ('input',), 'block/scores': ('lhs', 'rhs'), 'block/mix': ('lhs', 'rhs'),
    'out': ('input',),
}  # fmt: skip
PLAN = {path: SPEC for path in ROLES}
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 6, 2)).astype(np.float32))
TIMESTEPS = jnp.asarray([90, 60, 30, 0], jnp.int32)


def random_params(network, *inputs):
    """Cheaper than jitting `init`."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)['params']
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape).astype(np.float32)), shapes
    )


NETWORK = Network()
PARAMS = random_params(NETWORK, X, jnp.int32(0))


def nested(entries):
    tree = {}
    for path, entry in entries.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = entry
    return tree


def tables(num_rows=4):
    """Scales that differ in every row, role and layer."""
    rng = np.random.default_rng(2)
    return {
        path: {
            role: {
                'scale': jnp.asarray(rng.uniform(0.1, 0.5, num_rows).astype(np.float32)),
                'zero_point': jnp.asarray(rng.integers(3, 12, num_rows).astype(np.float32)),
            }
            for role in roles
        }
        for path, roles in ROLES.items()
    }


def run_fake(t, *, rows_of=None, network=NETWORK, plan=PLAN):
    rows = at_timestep(tables() if rows_of is None else rows_of, TIMESTEPS, t)
    with layers.fake_quantized(plan):
        return network.apply({'params': PARAMS, 'quant': nested(rows)}, X, t)


# -- the hook ------------------------------------------------------------------------------------


def test_an_empty_plan_leaves_the_network_bit_identical():
    want = NETWORK.apply({'params': PARAMS}, X, jnp.int32(30))
    for context in (layers.fake_quantized({}), layers.integer({}), layers.observe_inputs({}, 4)):
        with context:
            got = NETWORK.apply({'params': PARAMS}, X, jnp.int32(30))
        np.testing.assert_array_equal(got, want)


def test_outside_the_context_nothing_is_quantized():
    want = NETWORK.apply({'params': PARAMS}, X, jnp.int32(30))
    assert not np.array_equal(run_fake(jnp.int32(30)), want)
    np.testing.assert_array_equal(NETWORK.apply({'params': PARAMS}, X, jnp.int32(30)), want)


def test_every_quantizable_layer_is_found_and_others_are_not():
    found = layers.quantizable_layers(NETWORK.apply, PARAMS, X, jnp.int32(0))
    assert list(found) == list(ROLES)
    kinds = [layer.kind for layer in found.values()]
    assert kinds == ['dense', 'conv', 'tap', 'dense', 'dense', 'product', 'product', 'dense']
    assert found['conv'].weight_shape == (3, 3, 2, 4)
    assert found['block/mix'].weight_shape is None


def test_the_products_and_taps_of_models_are_known_by_the_same_names():
    assert layers.layer_kind(tap.Product()) == layers.layer_kind(Product()) == 'product'
    assert layers.layer_kind(tap.Tap()) == layers.layer_kind(Tap()) == 'tap'
    assert layers.layer_kind(nn.GroupNorm()) is None


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(2, name='shared')
        return layer(layer(x))


def test_a_layer_that_runs_twice_is_refused():
    x = jnp.ones((1, 2))
    params = random_params(Twice(), x)
    with pytest.raises(ValueError, match="layer 'shared' runs twice in one pass"):
        layers.quantizable_layers(Twice().apply, params, x)


class ByKeyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='dense')(inputs=x)


@pytest.mark.parametrize('context', [layers.fake_quantized, layers.integer])
def test_a_layer_called_by_keyword_is_refused(context):
    x = jnp.ones((1, 2))
    with context({'dense': SPEC}), pytest.raises(ValueError, match="layer 'dense' .*keywords"):
        ByKeyword().apply({'params': random_params(ByKeyword(), x)}, x)


@pytest.mark.parametrize('context', [layers.fake_quantized, layers.integer])
def test_a_missing_entry_names_the_layer(context):
    with context(PLAN), pytest.raises(ValueError, match="no 'input' for layer 'time'"):
        NETWORK.apply({'params': PARAMS}, X, jnp.int32(0))


def test_statistics_are_those_of_the_inputs_themselves():
    with layers.observe_inputs(PLAN, 16):
        out, collections = NETWORK.apply({'params': PARAMS}, X, jnp.int32(30), mutable=['stats'])
    np.testing.assert_array_equal(out, NETWORK.apply({'params': PARAMS}, X, jnp.int32(30)))
    stats = layers.collect_stats(PLAN, collections['stats'])
    assert {path: tuple(roles) for path, roles in stats.items()} == ROLES
    for seen, want in zip(stats['conv']['input'], observers.observe(X, 16), strict=True):
        np.testing.assert_array_equal(seen, want)
    # The same values reach block/q and block/k, and softmax is between 0 and 1.
    for a, b in zip(stats['block/q']['input'], stats['block/k']['input'], strict=True):
        np.testing.assert_array_equal(a, b)
    weights = stats['block/mix']['lhs']
    assert 0 <= float(weights.low) < float(weights.high) <= 1


def test_inputs_that_stay_float_are_not_observed():
    weights_only = LayerSpec(weight=QuantSpec(bits=4, symmetric=True), inputs=None)
    plan = {'conv': SPEC, 'out': weights_only}
    with layers.observe_inputs(plan, 4):
        _, found = NETWORK.apply({'params': PARAMS}, X, jnp.int32(0), mutable=['stats'])
    assert set(layers.collect_stats(plan, found['stats'])) == {'conv'}


def test_observing_inside_a_scan_stacks_the_timesteps():
    def visit(x, t):
        with layers.observe_inputs(PLAN, 8):
            _, found = NETWORK.apply({'params': PARAMS}, x, t, mutable=['stats'])
        return x * 0.5, layers.collect_stats(PLAN, found['stats'])

    _, stacked = jax.lax.scan(visit, X, TIMESTEPS)
    assert stacked['conv']['input'].values.shape == (4, 8)
    highs = [float(jnp.max(X)) * 0.5**i for i in range(4)]
    np.testing.assert_allclose(stacked['conv']['input'].high, highs, rtol=EPS)


def manual_fake(rows, t):
    """The network written out with explicit rounding."""

    def q(path, x, role='input'):
        row = rows[path][role]
        return numerics.fake_quantize(x, row['scale'], row['zero_point'], 0.0, 15.0)

    def dense(path, params, x):
        return q(path, x) @ params['kernel'] + params['bias'].reshape((1,) * (x.ndim - 1) + (-1,))

    p = PARAMS
    shift = dense('time', p['time'], jnp.full((3, 1), float(t)))
    h = jax.lax.conv_general_dilated(
        q('conv', X), p['conv']['kernel'], (2, 2), ((0, 1), (0, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )  # fmt: skip
    h = h + p['conv']['bias'][None, None, None] + 0.01 * shift[:, None, None, :]
    h = q('tap', jnp.tanh(h))
    flat = h.reshape(3, -1, 4)
    query = dense('block/q', p['block']['q'], flat)
    key = dense('block/k', p['block']['k'], flat)
    scores = jnp.einsum(
        'bmk,bnk->bmn', q('block/scores', query, 'lhs'), q('block/scores', key, 'rhs')
    )
    weights = q('block/mix', jax.nn.softmax(scores), 'lhs')
    values = q('block/mix', flat.swapaxes(1, 2), 'rhs')
    h = h + jnp.einsum('bmk,bnk->bmn', weights, values).reshape(h.shape)
    return dense('out', p['out'], h)


@pytest.mark.parametrize('t', [0, 60])
def test_fake_mode_equals_rounding_written_by_hand(t):
    rows = at_timestep(tables(), TIMESTEPS, jnp.int32(t))
    # The same float32 operations in the same order.
    np.testing.assert_allclose(run_fake(jnp.int32(t)), manual_fake(rows, t), atol=4 * EPS)


@pytest.mark.parametrize('bits', [2, 4])
def test_live_activations_have_at_most_two_to_the_bits_values(bits):
    spec = LayerSpec(weight=None, inputs=QuantSpec(bits=bits, symmetric=False))
    seen = {}

    def record(next_fun, args, kwargs, context):
        if '/'.join(context.module.path) in ROLES:
            seen['/'.join(context.module.path)] = args
        return next_fun(*args, **kwargs)

    # Zero points as a method might have learnt them: not integers.
    learnt = jax.tree.map(lambda a: a + 0.37, tables())
    t = jnp.asarray([90, 30, 0])
    rows = nested(at_timestep(learnt, TIMESTEPS, t))
    # Entered last: sees what the hook hands on.
    with layers.fake_quantized(dict.fromkeys(ROLES, spec)), nn.intercept_methods(record):
        NETWORK.apply({'params': PARAMS, 'quant': rows}, X, t)
    assert set(seen) == set(ROLES)
    for path, args in seen.items():
        for x in args:
            for image in np.asarray(x):
                assert len(np.unique(image)) <= 2**bits, path
    assert len(np.unique(seen['conv'][0])) > 2**bits, 'images have scales of their own'


def test_the_hook_works_under_remat_and_gives_the_same_gradients():
    def loss(tables, network):
        rows = at_timestep(tables, TIMESTEPS, jnp.int32(30))
        with layers.fake_quantized(PLAN):
            out = network.apply({'params': PARAMS, 'quant': nested(rows)}, X, jnp.int32(30))
        return jnp.sum(out**2)

    remat = Network(block=nn.remat(Block))
    gradient = jax.jit(
        jax.value_and_grad(loss), static_argnums=1,
        compiler_options=FAST_COMPILE,
    )  # fmt: skip
    plain_value, plain = gradient(tables(), NETWORK)
    value, gradients = gradient(tables(), remat)
    # Recomputed inside one compiled program: sums of 9 or fewer terms in another order.
    assert float(value) == pytest.approx(float(plain_value), rel=32 * EPS)
    norm = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * norm)
    assert list(layers.quantizable_layers(remat.apply, PARAMS, X, jnp.int32(0))) == list(ROLES)


def test_gradients_reach_exactly_the_rows_in_use():
    def loss(tables):
        return jnp.sum(run_fake(jnp.asarray([60, 60, 0]), rows_of=tables) ** 2)

    gradient = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(tables())
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(np.asarray(leaf)[[0, 2]], [0, 0])
    assert (np.asarray(gradient['conv']['input']['scale'])[[1, 3]] != 0).all()


def test_one_program_serves_all_timesteps():
    @jax.jit
    def predict(tables, t):
        return run_fake(t, rows_of=tables)

    outs = [predict(tables(), jnp.int32(t)) for t in (90, 61, 30, 0)]
    assert predict._cache_size() == 1
    assert len({np.asarray(out).tobytes() for out in outs}) == 4


# -- timesteps -----------------------------------------------------------------------------------


def test_a_scalar_t_equals_one_t_per_image():
    for t in (90, 47, 0):
        scalar = run_fake(jnp.int32(t))
        per_image = run_fake(jnp.full((3,), t, jnp.int32))
        np.testing.assert_allclose(per_image, scalar, atol=4 * EPS)


def test_each_image_takes_the_row_of_its_own_t():
    t = jnp.asarray([90, 30, 0])
    together = run_fake(t)
    for i in range(3):
        alone = run_fake(t[i])[i]
        np.testing.assert_allclose(together[i], alone, atol=4 * EPS)


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_rows_of_listed_timesteps_are_returned_as_they_are(lookup):
    # 20 sampling steps on the tables of 100.
    timesteps = jnp.arange(991, 0, -10)
    table = jnp.asarray(np.random.default_rng(0).uniform(size=100).astype(np.float32))
    got = at_timestep({'a': table}, timesteps, timesteps[::5], lookup=lookup)['a']
    np.testing.assert_array_equal(got, table[::5])


@pytest.mark.parametrize(
    't, row', [(90, 0), (76, 0), (74, 1), (46, 1), (44, 2), (1, 3), (0, 3), (500, 0), (-7, 3)]
)
def test_nearest_takes_the_closest_timestep_also_beyond_the_ends(t, row):
    table = jnp.arange(4.0)
    assert float(at_timestep(table, TIMESTEPS, jnp.int32(t))) == row
    np.testing.assert_array_equal(at_timestep(table, TIMESTEPS, jnp.asarray([t, t])), [row, row])


@pytest.mark.parametrize(
    't, value', [(90, 0.0), (75, 0.5), (60, 1.0), (40, 5 / 3), (10, 8 / 3), (500, 0.0), (-7, 3.0)]
)
def test_linear_interpolates_and_holds_the_ends(t, value):
    table = jnp.arange(4.0)
    got = at_timestep(table, TIMESTEPS, jnp.int32(t), lookup='linear')
    assert float(got) == pytest.approx(value, abs=4 * EPS)
    wide = at_timestep(
        jnp.stack([table, -table], -1), TIMESTEPS, jnp.asarray([t, t]), lookup='linear'
    )
    np.testing.assert_allclose(wide, [[value, -value]] * 2, atol=4 * EPS)


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_t_may_be_any_kind_of_number(lookup):
    table = jnp.arange(4.0)
    for t in (60, 60.0, np.int32(60), np.float32(60), jnp.int32(60), jnp.uint8(60)):
        assert float(at_timestep(table, TIMESTEPS, t, lookup=lookup)) == 1.0
    assert float(at_timestep(table, np.asarray(TIMESTEPS), 60, lookup=lookup)) == 1.0


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_a_single_row_serves_every_timestep(lookup):
    table = jnp.asarray([7.0])
    assert float(at_timestep(table, TIMESTEPS, 33, lookup=lookup)) == 7.0
    np.testing.assert_array_equal(
        at_timestep(table, TIMESTEPS, jnp.asarray([3, 90]), lookup=lookup), [7.0, 7.0]
    )
    assert float(at_timestep(table, TIMESTEPS[:1], 33, lookup=lookup)) == 7.0


def test_an_unknown_lookup_is_refused():
    with pytest.raises(ValueError, match="timestep_lookup='cubic': expected 'nearest'"):
        at_timestep(jnp.zeros(4), TIMESTEPS, 0, lookup='cubic')


# -- FakeQuant by hand ---------------------------------------------------------------------------


class ByHand(nn.Module):
    """A dense layer whose input is rounded by a module placed in the network."""

    lookup: str = 'nearest'

    @nn.compact
    def __call__(self, x, t):
        x = layers.FakeQuant(INPUTS, tuple(np.asarray(TIMESTEPS)), self.lookup, name='input')(x, t)
        return nn.Dense(2, name='dense')(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(2, name='dense')(x)


@pytest.mark.parametrize('t', [30, (90, 0, 47)])
@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_the_module_placed_by_hand_equals_the_hook(lookup, t):
    x, t = X[:, 0, 0], jnp.asarray(t)
    params = random_params(Plain(), x, t)
    table = tables()['conv']['input']
    by_hand = ByHand(lookup).apply({'params': params, 'quant': {'input': table}}, x, t)
    rows = at_timestep(table, TIMESTEPS, t, lookup=lookup)
    with layers.fake_quantized({'dense': SPEC}):
        hooked = Plain().apply({'params': params, 'quant': {'dense': {'input': rows}}}, x, t)
    np.testing.assert_array_equal(by_hand, hooked)


def test_the_module_placed_by_hand_starts_from_the_range_of_its_input():
    variables = layers.FakeQuant(INPUTS, (5, 0)).init(jax.random.key(0), X, 0)
    want = observers.compute_scale(jnp.min(X), jnp.max(X), INPUTS)
    for name, value in zip(('scale', 'zero_point'), want, strict=True):
        np.testing.assert_array_equal(variables['quant'][name], [value, value])
    single = layers.FakeQuant(INPUTS).init(jax.random.key(0), X)
    assert single['quant']['scale'].shape == (1,)


# -- integer mode --------------------------------------------------------------------------------


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
        entry['weight'] = layers.integer_weight(weight)
    variables = {'params': {'layer': params or {}}, 'quant': {'layer': entry}}
    with layers.integer({'layer': spec}):
        return Single(module).apply(variables, *inputs)


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
    x = X[:, 0]  # [B, 6, 2]
    x = jnp.concatenate([x, x + 0.3, -x], axis=-1)  # K = 6
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
    x = jnp.concatenate([X, X - 0.4], axis=-1)  # C = 4
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
    x = jnp.concatenate([X, X - 0.4], axis=-1)
    module, shape = nn.Dense(5), (4, 5)
    if kind == 'conv':
        module, shape = nn.Conv(5, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1))), (3, 3, 4, 5)
    rng = np.random.default_rng(3)
    bias = jnp.asarray(rng.standard_normal(5).astype(np.float32))
    kernel = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    tensor = None
    if weight is not None:
        scale, zero_point = observers.calibrate_weight(kernel, weight)
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
    with layers.fake_quantized({'layer': spec}):
        want = Single(module).apply(
            {'params': {'layer': {'kernel': kernel, 'bias': bias}}, 'quant': {'layer': roles}}, x
        )
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


@pytest.mark.parametrize('bits', [4, 7, 8])
def test_the_weights_of_integer_mode_stand_for_the_same_numbers(bits):
    spec = weight_spec(bits, False, 2)
    tensor, codes, scale, zero_point = random_weight((6, 5), spec)
    entry = layers.integer_weight(tensor)
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
    x = jnp.concatenate([X, X - 0.4], axis=-1)
    module, shape = nn.Dense(5), (4, 5)
    if kind == 'conv':
        module, shape = nn.Conv(5, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1))), (3, 3, 4, 5)
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    w_scale, w_zero = observers.calibrate_weight(kernel, weight)
    roles = {}
    if inputs is not None:
        scale, zero_point = observers.compute_scale(jnp.min(x), jnp.max(x), inputs)
        roles = {'input': {'scale': 0.9 * scale, 'zero_point': zero_point}}
    direction = jnp.asarray(rng.standard_normal(Single(module).apply(
        {'params': {'layer': {'kernel': kernel, 'bias': jnp.ones(5)}}}, x
    ).shape).astype(np.float32))  # fmt: skip

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
