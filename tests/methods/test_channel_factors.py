import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import methods
from dmq_jax.config import ChannelFactorsConfig, EfficientDMConfig
from dmq_jax.methods import base, channel_factors
from dmq_jax.quant import observers
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.rows import fake_quantize_input, scale_channels
from dmq_jax.quant.tensor import QuantSpec

EPS = float(np.finfo(np.float32).eps)
WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
W4A4 = LayerSpec(weight=WEIGHT, inputs=QuantSpec(bits=4, symmetric=False, observer='minmax'))
W4A8 = dataclasses.replace(W4A4, inputs=dataclasses.replace(W4A4.inputs, bits=8))
W8A4 = dataclasses.replace(W4A4, weight=dataclasses.replace(WEIGHT, bits=8))
TCAQ = ChannelFactorsConfig()
NUM_CHANNELS, NUM_OUTPUTS = 12, 8


def make_inputs(seed=0, num_timesteps=3):
    """[S, samples, K]: channels whose ranges differ 20-fold, the later timesteps smaller."""
    rng = np.random.default_rng(seed)
    ranges = np.geomspace(1, 20, NUM_CHANNELS)
    x = rng.uniform(-1, 1, (num_timesteps, 64, NUM_CHANNELS)) * ranges
    return (x * (1 / (1 + np.arange(num_timesteps)))[:, None, None]).astype(np.float32)


def observed(x):
    return jax.vmap(lambda row: observers.observe(row, 256, channels=True))(jnp.asarray(x))


def make_kernel(seed=1, shape=(NUM_CHANNELS, NUM_OUTPUTS)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle_factors(x):
    """Equations 3 to 5, loop by loop in float64."""
    total, weights = np.zeros(x.shape[-1]), np.zeros(x.shape[-1])
    for moment in x.astype(np.float64):
        peaks = np.abs(moment).max(axis=0)
        for d in range(x.shape[-1]):
            total[d] += peaks[d] * (peaks[d] / peaks.min())
            weights[d] += peaks[d]
    return total / weights


def test_factors_are_those_of_the_equations():
    x = make_inputs()
    got = channel_factors.compute(observed(x), make_kernel(), W4A4, TCAQ)
    # Sums of three float32 products and a quotient.
    np.testing.assert_allclose(got, oracle_factors(x), rtol=16 * EPS)
    half = dataclasses.replace(TCAQ, strength=0.5)
    np.testing.assert_allclose(
        channel_factors.compute(observed(x), make_kernel(), W4A4, half),
        np.sqrt(oracle_factors(x)), rtol=16 * EPS,
    )  # fmt: skip


def test_they_are_cut_at_three_for_w4a8_and_nowhere_else_unless_told():
    stats, kernel = observed(make_inputs()), make_kernel()
    assert float(channel_factors.compute(stats, kernel, W4A8, TCAQ).max()) == 3.0
    assert float(channel_factors.compute(stats, kernel, W4A4, TCAQ).max()) > 10
    cut = dataclasses.replace(TCAQ, limit=5.0)
    assert float(channel_factors.compute(stats, kernel, W4A4, cut).max()) == 5.0


def test_timesteps_with_a_larger_range_count_more():
    x = make_inputs(num_timesteps=2)
    # At the loud timestep all channels are equally wide, at the quiet one they are not.
    x[0] = 50 * np.sign(x[0])
    loud_first = channel_factors.compute(observed(x), make_kernel(), W4A4, TCAQ)
    x[0] /= 1000
    quiet_first = channel_factors.compute(observed(x), make_kernel(), W4A4, TCAQ)
    assert float(loud_first.max()) < float(quiet_first.max())


def test_a_channel_that_is_never_used_leaves_the_factors_finite():
    x = make_inputs()
    x[..., 3] = 0
    factors = np.asarray(channel_factors.compute(observed(x), make_kernel(), W4A4, TCAQ))
    assert np.isfinite(factors).all() and factors.max() <= 100 and factors[3] == 1


def test_the_balanced_rule_makes_both_ranges_equal_at_strength_one_half():
    x, kernel = make_inputs(), make_kernel(shape=(3, 3, NUM_CHANNELS, NUM_OUTPUTS))
    config = ChannelFactorsConfig(strength=0.5, rule='balanced', limit=100.0)
    factors = channel_factors.compute(observed(x), kernel, W4A4, config)
    of_input = np.abs(x).max((0, 1)) / factors
    of_weight = np.abs(kernel).max((0, 1, 3)) * factors
    ratio = of_input / of_weight
    np.testing.assert_allclose(ratio, ratio[0], rtol=32 * EPS)


@pytest.fixture(scope='module')
def layer():
    """Parameters, statistics and inputs of one layer."""
    x = make_inputs()
    return {'layer': {'kernel': jnp.asarray(make_kernel())}}, {'layer': {'input': observed(x)}}, x


def test_a_float_layer_is_unchanged(layer):
    params, stats, x = layer
    factors = channel_factors.init({'layer': W4A4}, params, stats, TCAQ)
    folded = base.get_kernel(channel_factors.fold(params, factors), 'layer')
    inputs = channel_factors.channels(factors)['layer']['input'][0]
    got = (x.astype(np.float64) * np.asarray(inputs)) @ np.asarray(folded, np.float64)
    want = x.astype(np.float64) @ np.asarray(base.get_kernel(params, 'layer'), np.float64)
    np.testing.assert_allclose(got, want, atol=8 * EPS * np.abs(want).max())


def test_they_lower_the_ratio_of_channel_ranges_and_the_error_of_the_layer(layer):
    # TCAQ-DM's claim: one activation scale then suits all channels. The weight, which takes the
    # ranges on, pays for it: at 4 bits and without a limit more than is won here.
    params, stats, x = layer
    plan = {'layer': W8A4}
    factors = channel_factors.init(plan, params, stats, TCAQ)

    def ratio(tensor):
        peaks = np.maximum(-np.asarray(tensor.channel_low), np.asarray(tensor.channel_high))
        return (peaks.max(-1) / peaks.min(-1)).max()

    scaled = channel_factors.scale_stats(stats, factors)
    assert ratio(scaled['layer']['input']) < ratio(stats['layer']['input']) / 5

    def error(factors):
        tables = base.init_inputs(plan, channel_factors.scale_stats(stats, factors))
        folded = channel_factors.fold(params, factors)
        start = base.init_weights(plan, folded)['layer']
        weight = base.quantize_weight(base.get_kernel(folded, 'layer'), **start, spec=W8A4)
        inputs = channel_factors.channels(factors).get('layer')
        total = 0.0
        for i, moment in enumerate(jnp.asarray(x)):
            rows = {name: table[i] for name, table in tables['layer']['input'].items()}
            row = None if inputs is None else {'input': inputs['input'][0]}
            x_hat = fake_quantize_input(scale_channels(moment, row, 'input'), rows, W8A4.inputs)
            want = moment @ base.get_kernel(params, 'layer')
            total += float(jnp.mean((x_hat @ base.dequantize_weight(weight) - want) ** 2))
        return total

    before, after = error({}), error(factors)
    assert after < before / 4, f'{before:.4g} -> {after:.4g}'


def test_no_strength_is_no_factors_and_needs_no_statistics_of_channels(layer):
    params, stats, _ = layer
    plain = {'layer': {'input': stats['layer']['input']._replace(channel_low=None)}}
    off = ChannelFactorsConfig(strength=0.0)
    assert channel_factors.init({'layer': W4A4}, params, plain, off) == {}
    with pytest.raises(ValueError, match='no ranges of single channels'):
        channel_factors.init({'layer': W4A4}, params, plain, TCAQ)


def test_layers_that_are_not_tuned_or_half_quantized_have_none(layer):
    params, stats, _ = layer
    for spec in (
        dataclasses.replace(W4A4, trainable=False),
        dataclasses.replace(W4A4, inputs=None),
    ):
        assert channel_factors.init({'layer': spec}, params, stats, TCAQ) == {}


def test_efficientdm_takes_them_where_asked(layer):
    params, stats, _ = layer
    plan = {'layer': W4A4}
    plain, scaled = (
        methods.make(EfficientDMConfig(channels=channels), plan)
        for channels in (ChannelFactorsConfig(strength=0.0), TCAQ)
    )
    assert not plain.channel_stats and scaled.channel_stats
    key = jax.random.key(0)
    assert plain.bind(params, plain.init(params, stats, key)).channels == {}
    bound = scaled.bind(params, scaled.init(params, stats, key))
    want = channel_factors.compute(stats['layer']['input'], params['layer']['kernel'], W4A4, TCAQ)
    np.testing.assert_allclose(bound.channels['layer']['input'][0], 1 / want, rtol=EPS)
    # The weight that is rounded is r W.
    step = np.asarray(bound.weights['layer'].scale)
    folded = np.asarray(params['layer']['kernel'] * want[:, None])
    got = np.asarray(base.dequantize_weight(bound.weights['layer']))
    assert np.all(np.abs(got - folded) <= step / 2 * (1 + 1e-5))
