import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmq_jax import methods
from dmq_jax.config import (
    ChannelFactorsConfig,
    EfficientDMConfig,
    RoundToNearestConfig,
    SVDQuantConfig,
)
from dmq_jax.methods import base, efficientdm
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

EPS = float(np.finfo(np.float32).eps)
WEIGHT = QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax')
ASYMMETRIC = QuantSpec(bits=4, symmetric=False, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')
EIGHT = QuantSpec(bits=8, symmetric=False, observer='minmax')

PLAN = {
    'small': LayerSpec(weight=WEIGHT, inputs=INPUT),
    'large': LayerSpec(weight=ASYMMETRIC, inputs=INPUT),
    'product': LayerSpec(weight=None, inputs=INPUT),
    'weights_only': LayerSpec(weight=WEIGHT, inputs=None),
    'edge': LayerSpec(weight=WEIGHT, inputs=EIGHT, per_timestep=False, trainable=False),
}
SIZES = {'small': 0.01, 'large': 3.0, 'weights_only': 1.0, 'edge': 1.0}
ROLES = {'small': ['input'], 'large': ['input'], 'product': ['lhs', 'rhs'], 'edge': ['input']}
NUM_ROWS = 4


def random_params():
    rng = np.random.default_rng(0)
    layers = {
        path: {'kernel': jnp.asarray(size * rng.standard_normal((6, 5)).astype(np.float32))}
        for path, size in SIZES.items()
    }
    affine = {name: jnp.asarray(rng.standard_normal(5), jnp.float32) for name in ('scale', 'bias')}
    return layers | {'norm': affine, 'classes': {'embedding': jnp.ones((3, 5))}}


def random_stats():
    rng = np.random.default_rng(1)

    def one():
        values = rng.standard_normal((NUM_ROWS, 30)).astype(np.float32)
        return TensorStats(values.min(-1), values.max(-1), values)

    return {path: {role: one() for role in roles} for path, roles in ROLES.items()}


PARAMS, STATS = random_params(), random_stats()


def start(**options):
    method, state = started(tuple(options.items()))
    # Trees of the caller's own, since tests change them.
    return method, jax.tree.map(lambda leaf: leaf, state)


@functools.cache
def started(options):
    config = EfficientDMConfig(**{'lora_rank': 3, **dict(options)})
    method = methods.make(config, PLAN)
    return method, jax.jit(method.init)(PARAMS, STATS, jax.random.key(0))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('base_weights', ['float', 'dequantized'])
def test_it_starts_from_round_to_nearest_exactly(base_weights):
    method, state = start(base=base_weights)
    nearest = methods.make(RoundToNearestConfig(), PLAN)
    want = nearest.bind(PARAMS, jax.jit(nearest.init)(PARAMS, STATS, jax.random.key(1)))
    found = method.bind(PARAMS, state)
    assert_same(found._replace(params={}), want)
    for name, leaf in found.params.items():
        np.testing.assert_array_equal(leaf, base.get_leaf(PARAMS, name))


def test_with_a_branch_it_starts_from_svdquant_exactly():
    method, state = start(branch_rank=2)
    no_factors = ChannelFactorsConfig(strength=0.0)
    branched = methods.make(SVDQuantConfig(rank=2, channels=no_factors), PLAN)
    want = branched.bind(PARAMS, jax.jit(branched.init)(PARAMS, STATS, jax.random.key(1)))
    assert want.branches.keys() == {'small', 'large', 'weights_only'}
    assert_same(method.bind(PARAMS, state)._replace(params={}), want)


def test_a_branch_that_has_learnt_leaves_the_integers_and_is_held_by_float16():
    method, state = start(branch_rank=2)
    before = method.bind(PARAMS, state)
    state['branch']['large'] = jax.tree.map(lambda a: a + 0.1234567, state['branch']['large'])
    after = method.bind(PARAMS, state)
    assert_same(after.weights, before.weights)
    for name, half in after.branches['large'].items():
        np.testing.assert_array_equal(half, np.asarray(half, np.float16).astype(np.float32))
        assert not np.array_equal(half, before.branches['large'][name])


def test_a_branch_is_trained_straight_through_its_rounding():
    method, state = start(branch_rank=2)

    def loss(state):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(method.bind(PARAMS, state).branches))

    gradients = jax.jit(jax.grad(loss))(state)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(gradients['branch']))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients['calibrated']))


def test_the_update_is_added_before_rounding():
    method, state = start()
    up = jnp.asarray(np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32))
    state['lora']['large']['up'] = up
    merged = PARAMS['large']['kernel'] + state['lora']['large']['down'] @ up
    calibrated = state['calibrated']['weight']['large']
    want = base.quantize_weight(merged, **calibrated, spec=PLAN['large'])
    bound = method.bind(PARAMS, state)
    assert_same(bound.weights['large'], want)
    assert not np.array_equal(
        want.codes, base.quantize_weight(PARAMS['large']['kernel'], **calibrated,
                                         spec=PLAN['large']).codes
    )  # fmt: skip


def test_the_dequantized_base_forgets_the_rounding_error():
    # An update of 0.3 steps moves a weight at 0.4 steps across the boundary only if the float
    # weight is the base.
    kernel = jnp.asarray([[0.4], [7.0]])
    spec = LayerSpec(
        weight=QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax'), inputs=None
    )
    codes = {}
    for base_weights in ('float', 'dequantized'):
        config = EfficientDMConfig(lora_rank=1, base=base_weights)
        method = methods.make(config, {'layer': spec})
        params = {'layer': {'kernel': kernel}}
        state = method.init(params, {}, jax.random.key(0))
        state['lora']['layer'] = {'down': jnp.asarray([[0.3], [0.0]]), 'up': jnp.ones((1, 1))}
        codes[base_weights] = method.bind(params, state).weights['layer'].codes[0, 0]
    assert codes == {'float': 1.0, 'dequantized': 0.0}


def test_gradients_do_not_reach_the_calibration_or_the_float_weights():
    method, state = start()

    def loss(params, state):
        bound = method.bind(params, state)
        total = sum(jnp.sum(base.dequantize_weight(w) ** 2) for w in bound.weights.values())
        return total + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(bound.tables))

    gradients = jax.jit(jax.grad(loss, 1))(PARAMS, state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients['calibrated']))
    for path in ('small', 'large', 'weights_only'):
        # The update starts at zero: its `up` learns first (LoRA).
        assert np.any(gradients['lora'][path]['up']) and not np.any(gradients['lora'][path]['down'])


def test_a_scale_never_reaches_zero():
    method, state = start()
    for group in ('weight', 'input'):
        state[group] = jax.tree.map(lambda leaf: leaf - 5.0, state[group])
    bound = method.bind(PARAMS, state)
    first = start()[1]['calibrated']
    for path in ('small', 'large', 'weights_only'):
        scale = np.asarray(bound.weights[path].scale)
        np.testing.assert_allclose(scale, 0.05 * first['weight'][path]['scale'], rtol=EPS)
        assert scale.min() > 0
    assert float(bound.tables['product']['rhs']['scale'].min()) > 0


@pytest.mark.parametrize('offset', [0.3, -0.7, 4.49, 100.0, -100.0])
def test_zero_points_stay_integers_on_the_grid(offset):
    method, state = start()
    for roles in state['input'].values():
        for table in roles.values():
            table['zero_point'] = table['zero_point'] + offset
    bound = method.bind(PARAMS, state)
    for path in ('small', 'large', 'product'):
        for role, table in bound.tables[path].items():
            first = np.asarray(state['calibrated']['input'][path][role]['zero_point'])
            want = np.clip(np.rint(first + np.float32(offset)), 0, 15)
            np.testing.assert_array_equal(table['zero_point'], want)


@pytest.mark.parametrize('zero_point, gradient', [(0.0, 1.0), (15.0, 1.0), (7.2, 1.0), (-2.0, 0.0)])
def test_a_zero_point_at_the_end_of_the_grid_has_its_whole_gradient(zero_point, gradient):
    table = {'scale': jnp.ones(1), 'zero_point': jnp.asarray([zero_point])}
    learnt = {'scale': jnp.ones(1), 'zero_point': jnp.zeros(1)}
    got = jax.grad(
        lambda learnt: jnp.sum(efficientdm.learnt_table(table, learnt, (0, 15))['zero_point'])
    )
    # jnp.clip would pass half: and 0 is where the zero point of every positive tensor is.
    assert float(got(learnt)['zero_point'][0]) == gradient


def train(num_steps, **options):
    """A few steps on gradients of ones; returns the states before and after."""
    method, state = start(**options)
    optimizer = method.optimizer(state, lambda step: 1.0)
    moments = optimizer.init(state)
    gradients = jax.tree.map(jnp.ones_like, state)

    @jax.jit
    def step(moments, state):
        updates, moments = optimizer.update(gradients, moments, state)
        return moments, jax.tree.map(jnp.add, state, updates)

    after = state
    for _ in range(num_steps):
        moments, after = step(moments, after)
    return state, after


def test_an_update_learns_at_a_rate_proportional_to_the_scale_of_its_layer():
    before, after = train(1, lora_rate_per_scale=0.1)
    for path, update in before['lora'].items():
        mean = float(jnp.mean(before['calibrated']['weight'][path]['scale']))
        step = np.asarray(update['up'] - after['lora'][path]['up'])
        # Adam's first step has size 1 up to its eps; a difference in float32.
        np.testing.assert_allclose(step, 0.1 * mean, rtol=1e-5)


def test_without_scale_awareness_all_updates_learn_at_the_mean_rate():
    before, after = train(1, lora_rate_per_scale=0.1, scale_aware=False)
    scales = [jnp.mean(before['calibrated']['weight'][path]['scale']) for path in before['lora']]
    for path, update in before['lora'].items():
        step = np.asarray(update['up'] - after['lora'][path]['up'])
        np.testing.assert_allclose(step, 0.1 * np.mean(scales), rtol=1e-5)


def test_each_group_moves_by_its_own_rate_and_the_calibration_not_at_all():
    before, after = train(
        1, weight_scale_learning_rate=1e-3, input_scale_learning_rate=2e-3,
        zero_point_learning_rate=3e-3,
    )  # fmt: skip
    # 1 - 1e-3 in float32 is off by 6e-8: 6e-5 of the step.
    for leaf in jax.tree.leaves(after['weight']):
        np.testing.assert_allclose(1 - leaf, 1e-3, rtol=1e-4)
    for roles in after['input'].values():
        for table in roles.values():
            np.testing.assert_allclose(1 - table['scale'], 2e-3, rtol=1e-4)
            np.testing.assert_allclose(-table['zero_point'], 3e-3, rtol=1e-5)
    assert_same(after['calibrated'], before['calibrated'])


def test_biases_and_normalizations_are_trained_and_nothing_else_in_float():
    before, after = train(1, affine_learning_rate=1e-3)
    assert sorted(before['affine']) == ['norm/bias', 'norm/scale']
    method, _ = start(affine_learning_rate=1e-3)
    first, last = (method.bind(PARAMS, state) for state in (before, after))
    for name, leaf in (('norm/bias', 'bias'), ('norm/scale', 'scale')):
        np.testing.assert_array_equal(first.params[name], PARAMS['norm'][leaf])
        # Values up to 2.4 in float32 carry the step of 1e-3 to 2.4e-7.
        np.testing.assert_allclose(first.params[name] - last.params[name], 1e-3, rtol=5e-4)


def test_without_a_rate_of_their_own_biases_stay_the_teachers():
    method, state = start(affine_learning_rate=0.0)
    assert state['affine'] == {}
    assert method.bind(PARAMS, state).params == {}


def test_the_rates_follow_the_decay():
    method, state = start(weight_scale_learning_rate=1e-2)
    optimizer = method.optimizer(state, lambda step: jnp.where(step < 1, 1.0, 0.0))
    gradients, moments = jax.tree.map(jnp.ones_like, state), optimizer.init(state)
    update = jax.jit(optimizer.update)
    first, moments = update(gradients, moments, state)
    second, _ = update(gradients, moments, state)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(first['weight']))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(second))


def test_layers_that_are_not_trainable_keep_their_calibration():
    before, after = train(3, lora_rate_per_scale=10.0, input_scale_learning_rate=0.1)
    assert 'edge' not in before['lora'] and 'edge' not in before['input']
    method, _ = start()
    first, last = (method.bind(PARAMS, state) for state in (before, after))
    assert_same(first.weights['edge'], last.weights['edge'])
    assert_same(first.tables['edge'], last.tables['edge'])
    assert not np.array_equal(first.weights['large'].codes, last.weights['large'].codes)


# -- Adam by rows --------------------------------------------------------------------------------


def run_adam(optimizer, gradients):
    params = {'a': jnp.zeros(NUM_ROWS), 'b': jnp.zeros((NUM_ROWS, 2))}
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates = {'a': gradient, 'b': jnp.stack([gradient, -2 * gradient], -1)}
        steps, state = base.promoting(optimizer).update(updates, state)
        history.append(steps)
    return history, state


def random_gradients(num_steps):
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.standard_normal(NUM_ROWS).astype(np.float32)) for _ in range(num_steps)]


def test_with_every_row_visited_it_is_adam():
    gradients = random_gradients(6)
    rows, _ = run_adam(efficientdm.scale_by_row_adam(), gradients)
    whole, _ = run_adam(optax.scale_by_adam(), gradients)
    for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(whole), strict=True):
        # Powers of b2 in float32: 1 - 0.999^c loses three digits, in either.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_rows_without_a_gradient_do_not_move_and_do_not_forget():
    mask = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    others = 1 - mask
    gradients = random_gradients(6)
    masked = [g * (mask if i % 2 else others) for i, g in enumerate(gradients)]
    history, state = run_adam(efficientdm.scale_by_row_adam(), masked)
    for i, steps in enumerate(history):
        still = np.asarray(others if i % 2 else mask, bool)
        assert not np.any(np.asarray(steps['a'])[still])
        assert np.all(np.asarray(steps['a'])[~still])
    np.testing.assert_array_equal(state.count['a'], [3, 3, 3, 3])
    # Each row has gone the way it would have gone alone.
    alone, _ = run_adam(efficientdm.scale_by_row_adam(), gradients[1::2])
    for got, want in zip(history[1::2], alone, strict=True):
        np.testing.assert_array_equal(
            np.asarray(got['b'])[np.asarray(mask, bool)],
            np.asarray(want['b'])[np.asarray(mask, bool)],
        )
