"""The distillation loop: its laws on a tiny network, and that devices and kills do not matter."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, finetune, methods
from dmq_jax.config import EfficientDMConfig, FinetuneConfig, QuantConfig, SamplerConfig
from dmq_jax.methods.base import Decay
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import INPUT_ROLES
from dmq_jax.runtime import hosts, log, mesh, programs
from tests import tiny_conditional
from tests.tiny_conditional import INFO

# Devices sum their parts of the batch in another order.
TOLERANCE = 1e-5
NUM_STEPS = 4
TIMESTEPS = np.array([75, 50, 25, 0], np.int32)  # of the tables
KEY_SEED = 7


def make_config(**options):
    """Of the same steps for all tests, where these do not matter: one program serves them."""
    defaults = dict(
        num_iterations=24 * NUM_STEPS, batch_size=8,
        sampler=SamplerConfig(num_steps=NUM_STEPS, eta=1.0), log_every=1, checkpoint_every=1000,
    )  # fmt: skip
    return FinetuneConfig(**{**defaults, **options})


def make_brief_config():
    return make_config(num_iterations=6, checkpoint_every=2)


@pytest.fixture(scope='module')
def problem():
    """(teacher, method, state, plan): 4 bits, ranges made up but wide enough."""
    teacher = tiny_conditional.teacher()
    layers = denoisers.quantizable(teacher)
    quant = QuantConfig(weight_observer='minmax', activation_observer='minmax')
    plan = denoisers.make_plan(layers, quant)
    low, high = np.full(NUM_STEPS, -2, np.float32), np.full(NUM_STEPS, 3, np.float32)
    seen = TensorStats(low, high, np.stack([low, high], axis=-1))
    stats = {path: dict.fromkeys(INPUT_ROLES[layers[path].kind], seen) for path in plan}
    method = methods.make(EfficientDMConfig(lora_rank=2, lora_rate_per_scale=0.05), plan)
    state = jax.jit(method.init)(teacher.params, stats, jax.random.key(1))
    return teacher, method, state, plan


class Start(NamedTuple):
    """A step, and what its programs take."""

    step: finetune.TrainStep
    train: finetune.TrainState
    params: Any
    sampler: Any
    key: Any

    def jitted(self):
        """Compiled at the first call."""
        return self._replace(step=self.step.jitted())

    def compiled(self):
        """Compiled: two programs that take nothing but what lies as these arguments do."""
        return self._replace(
            step=self.step.compiled(self.train, self.params, self.sampler, self.key)
        )

    def loss_and_gradients(self):
        (value, _), slopes = self.step.gradients(self.train, self.params, self.sampler)
        return float(value), jax.device_get(slopes)


def make_start(problem, config, *sizes):
    """The step, not yet compiled, and its first train state on such a mesh."""
    teacher, method, state, plan = problem
    device_mesh, key = mesh.make_mesh(*sizes), jax.random.key(KEY_SEED)
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    optimizer = method.optimizer(state, Decay(config.num_iterations, config.schedule))
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
    step = finetune.make_train_step(
        teacher, loss, optimizer, config, device_mesh, has_integers=True
    )
    train = finetune.start_state(teacher, sampler, config, optimizer, state, teacher.params, key)
    placement = mesh.shardings(device_mesh, train, finetune.SHARDING_RULES)
    train = programs.copied(mesh.place(train, placement))
    # Everything is on the device then; only reading results out is a transfer.
    sampler = jax.tree.map(jnp.asarray, sampler)
    return Start(step, train, mesh.shard_weights(device_mesh, teacher.params), sampler, key)


@pytest.fixture(scope='module')
def alone(problem):
    """The step on one device."""
    return make_start(problem, make_config(), 1).compiled()


@pytest.fixture(scope='module')
def reference(alone):
    """(loss, gradients) of one device, each image at a timestep of its own."""
    return alone.loss_and_gradients()


def run(problem, config, workdir, *, data=1, fsdp=1):
    teacher, method, state, plan = problem
    return finetune.run(
        teacher, method, state, plan, TIMESTEPS, 'nearest', config,
        key=jax.random.key(KEY_SEED), workdir=workdir, device_mesh=mesh.make_mesh(data, fsdp),
        description='test',
    )  # fmt: skip


def counted_run(problem, workdir):
    """(result, how often positions were drawn) of a run."""
    drawn, original = [], finetune.start_positions

    def counted(*inputs):
        jax.debug.callback(lambda: drawn.append(None))  # runs when the program does
        return original(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, 'start_positions', counted)
        result = run(problem, make_config(), workdir)
        jax.effects_barrier()
    return result, len(drawn)


class Finished(NamedTuple):
    workdir: Any
    num_drawn: int


@pytest.fixture(scope='module')
def finished(problem, tmp_path_factory):
    """A run to the end, on one device."""
    workdir = tmp_path_factory.mktemp('finished')
    return Finished(workdir, counted_run(problem, workdir)[1])


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in jax.tree.leaves(tree)))


def assert_alike(found, wanted):
    """Of two pairs (loss, gradients)."""
    assert norm(wanted[1]) > 0
    assert abs(found[0] - wanted[0]) < TOLERANCE * abs(wanted[0])
    gap = norm(jax.tree.map(np.subtract, found[1], wanted[1])) / norm(wanted[1])
    assert gap < TOLERANCE, f'{gap:.1e}'


def test_the_trajectory_is_led_by_the_predictions_of_whom_it_is_drawn_by(problem):
    teacher, method, state, plan = problem
    x = np.random.default_rng(3).standard_normal((2, *INFO.image_shape)).astype(np.float32)
    inputs = x, np.asarray([12, 24], np.int32), np.asarray([0, 1], np.int32)

    @jax.jit
    def predictions(state, params):
        led = {}
        for leader in ('teacher', 'student'):
            config = make_config(drawn_by=leader)
            loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
            led[leader] = loss(state, params, *inputs, np.ones(2, np.float32))[1]
        bound = method.bind(params, state)
        student = denoisers.fake_student(teacher, plan, bound, TIMESTEPS, 'nearest')
        return led, {
            'teacher': teacher.predict(params, *inputs),
            'student': student.predict(student.params, *inputs),
        }

    led, said = jax.device_get(predictions(state, teacher.params))
    for leader, other in ('teacher', 'student'), ('student', 'teacher'):
        assert norm(led[leader] - said[leader]) < TOLERANCE * norm(said[leader])
        assert norm(led[leader] - said[other]) > 10 * TOLERANCE * norm(said[other])


def test_gradients_do_not_depend_on_recomputing_activations(problem, reference):
    again = make_start(problem, make_config(remat=True), 1).jitted()
    assert_alike(again.loss_and_gradients(), reference)


def test_predictions_are_weighed_by_where_they_take_the_sampler(problem):
    teacher, _, _, _ = problem
    sampler = denoisers.make_denoiser_sampler(teacher, make_config().sampler)
    gain = np.asarray(finetune.step_gain(sampler, 'step'))
    assert np.mean(gain**2) == pytest.approx(1.0, rel=1e-5)  # a few float32 operations
    carry = sampler.init(jnp.ones((1, *INFO.image_shape)))
    silence = jnp.zeros_like(carry.x)
    moved = [
        np.mean(
            sampler.step(carry, jnp.ones_like(carry.x), i, silence).x
            - sampler.step(carry, silence, i, silence).x
        )
        for i in range(len(sampler.timesteps))
    ]
    moved = np.asarray(moved)
    np.testing.assert_allclose(gain / gain[0], moved / moved[0], rtol=1e-4)  # differences of 1
    balanced = np.asarray(finetune.step_gain(sampler, 'balanced'))
    # Between the two: its square goes with the first power of the other.
    np.testing.assert_allclose(balanced**2 / balanced[0] ** 2, np.abs(gain / gain[0]), rtol=1e-5)
    assert np.all(np.asarray(finetune.step_gain(sampler, 'prediction')) == 1)


@pytest.mark.parametrize('positions', ['trajectory', 'staggered'])
def test_one_program_visits_the_right_timesteps_and_starts_anew(problem, alone, positions):
    config = make_config(positions=positions)
    start = alone if config == make_config() else make_start(problem, config, 1).compiled()
    step, train = start.step, programs.copied(start.train)
    timesteps = np.asarray(start.sampler.timesteps)
    slots = np.arange(config.batch_size)
    first = np.zeros(8, int) if positions == 'trajectory' else slots * NUM_STEPS // 8
    first_noise = np.asarray(train.positions.carry.x)
    for i in range(NUM_STEPS + 1):
        index = np.asarray(train.positions.index)
        np.testing.assert_array_equal(index, (first + i) % NUM_STEPS)
        assert set(timesteps[index]) <= set(timesteps)
        np.testing.assert_array_equal(train.positions.round, (first + i) // NUM_STEPS)
        # Programs that are compiled already take no train state of other shapes or types.
        with jax.transfer_guard('disallow'):
            train, _ = step(train, start.params, start.sampler, start.key)
    assert int(train.step) == NUM_STEPS + 1
    assert np.isfinite(np.asarray(train.positions.carry.x)).all()
    assert not np.any(np.all(np.asarray(train.positions.carry.x) == first_noise, axis=(1, 2, 3)))


def test_a_finished_trajectory_starts_from_new_noise_and_a_class_of_its_own(alone):
    start, advance = alone.train.positions, jax.jit(finetune.advance, static_argnums=3)
    index = np.array([0] + [NUM_STEPS - 1] * 7, np.int32)
    silence = np.zeros(start.carry.x.shape, np.float32)
    after = advance(start._replace(index=index), silence, alone.sampler, INFO, alone.key)
    np.testing.assert_array_equal(after.index, [1] + [0] * 7)
    np.testing.assert_array_equal(after.round, [0] + [1] * 7)
    assert int(after.labels[0]) == int(start.labels[0])
    fresh = np.asarray(after.carry.x)[1:]
    # Noise of variance 1, drawn anew for every slot: 112 values.
    assert 0.7 < fresh.std() < 1.3
    assert len({image.tobytes() for image in fresh}) == 7
    assert not np.any(np.isin(fresh, np.asarray(start.carry.x)))
    assert set(np.asarray(after.labels).tolist()) <= {0, 1, 2}


@pytest.mark.slow  # test_pipeline kills a whole run and compares its metrics
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(problem, tmp_path, monkeypatch):
    config = make_brief_config()
    whole = run(problem, config, tmp_path / 'whole')

    class Stopped(Exception):
        pass

    original, calls = finetune.TrainStep.__call__, []

    def counted(*inputs):
        if len(calls) == 3:
            raise Stopped
        calls.append(None)
        return original(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.TrainStep, '__call__', counted)
        with pytest.raises(Stopped):
            run(problem, config, tmp_path / 'parts')
    resumed = run(problem, config, tmp_path / 'parts')
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    moved = jax.tree.map(np.subtract, whole.state['lora'], jax.device_get(problem[2]['lora']))
    assert norm(moved) > 0
    assert [line['step'] for line in log.read_metrics(tmp_path / 'parts')] == list(range(1, 7))


def test_start_positions_are_drawn_once_and_not_again_by_a_restart(problem, finished):
    assert finished.num_drawn == 1
    again, num_drawn = counted_run(problem, finished.workdir)
    assert num_drawn == 0
    assert again.duration_s > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(problem, tmp_path):
    teacher, method, state, plan = problem
    broken = {**state, 'affine': jax.tree.map(lambda a: a * np.nan, state['affine'])}
    with pytest.raises(FloatingPointError, match='loss is nan at step 1'):
        run((teacher, method, broken, plan), make_config(), tmp_path)


def test_the_loss_falls(finished):
    losses = [line['loss'] for line in log.read_metrics(finished.workdir)]
    # Whole trajectories, since the loss differs between timesteps; enough of them that the noise of
    # a batch does not decide (seen: 0.80).
    assert np.mean(losses[-8 * NUM_STEPS :]) < 0.9 * np.mean(losses[: 4 * NUM_STEPS])


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(problem, tmp_path):
    with pytest.raises(ValueError, match='finetune.batch_size=6 is not divisible by 8 devices'):
        run(problem, make_config(batch_size=6), tmp_path, data=8)


def test_a_group_that_learns_nothing_survives_a_file(tmp_path):
    state = {'lora': {'a': np.ones(2, np.float32)}, 'affine': {}}
    finetune.save(tmp_path / 'state.safetensors', finetune.Finetuned(state, 1.5))
    loaded = finetune.load(tmp_path / 'state.safetensors', like=state).state
    assert loaded.keys() == state.keys()
    assert loaded['affine'] == {}


def test_a_saved_state_loads_as_it_was_and_only_into_its_own_method(problem, tmp_path):
    state = jax.device_get(problem[2])
    finetune.save(tmp_path / 'state.safetensors', finetune.Finetuned(state, 1.5))
    loaded = finetune.load(tmp_path / 'state.safetensors', like=state)
    assert loaded.duration_s == 1.5
    jax.tree.map(np.testing.assert_array_equal, loaded.state, state)
    with pytest.raises(ValueError, match='other tensors than this method has'):
        finetune.load(tmp_path / 'state.safetensors', like={'other': state})


@pytest.mark.slow  # three compilations of the whole loop
def test_a_run_that_is_asked_to_stop_goes_on_elsewhere_with_the_same_losses(
    problem, tmp_path, monkeypatch
):
    config = make_config(num_iterations=6, checkpoint_every=4)
    run(problem, config, tmp_path / 'undisturbed', data=8)
    answers = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(hosts, 'stop_requested', lambda: next(answers))
        with pytest.raises(SystemExit) as stopped:
            run(problem, config, tmp_path / 'moved', data=8)
    assert stopped.value.code == hosts.REQUEUE == 75
    # The checkpoint of 8 devices, on 2, and split over them in another way.
    run(problem, config, tmp_path / 'moved', data=1, fsdp=2)
    lines = [log.read_metrics(tmp_path / name) for name in ('undisturbed', 'moved')]
    assert [line['step'] for line in lines[0]] == [line['step'] for line in lines[1]]
    losses = np.array([[line['loss'] for line in run] for run in lines])
    # Adam turns the rounding of a tiny gradient into a step of the size of the learning rate.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


_BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2}


def collectives(compiled):
    """(kind, bytes of the result) of everything that devices tell one another."""
    found = []
    kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
    text = '\n'.join(program.as_text() for program in (compiled.gradients, compiled.update))
    for shape, kind in re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', text):
        size = sum(
            _BYTES[dtype] * int(np.prod([int(n) for n in dims.split(',') if n]))
            for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shape)
        )
        found.append((kind, size))
    return found


def size_in_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def local_bytes(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def batch_split(problem):
    """The step on four devices that split the batch alone."""
    return make_start(problem, make_config(), 4).compiled()


@pytest.fixture(scope='module')
def weights_split(problem):
    """The step on four devices that split weights, state and the batch."""
    return make_start(problem, make_config(), 1, 4).compiled()


def test_devices_that_split_the_batch_tell_one_another_gradients_and_nothing_else(batch_split):
    found = collectives(batch_split.step)
    train, params = batch_split.train, batch_split.params
    assert {kind for kind, _ in found} == {'all-reduce'}
    # Gradients of the state once, those of low-rank updates as the kernels' that they come from;
    # besides them the loss.
    most = size_in_bytes(train.state) + size_in_bytes(params) + 64
    assert sum(size for _, size in found) <= most


def test_fsdp_divides_weights_and_optimizer_state_and_gathers_only_them(batch_split, weights_split):
    split_params, split_train = weights_split.params, weights_split.train
    weights, state, optimizer = (
        size_in_bytes(tree) - local_bytes(tree)
        for tree in (split_params, split_train.state, split_train.optimizer)
    )
    assert local_bytes(split_params) < 0.5 * local_bytes(batch_split.params)
    # What XLA takes for a step falls by what each device no longer holds; gradients lie as the
    # state does.
    for name, saved in ('gradients', weights + state), ('update', 2 * state + optimizer):
        sizes = [
            getattr(start.step, name).memory_analysis().argument_size_in_bytes
            for start in (batch_split, weights_split)
        ]
        assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05), name
    found = collectives(weights_split.step)
    gathered = [size for kind, size in found if kind == 'all-gather']
    can_be = size_in_bytes(split_params) + size_in_bytes(split_train.state)
    # Teacher and student use the same gathered weights: no weight travels twice.
    assert 0 < sum(gathered) <= can_be
    others = {kind for kind, _ in found} - {'all-gather', 'all-reduce'}
    assert others <= {'reduce-scatter'}, others


@pytest.mark.parametrize('how', ['batch_split', 'weights_split'])
def test_loss_and_gradients_are_the_same_on_one_and_on_four_devices(reference, how, request):
    assert_alike(request.getfixturevalue(how).loss_and_gradients(), reference)


@pytest.mark.parametrize('sizes', [(2, 2, 2), pytest.param((2, 4, 1), marks=pytest.mark.slow)])
def test_loss_and_gradients_do_not_depend_on_how_weights_are_split(problem, reference, sizes):
    assert_alike(
        make_start(problem, make_config(), *sizes).jitted().loss_and_gradients(), reference
    )
