"""TFMQ-DM on a network of two blocks shifted by the timestep, small enough to compile quickly."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, methods, reconstruct
from dmq_jax.config import (
    BlockLearningConfig,
    QDiffusionConfig,
    ReconstructConfig,
    SamplerConfig,
    TFMQDMConfig,
)
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.layers import collect_stats, observe_inputs, recorded_calls
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, features):
        h = jnp.tanh(nn.Dense(12, name='dense_0')(features))
        return jnp.tanh(nn.Dense(12, name='dense_1')(h))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, embedding):
        shift = nn.Dense(x.shape[-1], name='time_proj')(embedding)
        return x + nn.Conv(x.shape[-1], (3, 3), name='conv1')(jnp.tanh(x + shift[:, None, None, :]))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, t, y=None):
        del y
        t = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)[:, None] / 10
        features = jnp.concatenate([f(t * s) for f in (jnp.sin, jnp.cos) for s in (1, 0.3)], -1)
        embedding = Embedding(name='time_embed')(features)
        h = nn.Conv(6, (3, 3), name='conv_in')(x)
        for i in range(2):
            h = Block(name=f'block_{i}')(h, embedding)
        return nn.Conv(1, (3, 3), name='conv_out')(h)


INFO = denoisers.DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=None,
)
CONFIG = ReconstructConfig(
    num_iterations=150, batch_size=16, num_timesteps=5, num_images=16,
    sampler=SamplerConfig(num_steps=5),
)  # fmt: skip
SPEC = LayerSpec(
    weight=QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax'),
    inputs=QuantSpec(bits=8, symmetric=False),
    per_timestep=False,
)
LEARNING = BlockLearningConfig(rounding_learning_rate=0.02, input_share=0.1)
TIMED = ('time_embed/dense_0', 'time_embed/dense_1', 'block_0/time_proj', 'block_1/time_proj')
OUTPUTS = TIMED[2:]


@pytest.fixture(scope='module')
def teacher():
    network = Network()
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(()))
    return denoisers.float_denoiser(network, params['params'], INFO)


@pytest.fixture(scope='module')
def plan(teacher):
    return dict.fromkeys(denoisers.quantizable(teacher), SPEC)


@pytest.fixture(scope='module')
def inputs(teacher):
    return reconstruct.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8))


@pytest.fixture(scope='module')
def timesteps(inputs):
    return np.unique(np.asarray(inputs.t))[::-1].astype(np.int32)


@pytest.fixture(scope='module')
def stats(teacher, plan, inputs, timesteps):
    def visit(_, moment):
        with observe_inputs(plan, 64):
            _, found = teacher.network.apply({'params': teacher.params}, *moment, mutable=['stats'])
        return None, collect_stats(plan, found['stats'])

    moments = inputs.x.reshape(5, 16, 4, 4, 1), jnp.asarray(timesteps)
    return jax.jit(lambda moments: jax.lax.scan(visit, None, moments)[1])(moments)


def make(config, teacher, plan, stats):
    method = methods.make(config, plan, 50)
    return method, jax.jit(method.init)(teacher.params, stats, jax.random.key(0))


@pytest.fixture(scope='module')
def learnt(teacher, plan, stats, timesteps, tmp_path_factory):
    """{name of a method: (method, its start, what it learnt)}."""
    results = {}
    for config in (TFMQDMConfig(learning=LEARNING), QDiffusionConfig(learning=LEARNING)):
        method, state = make(config, teacher, plan, stats)
        result = reconstruct.run(
            teacher, method, state, plan, timesteps, 'nearest', CONFIG, key=jax.random.key(2),
            workdir=tmp_path_factory.mktemp(config.name), description='test',
        )  # fmt: skip
        results[config.name] = method, state, result.state
    return results


def test_the_layers_of_the_timestep_are_one_block_before_all_others(teacher, plan):
    joint = base.JointBlock(TFMQDMConfig().layers, TFMQDMConfig().outputs)
    first, *rest = reconstruct.find_blocks(teacher, plan, CONFIG.blocks, joint)
    assert first == reconstruct.Block('', TIMED, outputs=OUTPUTS)
    assert [block.path for block in rest] == ['conv_in', 'block_0', 'block_1', 'conv_out']
    assert rest[1].layers == ('block_0/conv1',) and rest[1].fixed == ('block_0/time_proj',)
    learning = [path for block in (first, *rest) for path in block.layers]
    assert sorted(learning) == sorted(plan)


def test_a_network_without_such_layers_is_refused(teacher, plan):
    joint = base.JointBlock('clock/.*', 'clock/.*')
    with pytest.raises(ValueError, match="layers='clock/.*'.*expected both to match"):
        reconstruct.find_blocks(teacher, plan, CONFIG.blocks, joint)


def test_their_activations_have_a_range_for_each_timestep_that_is_not_learnt(
    teacher, plan, stats, learnt
):
    method, start, state = learnt['tfmq_dm']
    assert set(state['input']) == set(plan) - set(TIMED)
    bound = method.bind(teacher.params, state)
    for path in TIMED:
        tensor = stats[path]['input']
        scale, zero_point = observers.compute_scale(tensor.low, tensor.high, SPEC.inputs)
        np.testing.assert_array_equal(bound.tables[path]['input']['scale'], scale)
        np.testing.assert_array_equal(bound.tables[path]['input']['zero_point'], zero_point)
    assert bound.tables['block_0/conv1']['input']['scale'].shape == (1,)


def test_layers_that_are_not_tuned_keep_their_calibration(teacher, plan, stats):
    fixed = {**plan, TIMED[0]: dataclasses.replace(SPEC, trainable=False)}
    method, state = make(TFMQDMConfig(), teacher, fixed, stats)
    assert method.bind(teacher.params, state).tables[TIMED[0]]['input']['scale'].shape == (1,)


def test_no_block_changes_what_the_joint_one_has_learnt(
    teacher, plan, stats, timesteps, learnt, tmp_path
):
    _, start, after = learnt['tfmq_dm']
    method, state = make(TFMQDMConfig(learning=LEARNING), teacher, plan, stats)
    only_joint = {path: plan[path] for path in TIMED}
    alone = reconstruct.run(
        teacher, methods.make(TFMQDMConfig(learning=LEARNING), only_joint, 50),
        reconstruct.select(state, TIMED, plan), only_joint, timesteps, 'nearest',
        dataclasses.replace(CONFIG, blocks='block_0'), key=jax.random.key(2), workdir=tmp_path,
        description='test',
    ).state  # fmt: skip
    for path in TIMED:
        assert np.any(np.asarray(after['rounding'][path]) != np.asarray(start['rounding'][path]))
        np.testing.assert_array_equal(after['rounding'][path], alone['rounding'][path])


def test_time_embeddings_stay_closer_at_every_timestep(teacher, plan, timesteps, learnt):
    # The paper's figure 3: embeddings learnt inside of their blocks drift from the teacher's.
    x = jnp.zeros((1, 4, 4, 1))

    def embeddings(run, t):
        with recorded_calls(lambda path: path in OUTPUTS) as calls:
            run(x, jnp.asarray(t))
        return np.concatenate([np.asarray(calls[path].output) for path in OUTPUTS], axis=-1)

    def errors(name):
        method, _, state = learnt[name]
        bound = jax.jit(method.bind)(teacher.params, state)
        student = denoisers.fake_student(teacher, plan, bound, timesteps, 'nearest')
        return np.array([
            np.sum((embeddings(lambda x, t: student.predict(student.params, x, t), t)
                    - embeddings(lambda x, t: teacher.predict(teacher.params, x, t), t)) ** 2)
            for t in timesteps
        ])  # fmt: skip

    ours, theirs = errors('tfmq_dm'), errors('qdiffusion')
    assert np.all(ours < theirs), (ours, theirs)
