import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
WEIGHT = QuantSpec(bits=4, symmetric=False, per_channel=True, group_size=2, observer='minmax')
INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')


def random_params():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((4, 3)).astype(np.float32))
    return {
        'a': {'b': {'kernel': kernel, 'bias': jnp.ones(3)}},
        'norm': {'scale': jnp.ones(4)},
        'c': {'kernel': jnp.asarray(rng.standard_normal((1, 1, 4, 2)).astype(np.float32))},
    }


def random_stats(num_rows=3):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((num_rows, 20)).astype(np.float32)
    return TensorStats(values.min(-1), values.max(-1), values)


def test_the_loss_is_the_squared_distance_per_image():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((3, 2, 2, 1)).astype(np.float32) for _ in range(2))
    want = np.mean([np.sum((a[i].astype(np.float64) - b[i]) ** 2) for i in range(3)])
    # A float32 sum of 12 squares.
    assert float(base.output_loss(base.Prediction(a), base.Prediction(b))) == pytest.approx(
        want, rel=12 * EPS
    )
    twice = base.output_loss(
        base.Prediction(np.concatenate([a, a])), base.Prediction(np.concatenate([b, b]))
    )
    assert float(twice) == pytest.approx(want, rel=24 * EPS)


def test_frozen_changes_nothing():
    state = {'weight': jnp.ones(2)}
    optimizer = base.frozen(state, lambda step: 1.0)
    updates, _ = optimizer.update(state, optimizer.init(state), state)
    np.testing.assert_array_equal(updates['weight'], [0, 0])


def test_each_group_has_a_transformation_of_its_own():
    optimizer = base.per_group({'a': optax.sgd(0.1), 'b': optax.set_to_zero()})
    state = {'a': {'x': jnp.ones(2)}, 'b': jnp.ones(3)}
    updates, _ = optimizer.update(state, optimizer.init(state), state)
    np.testing.assert_allclose(updates['a']['x'], [-0.1, -0.1], rtol=EPS)
    np.testing.assert_array_equal(updates['b'], [0, 0, 0])


def test_a_kernel_is_found_by_path():
    params = random_params()
    assert base.get_kernel(params, 'a/b') is params['a']['b']['kernel']


def test_inputs_have_a_row_per_timestep_or_one_for_all():
    stats = {'a/b': {'input': random_stats()}, 'c': {'input': random_stats()}}
    plan = {
        'a/b': LayerSpec(weight=WEIGHT, inputs=INPUT),
        'c': LayerSpec(weight=WEIGHT, inputs=INPUT, per_timestep=False),
    }
    tables = base.init_inputs(plan, stats)
    for row in range(3):
        want = oracle.compute_scale(
            stats['c']['input'].low[row], stats['c']['input'].high[row], 4, False
        )
        table = tables['a/b']['input']
        assert float(table['scale'][row]) == pytest.approx(want[0], rel=4 * EPS)
        assert float(table['zero_point'][row]) == want[1]
    shared = tables['c']['input']
    everything = stats['c']['input']
    want = oracle.compute_scale(everything.low.min(), everything.high.max(), 4, False)
    assert shared['scale'].shape == (1,)
    assert float(shared['scale'][0]) == pytest.approx(want[0], rel=4 * EPS)


def test_both_operands_of_a_product_have_tables_and_float_inputs_none():
    plan = {
        'p': LayerSpec(weight=None, inputs=INPUT),
        'w': LayerSpec(weight=WEIGHT, inputs=None),
    }
    tables = base.init_inputs(plan, {'p': {'lhs': random_stats(), 'rhs': random_stats()}})
    assert {path: set(roles) for path, roles in tables.items()} == {'p': {'lhs', 'rhs'}}


def test_missing_statistics_name_the_layer():
    with pytest.raises(ValueError, match="no statistics for layer 'c'"):
        base.init_inputs({'c': LayerSpec(weight=None, inputs=INPUT)}, {})


def test_weights_are_calibrated_where_the_plan_quantizes_them():
    params = random_params()
    plan = {
        'a/b': LayerSpec(weight=WEIGHT, inputs=None),
        'c': LayerSpec(weight=None, inputs=INPUT),
    }
    weights = base.init_weights(plan, params)
    assert set(weights) == {'a/b'}
    want = observers.calibrate_weight(params['a']['b']['kernel'], WEIGHT)
    np.testing.assert_array_equal(weights['a/b']['scale'], want[0])
    np.testing.assert_array_equal(weights['a/b']['zero_point'], want[1])


def test_a_weight_on_its_grid_stands_for_what_the_oracle_says():
    params = random_params()
    spec = LayerSpec(weight=WEIGHT, inputs=None)
    scale, zero_point = base.init_weights({'a/b': spec}, params)['a/b'].values()
    codes = base.quantize_weight(params['a']['b']['kernel'], scale, zero_point, spec)
    full_scale, full_zero = (np.repeat(np.asarray(a), 2, axis=0) for a in (scale, zero_point))
    kernel = np.asarray(params['a']['b']['kernel'])
    np.testing.assert_array_equal(
        codes.codes, oracle.quantize(kernel, full_scale, full_zero, 0, 15)
    )
    want = oracle.fake_quantize(kernel, full_scale, full_zero, 0, 15)
    np.testing.assert_allclose(base.dequantize_weight(codes), want, rtol=EPS)


def test_only_the_quantized_kernels_are_replaced():
    params = random_params()
    spec = LayerSpec(weight=WEIGHT, inputs=None)
    scale, zero_point = base.init_weights({'a/b': spec}, params)['a/b'].values()
    weight = base.quantize_weight(params['a']['b']['kernel'], scale, zero_point, spec)
    replaced = base.with_weights(params, {'a/b': weight})
    assert jax.tree.structure(replaced) == jax.tree.structure(params)
    np.testing.assert_array_equal(replaced['a']['b']['kernel'], base.dequantize_weight(weight))
    for get in (lambda p: p['a']['b']['bias'], lambda p: p['norm']['scale'], lambda p: p['c']):
        assert jax.tree.leaves(get(replaced))[0] is jax.tree.leaves(get(params))[0]


def test_entries_are_nested_by_path():
    assert base.by_path({'a/b': 1, 'a/c': 2, 'd': 3}) == {'a': {'b': 1, 'c': 2}, 'd': 3}
