import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import methods
from dmq_jax.config import QLoRAConfig, RoundToNearestConfig
from dmq_jax.methods.base import Decay, num_trained
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

RANK = 2
WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=8, symmetric=False, observer='minmax')
PLAN = {
    'dense': LayerSpec(weight=WEIGHT, inputs=INPUT),
    'conv': LayerSpec(weight=WEIGHT, inputs=None),
    'edge': LayerSpec(weight=WEIGHT, inputs=INPUT, trainable=False),
}
SHAPES = {'dense': (6, 5), 'conv': (3, 3, 4, 7), 'edge': (6, 5)}
RNG = np.random.default_rng(0)
PARAMS = {
    path: {'kernel': jnp.asarray(RNG.standard_normal(shape), jnp.float32)}
    for path, shape in SHAPES.items()
}


def start():
    values = RNG.standard_normal((3, 30)).astype(np.float32)
    seen = TensorStats(values.min(-1), values.max(-1), values)
    stats = {path: {'input': seen} for path, spec in PLAN.items() if spec.inputs is not None}
    method = methods.make(QLoRAConfig(rank=RANK), PLAN)
    nearest = methods.make(RoundToNearestConfig(), PLAN)
    key = jax.random.key(0)
    rounded = nearest.bind(PARAMS, nearest.init(PARAMS, stats, key))
    return method, method.init(PARAMS, stats, key), rounded


def test_it_starts_as_round_to_nearest_with_branches_that_add_nothing():
    method, state, rounded = start()
    bound = method.bind(PARAMS, state)
    jax.tree.map(np.testing.assert_array_equal, bound.weights, rounded.weights)
    jax.tree.map(np.testing.assert_array_equal, bound.tables, rounded.tables)
    assert bound.branches.keys() == {'dense', 'conv'}
    for path, branch in bound.branches.items():
        *taps, k, n = SHAPES[path]
        assert branch['down'].shape == (*taps, k, RANK) and np.any(branch['down'] != 0)
        np.testing.assert_array_equal(branch['up'], np.zeros((RANK, n)))


def test_the_branches_are_trained_and_nothing_else():
    method, state, _ = start()
    optimizer = method.optimizer(state, Decay(10))
    ones = jax.tree.map(jnp.ones_like, state)
    updates, _ = optimizer.update(ones, optimizer.init(state), state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates['calibrated']))
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates['branch']))
    numbers = sum(RANK * (np.prod(SHAPES[p][:-1]) + SHAPES[p][-1]) for p in ('dense', 'conv'))
    assert num_trained(state, [method.optimizer]) == numbers


def test_what_learns_lies_beside_integers_that_stand_still():
    method, state, rounded = start()
    state['branch'] = jax.tree.map(lambda leaf: leaf + 0.25, state['branch'])
    bound, beside = method.bind(PARAMS, state), method.beside(state)
    jax.tree.map(np.testing.assert_array_equal, bound.weights, rounded.weights)
    assert not beside.weights
    jax.tree.map(np.testing.assert_array_equal, beside.branches, bound.branches)
    # 16 bits at inference.
    for leaf in jax.tree.leaves(bound.branches):
        np.testing.assert_array_equal(leaf, np.asarray(leaf).astype(np.float16))
