"""Trains the small classifier whose features measure generated images.

Called by `dmq_jax.train_teacher`; the network, its file and the reference file are owned by
`dmq_jax.metrics.classifier`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8
from rich.progress import Progress

from dmq_jax.methods.base import promoting
from dmq_jax.metrics.classifier import Classifier, FeatureNetwork, extract
from dmq_jax.runtime import programs

# Losses stay on the device for this many steps, so that the host does not wait at each of them.
STEPS_PER_CHECK = 50


class TrainedClassifier(NamedTuple):
    """Result of `run`.

    Attributes:
      network: averaged parameters, rounded to the float16 in which they are saved.
      test_accuracy: share of the test images it classifies correctly, 0..1.
    """

    network: FeatureNetwork
    test_accuracy: float


class TrainState(NamedTuple):
    """Everything a step changes; `average` is the moving average of `params`."""

    params: Mapping[str, Any]
    average: Mapping[str, Any]
    optimizer_state: optax.OptState
    step: Int[Array, '']


def augment(
    images: UInt8[Array, 'B H W C'], key: Key[Array, ''], *, max_shift: int, flip: bool
) -> UInt8[Array, 'B H W C']:
    """Each image shifted by up to `max_shift` pixels and, half of the time, mirrored.

    Args:
      images: any values; what a shift uncovers is 0.
      key: one key for the batch.
      max_shift: largest shift along height and along width, in pixels; 0 for none.
      flip: whether left and right may be swapped.
    """
    shift_key, flip_key = jax.random.split(key)
    num_images, height, width, num_channels = images.shape
    padding = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
    starts = jax.random.randint(shift_key, (num_images, 2), 0, 2 * max_shift + 1)

    def crop(image, start):
        return jax.lax.dynamic_slice(
            image, (start[0], start[1], jnp.zeros_like(start[0])), (height, width, num_channels)
        )

    shifted = jax.vmap(crop)(jnp.pad(images, padding), starts)
    if not flip:
        return shifted
    mirrored = jax.random.bernoulli(flip_key, shape=(num_images,))
    return jnp.where(mirrored[:, None, None, None], shifted[:, :, ::-1], shifted)


def compute_loss(
    model: Classifier,
    params: Mapping[str, Any],
    images: UInt8[Array, 'B H W C'],
    labels: Int[Array, 'B'],
    label_smoothing: float,
) -> Float[Array, '']:
    """Mean cross entropy against labels smoothed by `label_smoothing`."""
    logits, _ = model.apply({'params': params}, images)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), label_smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def make_optimizer(
    learning_rate: float, weight_decay: float, num_steps: int
) -> optax.GradientTransformation:
    """AdamW that decays kernels only, on a warm-up over a tenth of the steps and a cosine."""
    rule = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, num_steps // 10), num_steps),
        weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return promoting(rule)


def make_train_step(
    model: Classifier,
    optimizer: optax.GradientTransformation,
    augmentation: Callable[[Array, Key[Array, '']], Array],
    label_smoothing: float,
    ema_decay: float,
) -> Callable[..., tuple[TrainState, Float[Array, '']]]:
    """The jitted `(state, images, labels, indices, key) -> (state, loss)`; `state` is donated.

    Args:
      model: the network.
      optimizer: turns gradients into updates.
      augmentation: `(images, key) -> images`.
      label_smoothing: as in `compute_loss`.
      ema_decay: decay per step of the average of the parameters.
    """
    options = programs.step_options(has_integers=False)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def train_step(state, all_images, all_labels, indices, root_key):
        inputs = augmentation(all_images[indices], jax.random.fold_in(root_key, state.step))
        loss, gradients = jax.value_and_grad(compute_loss, argnums=1)(
            model, state.params, inputs, all_labels[indices], label_smoothing
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Short memory at first, else a short run would return mostly its initial weights.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.average, params)
        return TrainState(params, average, optimizer_state, state.step + 1), loss

    return train_step


def run(
    images: UInt8[np.ndarray, 'N H W C'],
    labels: Int[np.ndarray, 'N'],
    *,
    test_images: UInt8[np.ndarray, 'M H W C'],
    test_labels: Int[np.ndarray, 'M'],
    num_classes: int | None = None,
    features: int = 64,
    widths: tuple[int, ...] = (24, 64),
    num_epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.05,
    max_shift: int = 1,
    flip: bool = False,
    ema_decay: float = 0.998,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainedClassifier:
    """Trains a classifier with AdamW on a warm-up and cosine rate.

    The result depends on the arguments alone (on one kind of device).

    Args:
      images: training images, values 0..255.
      labels: their classes, 0..num_classes - 1.
      test_images: images only used for the final accuracy.
      test_labels: their classes.
      num_classes: number of logits; by default the largest label + 1.
      features: width of the features, a multiple of 8.
      widths: channels of the stages before the last, multiples of 8.
      num_epochs: passes over the training images.
      batch_size: images per step; a last partial batch of an epoch is left out.
      learning_rate: peak of the schedule; the first tenth of the steps warms up.
      weight_decay: decay of the convolution and dense kernels, relative to the rate.
      label_smoothing: share of the target spread over all classes, 0..1.
      max_shift: augmentation by shifts of up to so many pixels.
      flip: augmentation by mirroring left and right.
      ema_decay: decay per step of the average of the parameters that is returned.
      seed: of initial weights, order and augmentation.
      progress: shows a bar with the loss, if given; it must have been started.

    Raises:
      ValueError: if images, labels and counts do not fit, or there are fewer images than
        `batch_size`.
      FloatingPointError: if the loss of a step is not finite; names the step.
    """
    num_classes = int(np.max(labels, initial=0)) + 1 if num_classes is None else num_classes
    check_dataset('training', images, labels, num_classes)
    check_dataset('test', test_images, test_labels, num_classes)
    if not 1 <= batch_size <= len(images):
        raise ValueError(
            f'batch_size={batch_size}: expected 1..{len(images)}, the number of training images.'
        )
    if num_epochs < 1:
        raise ValueError(f'num_epochs={num_epochs}: expected at least 1.')
    model = make_model(images, num_classes, features, widths)
    num_steps = num_epochs * (len(images) // batch_size)
    optimizer = make_optimizer(learning_rate, weight_decay, num_steps)
    augmentation = functools.partial(augment, max_shift=max_shift, flip=flip)
    train_step = make_train_step(model, optimizer, augmentation, label_smoothing, ema_decay)
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, images[:1])['params']
    # A copy: the step donates its state, and a buffer can be donated once.
    copy = programs.copied(params)
    state = TrainState(params, copy, optimizer.init(params), jnp.zeros((), jnp.int32))
    data = jax.device_put((images, labels.astype(np.int32)))
    batches = shuffled_batches(len(images), batch_size, num_epochs, seed)
    average = _descend(
        lambda state, indices: train_step(state, *data, indices, step_key),
        state, batches, num_steps, progress,
    )  # fmt: skip
    weights = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), average)
    network = FeatureNetwork(model, weights)
    _, probabilities = extract(network, test_images, min(500, len(test_images)))
    test_accuracy = float(np.mean(probabilities.argmax(axis=1) == test_labels))
    metadata = {
        'test_accuracy': round(test_accuracy, 4),
        'num_epochs': num_epochs,
        'batch_size': batch_size,
        'learning_rate': learning_rate,
        'seed': seed,
    }
    return TrainedClassifier(FeatureNetwork(model, weights, metadata), test_accuracy)


def make_model(
    images: UInt8[np.ndarray, 'N H W C'], num_classes: int, features: int, widths: Sequence[int]
) -> Classifier:
    """The classifier that scales its input as the mean and spread of `images` say."""
    channel_axes = (0, 1, 2)
    return Classifier(
        num_classes,
        features,
        tuple(widths),
        mean=tuple(round(float(v) / 255, 4) for v in np.mean(images, channel_axes)),
        # A constant channel has no spread; one grey level keeps it finite.
        std=tuple(round(max(float(v), 1.0) / 255, 4) for v in np.std(images, channel_axes)),
    )


def shuffled_batches(
    num_images: int, batch_size: int, num_epochs: int, seed: int
) -> Iterator[Int[np.ndarray, 'B']]:
    """Yields the indices of each batch, every epoch in a new order, without a last partial one."""
    order = np.random.default_rng(seed)
    for _ in range(num_epochs):
        permutation = order.permutation(num_images).astype(np.int32)
        for position in range(0, num_images - batch_size + 1, batch_size):
            yield permutation[position : position + batch_size]


def _descend(
    train_step: Callable[[TrainState, Array], tuple[TrainState, Array]],
    state: TrainState,
    batches: Iterator[Int[np.ndarray, 'B']],
    num_steps: int,
    progress: Progress | None,
) -> Mapping[str, Any]:
    """A step for each of the batches, `num_steps` in all; the average of the parameters."""
    task = progress.add_task('classifier', total=num_steps) if progress else None
    pending: list[Float[Array, '']] = []
    # An accidental copy per step between host and device would go unnoticed otherwise.
    with jax.transfer_guard('disallow'):
        for step, indices in enumerate(batches, start=1):
            state, loss = train_step(state, jax.device_put(indices))
            pending.append(loss)
            if len(pending) == STEPS_PER_CHECK or step == num_steps:
                losses = np.array(jax.device_get(pending))
                check_losses(losses, first_step=step - len(losses))
                pending.clear()
                if progress:
                    progress.update(
                        task, completed=step, description=f'classifier loss {losses.mean():.4f}'
                    )
    return state.average


def check_dataset(
    name: str, images: UInt8[np.ndarray, 'N H W C'], labels: Int[np.ndarray, 'N'], num_classes: int
) -> None:
    """Raises a ValueError if images and labels are not a classification data set."""
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f'{name} images are {images.dtype} {images.shape}: expected uint8 [N, H, W, C], N > 0.'
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f'{name} labels are {labels.dtype} {labels.shape}: expected {len(images)} integers, '
            'one per image.'
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f'{name} labels lie in {labels.min()}..{labels.max()}: expected '
            f'0..{num_classes - 1}. Set num_classes.'
        )


def check_losses(losses: Float[np.ndarray, 'n'], first_step: int) -> None:
    """Raises a FloatingPointError that names the first step whose loss is not finite."""
    if np.isfinite(losses).all():
        return
    index = int(np.argmin(np.isfinite(losses)))
    raise FloatingPointError(
        f'the loss of step {first_step + index} is {losses[index]}: expected a finite number. '
        'Lower learning_rate.'
    )
