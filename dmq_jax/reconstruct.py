"""Block reconstruction: a student learns one block of the network after the other.

BRECQ (arXiv:2102.05426) over the timesteps of diffusion (Q-Diffusion, arXiv:2302.04304). Inputs
are drawn evenly from trajectories. For each block in the order of execution, what enters it in the
network quantized so far, and what leaves it in the float one, are kept in memory; its part of the
method's state then learns to map one to the other. Blocks are modules of the network, found by
path; a quantized layer outside of them is a block by itself. The error of a block is
mean over samples and positions of the sum over channels of |output - target|^norm.

Over a mesh, the samples in memory are split over its devices, every batch of them too, and the
state of a block by 'fsdp'. A run that is asked to stop does so within a block, of which nothing is
kept: a restart goes on after the last whole one.
"""

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from dmq_jax import denoisers
from dmq_jax.blocks import Block, find_blocks, learns, merge, select, without_inputs
from dmq_jax.config import ReconstructConfig
from dmq_jax.examples import Recorder
from dmq_jax.methods.base import (
    Bound,
    Decay,
    Method,
    Phase,
    State,
    apply_fake,
    with_leaves,
    with_weights,
)
from dmq_jax.quant.layers import recorded_calls
from dmq_jax.quant.plan import Plan, multiplies_integers
from dmq_jax.runtime import hosts, log, mesh, programs
from dmq_jax.runtime.checkpoint import Checkpoints
from dmq_jax.runtime.progress import progress
from dmq_jax.trajectories import Inputs, draw_inputs, load_inputs, save_inputs

# How the state of a block and its moments lie on a mesh.
_STATE_RULES = (('.*', mesh.Spread(largest='fsdp')),)
_CHECK_EVERY = 100  # optimizer steps between looks at the loss, which wait for the device


class Reconstructed(NamedTuple):
    """The result: the method's state, and what it took: seconds, and megabytes where measured."""

    state: State
    duration_s: float
    memory_mb: float | None = None


class Task(NamedTuple):
    """What all blocks share; the entries are those of `run`, and what is made of them."""

    teacher: denoisers.Denoiser
    method: Method
    bind: Callable[[PyTree, State], Bound]  # the method's, compiled
    plan: Plan
    timesteps: Int[np.ndarray, 'S']
    lookup: str
    config: ReconstructConfig
    device_mesh: mesh.Mesh
    params: PyTree  # of the teacher, on the mesh
    blocks: list[Block]
    recorder: Recorder


class BlockStep(NamedTuple):
    """How one block learns in one phase.

    Attributes:
      learn: compiled when called: `(part, moments, params, examples, j) -> (part, moments, error)`,
        iteration j; it takes `part` and `moments` over.
      error: `(part, params, examples) -> scalar`, of the block as it is exported.
      mean_error: `(part, params, examples) -> [C]`, of target - output of the same block, if it is
        one layer.
      part: of the state, which is learnt.
      moments: of the optimizer.
      examples: what the block is shown.
      num_iterations: of this phase.
    """

    learn: Callable[..., tuple[State, PyTree, Array]]
    error: Callable[..., Array]
    mean_error: Callable[..., Array]
    part: State
    moments: PyTree
    examples: PyTree
    num_iterations: int


def make_task(
    teacher: denoisers.Denoiser,
    method: Method,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: ReconstructConfig,
    device_mesh: mesh.Mesh,
) -> Task:
    """What all blocks share; see `run` for the arguments and errors."""
    params = mesh.shard_weights(device_mesh, teacher.params)
    blocks = find_blocks(teacher, plan, config.blocks, method.joint)
    recorder = Recorder(
        teacher, params, plan, timesteps, lookup, blocks,
        batch_size=config.batch_size, device_mesh=device_mesh,
    )  # fmt: skip
    return Task(
        teacher, method, jax.jit(method.bind), plan, timesteps, lookup, config, device_mesh, params,
        blocks, recorder,
    )  # fmt: skip


def run(
    teacher: denoisers.Denoiser,
    method: Method,
    state: State,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: ReconstructConfig,
    *,
    key: Key[Array, ''],
    workdir: Path,
    description: str,
    device_mesh: mesh.Mesh | None = None,
) -> Reconstructed:
    """Passes every block through the phases of `method`; goes on after the last block in `workdir`.

    Args:
      teacher: the float network.
      method: of which `state` is the start.
      state: from `method.init`.
      plan: what is quantized.
      timesteps: of the rows of the state's tables.
      lookup: how a row is found for other timesteps.
      config: iterations, inputs, blocks.
      key: root key of trajectories and batches.
      workdir: receives the inputs of each round, checkpoints and `metrics.jsonl`.
      description: shown beside the progress.
      device_mesh: what the work is split over; None: one device.

    Raises:
      ValueError: the method has no phases, the pattern of `config.blocks` matches nothing, or a
        batch does not divide over the devices.
      FloatingPointError: the error of a block is not finite; names the block.
      Interrupted: the run was asked to stop; all whole blocks are saved.
    """
    check(method)
    device_mesh = device_mesh or mesh.make_mesh(1)
    check_mesh(device_mesh, config)
    state = jax.device_get(state)
    task = make_task(teacher, method, plan, timesteps, lookup, config, device_mesh)
    work = [
        (i, phase, block)
        for i in range(config.num_rounds)
        for phase in method.phases
        if round(config.num_iterations * phase.share)
        for block in task.blocks
        if learns(block, phase, plan)
    ]
    began, inputs, drawn = time.monotonic(), None, -1
    with (
        Checkpoints(workdir / 'checkpoints') as checkpoints,
        log.make_writer(workdir) as writer,
    ):
        restored = checkpoints.restore_latest(like=(state, np.zeros((), np.float32)))
        done, spent_s = 0, 0.0
        if restored is not None:
            state, spent_s = restored[0], float(restored[1])
            done = hosts.by_first(checkpoints.latest)
        bar = progress(len(work), description, start=done)
        for index in bar:
            i, phase, block = work[index]
            if i != drawn:
                drawn, inputs = i, _round_inputs(task, state, i, key=key, workdir=workdir)
            block_key = jax.random.fold_in(jax.random.fold_in(key, 1), index)
            state, errors = _learn_block(task, phase, block, state, inputs, i, key=block_key)
            writer.write_scalars(
                index + 1, {f'{phase.name}/before': errors[0], f'{phase.name}/after': errors[1]}
            )
            bar.note(f'{block.name}: {errors[0]:.4g} -> {errors[1]:.4g}')
            now_s = spent_s + time.monotonic() - began
            checkpoints.save(index + 1, (state, np.asarray(now_s, np.float32)))
    return Reconstructed(state, spent_s + time.monotonic() - began)


def check(method: Method) -> None:
    """Refuses a method that does not learn block by block.

    Raises:
      ValueError: it has no phases.
    """
    if not method.phases:
        raise ValueError(
            'reconstruct.num_iterations is not 0, but this method does not learn block by block; '
            'set it to 0, or choose another method.'
        )


def check_mesh(device_mesh: mesh.Mesh, config: ReconstructConfig) -> None:
    """Refuses samples or batches that do not divide over the devices.

    Raises:
      ValueError: naming sizes that would do.
    """
    mesh.check_batch_size(device_mesh, config.batch_size, name='reconstruct.batch_size')
    num_samples = config.num_timesteps * config.num_images
    mesh.check_batch_size(
        device_mesh, num_samples, name='reconstruct.num_timesteps * num_images'
    )  # fmt: skip


def _round_inputs(task, state, i, *, key, workdir):
    """The inputs of round `i`: of the teacher's trajectories, later of the student's."""
    file = workdir / f'inputs_{i}.npz'
    if hosts.by_first(file.is_file):
        return load_inputs(file)
    denoiser = task.teacher._replace(params=task.params)
    if i > 0:
        bound = task.bind(task.params, state)
        denoiser = denoisers.fake_student(denoiser, task.plan, bound, task.timesteps, task.lookup)
    key = jax.random.fold_in(jax.random.fold_in(key, 0), i)
    inputs = draw_inputs(task.teacher, denoiser, task.config, key=key, device_mesh=task.device_mesh)
    hosts.by_first(lambda: save_inputs(file, inputs, key))
    return inputs


def make_block_step(
    task: Task,
    phase: Phase,
    block: Block,
    state: State,
    inputs: Inputs,
    *,
    share: float,
    key: Key[Array, ''],
) -> BlockStep:
    """The step of a block, and where it starts.

    Args:
      task: what all blocks share.
      phase: of the method.
      block: from `find_blocks`.
      state: of the whole network.
      inputs: of the network.
      share: iterations of this round for each one of the first.
      key: of the batches.
    """
    num_iterations = round(task.config.num_iterations * phase.share * share)
    bound = task.bind(task.params, state)
    module, examples = task.recorder.record(block, bound, inputs, rounds_inputs=phase.rounds_inputs)
    plan = task.plan if phase.rounds_inputs else without_inputs(task.plan)
    inside = block.layers + block.fixed
    plan = {path: plan[path] for path in inside if path in plan}
    part = select(state, inside, task.plan)
    device_mesh = task.device_mesh

    def outputs(params, bound: Bound, args, kwargs, t):
        weights = {path: w for path, w in bound.weights.items() if path in plan}
        rows = denoisers.rows_at(denoisers.time_tables(bound, task.timesteps), t, task.lookup)
        params = _part_of(with_weights(with_leaves(params, bound.params), weights), block.path)
        with recorded_calls(lambda path: path in block.outputs) as calls:
            output = apply_fake(
                functools.partial(_apply, module), _inside(plan, block), params,
                _inside({path: row for path, row in rows.items() if path in plan}, block),
                args, kwargs,
            )  # fmt: skip
        # What is not compared is not computed either, once compiled.
        return {path: calls[path].output for path in block.outputs} if block.outputs else output

    def whole(tree):
        return mesh.whole(device_mesh, tree)

    def error(params, bound, batch):
        got = outputs(params, bound, batch.args, batch.kwargs, batch.t)
        distances = jax.tree.map(functools.partial(_distance, phase.norm), got, batch.target)
        return sum(jax.tree.leaves(distances))

    def loss(part, params, batch, progressed):
        part, params = whole(part), whole(params)
        value = error(params, phase.bind(params, part, progressed), batch)
        return value + phase.penalty(part, progressed)

    optimizer = phase.optimizer(part, Decay(num_iterations))

    options = programs.step_options(has_integers=multiplies_integers(plan))

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def learn(part, moments, params, examples, j):
        indices = jax.random.randint(
            jax.random.fold_in(key, j), (task.config.batch_size,), 0, examples.t.size
        )
        batch = mesh.split(device_mesh, jax.tree.map(lambda leaf: leaf[indices], examples))
        progressed = j.astype(jnp.float32) / num_iterations
        value, gradients = jax.value_and_grad(loss)(part, params, batch, progressed)
        updates, moments = optimizer.update(gradients, moments, part)
        stands = jax.tree.map(jnp.zeros_like, select(updates, block.fixed, task.plan))
        learnt = jax.tree.map(jnp.add, part, merge(updates, stands)), moments
        placement = mesh.shardings(device_mesh, learnt, _STATE_RULES)
        return *mesh.constrain(learnt, placement), value

    # Enough to compare with, and no larger than a few batches.
    few = np.linspace(0, examples.t.size - 1, min(examples.t.size, 4 * task.config.batch_size))

    @jax.jit
    def measure(part, params, examples):
        part, params = whole(part), whole(params)
        batch = jax.tree.map(lambda leaf: leaf[few.astype(np.int32)], examples)
        return error(params, task.method.bind(params, part), batch)

    @jax.jit
    def mean_error(part, params, examples):
        part, params = whole(part), whole(params)
        bound, count = task.method.bind(params, part), examples.t.size
        size = min(task.config.batch_size, count)

        def mean(start):
            indices = (start + jnp.arange(size)) % count
            batch = mesh.split(device_mesh, jax.tree.map(lambda leaf: leaf[indices], examples))
            left = batch.target - outputs(params, bound, batch.args, batch.kwargs, batch.t)
            return jnp.mean(left.astype(jnp.float32), axis=tuple(range(left.ndim - 1)))

        return jnp.mean(jax.lax.map(mean, jnp.arange(0, count, size)), axis=0)

    learnt = part, optimizer.init(part)
    # A copy: the step donates its state, and moments may be one array of zeros.
    placement = mesh.shardings(device_mesh, learnt, _STATE_RULES)
    part, moments = programs.copied(mesh.place(learnt, placement))
    return BlockStep(learn, measure, mean_error, part, moments, examples, num_iterations)


def _learn_block(task, phase, block, state, inputs, i, *, key):
    """The state after one block has learnt, and the errors of the block before and after."""
    share = task.config.later_share if i else 1.0
    step = make_block_step(task, phase, block, state, inputs, share=share, key=key)
    part, moments, num_iterations = step.part, step.moments, step.num_iterations
    before = float(step.error(part, task.params, step.examples))
    for j in range(num_iterations):
        hosts.stop_if_asked()
        index = jnp.asarray(j, jnp.int32)
        part, moments, value = step.learn(part, moments, task.params, step.examples, index)
        is_checked = j + 1 == num_iterations or (j + 1) % _CHECK_EVERY == 0
        if is_checked and not np.isfinite(float(value)):
            raise FloatingPointError(
                f'block {block.name!r}: the error is {float(value)} at iteration {j + 1} of '
                f'{phase.name}; lower the learning rates, or check the calibration.'
            )
    if phase.correct is not None and _is_one_layer(block):
        part = phase.correct(part, step.mean_error(part, task.params, step.examples))
    after = float(step.error(part, task.params, step.examples))
    return merge(state, mesh.fetch(task.device_mesh, part)), (before, after)


def _is_one_layer(block):
    return block.layers == (block.path,) and not block.fixed


def _part_of(params: PyTree, path: str) -> PyTree:
    """The parameters of a module; none for a product, which has none."""
    for part in filter(None, path.split('/')):
        params = params.get(part, {})
    return params


def _apply(module, variables, args, kwargs):
    return module.apply(variables, *args, **kwargs)


def _inside(by_path: Mapping[str, Any], block: Block) -> dict[str, Any]:
    """Entries by path, with paths as the block's own module sees them."""
    return {path[len(block.path) :].removeprefix('/'): entry for path, entry in by_path.items()}


def _distance(norm, output, target):
    difference = jnp.abs((output - target).astype(jnp.float32))
    return jnp.mean(jnp.sum(difference**norm, axis=-1))
