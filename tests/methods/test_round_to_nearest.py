import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import methods
from dmq_jax.config import RoundToNearestConfig
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

WEIGHT = QuantSpec(bits=3, symmetric=True, per_channel=True)
INPUT = QuantSpec(bits=4, symmetric=False)
PLAN = {'layer': LayerSpec(weight=WEIGHT, inputs=INPUT)}


def example():
    rng = np.random.default_rng(0)
    params = {'layer': {'kernel': jnp.asarray(rng.standard_normal((8, 3)).astype(np.float32))}}
    values = rng.standard_normal((2, 50)).astype(np.float32)
    stats = {'layer': {'input': TensorStats(values.min(-1), values.max(-1), values)}}
    return params, stats


def test_weights_and_tables_are_those_of_the_observers():
    params, stats = example()
    method = methods.make(RoundToNearestConfig(), PLAN)
    bound = method.bind(params, method.init(params, stats, jax.random.key(0)))
    scale, zero_point = observers.calibrate_weight(params['layer']['kernel'], WEIGHT)
    np.testing.assert_array_equal(bound.weights['layer'].scale, scale)
    codes = np.clip(np.rint(np.asarray(params['layer']['kernel']) / np.asarray(scale)), -4, 3)
    np.testing.assert_array_equal(bound.weights['layer'].codes, codes)
    want = observers.calibrate(stats['layer']['input'], INPUT)
    np.testing.assert_array_equal(bound.tables['layer']['input']['scale'], want[0])
    np.testing.assert_array_equal(bound.tables['layer']['input']['zero_point'], want[1])


def test_the_key_does_not_matter_and_nothing_is_learnt():
    params, stats = example()
    method = methods.make(RoundToNearestConfig(), PLAN)
    first, second = (method.init(params, stats, jax.random.key(i)) for i in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    optimizer = method.optimizer(first, lambda step: 1.0)
    updates, _ = optimizer.update(first, optimizer.init(first), first)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_more_bits_are_closer_to_the_float_weight():
    params, _ = example()
    errors = []
    for bits in (2, 3, 4, 8):
        spec = LayerSpec(weight=QuantSpec(bits=bits, symmetric=True, per_channel=True), inputs=None)
        method = methods.make(RoundToNearestConfig(), {'layer': spec})
        bound = method.bind(params, method.init(params, {}, jax.random.key(0)))
        difference = base.dequantize_weight(bound.weights['layer']) - params['layer']['kernel']
        errors.append(float(jnp.sum(difference**2)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 100
