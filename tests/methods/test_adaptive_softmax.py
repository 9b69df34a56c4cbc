import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.config import AdaptiveSoftmaxConfig
from dmq_jax.methods import adaptive_softmax, base
from dmq_jax.quant import numerics, observers
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.rows import fake_quantize_input
from dmq_jax.quant.tensor import QuantSpec

INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')
PLAN = {'attention/mix': LayerSpec(weight=None, inputs=INPUT)}
PAPER = AdaptiveSoftmaxConfig()


def power_law(exponent, size=4096, seed=0):
    """Values between 1e-3 and 1 of density x^-exponent."""
    u = np.random.default_rng(seed).uniform(size=size)
    a, b = 1e-3 ** (1 - exponent), 1.0
    return ((a + u * (b - a)) ** (1 / (1 - exponent))).astype(np.float32)


def exponential(scale, size=4096, seed=0):
    return np.random.default_rng(seed).exponential(scale, size).astype(np.float32).clip(0, 1)


def even(size=4096, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, size).astype(np.float32)


POWER_LAWS = [power_law(2.5), power_law(3.0)]
OTHERS = [exponential(0.1), exponential(0.3), even()]


@jax.jit
def observe(moments):
    return jax.vmap(lambda x: observers.observe(x, 1024))(moments)


def observed(*moments):
    """Statistics of a softmax, one row for each of `moments`."""
    tensor = observe(np.stack(moments))
    return {'attention/mix': {'lhs': tensor, 'rhs': tensor}}


@functools.partial(jax.jit, static_argnums=1)
def init(stats, config):
    return adaptive_softmax.init(PLAN, stats, base.init_inputs(PLAN, stats), config)


@jax.jit
def error(x, table, i):
    row = {name: jnp.asarray(entry)[i] for name, entry in table.items()}
    return jnp.mean((fake_quantize_input(x, row, INPUT) - x) ** 2)


def oracle_ratio(values, quantile):
    """The two maximum likelihoods in float64, written out."""
    x = values.astype(np.float64)
    x_min = np.quantile(x, quantile)
    x = x[x >= x_min]
    a = 1 + len(x) / np.log(x / x_min).sum()
    rate = 1 / (x - x_min).mean()
    power = np.log((a - 1) / x_min) - a * np.log(x / x_min)
    return (power - (np.log(rate) - rate * (x - x_min))).mean()


@pytest.mark.parametrize('values', POWER_LAWS + OTHERS)
def test_the_ratio_of_likelihoods_is_its_definition(values):
    got = adaptive_softmax.log_likelihood_ratio(jnp.asarray(values)[None], 0.1)[0]
    # Means of thousands of float32 logarithms.
    assert float(got) == pytest.approx(oracle_ratio(values, 0.1), abs=2e-4)


def test_powers_on_power_laws_and_an_even_grid_otherwise_at_each_timestep():
    moments = [POWER_LAWS[0], OTHERS[0], POWER_LAWS[1], OTHERS[1], OTHERS[2]]
    table = init(observed(*moments), PAPER)['attention/mix']['lhs']
    np.testing.assert_array_equal(table['powers'] > 0, [True, False, True, False, False])
    np.testing.assert_array_equal(table['zero_point'], np.zeros(5))


@pytest.mark.parametrize('choice', ['likelihood', 'error'])
def test_the_choice_loses_to_neither_grid(choice):
    moments = POWER_LAWS + OTHERS
    stats = observed(*moments)
    tables = {
        name: init(stats, AdaptiveSoftmaxConfig(choice=name))['attention/mix']['lhs']
        for name in (choice, 'uniform', 'powers')
    }
    for i, x in enumerate(moments):
        chosen, *fixed = (error(x, table, i) for table in tables.values())
        assert chosen <= min(fixed) * (1 + 1e-6), i


def test_timesteps_of_one_group_choose_together():
    moments = [POWER_LAWS[0], POWER_LAWS[1], OTHERS[0], OTHERS[1]]
    stats = observed(*moments)
    two = init(stats, AdaptiveSoftmaxConfig(num_groups=2))['attention/mix']['lhs']['powers']
    one = init(stats, AdaptiveSoftmaxConfig(num_groups=1))['attention/mix']['lhs']['powers']
    np.testing.assert_array_equal(two > 0, [True, True, False, False])
    assert len(set(np.asarray(one > 0).tolist())) == 1


def test_only_the_softmax_has_a_choice():
    tables = init(observed(POWER_LAWS[0]), PAPER)['attention/mix']
    assert 'powers' in tables['lhs'] and 'powers' not in tables['rhs']
    plan = {'attention/scores': PLAN['attention/mix']}
    stats = {'attention/scores': observed(POWER_LAWS[0])['attention/mix']}
    tables = adaptive_softmax.init(plan, stats, base.init_inputs(plan, stats), PAPER)
    assert 'powers' not in tables['attention/scores']['lhs']


def test_a_softmax_on_powers_has_at_most_two_to_the_bits_values():
    x = jnp.asarray(POWER_LAWS[0])
    got = numerics.fake_quantize_powers(x, jnp.max(x), numerics.largest_exponent(4))
    assert len(np.unique(np.asarray(got))) <= 16
