"""The loop of steps that stages of learning share: progress, loss, checkpoints, stops."""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from dmq_jax.runtime import hosts, log, memory, mesh, programs
from dmq_jax.runtime.checkpoint import Checkpoints
from dmq_jax.runtime.progress import progress


class Options(Protocol):
    """What a config says of the loop, in steps."""

    num_iterations: int
    log_every: int
    checkpoint_every: int


T = TypeVar('T')  # a train state: a tree with its number of steps as `step`


def restore_or_start(
    checkpoints: Checkpoints, start: Callable[[], T], device_mesh: mesh.Mesh, rules: mesh.Rules
) -> tuple[T, float]:
    """The train state of the last checkpoint, or else the first one, placed on the devices.

    Args:
      checkpoints: of this run.
      start: makes the first train state; only traced where there is a checkpoint.
      device_mesh: of the run.
      rules: what of a train state lies where; see `mesh.shardings`.

    Returns:
      The train state, and the seconds spent until then.
    """
    like = mesh.abstract(device_mesh, jax.eval_shape(start), rules)
    restored = checkpoints.restore_latest(like=(like, np.zeros((), np.float32)))
    if restored is None:
        train, placement = start(), jax.tree.map(lambda leaf: leaf.sharding, like)
        # A copy: the step donates its state, and leaves may be shared with the caller's or be the
        # same array twice (moments that all start from one zero).
        return programs.copied(mesh.place(train, placement)), 0.0
    train, spent_s = restored
    return train, float(spent_s)


def descend(
    train_step: Callable[[T], tuple[T, Array]],
    train: T,
    spent_s: float,
    config: Options,
    *,
    checkpoints: Checkpoints,
    writer: log.MetricWriter,
    description: str,
) -> tuple[T, float]:
    """The remaining steps of `config.num_iterations`, logged and saved.

    Args:
      train_step: gives the next train state, and the loss of the one before.
      train: with `step`, the steps already taken.
      spent_s: seconds these took.
      config: number of steps, and how often they are logged and saved.
      checkpoints: receive the train state and the seconds.
      writer: receives the loss, its mean since the last time.
      description: shown beside the progress.

    Returns:
      The last train state, and the seconds in all.

    Raises:
      FloatingPointError: the loss is not finite; names the step.
      Interrupted: the run was asked to stop; a checkpoint is saved.
    """
    began, first = time.monotonic(), int(train.step)
    bar = progress(config.num_iterations, description, start=first)
    losses: list[Any] = []
    for step in bar:
        train, value = train_step(train)
        if step == first:
            memory.give_back()  # compiling took more than a step needs
        losses.append(value)
        done = step + 1
        is_stopped = done < config.num_iterations and hosts.stop_requested()
        is_saved = (
            is_stopped or done == config.num_iterations or done % config.checkpoint_every == 0
        )
        if is_saved or done % config.log_every == 0:
            # Before a checkpoint too: one with a state of NaN could never be left again.
            mean = _checked_mean(losses, description, done, checkpoints.latest())
            writer.write_scalars(done, {'loss': mean})
            bar.note(f'loss {mean:.4g}')
            losses = []
        if is_saved:
            now_s = spent_s + time.monotonic() - began
            checkpoints.save(done, (train, np.asarray(now_s, np.float32)))
        if is_stopped:
            checkpoints.wait()
            raise hosts.interrupted()
    return train, spent_s + time.monotonic() - began


def _checked_mean(losses: list[Any], description: str, step: int, latest: int | None) -> float:
    mean = float(np.mean(jax.device_get(losses)))
    if not np.isfinite(mean):
        raise FloatingPointError(
            f'{description}: loss is {mean} at step {step}; lower the learning rates, or check the '
            f'calibration. Checkpoints up to {latest} are kept.'
        )
    return mean
