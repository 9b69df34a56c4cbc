import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, methods
from dmq_jax.config import RepQViTConfig, RoundToNearestConfig
from dmq_jax.methods import base, repq_vit
from dmq_jax.quant import observers
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
WEIGHT = QuantSpec(bits=8, symmetric=True, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')
SPEC = LayerSpec(weight=WEIGHT, inputs=INPUT)
LAYER = 'block_0/attention/q'
PLAN = {LAYER: SPEC}
NUM_CHANNELS = 12


def make_inputs(seed=0):
    """[S, samples, K]: channels of unequal ranges around unequal centres, as after a norm."""
    rng = np.random.default_rng(seed)
    ranges, centres = np.geomspace(0.3, 6, NUM_CHANNELS), np.linspace(-0.8, 0.8, NUM_CHANNELS)
    x = (rng.uniform(-1, 1, (3, 128, NUM_CHANNELS)) + centres) * ranges
    return x.astype(np.float32)


def observed(x):
    return jax.vmap(lambda row: observers.observe(row, 256, channels=True))(jnp.asarray(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name='q')(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Attention(name='attention')(x)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name='block_0')(x)


@pytest.fixture(scope='module')
def layer():
    """Parameters, inputs, statistics."""
    x = make_inputs()
    kernel = np.random.default_rng(1).standard_normal((NUM_CHANNELS, 8)).astype(np.float32)
    params = {'block_0': {'attention': {'q': {'kernel': jnp.asarray(kernel)}}}}
    return params, x, {LAYER: {'input': observed(x)}}


def run(config, layer, t=None, plan=PLAN):
    """Output at the first timestep, and what was bound."""
    params, x, stats = layer
    method = methods.make(config, plan)
    bound = method.bind(params, method.init(params, stats, jax.random.key(0)))
    rows = denoisers.rows_at(denoisers.time_tables(bound, np.array([2, 1, 0])), 2, 'nearest')
    weighed = base.with_weights(params, bound.weights)
    return base.apply_fake(Network().apply, plan, weighed, rows, jnp.asarray(x[0])), bound


def test_one_scale_rounds_as_each_channel_s_own_did():
    # The claim of section 3.3: from channel-wise to layer-wise without loss.
    x = make_inputs()
    factor, shift = (
        np.asarray(a, np.float64) for a in repq_vit.reparameterization(observed(x), INPUT)
    )
    scale = np.empty(NUM_CHANNELS)
    zero_point = np.empty(NUM_CHANNELS)
    for d in range(NUM_CHANNELS):
        scale[d], zero_point[d] = oracle.compute_scale(x[..., d].min(), x[..., d].max(), 4, False)
    one_scale, one_zero = scale.mean(), np.rint(zero_point.mean())
    want = oracle.quantize(x, scale, zero_point, 0, 15)
    got = oracle.quantize(x / factor + shift, one_scale, one_zero, 0, 15)
    # Values at half a step may fall on either side of it.
    assert np.mean(got != want) < 1e-3
    back = ((got - one_zero) * one_scale - shift) * factor
    inside = got == want
    np.testing.assert_allclose(
        back[inside], ((want - zero_point) * scale)[inside], atol=1e-4 * np.abs(x).max()
    )


def test_without_rounding_the_layer_is_unchanged(layer):
    params, x, _ = layer
    _, bound = run(RepQViTConfig(), layer)
    entry = {name: np.asarray(a[0], np.float64) for name, a in bound.channels[LAYER].items()}
    kernel = np.asarray(base.get_kernel(params, LAYER), np.float64)
    folded = kernel / entry['input'][:, None]
    got = (x * entry['input'] + entry['shift']) @ folded + entry['offset']
    want = x.astype(np.float64) @ kernel
    np.testing.assert_allclose(got, want, atol=32 * EPS * np.abs(want).max())


def test_it_beats_rounding_to_nearest_where_channels_differ(layer):
    params, x, _ = layer
    want = x[0] @ np.asarray(base.get_kernel(params, LAYER))
    nearest, ours = (
        float(np.mean((np.asarray(run(config, layer)[0]) - want) ** 2))
        for config in (RoundToNearestConfig(), RepQViTConfig())
    )
    assert ours < nearest / 2, (nearest, ours)


def test_only_dense_layers_that_follow_a_norm_and_are_tuned_are_changed(layer):
    for plan, config in (
        (PLAN, RepQViTConfig(layers='.*/out')),
        ({LAYER: dataclasses.replace(SPEC, trainable=False)}, RepQViTConfig()),
        ({LAYER: dataclasses.replace(SPEC, inputs=None)}, RepQViTConfig()),
    ):
        assert run(config, layer, plan=plan)[1].channels == {}


def test_a_softmax_lies_on_powers_of_the_root_of_two_unless_told(layer):
    values = np.random.default_rng(2).dirichlet(np.full(16, 0.2), 64).astype(np.float32)
    tensor = jax.tree.map(lambda leaf: leaf[None], observers.observe(jnp.asarray(values), 512))
    plan = {'attention/mix': LayerSpec(weight=None, inputs=INPUT)}
    stats = {'attention/mix': {'lhs': tensor, 'rhs': tensor}}
    for softmax in ('roots', 'uniform'):
        method = methods.make(RepQViTConfig(softmax=softmax), plan)
        tables = method.bind({}, method.init({}, stats, jax.random.key(0))).tables['attention/mix']
        assert ('roots' in tables['lhs']) == (softmax == 'roots') and 'roots' not in tables['rhs']
