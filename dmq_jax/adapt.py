"""Fine-tuning of a quantized student on images of one's own, with the denoising loss.

How a quantized model is made to draw a new subject or style (TuneQDM, arXiv:2401.04339): the loss
is that of the network's own training (arXiv:2006.11239, eq. 14), at timesteps drawn for each image
by itself, and only the state of the student's method is learnt. Where its integers stand still
(`Method.beside`), they are packed once, and the step knows no float kernel.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from dmq_jax import denoisers, descent
from dmq_jax.config import AdaptConfig
from dmq_jax.diffusion import samplers
from dmq_jax.diffusion.schedule import alphas_cumprod
from dmq_jax.methods.base import (
    Decay,
    Method,
    Prediction,
    State,
    WeightCodes,
    freeze,
    without_kernels,
)
from dmq_jax.models.autoencoder import Moments, sample_latents
from dmq_jax.quant.layers import recomputed
from dmq_jax.quant.plan import Plan, multiplies_integers
from dmq_jax.runtime import log, mesh, programs
from dmq_jax.runtime.checkpoint import Checkpoints

_BATCH_RULES = (('.*', (mesh.BATCH,)),)
_WHOLE = (('.*', ()),)


class TrainState(NamedTuple):
    """Everything a step changes, and so what a checkpoint holds."""

    state: State
    optimizer: PyTree
    step: Int[Array, '']


class Constants(NamedTuple):
    """What a step reads and never changes.

    Attributes:
      params: of the float network; without the kernels that `weights` holds.
      weights: integers that stand still; None: the method makes them anew from `params`.
    """

    params: PyTree
    weights: dict[str, WeightCodes] | None


class Adapted(NamedTuple):
    """The result: the method's state, and what it took: seconds, and megabytes where measured."""

    state: State
    duration_s: float
    memory_mb: float | None = None


def make_constants(
    teacher: denoisers.Denoiser, method: Method, state: State, plan: Plan
) -> Constants:
    """The constants of every step that starts from `state`.

    Args:
      teacher: the float network.
      method: of `state`.
      state: from `method.init`, or learnt before.
      plan: what is quantized.
    """
    if method.beside is None:
        return Constants(teacher.params, None)
    weights = freeze(method, plan, teacher.params, state)
    return Constants(without_kernels(teacher.params, weights), weights)


def make_loss(
    teacher: denoisers.Denoiser,
    method: Method,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    label_dropout: float,
    remat: str,
    prior_weight: float | None = None,
) -> Callable[..., Float[Array, '']]:
    """(state, constants, images, labels, key) -> denoising loss; differentiable in the state.

    Where images are Gaussians of latents, every step draws its latents anew, as the training of
    latent diffusion does (`LatentDiffusion.get_first_stage_encoding`).

    Args:
      teacher: network, schedule, classes.
      method: of the state; its `loss` compares the prediction with what is to be predicted.
      plan: what is quantized.
      timesteps: of the rows of the state's tables.
      lookup: how a row is found for other timesteps.
      label_dropout: share of labels replaced by the null class.
      remat: regular expression over paths of modules; what is computed in them is computed again
        in the backward pass. '': nothing is.
      prior_weight: the second half of the images is what the student shall not forget, and this the
        weight of its loss (prior preservation, DreamBooth, arXiv:2208.12242); None: all are one.
    """
    info = teacher.info
    student = denoisers.QuantizedPredict(teacher.network, tuple(plan.items()), lookup, 'fake')
    predict = denoisers.guided(student, info, 1.0)

    def bind(state, constants):
        if constants.weights is None:
            return method.bind(constants.params, state)
        return method.beside(state)._replace(weights=constants.weights)

    def loss(state, constants, images, labels, key):
        time_key, noise_key, label_key = jax.random.split(key, 3)
        if isinstance(images, Moments):
            images = sample_latents(images, jax.random.fold_in(key, 3))
        batch = images.shape[0]
        t = jax.random.randint(time_key, (batch,), 0, info.schedule.num_train_timesteps)
        noise = jax.random.normal(noise_key, images.shape)
        if labels is not None and label_dropout:
            dropped = jax.random.bernoulli(label_key, label_dropout, (batch,))
            labels = jnp.where(dropped, denoisers.null_like(labels, info), labels)
        alpha_cumprod = jnp.asarray(alphas_cumprod(info.schedule), jnp.float32)[t]
        x_t = samplers.add_noise(images, noise, alpha_cumprod)
        target = noise
        if info.prediction == 'v':
            target = samplers.velocity_target(images, noise, alpha_cumprod)
        bound = bind(state, constants)
        bound = denoisers.training_params(constants.params, bound, timesteps)
        # Entered first, so that what the student does to its layers is done again as well.
        with recomputed(remat) if remat else contextlib.nullcontext():
            output = predict(bound, x_t, t, labels)
        if prior_weight is None:
            return method.loss(Prediction(output), Prediction(target))
        halves = zip(jnp.split(output, 2), jnp.split(target, 2), strict=True)
        own, prior = (method.loss(Prediction(got), Prediction(want)) for got, want in halves)
        return own + prior_weight * prior

    return loss


def make_train_step(
    loss: Callable[..., Float[Array, '']],
    optimizer: optax.GradientTransformation,
    batch_size: int,
    key: Key[Array, ''],
    device_mesh: mesh.Mesh,
    *,
    has_integers: bool,
) -> Callable[..., tuple[TrainState, Float[Array, '']]]:
    """The step, to be compiled: (train state, constants, *sets) -> (train state, loss).

    Each of the sets is images and their labels, see `run`; a batch of every one of them makes the
    step, in this order.

    Args:
      loss: from `make_loss`.
      optimizer: of the method.
      batch_size: images drawn from each set for a step.
      key: root key of batches, timesteps and noise.
      device_mesh: splits every batch.
      has_integers: whether the student multiplies integers; see `programs.step_options`.
    """
    options = programs.step_options(has_integers=has_integers)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def train_step(train, constants, *sets):
        step_key = jax.random.fold_in(key, train.step)
        # 1 is the key of the loss.
        keys = [step_key, *(jax.random.fold_in(step_key, 2 + i) for i in range(len(sets) - 1))]
        batches = []
        for which, images in zip(keys, sets, strict=True):
            count = jax.tree.leaves(images)[0].shape[0]
            indices = jax.random.randint(which, (batch_size,), 0, count)
            batches.append(jax.tree.map(lambda leaf, indices=indices: leaf[indices], images))
        batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
        batch = mesh.constrain(batch, mesh.shardings(device_mesh, batch, _BATCH_RULES))
        constants = mesh.whole(device_mesh, constants)
        value, gradients = jax.value_and_grad(loss)(
            train.state, constants, *batch, jax.random.fold_in(step_key, 1)
        )
        updates, moments = optimizer.update(gradients, train.optimizer, train.state)
        return TrainState(optax.apply_updates(train.state, updates), moments, train.step + 1), value

    return train_step


def run(
    teacher: denoisers.Denoiser,
    method: Method,
    state: State,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: AdaptConfig,
    *,
    sets: Sequence[tuple[Float[np.ndarray, 'N H W C'] | Moments, Int[np.ndarray, 'N'] | None]],
    key: Key[Array, ''],
    workdir: Path,
    device_mesh: mesh.Mesh,
    description: str,
) -> Adapted:
    """Trains `state` for `num_iterations` steps, from the last checkpoint in `workdir`.

    Args:
      teacher: the float network.
      method: of which `state` is the start.
      state: from `method.init`, or learnt before.
      plan: what is quantized.
      timesteps: of the rows of the state's tables.
      lookup: how a row is found for other timesteps.
      config: iterations, batch.
      sets: images in [-1, 1], of the teacher's size, or the Gaussians of their latents, and their
        labels, None iff the teacher has none. A second set is what the student shall not forget.
      key: root key of batches, timesteps and noise.
      workdir: receives checkpoints and `metrics.jsonl`.
      device_mesh: splits every batch, and weights between their uses; images and scales, which are
        small, lie whole on every device.
      description: shown beside the progress.

    Raises:
      ValueError: the method compares features, which real images have none of.
      FloatingPointError: the loss is not finite; names the step.
      Interrupted: the run was asked to stop; a checkpoint is saved.
    """
    mesh.check_batch_size(device_mesh, config.batch_size, name='adapt.batch_size')
    if method.features is not None:
        raise ValueError(
            "adapt: this method's loss compares features with the teacher's; choose loss='output'."
        )
    dropout = config.label_dropout if sets[0][1] is not None else 0.0
    loss = make_loss(
        teacher, method, plan, timesteps, lookup, dropout, config.remat,
        None if len(sets) == 1 else config.prior_weight,
    )  # fmt: skip
    optimizer = method.optimizer(state, Decay(config.num_iterations))

    train_step = make_train_step(
        loss, optimizer, config.batch_size, key, device_mesh, has_integers=multiplies_integers(plan)
    )
    constants = make_constants(teacher, method, state, plan)
    constants = mesh.shard_weights(device_mesh, constants)
    sets = mesh.replicate(device_mesh, list(sets))

    def start() -> TrainState:
        return TrainState(state, optimizer.init(state), jnp.zeros((), jnp.int32))

    with Checkpoints(workdir / 'checkpoints') as checkpoints, log.make_writer(workdir) as writer:
        train, spent_s = descent.restore_or_start(checkpoints, start, device_mesh, _WHOLE)
        train, duration_s = descent.descend(
            lambda train: train_step(train, constants, *sets), train, spent_s, config,
            checkpoints=checkpoints, writer=writer, description=description,
        )  # fmt: skip
    return Adapted(mesh.fetch(device_mesh, train.state), duration_s)
