import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models import tap
from dmq_jax.quant import layers, numerics, observers
from dmq_jax.quant.codes import integer_weight
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.rows import at_timestep
from dmq_jax.quant.tensor import QuantSpec, pack

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


def compiled(function):
    """One program: operation by operation, each is a program of its own."""
    return jax.jit(function, compiler_options=FAST_COMPILE)


calibrate_weight = jax.jit(
    observers.calibrate_weight, static_argnums=1, compiler_options=FAST_COMPILE
)


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

    @compiled
    def run(tables, t):
        seen = {}

        def record(next_fun, args, kwargs, context):
            if '/'.join(context.module.path) in ROLES:
                seen['/'.join(context.module.path)] = args
            return next_fun(*args, **kwargs)

        rows = nested(at_timestep(tables, TIMESTEPS, t))
        # Entered last: sees what the hook hands on.
        with layers.fake_quantized(dict.fromkeys(ROLES, spec)), nn.intercept_methods(record):
            NETWORK.apply({'params': PARAMS, 'quant': rows}, X, t)
        return seen

    # Zero points as a method might have learnt them: not integers.
    seen = run(jax.tree.map(lambda a: a + 0.37, tables()), jnp.asarray([90, 30, 0]))
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


# -- attention computed in one piece --------------------------------------------------------------


class Attending(nn.Module):
    """One block of attention as the models have it."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=n)(x).reshape(*x.shape[:2], 2, 4) for n in ('q', 'k', 'v'))
        return nn.Dense(4, name='out')(tap.Attend(name='attend')(q, k, v).reshape(*x.shape[:2], 8))


def attending():
    x = jnp.asarray(np.random.default_rng(4).standard_normal((2, 5, 4)).astype(np.float32))
    return random_params(Attending(), x), x


def test_the_products_inside_fused_attention_have_paths():
    params, x = attending()
    found = layers.quantizable_layers(Attending().apply, params, x)
    assert list(found) == ['q', 'k', 'v', 'attend/scores', 'attend/mix', 'out']
    assert found['attend/mix'].kind == 'product'


def test_the_operands_of_fused_attention_are_observed_and_rounded():
    params, x = attending()
    plan = {'attend/scores': SPEC, 'attend/mix': SPEC}

    def observed():
        with layers.observe_inputs(plan, 16):
            _, seen = Attending().apply({'params': params}, x, mutable=['stats'])
        return layers.collect_stats(plan, seen['stats'])

    stats = jax.eval_shape(observed)
    assert {path: tuple(roles) for path, roles in stats.items()} == {
        'attend/scores': ('lhs', 'rhs'), 'attend/mix': ('lhs', 'rhs'),
    }  # fmt: skip
    row = {'scale': jnp.float32(0.25), 'zero_point': jnp.float32(8)}
    products = {name: {'lhs': row, 'rhs': row} for name in ('scores', 'mix')}
    variables = {'params': params, 'quant': {'attend': products}}

    @compiled
    def rounded(variables, x):
        with layers.fake_quantized(plan):
            return Attending().apply(variables, x)

    def fake(tensor):
        return (jnp.clip(jnp.round(tensor / 0.25) + 8, 0, 15) - 8) * 0.25

    @compiled
    def by_hand(params, x):
        q, k, v = (
            nn.Dense(8).apply({'params': params[n]}, x).reshape(2, 5, 2, 4).swapaxes(1, 2)
            for n in 'qkv'
        )
        scores = jax.nn.softmax(fake(q) @ fake(k).swapaxes(2, 3) / 2)
        mixed = (fake(scores) @ fake(v)).swapaxes(1, 2).reshape(2, 5, 8)
        return nn.Dense(4).apply({'params': params['out']}, mixed)

    np.testing.assert_allclose(rounded(variables, x), by_hand(params, x), atol=16 * EPS)


def test_attention_whose_products_stay_float_stays_in_one_piece():
    params, x = attending()
    plan = {
        'attend/scores': LayerSpec(weight=None, inputs=None),
        'attend/mix': LayerSpec(weight=None, inputs=None),
    }

    def program(*plans):
        def run(p, x):
            for entered in plans:
                with layers.fake_quantized(entered):
                    return Attending().apply({'params': p}, x)
            return Attending().apply({'params': p}, x)

        return str(jax.make_jaxpr(run)(params, x))

    assert program(plan) == program()


WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')


@pytest.mark.parametrize('module, shape', [
    (nn.Dense(5), (2, 3)), (nn.Conv(5, (3, 3)), (2, 4, 4, 3)),
], ids=['dense', 'conv'])  # fmt: skip
def test_factors_of_channels_rescale_the_rounded_kernel_in_every_mode(module, shape):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
    params = random_params(module, x)
    scale, zero_point = calibrate_weight(params['kernel'], WEIGHT)
    codes = numerics.quantize(params['kernel'], scale, zero_point, *WEIGHT.grid)
    kernel = numerics.dequantize(codes, scale, zero_point)
    # Each image has factors of its own, as where each is at a timestep of its own.
    ends = {'input': rng.uniform(0.5, 2, (2, 3)), 'output': rng.uniform(0.5, 2, (2, 5))}
    channels = {end: jnp.asarray(factor.astype(np.float32)) for end, factor in ends.items()}
    want, apply = [], compiled(module.apply)
    for i in range(2):
        both = ends['input'][i][:, None] * ends['output'][i]
        rescaled = jnp.asarray((np.asarray(kernel) * both).astype(np.float32))
        want.append(apply({'params': {**params, 'kernel': rescaled}}, x[i : i + 1]))
    plan = {'': LayerSpec(weight=WEIGHT, inputs=None)}
    weight = {'codes': codes, 'scale': scale, 'zero_point': zero_point}
    packed = pack(codes, scale, zero_point, spec=WEIGHT)
    rounded = {'kernel': kernel, 'bias': params['bias']}
    entries = [
        (layers.fake_quantized, rounded, {'channels': channels}),
        (layers.fake_quantized, rounded, {'channels': channels, 'weight': weight}),
        (layers.integer, {'bias': params['bias']},
         {'channels': channels, 'weight': integer_weight(packed)}),
    ]  # fmt: skip
    for context, params, quant in entries:

        @compiled
        def run(variables, x, context=context):
            with context(plan):
                return module.apply(variables, x)

        got = run({'params': params, 'quant': quant}, x)
        # Float32 sums of up to 27 products, in another order.
        np.testing.assert_allclose(
            got, np.concatenate(want), atol=27 * EPS * float(jnp.max(jnp.abs(got)))
        )


def test_calls_are_recorded_with_inputs_before_rounding_and_run_by_themselves():
    network, x = NETWORK, X
    with layers.recorded_calls(lambda path: path in ('conv', 'block')) as calls:
        plain = network.apply({'params': PARAMS}, x, 0)
    assert list(calls) == ['conv', 'block']
    np.testing.assert_array_equal(calls['conv'].args[0], x)
    call = calls['block']
    again = call.module.apply({'params': PARAMS['block']}, *call.args, **call.kwargs)
    np.testing.assert_array_equal(again, call.output)
    assert plain.shape[-1] == 2
    with layers.recorded_calls(lambda path: path == 'conv') as calls:
        run_fake(0)
    np.testing.assert_array_equal(calls['conv'].args[0], x)


class Joining(nn.Module):
    """A layer whose input is two tensors, of 4 and 2 channels."""

    layer: nn.Module

    @property
    def joined_inputs(self):
        return {'layer': 4}

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


HALVES = ('layer/inputs_0_4', 'layer/inputs_4_6')


def split_case(module, bits):
    """Network, parameters, plan of the two halves, their entries in `quant`, and an input."""
    rng = np.random.default_rng(3)
    network = Joining(module)
    x = jnp.asarray(rng.standard_normal((2, 5, 5, 6)).astype(np.float32))
    params = random_params(network, x)
    params['layer']['bias'] = jnp.asarray([0.5, -0.25, 1.0])
    weight = QuantSpec(bits=bits, symmetric=bits < 8, per_channel=True)
    plan = dict.fromkeys(
        HALVES, LayerSpec(weight=weight, inputs=QuantSpec(bits=bits, symmetric=False))
    )
    entries = {}
    for path, (begin, end) in zip(HALVES, ((0, 4), (4, 6)), strict=True):
        kernel = params['layer']['kernel'][..., begin:end, :]
        scale, zero_point = calibrate_weight(kernel, weight)
        codes = numerics.quantize(kernel, scale, zero_point, *weight.grid)
        pair = observers.compute_scale(
            x[..., begin:end].min(), x[..., begin:end].max(), plan[path].inputs
        )
        entries[path] = {
            'input': dict(zip(('scale', 'zero_point'), pair, strict=True)),
            'weight': {'codes': codes, 'scale': scale, 'zero_point': zero_point},
        }
    return network, params, plan, entries, x


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize(
    'module', [nn.Dense(3), nn.Conv(3, (3, 3), padding=1, strides=2)], ids=['dense', 'conv']
)
def test_a_layer_in_two_parts_is_the_sum_of_two_layers_in_every_mode(module, bits):
    network, params, plan, entries, x = split_case(module, bits)
    halves = {path.rpartition('/')[2]: entry for path, entry in entries.items()}
    kernels = {p: numerics.dequantize(*entry['weight'].values()) for p, entry in entries.items()}

    @compiled
    def by_hand(x):
        total = jnp.zeros(())
        for path, (begin, end) in zip(HALVES, ((0, 4), (4, 6)), strict=True):
            x_hat = layers.fake_quantize_input(
                x[..., begin:end], entries[path]['input'], plan[path].inputs
            )
            layer = module.clone(use_bias=False)
            total = total + layer.apply({'params': {'kernel': kernels[path]}}, x_hat)
        return total + params['layer']['bias'].reshape((1,) * (total.ndim - 1) + (3,))

    def mode(context):
        @compiled
        def run(layer, halves, x):
            with context(plan):
                return network.apply({'params': {'layer': layer}, 'quant': {'layer': halves}}, x)

        return run

    want, bias = by_hand(x), params['layer']['bias']
    from_codes = mode(layers.fake_quantized)(params['layer'], halves, x)
    rounded = {'kernel': jnp.concatenate(list(kernels.values()), axis=-2), 'bias': bias}
    inputs = {name: {'input': entry['input']} for name, entry in halves.items()}
    from_kernels = mode(layers.fake_quantized)(rounded, inputs, x)
    packed = {
        name: {
            **entry,
            'weight': integer_weight(pack(**entry['weight'], spec=plan[HALVES[0]].weight)),
        }
        for name, entry in halves.items()
    }
    integers = mode(layers.integer)({'bias': bias}, packed, x)
    # Sums of at most 54 products in another order.
    tolerance = 54 * EPS * float(jnp.max(jnp.abs(want)))
    for got in (from_codes, from_kernels, integers):
        assert float(jnp.max(jnp.abs(got - want))) < tolerance


def test_the_parts_of_a_layer_are_observed_beside_the_whole():
    network, params, plan, _, x = split_case(nn.Dense(3), 4)
    plan = {'layer': SPEC, **plan}
    with layers.observe_inputs(plan, 8):
        _, found = network.apply({'params': params}, x, mutable=['stats'])
    stats = layers.collect_stats(plan, found['stats'])
    assert set(stats) == set(plan)
    for path, (begin, end) in zip(plan, ((0, 6), (0, 4), (4, 6)), strict=True):
        part = x[..., begin:end]
        assert float(stats[path]['input'].low) == float(part.min())
        assert float(stats[path]['input'].high) == float(part.max())


def test_what_a_module_says_of_its_layers_is_found():
    network, params, _, _, x = split_case(nn.Dense(3), 4)
    assert layers.quantizable_layers(network.apply, params, x)['layer'].joined == 4
