import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant import observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.tensor import QuantSpec, scale_shape
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
# A subtraction of the ends and a division, in float32.
SCALE_TOLERANCE = 4 * EPS
# float32 powers and a mean of hundreds of values; seen: 2e-6.
ERROR_TOLERANCE = 2e-5
# A percentile interpolates between two float32 values at a float32 position near 400.
PERCENTILE_TOLERANCE = 400 * EPS

RANGES = [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-3.0, 0.0), (-2.5e-3, 1e-3)]

# One program each: operation by operation, each is a program of its own.
observe = jax.jit(observers.observe, static_argnums=1, static_argnames='channels')
search_scale = jax.jit(observers.search_scale, static_argnums=1)
calibrate = jax.jit(observers.calibrate, static_argnums=1)
calibrate_weight = jax.jit(observers.calibrate_weight, static_argnums=1)


def spec_of(bits=4, symmetric=False, **options):
    return QuantSpec(bits=bits, symmetric=symmetric, **options)


def stats_of(values):
    values = np.asarray(values, np.float32)
    return TensorStats(values.min(-1), values.max(-1), values)


@pytest.mark.parametrize('low, high', RANGES)
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_a_range_is_covered_and_contains_zero(bits, symmetric, low, high):
    spec = spec_of(bits, symmetric)
    scale, zero_point = observers.compute_scale(jnp.float32(low), jnp.float32(high), spec)
    want_scale, want_zero = oracle.compute_scale(np.float32(low), np.float32(high), bits, symmetric)
    assert float(scale) == pytest.approx(want_scale, rel=SCALE_TOLERANCE)
    assert float(zero_point) == want_zero
    assert float(scale) > 0
    qmin, qmax = spec.grid
    ends = (qmin - want_zero) * want_scale, (qmax - want_zero) * want_scale
    assert ends[0] <= 0.0 <= ends[1]
    # The zero point is rounded: either end may miss by half a step.
    slack = 0 if symmetric else want_scale / 2
    assert ends[0] - slack <= low + 1e-6 and high <= ends[1] + slack + 1e-6


def test_a_symmetric_scale_is_absmax_over_qmax():
    scale, zero_point = observers.compute_scale(
        jnp.float32(-14), jnp.float32(3), spec_of(4, symmetric=True)
    )
    assert (float(scale), float(zero_point)) == (2.0, 0.0)


def test_leading_axes_are_mapped_over():
    low = np.random.default_rng(0).uniform(-2, 0.1, (3, 2)).astype(np.float32)
    scale, zero_point = observers.compute_scale(jnp.asarray(low), jnp.asarray(low + 3), spec_of())
    for index in np.ndindex(3, 2):
        want = oracle.compute_scale(low[index], low[index] + np.float32(3), 4, False)
        assert float(scale[index]) == pytest.approx(want[0], rel=SCALE_TOLERANCE)
        assert float(zero_point[index]) == want[1]


@pytest.mark.parametrize('percentile', [99.9, 99.0, 80.0, 100.0])
def test_a_percentile_range_leaves_equal_shares_out_on_both_sides(percentile):
    values = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    got = observers.percentile_range(jnp.asarray(values), percentile)
    tail = (100 - percentile) / 2
    want = np.percentile(values.astype(np.float64), [tail, 100 - tail], axis=-1)
    np.testing.assert_allclose(np.stack(got), want, rtol=PERCENTILE_TOLERANCE)
    scale, zero_point = calibrate(
        stats_of(values), spec_of(observer='percentile', percentile=percentile)
    )
    for row in range(2):
        expected = oracle.compute_scale(*want[:, row], 4, False)
        assert float(scale[row]) == pytest.approx(expected[0], rel=PERCENTILE_TOLERANCE)
        assert float(zero_point[row]) == expected[1]


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize(
    'kind, bits', [('normal', 2), ('normal', 8), ('positive', 4), ('outlier', 3)]
)
def test_the_search_finds_the_least_error_of_all_candidates(kind, bits, symmetric):
    values = np.random.default_rng(bits).standard_normal(300).astype(np.float32)
    if kind == 'positive':
        values = np.abs(values) + 1
    if kind == 'outlier':
        values[7] = 20.0
    stats = stats_of(values)
    scale, zero_point = search_scale(stats, spec_of(bits, symmetric))
    candidates = oracle.search_errors(
        values.astype(np.float64), stats.low, stats.high, bits, symmetric
    )
    best = min(error for error, _, _ in candidates)
    approximation = oracle.fake_quantize(
        values, float(scale), float(zero_point), *oracle.integer_grid(bits, symmetric)
    )
    error = np.mean(np.abs(values - approximation) ** observers.ERROR_NORM)
    # Two candidates may tie within float32; then either is right.
    assert error <= best * (1 + ERROR_TOLERANCE)
    assert any(
        abs(float(scale) - s) < 1e-5 * s and float(zero_point) == z for _, s, z in candidates
    )


def test_a_search_beats_the_full_range_where_there_is_an_outlier():
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    values[0] = 30.0
    minmax, _ = calibrate(stats_of(values), spec_of(observer='minmax'))
    searched, _ = calibrate(stats_of(values), spec_of(observer='mse'))
    assert float(searched) < float(minmax)


@pytest.mark.parametrize('observer', ['minmax', 'percentile', 'mse'])
def test_all_rows_at_once_equal_each_row_alone(observer):
    values = np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)
    values *= np.arange(1, 7, dtype=np.float32).reshape(3, 2, 1)
    spec = spec_of(observer=observer)
    together = calibrate(stats_of(values), spec)
    for index in np.ndindex(3, 2):
        alone = calibrate(stats_of(values[index]), spec)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[index], b, rtol=SCALE_TOLERANCE)


def test_an_unknown_observer_is_refused():
    with pytest.raises(ValueError, match="observer='max': expected 'minmax'"):
        calibrate(stats_of(np.ones(4)), spec_of(observer='max'))


def test_a_tensor_of_zeros_stays_zero():
    for observer in ('minmax', 'percentile', 'mse'):
        scale, zero_point = calibrate(stats_of(np.zeros(8)), spec_of(observer=observer))
        assert float(scale) > 0 and float(zero_point) == 0


# Sizes that are powers of two times small numbers: the common case, and the one where an even
# stride sees few channels only.
@pytest.mark.parametrize(
    'shape', [(8, 16, 16, 32), (4, 28, 28, 24), (2, 7, 7, 48), (16, 128), (3, 5)]
)
def test_a_sample_sees_every_channel_equally_often(shape):
    num_values = 1024
    channel = np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
    values = np.asarray(observe(jnp.asarray(channel), num_values).values)
    counts = np.bincount(values.astype(int), minlength=shape[-1])
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= max(1, num_values // (np.prod(shape) // shape[-1]))


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_a_sample_is_spread_over_images_rows_and_columns(axis):
    shape, num_values = (16, 16, 16, 32), 1024
    position = np.arange(16, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
    x = jnp.asarray(np.broadcast_to(position, shape))
    counts = np.bincount(np.asarray(observe(x, num_values).values, int), minlength=16)
    # 64 each if perfectly even; a random sample would vary by 8.
    assert abs(counts - 64).max() <= 24


def test_a_sample_holds_distinct_values_while_there_are_enough():
    x = jnp.arange(5000, dtype=jnp.float32).reshape(50, 100)
    stats = observe(x, 700)
    assert len(np.unique(stats.values)) == 700
    assert (float(stats.low), float(stats.high)) == (0.0, 4999.0)


def test_a_small_tensor_is_repeated_evenly():
    values = np.asarray(observe(jnp.asarray([1.0, 2.0, 5.0]), 7).values)
    assert sorted(np.bincount(values.astype(int))[[1, 2, 5]]) == [2, 2, 3]


def test_observing_has_no_gradient_and_is_float32():
    stats = observe(jnp.ones((4,), jnp.bfloat16), 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype('float32')}
    gradient = jax.grad(lambda x: jnp.sum(observe(x, 4).values))(jnp.ones(4))
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_merged_statistics_are_those_of_both():
    rng = np.random.default_rng(0)
    first, second = (stats_of(rng.standard_normal((3, 5))) for _ in range(2))
    merged = observers.merge(first, second)
    together = stats_of(np.concatenate([first.values, second.values], axis=-1))
    for got, want in zip(merged, together, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_running_range_moves_by_one_minus_momentum():
    first = TensorStats(jnp.float32(-1), jnp.float32(2), jnp.zeros(3))
    second = TensorStats(jnp.float32(-3), jnp.float32(4), jnp.ones(3))
    moved = observers.running(first, second, momentum=0.75)
    assert (float(moved.low), float(moved.high)) == (-1.5, 2.5)
    np.testing.assert_array_equal(moved.values, [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize('size, block', [(40, 5), (38, 5), (8, 1)])
def test_the_extremes_are_those_of_every_block(size, block):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    stats = observe(jnp.asarray(x), 8)
    wrapped = np.resize(x, 8 * block).reshape(8, block)
    want = np.concatenate([wrapped.min(1), wrapped.max(1)])
    np.testing.assert_array_equal(stats.extremes, want)
    assert float(stats.count) == size
    merged = observers.merge(stats, stats)
    assert merged.extremes.shape == (32,) and float(merged.count) == 2 * size


# At fewer bits the search cuts the outliers off in any case.
@pytest.mark.parametrize('bits', [4, 8])
def test_an_outlier_that_the_sample_missed_counts_in_the_search(bits):
    x = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    x[[123, 4567, 30_001]] = 9.0, -8.0, 12.0
    spec = spec_of(bits)
    observed = observe(jnp.asarray(x), 512)
    assert not np.isin([9.0, -8.0, 12.0], np.asarray(observed.values)).any()
    seen, _ = search_scale(observed, spec)
    all_values, _ = search_scale(stats_of(x), spec)
    sample_only, _ = search_scale(observed._replace(extremes=None, count=None), spec)
    # 512 values stand for 40,000: a few candidates of one per cent to either side.
    assert float(seen) == pytest.approx(float(all_values), rel=0.1)
    assert abs(float(sample_only) - float(all_values)) > abs(float(seen) - float(all_values))


@pytest.mark.parametrize('lead', [(), (2,)])
def test_pooled_statistics_are_those_of_all_timesteps_together(lead):
    values = np.random.default_rng(0).standard_normal((4, *lead, 6)).astype(np.float32)
    pooled = observers.pool(stats_of(values))
    assert pooled.low.shape == pooled.high.shape == (1, *lead)
    together = np.moveaxis(values, 0, -2).reshape(*lead, 24)
    np.testing.assert_array_equal(pooled.low[0], together.min(-1))
    np.testing.assert_array_equal(pooled.high[0], together.max(-1))
    np.testing.assert_array_equal(np.sort(pooled.values[0]), np.sort(together))


WEIGHTS = {
    'per_tensor': ({}, lambda c, k, n: (0, 0)),
    'per_channel': ({'per_channel': True}, lambda c, k, n: (0, n)),
    'groups': ({'per_channel': True, 'group_size': 2}, lambda c, k, n: (k // 2, n)),
}


@pytest.mark.parametrize('shape', [(4, 3), (3, 2, 4, 3)])
@pytest.mark.parametrize('name', WEIGHTS)
def test_weights_are_calibrated_from_all_values_that_share_a_scale(name, shape):
    options, owner = WEIGHTS[name]
    spec = spec_of(4, observer='minmax', **options)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scale, zero_point = calibrate_weight(jnp.asarray(weight), spec)
    assert scale.shape == zero_point.shape == scale_shape(shape, spec)
    members = {}
    for index in np.ndindex(shape):
        members.setdefault(owner(index[:-2], *index[-2:]), []).append(weight[index])
    assert len(members) == scale.size
    for (group, channel), values in members.items():
        want = oracle.compute_scale(min(values), max(values), 4, False)
        at = (0,) * (len(shape) - 2) + (group, channel)
        assert float(scale[at]) == pytest.approx(want[0], rel=SCALE_TOLERANCE)
        assert float(zero_point[at]) == want[1]


def test_an_error_search_of_a_weight_uses_each_channel_alone():
    weight = np.random.default_rng(0).standard_normal((3, 3, 4, 2)).astype(np.float32)
    spec = spec_of(3, symmetric=True, per_channel=True)
    scale, _ = calibrate_weight(jnp.asarray(weight), spec)
    for channel in range(2):
        alone, _ = search_scale(stats_of(weight[..., channel].reshape(-1)), spec)
        assert float(scale[0, 0, 0, channel]) == pytest.approx(float(alone), rel=SCALE_TOLERANCE)


def with_channels(seed=0, channels=5, num_values=64):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 4, channels)) * 2.0 ** np.arange(channels)).astype(np.float32)
    return x, observe(jnp.asarray(x), num_values, channels=True)


def test_ranges_of_channels_are_those_of_the_last_axis_and_only_on_demand():
    x, stats = with_channels()
    np.testing.assert_array_equal(stats.channel_low, x.min((0, 1)))
    np.testing.assert_array_equal(stats.channel_high, x.max((0, 1)))
    plain = observe(jnp.asarray(x), 64)
    assert plain.channel_low is None and plain.channels is None
    np.testing.assert_array_equal(plain.values, stats.values)


def test_statistics_of_scaled_channels_are_those_of_the_scaled_tensor():
    x, stats = with_channels()
    factor = np.float32([4, 2, 1, 0.5, 0.25])
    got = observers.scale_channels(stats, jnp.asarray(factor))
    want = observe(jnp.asarray(x * factor), 64, channels=True)
    for name in ('low', 'high', 'values', 'count', 'channel_low', 'channel_high', 'channels'):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    # Its extremes are attained, and the widest are among them.
    assert float(got.extremes.min()) == float(want.low)
    assert float(got.extremes.max()) == float(want.high)
    assert np.isin(got.extremes, x * factor).all()


def test_merged_and_pooled_channels_keep_the_wider_range_and_all_samples():
    (x, first), (y, second) = with_channels(0), with_channels(1)
    both = observers.merge(first, second)
    np.testing.assert_array_equal(both.channel_high, np.maximum(x, y).max((0, 1)))
    np.testing.assert_array_equal(both.channels, np.concatenate([first.channels, second.channels]))
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    pooled = observers.pool(stacked)
    np.testing.assert_array_equal(pooled.channel_low[0], np.minimum(x, y).min((0, 1)))
    np.testing.assert_array_equal(np.sort(pooled.values[0]), np.sort(both.values))
    # Each value keeps its channel.
    pairs = set(zip(np.asarray(both.values), np.asarray(both.channels), strict=True))
    assert pairs == set(
        zip(np.asarray(pooled.values[0]), np.asarray(pooled.channels[0]), strict=True)
    )
