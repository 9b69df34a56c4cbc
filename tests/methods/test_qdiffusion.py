import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import methods
from dmq_jax.config import BlockLearningConfig, QDiffusionConfig, RoundToNearestConfig
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec, QuantizableLayer, part_at, split_joined
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
        optimizer = phase.optimizer(state, base.Decay(1))
        updates, _ = optimizer.update(gradients, optimizer.init(state), state)
        moved = {
            name for name, tree in updates.items() if any(u.any() for u in jax.tree.leaves(tree))
        }
        assert moved == {group}


@pytest.mark.parametrize('num_iterations', [1, 100])
def test_the_rate_is_what_the_iterations_ask_for_unless_it_is_given(num_iterations):
    for rate, moved in ((None, 20.0 / num_iterations), (0.3, 0.3)):
        method, state = start(rounding_learning_rate=rate)
        optimizer = method.phases[0].optimizer(state, base.Decay(num_iterations))
        updates, _ = optimizer.update(state, optimizer.init(state), state)
        # Adam's first step is its rate, but for its epsilon.
        np.testing.assert_allclose(np.abs(updates['rounding']['a']).max(), moved, rtol=1e-5)


def test_the_mean_error_of_a_layer_goes_into_its_bias():
    params = {**PARAMS, 'a': {**PARAMS['a'], 'bias': jnp.arange(5.0)}}
    method = methods.make(QDiffusionConfig(), PLAN)
    state = method.init(params, stats(), jax.random.key(0))
    error = jnp.linspace(-1, 1, 5)
    for phase in method.phases:
        state = phase.correct(state, error)
    bound = method.bind(params, state)
    np.testing.assert_allclose(bound.params['a/bias'], np.arange(5.0) + 2 * np.asarray(error))
    assert set(bound.params) == {'a/bias'}  # 'edge' learns nothing
    uncorrected = methods.make(
        QDiffusionConfig(learning=BlockLearningConfig(correct_bias=False)), PLAN
    )
    assert all(phase.correct is None for phase in uncorrected.phases)


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


class Single(nn.Module):
    """One layer at the path 'layer'."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name='layer')(x)


def test_splitting_a_layer_lowers_its_error_tenfold_where_its_halves_differ_fiftyfold():
    # Q-Diffusion, section 4.2: the ranges of the two halves differ by up to 200.
    rng = np.random.default_rng(2)
    ratio = np.repeat([1.0, 50.0], 16)
    x = (rng.standard_normal((256, 32)) * ratio).astype(np.float32)
    kernel = jnp.asarray((rng.standard_normal((32, 8)) / ratio[:, None]).astype(np.float32))
    layers = {'layer': QuantizableLayer(kind='dense', weight_shape=(32, 8), joined=16)}
    whole = {'layer': LayerSpec(weight=WEIGHT, inputs=INPUT)}
    params = {'layer': {'kernel': kernel}}

    def error(plan):
        parts = [(path, part_at(path)) for path in plan]
        seen = {path: x if part is None else x[:, part.begin : part.end] for path, part in parts}
        stats = {
            path: {'input': observers.observe(jnp.asarray(values), 512)}
            for path, values in seen.items()
        }
        stats = jax.tree.map(lambda leaf: leaf[None], stats)
        method = methods.make(QDiffusionConfig(), plan)
        bound = method.bind(params, method.init(params, stats, jax.random.key(0)))
        rows = jax.tree.map(lambda table: table[0], bound.tables)
        got = base.apply_fake(
            Single().apply, plan, base.with_weights(params, bound.weights), rows, jnp.asarray(x)
        )
        return float(jnp.mean((got - x @ kernel) ** 2))

    before, after = error(whole), error(split_joined(whole, layers))
    assert after < before / 10, f'{before:.4g} -> {after:.4g}'
