import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import methods
from dmq_jax.config import FullFinetuningConfig, RoundToNearestConfig
from dmq_jax.methods.base import Decay, num_trained
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
PLAN = {
    'dense': LayerSpec(weight=WEIGHT, inputs=None),
    'edge': LayerSpec(weight=WEIGHT, inputs=None, trainable=False),
}
RNG = np.random.default_rng(0)
PARAMS = {
    path: {
        'kernel': jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32),
        'bias': jnp.asarray(RNG.standard_normal(5), jnp.float32),
    }
    for path in ('dense', 'edge', 'float')
}


def start(plan):
    method = methods.make(FullFinetuningConfig(), plan)
    return method, method.init(PARAMS, {}, jax.random.key(0))


def test_of_a_float_network_everything_is_trained_and_bound_as_it_is():
    method, state = start({})
    assert num_trained(state, [method.optimizer]) == 3 * (30 + 5)
    moved = {**state, 'params': jax.tree.map(lambda leaf: leaf + 1, state['params'])}
    bound = method.bind(PARAMS, moved)
    assert not bound.weights and not bound.tables
    assert bound.params.keys() == {f'{p}/{leaf}' for p in PARAMS for leaf in ('kernel', 'bias')}
    for name, leaf in bound.params.items():
        path, _, kind = name.rpartition('/')
        np.testing.assert_array_equal(leaf, PARAMS[path][kind] + 1)


def test_kernels_of_a_plan_are_rounded_on_their_calibrated_grids():
    method, state = start(PLAN)
    assert 'edge/kernel' not in state['params'] and 'edge/bias' in state['params']
    nearest = methods.make(RoundToNearestConfig(), PLAN)
    rounded = nearest.bind(PARAMS, nearest.init(PARAMS, {}, jax.random.key(0)))
    bound = method.bind(PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, bound.weights, rounded.weights)
    # The kernels are integers now; all else is trained as float.
    assert bound.params.keys() == {'dense/bias', 'edge/bias', 'float/kernel', 'float/bias'}
    params = state['params'] | {'dense/kernel': -state['params']['dense/kernel']}
    again = method.bind(PARAMS, {**state, 'params': params})
    scale = np.asarray(bound.weights['dense'].scale)
    np.testing.assert_array_equal(again.weights['dense'].scale, scale)
    codes = np.clip(np.rint(-np.asarray(PARAMS['dense']['kernel'], np.float64) / scale), -8, 7)
    np.testing.assert_array_equal(again.weights['dense'].codes, codes)
    np.testing.assert_array_equal(again.weights['edge'].codes, rounded.weights['edge'].codes)


def test_grids_do_not_learn():
    method, state = start(PLAN)
    optimizer = method.optimizer(state, Decay(10))
    ones = jax.tree.map(jnp.ones_like, state)
    updates, _ = optimizer.update(ones, optimizer.init(state), state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates['calibrated']))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates['params']))
