"""TCAQ-DM on a network of one block with attention, small enough to compile in no time."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, methods, reconstruct, trajectories
from dmq_jax.config import (
    AdaptiveSoftmaxConfig,
    BlockLearningConfig,
    ChannelFactorsConfig,
    ReconstructConfig,
    SamplerConfig,
    TCAQDMConfig,
)
from dmq_jax.methods import base, channel_factors
from dmq_jax.models.tap import Product
from dmq_jax.quant.plan import LayerSpec, full_rules, make_plan
from dmq_jax.quant.tensor import QuantSpec
from tests import tiny, tiny_blocks


class Block(nn.Module):
    """A convolution shifted by the timestep, and attention over the pixels."""

    @nn.compact
    def __call__(self, x, embedding):
        shift = nn.Dense(x.shape[-1], name='time_proj')(embedding)
        h = jnp.tanh(nn.Conv(x.shape[-1], (3, 3), name='conv1')(x) + shift[:, None, None, :])
        rows = h.reshape(h.shape[0], -1, h.shape[-1])
        weights = jax.nn.softmax(4 * Product(name='scores')(rows, rows))
        return x + Product(name='mix')(weights, rows.swapaxes(1, 2)).reshape(h.shape)


class Network(nn.Module):
    """The block between two convolutions."""

    @nn.compact
    def __call__(self, x, t, y=None):
        del y
        angle = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)[:, None] / 20
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        h = Block(name='block_0')(nn.Conv(6, (3, 3), name='conv_in')(x), embedding)
        return nn.Conv(1, (3, 3), name='conv_out')(h)


SAMPLER = SamplerConfig(num_steps=4)
CONFIG = ReconstructConfig(
    num_iterations=60, batch_size=16, num_timesteps=4, num_images=32, sampler=SAMPLER,
    num_rounds=2,
)  # fmt: skip
SPEC = LayerSpec(
    weight=QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax'),
    inputs=QuantSpec(bits=6, symmetric=False, observer='minmax'),
)
METHOD = TCAQDMConfig(
    channels=ChannelFactorsConfig(limit=3.0),
    learning=BlockLearningConfig(rounding_learning_rate=0.02),
)


@pytest.fixture(scope='module')
def teacher():
    return tiny.random_denoiser(Network(), tiny_blocks.INFO, tiny.like_initial)


@pytest.fixture(scope='module')
def plan(teacher):
    return make_plan(denoisers.quantizable(teacher), full_rules(SPEC))


@pytest.fixture(scope='module')
def inputs(teacher):
    return trajectories.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8))


@pytest.fixture(scope='module')
def timesteps(inputs):
    return tiny_blocks.visited(inputs)


@pytest.fixture(scope='module')
def stats(teacher, plan, inputs):
    return tiny_blocks.observe(teacher, plan, inputs, channels=True)


@pytest.fixture(scope='module')
def start(teacher, plan, stats):
    method = methods.make(METHOD, plan, 50)
    return method, jax.jit(method.init)(teacher.params, stats, jax.random.key(0))


def test_it_starts_as_rounding_of_the_rescaled_layers(teacher, plan, stats, start):
    method, state = start
    bound = jax.jit(method.bind)(teacher.params, state)
    factors = jax.jit(
        lambda params, stats: channel_factors.init(plan, params, stats, METHOD.channels)
    )(teacher.params, stats)
    assert set(bound.channels) == set(factors) == {p for p, s in plan.items() if 'conv' in p
                                                   or 'proj' in p}  # fmt: skip

    @jax.jit
    def rounded(params, factors):
        folded = channel_factors.fold(params, factors)
        return {
            path: base.quantize_weight(base.get_kernel(folded, path), **scale, spec=plan[path])
            for path, scale in base.init_weights(plan, folded).items()
        }

    wanted = rounded(teacher.params, factors)
    for path, weight in bound.weights.items():
        np.testing.assert_array_equal(weight.codes, wanted[path].codes)
        np.testing.assert_allclose(bound.channels[path]['input'][0], 1 / factors[path])


def test_a_softmax_has_a_choice_of_grids_and_other_inputs_have_not(teacher, start):
    method, state = start
    tables = jax.eval_shape(method.bind, teacher.params, state).tables
    chosen = {
        (p, r) for p, roles in tables.items() for r, table in roles.items() if 'powers' in table
    }
    assert chosen == {('block_0/mix', 'lhs')}


def test_it_asks_for_ranges_of_channels_unless_it_has_no_factors(plan):
    off = TCAQDMConfig(channels=ChannelFactorsConfig(strength=0.0))
    assert methods.make(METHOD, plan).channel_stats and not methods.make(off, plan).channel_stats


def test_interpolated_rows_never_mix_two_kinds_of_grid(teacher, plan, stats, timesteps):
    config = TCAQDMConfig(softmax=AdaptiveSoftmaxConfig(choice='powers'))
    # What else is quantized does not matter, and takes its time.
    method = methods.make(config, {'block_0/mix': plan['block_0/mix']}, 50)

    @jax.jit
    def start(params, stats):
        return method.bind(params, method.init(params, stats, jax.random.key(0)))

    bound = start(teacher.params, stats)
    table = bound.tables['block_0/mix']['lhs']
    half_off = {**table, 'powers': table['powers'].at[1].set(0.0)}
    bound.tables['block_0/mix'] = {**bound.tables['block_0/mix'], 'lhs': half_off}
    between = jnp.asarray(timesteps[:2].mean())
    tables = denoisers.time_tables(bound, timesteps)
    rows = jax.jit(denoisers.rows_at, static_argnums=2)(tables, between, 'linear')
    assert float(rows['block_0/mix']['lhs']['powers']) in np.asarray(half_off['powers']).tolist()


def test_a_product_outside_of_all_blocks_learns_by_itself(
    teacher, plan, stats, timesteps, tmp_path
):
    only = {path: plan[path] for path in ('conv_out', 'block_0/mix')}
    method = methods.make(METHOD, only, 50)
    state = jax.jit(method.init)(teacher.params, stats, jax.random.key(0))
    config = dataclasses.replace(CONFIG, num_iterations=4, num_rounds=1, blocks='conv_out')
    learnt = reconstruct.run(
        teacher, method, state, only, timesteps, 'nearest', config,
        key=jax.random.key(2), workdir=tmp_path, description='test',
    ).state  # fmt: skip
    factors = [tree['input']['block_0/mix']['rhs'] for tree in (state, learnt)]
    assert np.any(np.asarray(factors[0]) != np.asarray(factors[1]))


@pytest.mark.slow  # a minute of compiling
def test_later_rounds_bring_the_inputs_of_calibration_nearer_to_those_of_inference(
    teacher, plan, start, timesteps, tmp_path
):
    # TCAQ-DM, section 3.4: round 0 learns on the teacher's trajectories, inference runs elsewhere.
    method, state = start
    learnt = reconstruct.run(
        teacher, method, state, plan, timesteps, 'nearest', CONFIG,
        key=jax.random.key(2), workdir=tmp_path, description='test',
    ).state  # fmt: skip
    rounds = [trajectories.load_inputs(tmp_path / f'inputs_{i}.npz') for i in range(2)]
    bound = jax.jit(method.bind)(teacher.params, learnt)
    student = denoisers.fake_student(teacher, plan, bound, timesteps, 'nearest')
    # The same noise as each round had, so that trajectories can be compared point by point.
    gaps = []
    for i, seen in enumerate(rounds):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), i)
        met = trajectories.draw_inputs(teacher, student, CONFIG, key=key)
        gaps.append(float(jnp.mean((met.x - seen.x) ** 2)))
    assert gaps[1] < 0.7 * gaps[0], gaps
