"""Trains a small class-conditional float teacher, and the classifier that judges its samples.

    python -m dmq_jax.train_teacher --config=configs/teacher_fashion_mnist.py --workdir=runs/teacher

The objective is the simple loss of DDPM (arXiv:2006.11239, eq. 14) with labels dropped at random
for classifier-free guidance (arXiv:2207.12598). What is kept is the moving average of the weights.
Interrupted at any moment and started again, it goes on from the last checkpoint.
"""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from dmq_jax import artefacts, denoisers, sampling, teachers, train_classifier
from dmq_jax import config as config_lib
from dmq_jax.diffusion import samplers
from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod
from dmq_jax.files.image_sets import ImageSet, load_images, pad_images
from dmq_jax.methods.base import promoting
from dmq_jax.metrics import classifier as classifier_lib
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.runtime import log, mesh, programs
from dmq_jax.runtime.checkpoint import Checkpoints
from dmq_jax.runtime.progress import progress


class TrainState(NamedTuple):
    """Everything a step changes; `average` is what will be the teacher."""

    params: PyTree
    average: PyTree
    optimizer: PyTree
    step: Int[Array, '']


def load_dataset(config: config_lib.DatasetConfig, split: str) -> ImageSet:
    """The images of one split, padded to `image_size`, labels checked.

    Raises:
      ValueError: labels missing or beyond `num_classes`; see also `files.image_sets.load_images`.
    """
    images, labels, _ = load_images(config.path, split)
    if labels is None:
        raise ValueError(f'{config.path}: no labels; a class-conditional teacher needs them.')
    if labels.min() < 0 or labels.max() >= config.num_classes:
        raise ValueError(
            f'{config.path}: labels {labels.min()}..{labels.max()}, expected '
            f'0..{config.num_classes - 1} (dataset.num_classes).'
        )
    return ImageSet(pad_images(images, (config.image_size,) * 2), labels)


def make_untrained(config: config_lib.TrainTeacherConfig, channels: int) -> denoisers.Denoiser:
    """The denoiser that training starts from."""
    info = denoisers.DenoiserInfo(
        schedule=Schedule(kind=config.schedule),
        prediction=config.prediction,
        image_shape=(config.dataset.image_size, config.dataset.image_size, channels),
        num_classes=config.dataset.num_classes,
    )
    network = DDPMUNet(
        channels=config.network.channels,
        in_channels=channels,
        layers_per_block=config.network.layers_per_block,
        down_attention=config.network.attention,
        head_dim=config.network.head_dim,
        num_groups=config.network.num_groups,
        num_class_embeds=config.dataset.num_classes + 1,
        patch_size=config.network.patch_size,
        dtype=jnp.dtype(config.dtype),
    )
    params = denoisers.init_params(network, info, jax.random.key(config.seed))
    return denoisers.float_denoiser(network, params, info)


def make_optimizer(config: config_lib.TrainTeacherConfig) -> optax.GradientTransformation:
    """Adam on a warm-up and cosine rate, gradients clipped to norm 1."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_iterations,
        max(config.num_iterations, config.warmup_iterations + 1), config.learning_rate / 100,
    )  # fmt: skip
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    return promoting(rule)


def diffusion_loss(
    denoiser: denoisers.Denoiser,
    params: PyTree,
    images: Float[Array, 'B H W C'],
    labels: Int[Array, 'B'],
    key: Key[Array, ''],
    *,
    label_dropout: float,
) -> Float[Array, '']:
    """Mean squared error of the prediction at random timesteps (arXiv:2006.11239, eq. 14)."""
    info = denoiser.info
    time_key, noise_key, label_key = jax.random.split(key, 3)
    batch = images.shape[0]
    t = jax.random.randint(time_key, (batch,), 0, info.schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, images.shape)
    dropped = jax.random.bernoulli(label_key, label_dropout, (batch,))
    labels = jnp.where(dropped, info.num_classes, labels)
    alpha_cumprod = jnp.asarray(alphas_cumprod(info.schedule), jnp.float32)[t]
    x_t = samplers.add_noise(images, noise, alpha_cumprod)
    target = noise
    if info.prediction == 'v':
        target = samplers.velocity_target(images, noise, alpha_cumprod)
    prediction = denoiser.predict(params, x_t, t, labels).astype(jnp.float32)
    return jnp.mean((prediction - target) ** 2)


def make_train_step(config: config_lib.TrainTeacherConfig, denoiser: denoisers.Denoiser):
    """The compiled step: (state, all images, all labels, indices) -> (state, loss)."""
    optimizer = make_optimizer(config)
    options = programs.step_options(has_integers=False)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def train_step(
        state: TrainState,
        images: UInt8[Array, 'N H W C'],
        labels: Int[Array, 'N'],
        indices: Int[Array, 'B'],
    ) -> tuple[TrainState, Float[Array, '']]:
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        loss, gradients = jax.value_and_grad(
            lambda params: diffusion_loss(
                denoiser,
                params,
                sampling.to_float(images[indices]),
                labels[indices],
                key,
                label_dropout=config.label_dropout,
            )  # fmt: skip
        )(state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # A short memory at first: the average must not keep the random initial weights.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        return TrainState(params, average, optimizer_state, state.step + 1), loss

    return train_step


def train(config: config_lib.TrainTeacherConfig, dataset: ImageSet, workdir: Path) -> Any:
    """The averaged weights after `num_iterations` steps, from the last checkpoint in `workdir`.

    Raises:
      FloatingPointError: the loss is not finite; names the step.
    """
    device_mesh = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    mesh.check_batch_size(device_mesh, config.batch_size)
    denoiser = make_untrained(config, dataset.images.shape[-1])
    state = TrainState(
        denoiser.params,
        # A copy: the step donates its state, and a buffer can be donated once.
        programs.copied(denoiser.params),
        make_optimizer(config).init(denoiser.params),
        jnp.zeros((), jnp.int32),
    )
    state = mesh.replicate(device_mesh, state)
    images, labels = mesh.replicate(device_mesh, (dataset.images, dataset.labels.astype(np.int32)))
    train_step = make_train_step(config, denoiser)
    with Checkpoints(workdir / 'checkpoints') as checkpoints, log.make_writer(workdir) as writer:
        if (restored := checkpoints.restore_latest(like=state)) is not None:
            state = restored
        begin = int(state.step)
        bar = progress(config.num_iterations, 'teacher', start=begin)
        losses, began = [], time.monotonic()
        for step in bar:
            rng = np.random.default_rng((config.seed, step))
            indices = rng.integers(len(dataset.images), size=config.batch_size, dtype=np.int32)
            state, loss = train_step(state, images, labels, mesh.shard_batch(device_mesh, indices))
            losses.append(loss)
            done = step + 1
            saves = done % config.checkpoint_every == 0 or done == config.num_iterations
            # Also at every checkpoint: none may hold weights that are not finite.
            if done % config.log_every == 0 or saves:
                mean = float(np.mean([float(x) for x in losses]))
                if not np.isfinite(mean):
                    raise FloatingPointError(f'loss is {mean} at step {done}; lower learning_rate.')
                rate = (done - begin) / (time.monotonic() - began)
                writer.write_scalars(done, {'loss': mean, 'steps_per_second': rate})
                bar.note(f'loss {mean:.4f}')
                losses = []
            if done % config.preview_every == 0 or done == config.num_iterations:
                preview = denoiser._replace(params=state.average)
                writer.write_images(done, {'samples': preview_grid(preview)})
            if saves:
                checkpoints.save(done, state)
    return denoiser._replace(params=state.average)


def preview_grid(denoiser: denoisers.Denoiser) -> UInt8[np.ndarray, 'H W C']:
    """A picture of ten samples of each class (DDIM, 20 steps)."""
    classes = np.arange(denoiser.info.num_classes)
    labels = np.repeat(classes, 10)
    images = sampling.draw(
        denoiser,
        config_lib.SamplerConfig(),
        labels=labels,
        key=jax.random.key(0),
        batch_size=min(100, len(labels)),
    )
    return sampling.image_grid(images, columns=10)


def run(config: config_lib.TrainTeacherConfig, workdir: Path) -> None:
    """Trains teacher and classifier, and writes both with the reference statistics.

    Raises:
      ValueError: another process works in `workdir`, or it holds a run of other options.
    """
    with artefacts.sole_user(workdir):
        _make_files(config, workdir)


def _make_files(config: config_lib.TrainTeacherConfig, workdir: Path) -> None:
    dataset = load_dataset(config.dataset, 'train')
    test = load_dataset(config.dataset, 'test')
    log.write_json(workdir / 'config.json', config_lib.to_dict(config))

    # Checkpoints belong to these options; how often something is written may change.
    options = config_lib.to_dict(config)
    for name in ('log_every', 'checkpoint_every', 'preview_every', 'mesh'):
        del options[name]
    artefacts.claim(workdir, options)

    network_file = workdir / f'{config.name}_classifier.safetensors'
    if not network_file.is_file():
        trained = train_classifier.run(
            dataset.images, dataset.labels,
            test_images=test.images, test_labels=test.labels,
            num_classes=config.dataset.num_classes, seed=config.seed,
            **dataclasses.asdict(config.classifier),
        )  # fmt: skip
        # Renamed when complete: a kill must not leave half a file to be found.
        partial = network_file.with_suffix('.partial')
        classifier_lib.save_classifier(partial, trained.network)
        os.replace(partial, network_file)
        print(f'classifier: test accuracy {trained.test_accuracy:.2%}')
    network = classifier_lib.load_classifier(network_file)
    reference = classifier_lib.make_reference(network, dataset.images)
    classifier_lib.save_reference(workdir / f'{config.name}_reference.npz', reference)

    teacher = train(config, dataset, workdir)
    facts = {
        'dataset': Path(config.dataset.path).name,
        'num_iterations': config.num_iterations,
        'batch_size': config.batch_size,
        'revision': log.git_revision(),
        'versions': log.versions(),
    }
    teachers.save_teacher(workdir / f'{config.name}_teacher.safetensors', teacher, facts)
    print(f'wrote {workdir}/{config.name}_*')


def main() -> None:
    """Entry point of `python -m dmq_jax.train_teacher`."""
    from dmq_jax import command_line

    command_line.run(
        config_lib.TrainTeacherConfig, lambda config, workdir: run(config, workdir), __doc__
    )


if __name__ == '__main__':
    main()
