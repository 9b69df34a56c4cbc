import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, methods
from dmq_jax.config import TuneQDMConfig
from dmq_jax.methods import base
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

WEIGHT = QuantSpec(bits=4, symmetric=False, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=8, symmetric=False, observer='minmax')
PLAN = {
    'dense': LayerSpec(weight=WEIGHT, inputs=None),
    'conv': LayerSpec(weight=WEIGHT, inputs=INPUT, per_timestep=False),
    'edge': LayerSpec(weight=WEIGHT, inputs=None, trainable=False),
}
SHAPES = {'dense': (6, 5), 'conv': (3, 3, 4, 7), 'edge': (2, 2)}
RNG = np.random.default_rng(0)
PARAMS = {
    path: {'kernel': jnp.asarray(RNG.standard_normal(shape).astype(np.float32))}
    for path, shape in SHAPES.items()
}
T = 100


def stats():
    values = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    return {'conv': {'input': TensorStats(values.min(-1), values.max(-1), values)}}


def start(**options):
    method = methods.make(TuneQDMConfig(**options), PLAN, T)
    return method, method.init(PARAMS, stats(), jax.random.key(0))


@pytest.mark.parametrize('num_experts', [1, 2, 4])
def test_out_plus_in_numbers_are_learnt_per_layer_and_expert(num_experts):
    _, state = start(num_experts=num_experts)
    learnt = {name: group for name, group in state.items() if name != 'calibrated'}
    assert sum(leaf.size for leaf in jax.tree.leaves(learnt)) == num_experts * (6 + 5 + 4 + 7)


def test_peqa_learns_the_scales_of_output_channels_alone():
    _, state = start(scales='output', num_experts=1)
    assert state.keys() == {'output', 'calibrated'}
    assert sum(leaf.size for leaf in jax.tree.leaves(state['output'])) == 5 + 7


@pytest.mark.parametrize('num_experts', [1, 2, 4])
def test_each_interval_of_timesteps_has_its_own_expert(num_experts):
    method, state = start(num_experts=num_experts)
    number = jnp.arange(num_experts, dtype=jnp.float32)[:, None]
    state['output'] = jax.tree.map(lambda leaf: number + 0 * leaf, state['output'])
    tables = denoisers.time_tables(method.bind(PARAMS, state), np.array([90, 10]))
    t = jnp.arange(T)
    rows = denoisers.rows_at(tables, t, 'nearest')
    got = np.asarray(rows['dense']['channels']['output'])[:, 0]
    np.testing.assert_array_equal(got, np.arange(T) * num_experts // T)


def test_the_integers_do_not_move_with_the_scales():
    method, state = start()
    moved = {**state, 'output': jax.tree.map(lambda a: 3 * a, state['output']),
             'input': jax.tree.map(lambda a: 0.5 * a, state['input'])}  # fmt: skip
    first, second = (method.bind(PARAMS, s) for s in (state, moved))
    for a, b in zip(*map(jax.tree.leaves, (first.weights, second.weights)), strict=True):
        np.testing.assert_array_equal(a, b)
    gradients = jax.grad(
        lambda s: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(method.bind(PARAMS, s).weights))
    )(state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_the_first_input_scales_are_one_or_spread_around_it_the_same_for_all_experts():
    _, state = start()
    for leaf in jax.tree.leaves(state['input']):
        np.testing.assert_array_equal(leaf, 1)
    _, state = start(input_spread=0.1)
    for leaf in jax.tree.leaves(state['input']):
        np.testing.assert_array_equal(leaf[0], leaf[1])
        assert 0 < np.std(leaf[0]) < 0.5


def test_a_separable_rescaling_is_learnt_exactly_where_output_scales_alone_cannot():
    # The target is the rounded kernel with channels rescaled at both ends: P1 of the paper.
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((64, 6)).astype(np.float32))
    losses = {}
    for scales in ('both', 'output'):
        method, state = start(scales=scales, num_experts=1, learning_rate=0.02)
        codes = base.dequantize_weight(method.bind(PARAMS, state).weights['dense'])
        ends = (rng.uniform(0.7, 1.3, n).astype(np.float32) for n in (6, 5))
        s_in, s_out = ends if scales == 'both' else (s_in, s_out)  # noqa: F821
        target = ((x * s_in[None]) @ codes) * s_out[None]

        def loss(state, method=method, codes=codes, target=target):
            factors = method.bind(PARAMS, state).channels['dense']
            y = ((x * factors.get('input', jnp.ones((1, 6)))) @ codes) * factors['output']
            return jnp.mean((y - target) ** 2)

        optimizer = method.optimizer(state, lambda step: 1.0)

        @jax.jit
        def step(state, moments, loss=loss, optimizer=optimizer):
            value, gradients = jax.value_and_grad(loss)(state)
            updates, moments = optimizer.update(gradients, moments, state)
            return jax.tree.map(jnp.add, state, updates), moments, value

        moments = optimizer.init(state)
        for _ in range(300):
            state, moments, value = step(state, moments)
        losses[scales] = float(value)
    assert losses['both'] < 0.01 * losses['output'], losses
