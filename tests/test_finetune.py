"""The distillation loop: its laws on a tiny network, and that devices and kills do not matter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, finetune, methods
from dmq_jax.config import EfficientDMConfig, FinetuneConfig, QuantConfig, SamplerConfig
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods.base import Decay
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import INPUT_ROLES
from dmq_jax.runtime import hosts, log, mesh, programs
from tests import tiny

# Devices sum their parts of the batch in another order.
TOLERANCE = 1e-5
NUM_STEPS = 4
TIMESTEPS = np.array([75, 50, 25, 0], np.int32)  # of the tables
NETWORK = DDPMUNet(
    channels=(8,), in_channels=1, layers_per_block=1, num_groups=2, down_attention=(False,),
    mid_attention=False, num_class_embeds=3,
)  # fmt: skip
INFO = denoisers.DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=100, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=3,
)
KEY_SEED = 7
# Of each kind of layer one or two: what is compiled for all is three times as much.
LAYERS = (
    'time_embed/dense_0', 'conv_in', 'down_0/block_0/conv1', 'down_0/block_0/time_proj',
    'down_0/block_0/conv2', 'up_0/block_1/conv1', 'conv_out',
)  # fmt: skip


def make_config(**options):
    defaults = dict(
        num_iterations=6, batch_size=8, sampler=SamplerConfig(num_steps=NUM_STEPS, eta=1.0),
        log_every=1, checkpoint_every=2,
    )  # fmt: skip
    return FinetuneConfig(**{**defaults, **options})


def make_problem():
    """(teacher, method, state, plan): 4 bits, ranges made up but wide enough."""
    teacher = tiny.random_denoiser(NETWORK, INFO, tiny.like_initial)
    layers = denoisers.quantizable(teacher)
    quant = QuantConfig(weight_observer='minmax', activation_observer='minmax')
    plan = denoisers.make_plan(layers, quant)
    plan = {path: plan[path] for path in LAYERS}
    low, high = np.full(NUM_STEPS, -2, np.float32), np.full(NUM_STEPS, 3, np.float32)
    seen = TensorStats(low, high, np.stack([low, high], axis=-1))
    stats = {path: dict.fromkeys(INPUT_ROLES[layers[path].kind], seen) for path in plan}
    method = methods.make(EfficientDMConfig(lora_rank=2, lora_rate_per_scale=0.05), plan)
    state = jax.jit(method.init)(teacher.params, stats, jax.random.key(1))
    return teacher, method, state, plan


@pytest.fixture(scope='module')
def problem():
    return make_problem()


def make_step(problem, config):
    """(compiled step, its first train state, sampler), on the default device."""
    teacher, method, state, plan = problem
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    optimizer = method.optimizer(state, Decay(config.num_iterations, config.schedule))
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
    step = finetune.make_train_step(teacher, loss, optimizer, config, has_integers=True)
    key = jax.random.key(KEY_SEED)
    train = finetune.start_state(teacher, sampler, config, optimizer, state, teacher.params, key)
    train = programs.copied(train)
    return step.jitted(), train, sampler


def run(problem, config, workdir, *, data=1, fsdp=1):
    teacher, method, state, plan = problem
    return finetune.run(
        teacher, method, state, plan, TIMESTEPS, 'nearest', config,
        key=jax.random.key(KEY_SEED), workdir=workdir, device_mesh=mesh.make_mesh(data, fsdp),
        description='test',
    )  # fmt: skip


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in jax.tree.leaves(tree)))


def test_loss_and_gradients_are_the_same_on_one_and_on_eight_devices(problem):
    teacher, method, state, plan = problem
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', make_config())
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, *INFO.image_shape)).astype(np.float32)
    t, y = np.arange(8, dtype=np.int32) * 12, np.arange(8, dtype=np.int32) % 3
    gain = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    results = []
    for data in (1, 8):
        device_mesh = mesh.make_mesh(data)
        replicated = mesh.replicate(device_mesh, (state, teacher.params))
        batch = mesh.shard_batch(device_mesh, (x, t, y, gain))
        (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*replicated, *batch)
        results.append((float(value), jax.device_get(gradients)))
    (one, gradients_one), (eight, gradients_eight) = results
    assert abs(one - eight) < TOLERANCE * abs(one)
    gap = norm(jax.tree.map(np.subtract, gradients_eight, gradients_one)) / norm(gradients_one)
    assert norm(gradients_one) > 0
    assert gap < TOLERANCE, f'{gap:.1e}'


@pytest.mark.parametrize('leader', ['teacher', 'student'])
def test_the_trajectory_is_led_by_the_predictions_of_whom_it_is_drawn_by(problem, leader):
    teacher, method, state, plan = problem
    config = make_config(drawn_by=leader)
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
    x = np.random.default_rng(3).standard_normal((2, *INFO.image_shape)).astype(np.float32)
    inputs = x, np.asarray([12, 24], np.int32), np.asarray([0, 1], np.int32)
    _, prediction = loss(state, teacher.params, *inputs, np.ones(2, np.float32))
    bound = method.bind(teacher.params, state)
    student = denoisers.fake_student(teacher, plan, bound, TIMESTEPS, 'nearest')
    said = {name: d.predict(d.params, *inputs) for name, d in
            {'teacher': teacher, 'student': student}.items()}  # fmt: skip
    other = said['student' if leader == 'teacher' else 'teacher']
    assert norm(prediction - said[leader]) < TOLERANCE * norm(said[leader])
    assert norm(prediction - other) > 10 * TOLERANCE * norm(other)


def test_gradients_do_not_depend_on_recomputing_activations(problem):
    teacher, method, state, plan = problem
    inputs = jnp.ones((2, *INFO.image_shape)), jnp.asarray(50), jnp.array([0, 2]), jnp.ones(())
    results = []
    for remat in (False, True):
        config = make_config(remat=remat)
        loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        results.append(gradient(state, teacher.params, *inputs)[0])
    gap = norm(jax.tree.map(jnp.subtract, *results)) / norm(results[0])
    assert gap < TOLERANCE, f'{gap:.1e}'


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
def test_one_program_visits_the_right_timesteps_and_starts_anew(problem, positions):
    config = make_config(positions=positions)
    step, train, sampler = make_step(problem, config)
    params, key = problem[0].params, jax.random.key(KEY_SEED)
    timesteps = np.asarray(sampler.timesteps)
    slots = np.arange(config.batch_size)
    start = np.zeros(8, int) if positions == 'trajectory' else slots * NUM_STEPS // 8
    first_noise = np.asarray(train.positions.carry.x)
    # Everything is on the device already; only reading results out is a transfer.
    sampler = jax.tree.map(jnp.asarray, sampler)
    for i in range(NUM_STEPS + 1):
        index = np.asarray(train.positions.index)
        np.testing.assert_array_equal(index, (start + i) % NUM_STEPS)
        assert set(timesteps[index]) <= set(timesteps)
        np.testing.assert_array_equal(train.positions.round, (start + i) // NUM_STEPS)
        with jax.transfer_guard('disallow'):
            train, _ = step(train, params, sampler, key)
    assert [program._cache_size() for program in (step.gradients, step.update)] == [1, 1]
    assert int(train.step) == NUM_STEPS + 1
    assert np.isfinite(np.asarray(train.positions.carry.x)).all()
    assert not np.any(np.all(np.asarray(train.positions.carry.x) == first_noise, axis=(1, 2, 3)))


def test_a_finished_trajectory_starts_from_new_noise_and_a_class_of_its_own(problem):
    teacher = problem[0]
    config = make_config()
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    key = jax.random.key(KEY_SEED)
    start = finetune.start_positions(teacher, sampler, config, teacher.params, key)
    last = start._replace(index=jnp.full((8,), NUM_STEPS - 1).at[0].set(0))
    after = finetune.advance(last, jnp.zeros_like(start.carry.x), sampler, INFO, key)
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
    config = make_config()
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


def test_start_positions_are_drawn_once_and_not_again_by_a_restart(problem, tmp_path, monkeypatch):
    drawn, original = [], finetune.start_positions

    def counted(*inputs):
        jax.debug.callback(lambda: drawn.append(None))  # runs when the program does
        return original(*inputs)

    monkeypatch.setattr(finetune, 'start_positions', counted)
    run(problem, make_config(num_iterations=2), tmp_path)
    jax.effects_barrier()
    assert len(drawn) == 1
    again = run(problem, make_config(num_iterations=2), tmp_path)
    jax.effects_barrier()
    assert len(drawn) == 1
    assert again.duration_s > 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(problem, tmp_path):
    teacher, method, state, plan = problem
    broken = method._replace(loss=lambda student, target: jnp.sum(student.output) * jnp.nan)
    with pytest.raises(FloatingPointError, match='loss is nan at step 1'):
        run((teacher, broken, state, plan), make_config(), tmp_path)


def test_the_loss_falls(problem, tmp_path):
    config = make_config(num_iterations=24 * NUM_STEPS, checkpoint_every=1000)
    run(problem, config, tmp_path)
    losses = [line['loss'] for line in log.read_metrics(tmp_path)]
    # Whole trajectories, since the loss differs between timesteps; enough of them that the noise of
    # a batch does not decide (seen: 0.74).
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
    config = make_config(checkpoint_every=4)
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


def compile_step(problem, **sizes):
    """(compiled step, train state, weights) on a mesh of these sizes."""
    teacher, method, state, plan = problem
    config, device_mesh = make_config(), mesh.make_mesh(**sizes)
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    optimizer = method.optimizer(state, Decay(config.num_iterations, config.schedule))
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', config)
    step = finetune.make_train_step(
        teacher, loss, optimizer, config, device_mesh, has_integers=True
    )
    key = jax.random.key(KEY_SEED)
    positions = finetune.start_positions(teacher, sampler, config, teacher.params, key)
    train = finetune.TrainState(state, optimizer.init(state), positions, jnp.zeros((), jnp.int32))
    train = mesh.place(train, mesh.shardings(device_mesh, train, finetune.SHARDING_RULES))
    params = mesh.shard_weights(device_mesh, teacher.params)
    return step.compiled(train, params, sampler, key), train, params


def size_in_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def local_bytes(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def batch_split(problem):
    """The step on four devices that split the batch alone."""
    return compile_step(problem, data=4)


def test_devices_that_split_the_batch_tell_one_another_gradients_and_nothing_else(batch_split):
    compiled, train, params = batch_split
    found = collectives(compiled)
    assert {kind for kind, _ in found} == {'all-reduce'}
    # Gradients of the state once, those of low-rank updates as the kernels' that they come from;
    # besides them the loss.
    most = size_in_bytes(train.state) + size_in_bytes(params) + 64
    assert sum(size for _, size in found) <= most


def test_fsdp_divides_weights_and_optimizer_state_and_gathers_only_them(problem, batch_split):
    whole, _, params = batch_split
    split, split_train, split_params = compile_step(problem, data=1, fsdp=4)
    weights, state, optimizer = (
        size_in_bytes(tree) - local_bytes(tree)
        for tree in (split_params, split_train.state, split_train.optimizer)
    )
    assert local_bytes(split_params) < 0.5 * local_bytes(params)
    # What XLA takes for a step falls by what each device no longer holds; gradients lie as the
    # state does.
    for name, saved in ('gradients', weights + state), ('update', 2 * state + optimizer):
        sizes = [
            getattr(step, name).memory_analysis().argument_size_in_bytes for step in (whole, split)
        ]
        assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05), name
    gathered = [size for kind, size in collectives(split) if kind == 'all-gather']
    can_be = size_in_bytes(split_params) + size_in_bytes(split_train.state)
    # Teacher and student use the same gathered weights: no weight travels twice.
    assert 0 < sum(gathered) <= can_be
    others = {kind for kind, _ in collectives(split)} - {'all-gather', 'all-reduce'}
    assert others <= {'reduce-scatter'}, others


@pytest.mark.parametrize('sizes', [(2, 2, 2), pytest.param((2, 4, 1), marks=pytest.mark.slow)])
def test_loss_and_gradients_do_not_depend_on_how_weights_are_split(problem, sizes):
    teacher, method, state, plan = problem
    loss = finetune.make_loss(teacher, method, plan, TIMESTEPS, 'nearest', make_config())
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, *INFO.image_shape)).astype(np.float32)
    t, y = np.arange(8, dtype=np.int32) * 12, np.arange(8, dtype=np.int32) % 3
    gain = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    results = []
    for shape in ((1, 1, 1), sizes):
        device_mesh = mesh.make_mesh(*shape)

        def on_mesh(state, params, *batch, device_mesh=device_mesh):
            state, params = mesh.whole(device_mesh, state), mesh.whole(device_mesh, params)
            return loss(state, params, *batch)

        weights = mesh.shard_weights(device_mesh, (state, teacher.params))
        batch = mesh.shard_batch(device_mesh, (x, t, y, gain))
        (value, _), gradients = jax.jit(jax.value_and_grad(on_mesh, has_aux=True))(*weights, *batch)
        results.append((float(value), jax.device_get(gradients)))
    (one, gradients_one), (many, gradients_many) = results
    assert abs(one - many) < TOLERANCE * abs(one)
    gap = norm(jax.tree.map(np.subtract, gradients_many, gradients_one)) / norm(gradients_one)
    assert gap < TOLERANCE, f'{gap:.1e}'
