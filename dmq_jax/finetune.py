"""Distillation of the teacher into a quantized student: data-free, resumable, sharded.

Both networks see the same x_t, drawn by the sampler from pure noise, led by the teacher's
predictions or by the student's; one optimizer step per position on the trajectories (EfficientDM,
arXiv:2310.03270, eq. 7). Two programs, of gradients and of the update, serve
every timestep, and the float weights are an argument: teacher and student share one copy.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int, Key, PyTree

from dmq_jax import denoisers, descent
from dmq_jax.config import FinetuneConfig
from dmq_jax.diffusion import samplers
from dmq_jax.methods.base import Decay, Method, Prediction, State
from dmq_jax.quant.layers import recomputed
from dmq_jax.quant.plan import Plan, multiplies_integers
from dmq_jax.quant.rows import per_image
from dmq_jax.runtime import log, mesh, programs
from dmq_jax.runtime.checkpoint import Checkpoints

# What is split over the devices of a mesh, by path of the train state; first match wins.
SHARDING_RULES = (
    ('positions/.*', (mesh.BATCH,)),
    ('(state|optimizer)/.*', mesh.Spread(largest='fsdp')),
    ('.*', ()),
)

# Normalizations, whatever a network calls them. What they made is computed again in the backward
# pass: 597 instead of 706 MB of temporaries (CIFAR-10 U-Net, batch 8).
NORMS = '(?i)(.*/)?[^/]*norm[^/]*'


class Positions(NamedTuple):
    """Where each image of the batch stands on its trajectory.

    Attributes:
      carry: of the sampler.
      index: row of the sampler's table, per image.
      round: how many trajectories this slot has finished; picks noise and class of the next.
      labels: class of each image; None if unconditional.
    """

    carry: samplers.Carry
    index: Int[Array, 'B']
    round: Int[Array, 'B']
    labels: Int[Array, 'B'] | None


class TrainState(NamedTuple):
    """Everything a step changes, and so what a checkpoint holds."""

    state: State
    optimizer: PyTree
    positions: Positions
    step: Int[Array, '']


class Finetuned(NamedTuple):
    """The result: the method's state, and what it took: seconds, and megabytes where measured."""

    state: State
    duration_s: float
    memory_mb: float | None = None


def slot_keys(key: Key[Array, ''], rounds: Int[Array, 'B']) -> Key[Array, 'B']:
    """One key per slot and trajectory."""
    slots = jnp.arange(rounds.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots)
    return jax.vmap(jax.random.fold_in)(keys, rounds.astype(jnp.uint32))


def start_labels(keys: Key[Array, 'B'], info: denoisers.DenoiserInfo) -> Int[Array, 'B'] | None:
    """A random class per trajectory."""
    if info.num_classes is None:
        return None
    # Noise folds in step indices and 2^32 - 1; this constant is neither.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**31)
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, info.num_classes))(keys)


def start_positions(
    teacher: denoisers.Denoiser,
    sampler: samplers.Sampler,
    config: FinetuneConfig,
    params: PyTree,
    key: Key[Array, ''],
) -> Positions:
    """All at the start of a trajectory; or, staggered, spread evenly over one."""
    rounds = jnp.zeros((config.batch_size,), jnp.int32)
    keys = slot_keys(key, rounds)
    labels = start_labels(keys, teacher.info)
    x_T = samplers.initial_noise(keys, teacher.info.image_shape)
    if config.positions == 'trajectory':
        return Positions(sampler.init(x_T), jnp.zeros_like(rounds), rounds, labels)
    predict = denoisers.guided(teacher.predict, teacher.info, config.sampler.guidance_scale)
    _, carries = samplers.trajectory(
        lambda x, t: (predict(params, x, t, labels), None), sampler, x_T, keys
    )
    slots = jnp.arange(config.batch_size)
    index = (slots * sampler.timesteps.size // config.batch_size).astype(jnp.int32)
    carry = jax.tree.map(lambda a: a[index, slots], carries)
    return Positions(carry, index, rounds, labels)


def start_state(
    teacher: denoisers.Denoiser,
    sampler: samplers.Sampler,
    config: FinetuneConfig,
    optimizer: optax.GradientTransformation,
    state: State,
    params: PyTree,
    key: Key[Array, ''],
) -> TrainState:
    """The first train state; what is compiled for it is let go, before the step is compiled."""
    draw = functools.partial(start_positions, teacher, sampler, config)
    positions = programs.call_once(draw, params, key)
    moments = programs.call_once(optimizer.init, state)
    return TrainState(state, moments, positions, jnp.zeros((), jnp.int32))


def advance(
    positions: Positions,
    prediction: Float[Array, 'B H W C'],
    sampler: samplers.Sampler,
    info: denoisers.DenoiserInfo,
    key: Key[Array, ''],
) -> Positions:
    """One step of the sampler for every image; those that arrive start anew."""
    keys = slot_keys(key, positions.round)
    noise = None
    if sampler.is_stochastic:
        noise = samplers.step_noise(keys, positions.index, info.image_shape)
    moved = sampler.step(positions.carry, prediction, positions.index, noise)
    index = positions.index + 1
    done = index >= sampler.timesteps.size
    rounds = positions.round + done.astype(jnp.int32)
    new_keys = slot_keys(key, rounds)
    fresh = sampler.init(samplers.initial_noise(new_keys, info.image_shape))

    def restart(new: Array, old: Array) -> Array:
        return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new, old)

    labels = positions.labels
    if labels is not None:
        labels = restart(start_labels(new_keys, info), labels)
    return Positions(jax.tree.map(restart, fresh, moved), jnp.where(done, 0, index), rounds, labels)


def make_loss(
    teacher: denoisers.Denoiser,
    method: Method,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: FinetuneConfig,
) -> Callable[..., tuple[Float[Array, ''], Array]]:
    """(state, params, x, t, y, gain) -> (loss, prediction); differentiable in the state.

    The prediction is of whom `config.drawn_by` names; it leads on to the next x_t. `gain` ([] or
    [B]) multiplies both outputs before they are compared; see `step_gain`.
    """
    network = teacher.network
    if method.features is not None:
        network = denoisers.Capturing(network, method.features)
    student = denoisers.QuantizedPredict(network, tuple(plan.items()), lookup, 'fake')
    floating = denoisers.float_denoiser(network, None, teacher.info).predict
    scale = config.sampler.guidance_scale
    predict_teacher = denoisers.guided(floating, teacher.info, scale)
    predict_student = denoisers.guided(student, teacher.info, scale)
    if config.remat:
        predict_student = jax.checkpoint(predict_student)

    def weighed(predicted: Prediction, gain: Array) -> Prediction:
        return predicted._replace(output=predicted.output * per_image(gain, 4))

    def prediction(predicted) -> Prediction:
        return Prediction(*predicted) if isinstance(predicted, tuple) else Prediction(predicted)

    def loss(state, params, x, t, y, gain):
        target = jax.lax.stop_gradient(prediction(predict_teacher(params, x, t, y)))
        bound = denoisers.training_params(params, method.bind(params, state), timesteps)
        with recomputed(NORMS):
            student_says = prediction(predict_student(bound, x, t, y))
        value = method.loss(weighed(student_says, gain), weighed(target, gain))
        leader = student_says if config.drawn_by == 'student' else target
        return value, jax.lax.stop_gradient(leader.output)

    return loss


def step_gain(sampler: samplers.Sampler, target: str) -> Float[Array, 'S']:
    """What multiplies the two predictions at each position before they are compared.

    Args:
      sampler: of the trajectories.
      target: 'prediction' compares them as they are (EfficientDM's code); 'step' compares where
        they take the sampler next (the mean mu of its paper's eq. 7), scaled to a mean square of 1;
        'balanced' weighs by the geometric mean of the two. `step` values the first, noisy part of
        a trajectory, which decides what an image shows, `prediction` the last, which decides its
        texture.
    """
    if target == 'prediction':
        return jnp.ones(sampler.timesteps.shape)
    gain = jnp.abs(samplers.prediction_gain(sampler))
    gain = jnp.sqrt(gain) if target == 'balanced' else gain
    return gain / jnp.sqrt(jnp.mean(gain**2))


class TrainStep(NamedTuple):
    """One step as two programs: to compile both at once takes 3.0 instead of 2.3 GB.

    (CIFAR-10 U-Net, two cores, the process.)

    Called, it is the whole step: (train state, float weights, sampler, key) -> (train state, loss).
    The train state is donated once it is `jitted` or `compiled`.

    Attributes:
      gradients: (train state, float weights, sampler) -> ((loss, prediction), gradients).
      update: (train state, gradients, prediction, sampler, key) -> train state.
      options: what the compiler is told.
    """

    gradients: Callable[..., Any]
    update: Callable[..., TrainState]
    options: dict[str, Any] | None

    def __call__(
        self, train: TrainState, params: PyTree, sampler: samplers.Sampler, key: Key[Array, '']
    ) -> tuple[TrainState, Float[Array, '']]:
        """The next train state, and the loss of this one."""
        (value, prediction), gradients = self.gradients(train, params, sampler)
        return self.update(train, gradients, prediction, sampler, key), value

    def jitted(self) -> 'TrainStep':
        """The same, each program compiled when it is first called."""
        return self._replace(
            gradients=jax.jit(self.gradients, compiler_options=self.options),
            update=jax.jit(self.update, donate_argnums=0, compiler_options=self.options),
        )

    def compiled(
        self, train: TrainState, params: PyTree, sampler: samplers.Sampler, key: Key[Array, '']
    ) -> 'TrainStep':
        """The same of compiled programs, for arguments that lie as these do."""
        step = self.jitted()
        gradients = programs.compile_alone(step.gradients, train, params, sampler)
        (_, prediction), slopes = gradients.out_info
        update = programs.compile_alone(step.update, train, slopes, prediction, sampler, key)
        return self._replace(gradients=gradients, update=update)

    def peak_bytes(self, *arguments: Any) -> int:
        """Of compiled programs: arguments, results and temporaries."""
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments) if hasattr(leaf, 'nbytes'))
        results = self.gradients.memory_analysis().output_size_in_bytes
        made = programs.made_bytes(self.gradients), results + programs.made_bytes(self.update)
        return held + max(made)


def make_train_step(
    teacher: denoisers.Denoiser,
    loss: Callable[..., tuple[Float[Array, ''], Array]],
    optimizer: optax.GradientTransformation,
    config: FinetuneConfig,
    device_mesh: mesh.Mesh | None = None,
    *,
    has_integers: bool,
) -> TrainStep:
    """The step, not yet compiled.

    Its result lies on the devices of `device_mesh` as its argument does; see `SHARDING_RULES`.
    `has_integers`: whether the student multiplies integers; see `programs.step_options`.
    """
    info = teacher.info

    def whole_loss(state, params, *inputs):
        if device_mesh is not None:
            state, params = mesh.whole(device_mesh, state), mesh.whole(device_mesh, params)
        return loss(state, params, *inputs)

    def gradients(train, params, sampler):
        positions = train.positions
        t = jnp.asarray(sampler.timesteps)[positions.index]
        gain = step_gain(sampler, config.target)[positions.index]
        # On a common trajectory all images are at one timestep: scalar rows, less work.
        if config.positions == 'trajectory':
            t, gain = t[0], gain[0]
        (value, prediction), slopes = jax.value_and_grad(whole_loss, has_aux=True)(
            train.state, params, positions.carry.x, t, positions.labels, gain
        )
        if device_mesh is not None:
            placement = mesh.shardings(device_mesh, train, SHARDING_RULES)
            slopes = mesh.constrain(slopes, placement.state)
            prediction = mesh.constrain(prediction, placement.positions.carry.x)
        return (value, prediction), slopes

    def update(train, slopes, prediction, sampler, key):
        updates, optimizer_state = optimizer.update(slopes, train.optimizer, train.state)
        state = optax.apply_updates(train.state, updates)
        positions = advance(train.positions, prediction, sampler, info, key)
        train = TrainState(state, optimizer_state, positions, train.step + 1)
        if device_mesh is not None:
            train = mesh.constrain(train, mesh.shardings(device_mesh, train, SHARDING_RULES))
        return train

    return TrainStep(gradients, update, programs.step_options(has_integers=has_integers))


def run(
    teacher: denoisers.Denoiser,
    method: Method,
    state: State,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: FinetuneConfig,
    *,
    key: Key[Array, ''],
    workdir: Path,
    device_mesh: mesh.Mesh,
    description: str,
) -> Finetuned:
    """Trains `state` for `num_iterations` steps, from the last checkpoint in `workdir`.

    Args:
      teacher: the float network.
      method: of which `state` is the start.
      state: from `method.init`.
      plan: what is quantized.
      timesteps: of the rows of the state's tables.
      lookup: how a row is found for other timesteps.
      config: iterations, batch, trajectories.
      key: root key of the trajectories.
      workdir: receives checkpoints and `metrics.jsonl`.
      device_mesh: batches are split over it, and what `SHARDING_RULES` names.
      description: shown beside the progress.

    Raises:
      FloatingPointError: the loss is not finite; names the step.
      Interrupted: the run was asked to stop; a checkpoint is saved.
    """
    mesh.check_batch_size(device_mesh, config.batch_size, name='finetune.batch_size')
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    optimizer = method.optimizer(state, Decay(config.num_iterations, config.schedule))
    loss = make_loss(teacher, method, plan, timesteps, lookup, config)
    train_step = make_train_step(
        teacher, loss, optimizer, config, device_mesh, has_integers=multiplies_integers(plan)
    )
    params = mesh.shard_weights(device_mesh, teacher.params)

    def start() -> TrainState:
        return start_state(teacher, sampler, config, optimizer, state, params, key)

    found: list[Any] = []

    def compiled(train: TrainState) -> Any:
        if not found:  # at the first step, which a run that is resumed at its end does not take
            found.append(train_step.compiled(train, params, sampler, key))
        return found[0]

    with (
        Checkpoints(workdir / 'checkpoints', config.max_to_keep) as checkpoints,
        log.make_writer(workdir) as writer,
    ):
        train, spent_s = descent.restore_or_start(checkpoints, start, device_mesh, SHARDING_RULES)
        train, duration_s = descent.descend(
            lambda train: compiled(train)(train, params, sampler, key), train, spent_s, config,
            checkpoints=checkpoints, writer=writer, description=description,
        )  # fmt: skip
    return Finetuned(mesh.fetch(device_mesh, train.state), duration_s)


def save(path: str | os.PathLike, result: Finetuned) -> None:
    """Writes a learnt state as one safetensors file."""
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(result.state, sep=':')
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    took = {'duration_s': result.duration_s, 'memory_mb': result.memory_mb}
    save_file(tensors, path, {name: str(n) for name, n in took.items() if n is not None})


def load(path: str | os.PathLike, like: State) -> Finetuned:
    """Reads what `save` wrote.

    Raises:
      ValueError: its tensors are not those of `like`.
    """
    from safetensors import safe_open

    with safe_open(path, framework='numpy') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        took = {name: float(text) for name, text in file.metadata().items()}
    expected = traverse_util.flatten_dict(like, sep=':')
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ValueError(f'{path}: other tensors than this method has, e.g. {odd[0]!r}.')
    # Groups without a leaf are in no file.
    whole = traverse_util.flatten_dict(like, sep=':', keep_empty_nodes=True)
    return Finetuned(traverse_util.unflatten_dict(whole | tensors, sep=':'), **took)
