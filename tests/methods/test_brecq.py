import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.methods import brecq
from dmq_jax.quant import observers
from dmq_jax.quant.tensor import QuantSpec

EPS = float(np.finfo(np.float32).eps)
SPECS = [
    QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax'),
    QuantSpec(bits=4, symmetric=False, per_channel=True, group_size=4, observer='minmax'),
]
# V passes through a logarithm and an exponential of float32.
GATE_TOLERANCE = 100 * EPS


def start(spec, shape=(8, 5)):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    scale, zero_point = observers.calibrate_weight(kernel, spec)
    return kernel, brecq.init(kernel, scale), scale, zero_point


@pytest.mark.parametrize('spec', SPECS)
def test_nothing_is_rounded_at_first(spec):
    kernel, v, scale, zero_point = start(spec)
    codes = brecq.soft_codes(kernel, v, scale, zero_point, spec)
    groups = scale.shape[0]
    wide = np.repeat(np.asarray(scale), 8 // groups, axis=0)
    zeros = np.repeat(np.asarray(zero_point), 8 // groups, axis=0)
    error = np.abs((np.asarray(codes) - zeros) * wide - np.asarray(kernel))
    # minmax scales: no weight lies beyond the grid by more than the rounded zero point moves it.
    inside = (np.asarray(codes) > spec.grid[0]) & (np.asarray(codes) < spec.grid[1])
    assert inside.mean() > 0.5
    assert np.max(error[inside] / wide[inside]) < GATE_TOLERANCE


@pytest.mark.parametrize('spec', SPECS)
def test_without_learning_it_is_rounding_to_nearest(spec):
    kernel, v, scale, zero_point = start(spec)
    codes = np.asarray(brecq.hard_codes(kernel, v, scale, zero_point, spec))
    groups = scale.shape[0]
    wide = np.repeat(np.asarray(scale), 8 // groups, axis=0)
    zeros = np.repeat(np.asarray(zero_point), 8 // groups, axis=0)
    want = np.clip(np.rint(np.asarray(kernel) / wide) + zeros, *spec.grid)
    np.testing.assert_array_equal(codes, want)


def test_learnt_codes_are_one_of_the_two_integers_around_the_weight():
    kernel, v, scale, zero_point = start(SPECS[0])
    below = np.floor(np.asarray(kernel / scale))
    for shift, above in ((20.0, 1), (-20.0, 0)):
        codes = brecq.hard_codes(kernel, v + shift, scale, zero_point, SPECS[0])
        np.testing.assert_array_equal(codes, np.clip(below + above, *SPECS[0].grid))


def test_hard_codes_have_the_gradient_of_soft_ones():
    kernel, v, scale, zero_point = start(SPECS[0])

    def total(v, codes):
        return jnp.sum(jnp.sin(kernel) * codes(kernel, v, scale, zero_point, SPECS[0]))

    both = [jax.grad(total)(v, codes) for codes in (brecq.soft_codes, brecq.hard_codes)]
    # Where one of the two lies beyond the grid, only the other has a gradient.
    soft, hard = map(np.asarray, both)
    inside = (soft != 0) & (hard != 0)
    np.testing.assert_array_equal(soft[inside], hard[inside])
    assert np.mean(inside) > 0.8


@pytest.mark.parametrize('v, want', [(-9.0, 0.0), (9.0, 0.0), (0.0, 1.0)])
def test_the_penalty_is_zero_where_all_is_decided_and_one_where_nothing_is(v, want):
    got = brecq.penalty(jnp.full((1,), v), jnp.asarray(2.0))
    assert float(got) == pytest.approx(want, abs=4 * EPS)


def test_the_penalty_pushes_towards_the_nearer_integer():
    slope = jax.grad(lambda v: brecq.penalty(v, jnp.asarray(2.0)))(jnp.asarray([-1.0, 1.0]))
    assert slope[0] > 0 > slope[1]


@pytest.mark.parametrize('progress, want', [(0.0, 20.0), (0.2, 20.0), (0.6, 11.0), (1.0, 2.0)])
def test_beta_waits_and_then_falls(progress, want):
    got = brecq.beta_at(jnp.asarray(progress), warm_up=0.2, start=20.0, end=2.0)
    assert float(got) == pytest.approx(want, rel=10 * EPS)
