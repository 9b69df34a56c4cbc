"""TFMQ-DM on a network of two blocks shifted by the timestep, small enough to compile quickly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import blocks, denoisers, methods, reconstruct, trajectories
from dmq_jax.config import (
    BlockLearningConfig,
    QDiffusionConfig,
    ReconstructConfig,
    SamplerConfig,
    TFMQDMConfig,
)
from dmq_jax.methods import base
from dmq_jax.quant import observers
from dmq_jax.quant.layers import recorded_calls
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests import tiny_blocks

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
    return tiny_blocks.teacher()


@pytest.fixture(scope='module')
def plan(teacher):
    return dict.fromkeys(denoisers.quantizable(teacher), SPEC)


@pytest.fixture(scope='module')
def inputs(teacher):
    return trajectories.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8))


@pytest.fixture(scope='module')
def timesteps(inputs):
    return tiny_blocks.visited(inputs)


@pytest.fixture(scope='module')
def stats(teacher, plan, inputs):
    return tiny_blocks.observe(teacher, plan, inputs)


def make(config, teacher, plan, stats):
    method = methods.make(config, plan, 50)
    return method, jax.jit(method.init)(teacher.params, stats, jax.random.key(0))


@pytest.fixture(scope='module')
def inner(plan):
    """The plan with layers of the timestep, and one other: fewer programs to compile."""
    return {path: plan[path] for path in (*TIMED, 'block_0/conv1')}


@pytest.fixture(scope='module')
def learnt(teacher, inner, stats, timesteps, tmp_path_factory):
    """{name of a method: (method, its start, what it learnt)}."""
    results = {}
    for config in (TFMQDMConfig(learning=LEARNING), QDiffusionConfig(learning=LEARNING)):
        method, state = make(config, teacher, inner, stats)
        result = reconstruct.run(
            teacher, method, state, inner, timesteps, 'nearest', CONFIG, key=jax.random.key(2),
            workdir=tmp_path_factory.mktemp(config.name), description='test',
        )  # fmt: skip
        results[config.name] = method, state, result.state
    return results


def test_the_layers_of_the_timestep_are_one_block_before_all_others(teacher, plan):
    joint = base.JointBlock(TFMQDMConfig().layers, TFMQDMConfig().outputs)
    first, *rest = blocks.find_blocks(teacher, plan, CONFIG.blocks, joint)
    assert first == blocks.Block('', TIMED, outputs=OUTPUTS)
    assert [block.path for block in rest] == ['conv_in', 'block_0', 'block_1', 'conv_out']
    assert rest[1].layers == ('block_0/conv1',) and rest[1].fixed == ('block_0/time_proj',)
    learning = [path for block in (first, *rest) for path in block.layers]
    assert sorted(learning) == sorted(plan)


def test_a_network_without_such_layers_is_refused(teacher, plan):
    joint = base.JointBlock('clock/.*', 'clock/.*')
    with pytest.raises(ValueError, match="layers='clock/.*'.*expected both to match"):
        blocks.find_blocks(teacher, plan, CONFIG.blocks, joint)


def test_their_activations_have_a_range_for_each_timestep_that_is_not_learnt(
    teacher, inner, stats, learnt
):
    method, start, state = learnt['tfmq_dm']
    assert set(state['input']) == set(inner) - set(TIMED)
    bound = jax.jit(method.bind)(teacher.params, state)
    for path in TIMED:
        tensor = stats[path]['input']
        scale, zero_point = observers.compute_scale(tensor.low, tensor.high, SPEC.inputs)
        np.testing.assert_array_equal(bound.tables[path]['input']['scale'], scale)
        np.testing.assert_array_equal(bound.tables[path]['input']['zero_point'], zero_point)
    assert bound.tables['block_0/conv1']['input']['scale'].shape == (1,)


def test_layers_that_are_not_tuned_keep_their_calibration(teacher, plan, stats):
    fixed = {**plan, TIMED[0]: dataclasses.replace(SPEC, trainable=False)}
    method, state = make(TFMQDMConfig(), teacher, fixed, stats)
    bound = jax.eval_shape(method.bind, teacher.params, state)
    assert bound.tables[TIMED[0]]['input']['scale'].shape == (1,)


def test_no_block_changes_what_the_joint_one_has_learnt(
    teacher, inner, timesteps, learnt, tmp_path
):
    _, start, after = learnt['tfmq_dm']
    only_joint = {path: inner[path] for path in TIMED}
    alone = reconstruct.run(
        teacher, methods.make(TFMQDMConfig(learning=LEARNING), only_joint, 50),
        blocks.select(start, TIMED, inner), only_joint, timesteps, 'nearest',
        dataclasses.replace(CONFIG, blocks='block_0'), key=jax.random.key(2), workdir=tmp_path,
        description='test',
    ).state  # fmt: skip
    for path in TIMED:
        assert np.any(np.asarray(after['rounding'][path]) != np.asarray(start['rounding'][path]))
        np.testing.assert_array_equal(after['rounding'][path], alone['rounding'][path])


def test_time_embeddings_stay_closer_at_every_timestep(teacher, inner, timesteps, learnt):
    # The paper's figure 3: embeddings learnt inside of their blocks drift from the teacher's.
    def embeddings(denoiser):
        @jax.jit
        def at(t, params):
            with recorded_calls(lambda path: path in OUTPUTS) as calls:
                denoiser.predict(params, jnp.zeros((1, 4, 4, 1)), t)
            return jnp.concatenate([calls[path].output for path in OUTPUTS], axis=-1)

        return np.stack([at(t, denoiser.params) for t in timesteps])

    def errors(name):
        method, _, state = learnt[name]
        bound = jax.jit(method.bind)(teacher.params, state)
        student = denoisers.fake_student(teacher, inner, bound, timesteps, 'nearest')
        return np.sum((embeddings(student) - embeddings(teacher)) ** 2, axis=(1, 2))

    ours, theirs = errors('tfmq_dm'), errors('qdiffusion')
    assert np.all(ours < theirs), (ours, theirs)
