import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import methods
from dmq_jax.config import BlockLearningConfig, QDiffusionConfig, RoundToNearestConfig
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')
PLAN = {
    'a': LayerSpec(weight=WEIGHT, inputs=INPUT),
    'edge': LayerSpec(weight=WEIGHT, inputs=INPUT, trainable=False),
    'product': LayerSpec(weight=None, inputs=INPUT),
}
RNG = np.random.default_rng(0)
PARAMS = {
    path: {'kernel': jnp.asarray(RNG.standard_normal((6, 5)).astype(np.float32))}
    for path in ('a', 'edge')
}


def stats():
    values = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    tensor = TensorStats(values.min(-1), values.max(-1), values)
    return {'a': {'input': tensor}, 'edge': {'input': tensor},
            'product': {'lhs': tensor, 'rhs': tensor}}  # fmt: skip


def start(**learning):
    method = methods.make(QDiffusionConfig(learning=BlockLearningConfig(**learning)), PLAN)
    return method, method.init(PARAMS, stats(), jax.random.key(0))


def test_it_starts_as_round_to_nearest():
    method, state = start()
    nearest = methods.make(RoundToNearestConfig(), PLAN)
    want = nearest.bind(PARAMS, nearest.init(PARAMS, stats(), jax.random.key(0)))
    got = method.bind(PARAMS, state)
    for path, weight in want.weights.items():
        for a, b in zip(got.weights[path], weight, strict=True):
            np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, got.tables, want.tables)


def test_each_phase_moves_its_own_group_alone():
    method, state = start()
    gradients = jax.tree.map(jnp.ones_like, state)
    for phase, group in zip(method.phases, ('rounding', 'input'), strict=True):
        optimizer = phase.optimizer(state, lambda step: 1.0)
        with jax.numpy_dtype_promotion('standard'):
            updates, _ = optimizer.update(gradients, optimizer.init(state), state)
        moved = {
            name for name, tree in updates.items() if any(u.any() for u in jax.tree.leaves(tree))
        }
        assert moved == {group}


def test_the_first_phase_leaves_activations_alone_and_the_second_has_codes():
    method, state = start()
    rounding, scales = method.phases
    assert not rounding.rounds_inputs and scales.rounds_inputs
    half = jnp.asarray(0.5)
    soft = rounding.bind(PARAMS, state, half).weights['a'].codes
    hard = scales.bind(PARAMS, state, half).weights['a'].codes
    assert np.mean(np.asarray(soft) != np.rint(np.asarray(soft))) > 0.5
    np.testing.assert_array_equal(hard, np.rint(np.asarray(hard)))


def test_the_penalty_waits_for_the_warm_up():
    method, state = start(warm_up=0.2, penalty_weight=0.01)
    penalty = method.phases[0].penalty
    assert float(penalty(state, jnp.asarray(0.1))) == 0
    assert float(penalty(state, jnp.asarray(0.5))) > 0
    # 30 weights of which none can count more than 1.
    assert float(penalty(state, jnp.asarray(1.0))) <= 0.3


def test_zero_points_and_untrainable_layers_have_nothing_to_learn():
    _, state = start()
    assert set(state['rounding']) == {'a'}
    assert set(state['input']) == {'a', 'product'}
    assert {role: leaf.shape for role, leaf in state['input']['product'].items()} == {
        'lhs': (3,), 'rhs': (3,),
    }  # fmt: skip
