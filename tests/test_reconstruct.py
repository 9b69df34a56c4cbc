"""Block reconstruction of a block and two layers beside it, small enough to compile in no time."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import blocks, denoisers, methods, reconstruct, trajectories
from dmq_jax.config import (
    BlockLearningConfig,
    QDiffusionConfig,
    ReconstructConfig,
    RoundToNearestConfig,
    SamplerConfig,
)
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods import base
from dmq_jax.quant.layers import collect_stats, observe_inputs
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from dmq_jax.runtime import hosts, log, mesh
from tests import tiny


class Block(nn.Module):
    """A convolution and a shift by the timestep, added to the input."""

    @nn.compact
    def __call__(self, x, embedding):
        h = nn.Conv(x.shape[-1], (3, 3), name='conv1')(jnp.tanh(x))
        shift = nn.Dense(x.shape[-1], name='time_proj')(embedding)
        return x + nn.Conv(x.shape[-1], (1, 1), name='conv2')(jnp.tanh(h + shift[:, None, None, :]))


class Network(nn.Module):
    """A block between two layers that belong to none."""

    @nn.compact
    def __call__(self, x, t, y=None):
        del y
        angle = jnp.broadcast_to(t, x.shape[:1]).astype(jnp.float32)[:, None] / 20
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        h = nn.Conv(6, (3, 3), name='conv_in')(x)
        h = Block(name='block_0')(h, embedding)
        return nn.Conv(1, (3, 3), name='conv_out')(h)


INFO = denoisers.DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(6, 6, 1),
    num_classes=None,
)
SAMPLER = SamplerConfig(num_steps=4)
CONFIG = ReconstructConfig(
    num_iterations=300, batch_size=16, num_timesteps=2, num_images=64, sampler=SAMPLER
)
TIMESTEPS = np.array([37, 13], np.int32)
SPEC = LayerSpec(
    weight=QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax'),
    inputs=QuantSpec(bits=4, symmetric=False, observer='minmax'),
)
BLOCKS = ['conv_in', 'block_0', 'conv_out']


@pytest.fixture(scope='module')
def teacher():
    denoiser = tiny.random_denoiser(Network(), INFO, tiny.like_initial)
    return denoiser._replace(params=jax.device_get(denoiser.params))


@pytest.fixture(scope='module')
def plan(teacher):
    layers = denoisers.quantizable(teacher)
    return dict.fromkeys(layers, SPEC)


@pytest.fixture(scope='module')
def inputs(teacher):
    return trajectories.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8))


@pytest.fixture(scope='module')
def stats(teacher, plan, inputs):
    def visit(_, moment):
        x, t = moment
        with observe_inputs(plan, 64):
            _, found = teacher.network.apply({'params': teacher.params}, x, t, mutable=['stats'])
        return None, collect_stats(plan, found['stats'])

    moments = inputs.x.reshape(2, 64, 6, 6, 1), jnp.asarray(TIMESTEPS)
    return jax.jit(lambda moments: jax.lax.scan(visit, None, moments)[1])(moments)


def start(teacher, plan, stats, config):
    method = methods.make(config, plan, 50)
    return method, jax.jit(method.init)(teacher.params, stats, jax.random.key(0))


QDIFFUSION = QDiffusionConfig(
    learning=BlockLearningConfig(
        rounding_learning_rate=0.02, penalty_weight=0.01, input_scale_learning_rate=5e-3
    )
)


class Learnt:
    def __init__(self, teacher, plan, stats, folder):
        self.method, self.start = start(teacher, plan, stats, QDIFFUSION)
        self.folder = folder
        self.run = lambda folder=folder: reconstruct.run(
            teacher, self.method, self.start, plan, TIMESTEPS, 'nearest', CONFIG,
            key=jax.random.key(2), workdir=folder, description='test',
        )  # fmt: skip
        self.state = self.run().state
        self.metrics = log.read_metrics(folder)


@pytest.fixture(scope='module')
def learnt(teacher, plan, stats, tmp_path_factory):
    return Learnt(teacher, plan, stats, tmp_path_factory.mktemp('reconstruct'))


def test_learnt_rounding_beats_rounding_to_nearest_block_by_block(learnt):
    rounding = learnt.metrics[: len(BLOCKS)]
    for path, row in zip(BLOCKS, rounding, strict=True):
        before, after = row['rounding/before'], row['rounding/after']
        assert after < before, f'{path}: {before:.3g} -> {after:.3g}'
    before, after = (
        sum(row[f'rounding/{when}'] for row in rounding) for when in ('before', 'after')
    )
    assert after < 0.8 * before, f'{before:.3g} -> {after:.3g}'


def test_learnt_scales_of_activations_beat_the_calibrated_ones(learnt):
    rows = learnt.metrics[len(BLOCKS) :]
    assert len(rows) == len(BLOCKS)
    before, after = (sum(row[f'scales/{when}'] for row in rows) for when in ('before', 'after'))
    assert after < before, f'{before:.3g} -> {after:.3g}'


@pytest.fixture(scope='module')
def left(teacher, plan, learnt):
    """(state, inputs) -> the student's prediction less the teacher's."""

    @jax.jit
    def difference(params, state, x, t):
        bound = learnt.method.bind(params, state)
        student = denoisers.fake_student(teacher, plan, bound, TIMESTEPS, 'nearest')
        return student.predict(student.params, x, t) - teacher.predict(params, x, t)

    return lambda state, inputs: np.asarray(difference(teacher.params, state, inputs.x, inputs.t))


def test_the_whole_network_is_nearer_to_the_teacher(left, learnt, inputs):
    before, after = (np.mean(left(state, inputs) ** 2) for state in (learnt.start, learnt.state))
    assert after < 0.85 * before, f'{before:.3g} -> {after:.3g}'


def test_the_last_layer_is_left_without_a_mean_error(left, learnt):
    inputs = trajectories.load_inputs(learnt.folder / 'inputs_0.npz')

    def mean_error(state):
        return np.abs(np.mean(left(state, inputs), axis=(0, 1, 2)))

    # Where it learnt, in sums of another order.
    assert mean_error(learnt.state) < 1e-5 < 1e-3 < mean_error(learnt.start)


def test_a_finished_run_is_not_repeated(learnt):
    again = learnt.run()
    jax.tree.map(np.testing.assert_array_equal, again.state, learnt.state)
    assert len(log.read_metrics(learnt.folder)) == len(learnt.metrics)


def test_a_killed_run_ends_with_the_same_state(learnt, tmp_path):
    shutil.copytree(learnt.folder, tmp_path / 'killed')
    last = len(learnt.metrics)
    shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / f'{last}')
    resumed = learnt.run(folder=tmp_path / 'killed')
    jax.tree.map(np.testing.assert_array_equal, resumed.state, learnt.state)
    assert len(log.read_metrics(tmp_path / 'killed')) == last


SHORT = ReconstructConfig(
    num_iterations=20, batch_size=16, num_timesteps=2, num_images=16, sampler=SAMPLER
)


@pytest.fixture(scope='module')
def on_devices(teacher, plan, stats):
    """(folder, sizes of the mesh) -> (state, metrics), of a block and of a layer by itself."""
    part = {path: spec for path, spec in plan.items() if path != 'conv_in'}
    method, state = start(teacher, part, stats, QDIFFUSION)

    def run(folder, *sizes):
        learnt = reconstruct.run(
            teacher, method, state, part, TIMESTEPS, 'nearest', SHORT, key=jax.random.key(2),
            workdir=folder, description='test', device_mesh=mesh.make_mesh(*sizes),
        )  # fmt: skip
        return learnt.state, log.read_metrics(folder)

    return run


@pytest.fixture(scope='module')
def on_one(on_devices, tmp_path_factory):
    return on_devices(tmp_path_factory.mktemp('one'), 1)


@pytest.mark.parametrize('sizes', [(8,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_the_errors_do_not_depend_on_the_devices(on_devices, on_one, tmp_path, sizes):
    _, rows = on_devices(tmp_path, *sizes)
    assert len(rows) == len(on_one[1]) == 4
    for one, many in zip(on_one[1], rows, strict=True):
        assert one.keys() == many.keys()
        # Sums in another order; Adam makes a step of the learning rate from a tiny gradient too.
        for name in one.keys() - {'step', 'time'}:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-3, err_msg=name)


def test_a_run_that_is_asked_to_stop_goes_on_to_the_same_state(
    on_devices, on_one, tmp_path, monkeypatch
):
    # In the middle of the third of four passes: 20 iterations for rounding, 5 for scales.
    answers = iter([False] * 42 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(hosts, 'stop_requested', lambda: next(answers))
        with pytest.raises(SystemExit) as stopped:
            on_devices(tmp_path, 1)
    assert stopped.value.code == hosts.REQUEUE
    assert len(log.read_metrics(tmp_path)) == 2
    state, rows = on_devices(tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, state, on_one[0])
    assert [row['step'] for row in rows] == [1, 2, 3, 4]


def test_samples_that_do_not_divide_over_the_devices_are_refused(on_devices, tmp_path):
    with pytest.raises(ValueError, match='reconstruct.batch_size=16 is not divisible by 3'):
        on_devices(tmp_path, 3)


def test_a_part_of_a_state_binds_to_a_part_of_the_network(teacher, plan, learnt):
    layers = ('block_0/conv1', 'block_0/conv2')
    part = blocks.select(learnt.state, layers, plan)
    whole, bound = (
        jax.jit(learnt.method.bind)(teacher.params, state) for state in (learnt.state, part)
    )
    assert set(bound.weights) == set(bound.tables) == set(layers)
    for path in layers:
        np.testing.assert_array_equal(bound.weights[path].codes, whole.weights[path].codes)
    jax.tree.map(np.testing.assert_array_equal, blocks.merge(learnt.state, part), learnt.state)


def test_a_method_without_phases_is_refused(teacher, plan, stats, tmp_path):
    method, state = start(teacher, plan, stats, RoundToNearestConfig())
    with pytest.raises(ValueError, match='does not learn block by block'):
        reconstruct.run(
            teacher, method, state, plan, TIMESTEPS, 'nearest', CONFIG,
            key=jax.random.key(0), workdir=tmp_path, description='test',
        )  # fmt: skip


def test_a_later_round_draws_its_inputs_with_the_student(teacher, plan, stats, tmp_path):
    config = ReconstructConfig(
        num_iterations=2, batch_size=16, num_timesteps=2, num_images=16, sampler=SAMPLER,
        num_rounds=2, blocks='block_0',
    )  # fmt: skip
    only = {path: SPEC for path in plan if path.startswith('block_0')}
    method, state = start(teacher, only, stats, QDIFFUSION)
    reconstruct.run(
        teacher, method, state, only, TIMESTEPS, 'nearest', config,
        key=jax.random.key(2), workdir=tmp_path, description='test',
    )  # fmt: skip
    first, second = (trajectories.load_inputs(tmp_path / f'inputs_{i}.npz') for i in range(2))
    np.testing.assert_array_equal(first.t, second.t)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 0), 1)
    teachers = trajectories.draw_inputs(teacher, teacher, config, key=key)
    # The same noise at the start of each trajectory, then where the student goes.
    np.testing.assert_array_equal(second.x[:16], teachers.x[:16])
    assert np.mean(np.asarray(second.x[16:]) != np.asarray(teachers.x[16:])) > 0.9


def test_bound_kernels_are_integers(learnt, teacher):
    bound = jax.jit(learnt.method.bind)(teacher.params, learnt.state)
    for weight in bound.weights.values():
        codes = np.asarray(weight.codes)
        np.testing.assert_array_equal(codes, np.rint(codes))
    assert isinstance(bound, base.Bound)
