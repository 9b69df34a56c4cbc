"""A small image classifier: the feature network for data Inception was not made for.

Owns the network, its file format, the features of an image set and the reference file compared
with. Inception-v3 sees 32x32 grey images as blurred stamps; a classifier trained on the data
itself gives features in which the Fréchet distance, precision and recall order generators
sensibly, at a thousandth of the cost. Numbers obtained with it compare only with numbers of the
same network.

Normalisation is by groups of channels (Wu and He 2018, arXiv:1803.08494), so the features of an
image depend on that image alone and there are no running statistics to store.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float, Num, UInt8

from dmq_jax.metrics.frechet import GaussianStatistics, gaussian_statistics

FORMAT = 'dmq_jax.classifier/1'
BATCH_SIZE = 500  # images per call of the network
ARCHITECTURE = ('num_classes', 'features', 'widths', 'mean', 'std')


class Block(nn.Module):
    """Residual unit of two 3x3 convolutions, the first of which strides."""

    channels: int
    stride: int = 2
    group_size: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H2 W2 C2']:
        """Features at 1 / `stride` of the height and width."""
        norm = functools.partial(nn.GroupNorm, num_groups=None, group_size=self.group_size)
        x = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False, name='conv1')(x)
        x = nn.relu(norm(name='norm1')(x))
        h = nn.Conv(self.channels, (3, 3), use_bias=False, name='conv2')(x)
        return nn.relu(x + norm(name='norm2')(h))


class Classifier(nn.Module):
    """Convolutional classifier of small images; about 4 million multiply-adds at 32x32x1.

    Attributes:
      num_classes: number of logits.
      features: width D of the layer before the logits, a mean over positions; multiple of 8.
      widths: channels of the stem and of the blocks between stem and last block, multiples of 8;
        each halves the height and width.
      mean: mean of the training images, one per channel or one for all, in units of 0..1.
      std: standard deviation, likewise.
    """

    num_classes: int
    features: int = 64
    widths: tuple[int, ...] = (24, 64)
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    @nn.compact
    def __call__(
        self, images: Num[Array, 'B H W C']
    ) -> tuple[Float[Array, 'B num_classes'], Float[Array, 'B D']]:
        """Logits and features of images with values 0..255, in float32."""
        x = images.astype(jnp.float32) / 255.0
        x = (x - jnp.array(self.mean)[None, None, None]) / jnp.array(self.std)[None, None, None]
        x = nn.Conv(self.widths[0], (5, 5), 2, use_bias=False, name='stem')(x)
        x = nn.relu(nn.GroupNorm(None, group_size=8, name='stem_norm')(x))
        for index, channels in enumerate(self.widths[1:]):
            x = Block(channels, name=f'block_{index}')(x)
        x = Block(self.features, name='last')(x)
        features = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name='logits')(features), features


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A classifier with its weights.

    Attributes:
      model: the architecture, normalisation included.
      params: its parameters, float32.
      metadata: facts about its training, JSON values only, e.g. `test_accuracy` in 0..1.
    """

    model: Classifier
    params: Mapping[str, Any]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_classifier(path: str | Path, network: FeatureNetwork) -> None:
    """Writes a network as one safetensors file, weights in float16.

    Args:
      path: file to write; its folder must exist.
      network: what to write.

    Raises:
      ValueError: if a weight does not fit in float16 or is not finite.
    """
    tensors = {}
    for name, leaf in traverse_util.flatten_dict(dict(network.params), sep='/').items():
        values = np.asarray(leaf)
        if not np.all(np.abs(values) <= np.finfo(np.float16).max):
            raise ValueError(
                f'the weight {name!r} has values beyond float16 or not finite: expected trained '
                'weights. Train with a lower learning rate.'
            )
        tensors[name] = values.astype(np.float16)
    header = {
        'format': FORMAT,
        'architecture': json.dumps(
            {name: getattr(network.model, name) for name in ARCHITECTURE}
            | {'num_channels': int(network.params['stem']['kernel'].shape[2])}
        ),
        'metadata': json.dumps(dict(network.metadata)),
    }
    safetensors.numpy.save_file(tensors, str(path), header)


def load_classifier(path: str | Path) -> FeatureNetwork:
    """Reads a network written by `save_classifier`; weights become float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not a classifier or its tensors do not fit its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such classifier file. Train one with dmq_jax.train_classifier.run and '
            'write it with save_classifier.'
        )
    with safetensors.safe_open(path, framework='numpy') as file:
        header = file.metadata() or {}
        if header.get('format') != FORMAT:
            raise ValueError(
                f'{path}: the format is {header.get("format")!r}, expected {FORMAT!r}, as '
                'written by save_classifier.'
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    fields = json.loads(header['architecture'])
    num_channels = fields.pop('num_channels')
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    model = Classifier(**fields)
    image = jax.ShapeDtypeStruct((1, 32, 32, num_channels), jnp.uint8)
    template = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    expected = {k: v.shape for k, v in traverse_util.flatten_dict(template, sep='/').items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if given != expected:
        differing = sorted(n for n in given | expected if given.get(n) != expected.get(n))
        raise ValueError(
            f'{path}: {len(differing)} tensors differ from the architecture in the header, e.g. '
            f'{differing[0]!r}: {given.get(differing[0])}, expected {expected.get(differing[0])}. '
            'The file is damaged or was edited; write it again with save_classifier.'
        )
    # `jnp.asarray` would compile a program for every shape.
    params = jax.device_put({name: np.float32(tensor) for name, tensor in tensors.items()})
    return FeatureNetwork(
        model, traverse_util.unflatten_dict(params, sep='/'), json.loads(header['metadata'])
    )


@functools.partial(jax.jit, static_argnums=0)
def apply_classifier(
    model: Classifier, params: Mapping[str, Any], images: UInt8[Array, 'B H W C']
) -> tuple[Float[Array, 'B D'], Float[Array, 'B num_classes']]:
    """Features and class probabilities of one batch; one compilation per model and shape."""
    # Full float32 products: the TF32 that GPUs use by default moves distances visibly.
    with jax.default_matmul_precision('highest'):
        logits, features = model.apply({'params': params}, images)
    return features, jax.nn.softmax(logits, axis=-1)


def extract(
    network: FeatureNetwork,
    images: UInt8[np.ndarray, 'N H W C'] | Iterable[UInt8[np.ndarray, 'n H W C']],
    batch_size: int = BATCH_SIZE,
    *,
    put: Callable[[np.ndarray], Array] = jax.device_put,
    fetch: Callable[[Any], Any] = jax.device_get,
) -> tuple[Float[np.ndarray, 'N D'], Float[np.ndarray, 'N num_classes']]:
    """Features and class probabilities of an image set, in its order.

    The features of an image do not depend on its neighbours in the batch; the last batch is
    filled up with zeros, whose results are dropped.

    Args:
      network: which features.
      images: one array, or an iterable of arrays of any lengths; values 0..255.
      batch_size: images per call of the network.
      put: places a batch on the devices that compute it.
      fetch: brings features and probabilities back as NumPy arrays.

    Returns:
      features: float32, the input of `frechet_distance` and `precision_recall`.
      probabilities: float32, rows sum to 1.

    Raises:
      ValueError: if an array is not uint8 [n, H, W, C] with the network's channels, if heights
        or widths differ, if there is no image, or if batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: expected at least 1.')
    num_channels = network.params['stem']['kernel'].shape[2]
    results = []
    for batch in rebatch([images] if isinstance(images, np.ndarray) else images, batch_size):
        if batch.shape[3] != num_channels:
            raise ValueError(
                f'images have {batch.shape[3]} channels: expected {num_channels}, as the '
                'classifier was trained with. Use the classifier of this dataset.'
            )
        num_real = len(batch)
        padding = np.zeros((batch_size - num_real, *batch.shape[1:]), np.uint8)
        padded = put(np.concatenate([batch, padding]))
        outputs = fetch(apply_classifier(network.model, network.params, padded))
        results.append([output[:num_real] for output in outputs])
    if not results:
        raise ValueError('there are no images: expected at least 1.')
    features, probabilities = (np.concatenate(parts) for parts in zip(*results, strict=True))
    return features, probabilities


def rebatch(
    arrays: Iterable[UInt8[np.ndarray, 'n H W C']], batch_size: int
) -> Iterator[UInt8[np.ndarray, 'm H W C']]:
    """The same images in batches of `batch_size`, the last one possibly shorter.

    Raises:
      ValueError: if an array is not uint8 [n, H, W, C] or the sizes of images differ.
    """
    pending: list[np.ndarray] = []
    size = None
    for images in arrays:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f'images are {images.dtype} {images.shape}: expected uint8 [n, H, W, C], 0..255.'
            )
        size = size or images.shape[1:]
        if images.shape[1:] != size:
            raise ValueError(
                f'images of {images.shape[1:]} follow images of {size}: expected one size. '
                'Measure image sets of one size at a time.'
            )
        pending.append(images)
        if sum(map(len, pending)) >= batch_size:
            joined = np.concatenate(pending)
            end = len(joined) - len(joined) % batch_size
            yield from (joined[i : i + batch_size] for i in range(0, end, batch_size))
            pending = [joined[end:]]
    if num_left := sum(map(len, pending)):
        assert num_left < batch_size
        yield np.concatenate(pending)


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are compared with.

    Attributes:
      statistics: Gaussian of the features of the whole reference set.
      features: features of its first images, for precision and recall; float32 holding float16
        values.
      network_id: `network_id` of the feature network that made them.
    """

    statistics: GaussianStatistics
    features: Float[np.ndarray, 'M D']
    network_id: str


def network_id(network: FeatureNetwork) -> str:
    """Sixteen hex digits that name the architecture and the weights of a network, in float16."""
    digest = hashlib.sha256(repr([getattr(network.model, n) for n in ARCHITECTURE]).encode())
    for name, leaf in sorted(traverse_util.flatten_dict(dict(network.params), sep='/').items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).astype('<f2').tobytes())
    return digest.hexdigest()[:16]


def make_reference(
    network: FeatureNetwork,
    images: UInt8[np.ndarray, 'N H W C'] | Iterable[UInt8[np.ndarray, 'n H W C']],
    num_features: int = 10_000,
    batch_size: int = BATCH_SIZE,
) -> Reference:
    """Statistics of all images and features of the first `num_features`.

    Pass a network that came from `load_classifier`, so that the reference belongs to the weights
    of the file rather than to those before their rounding to float16.

    Args:
      network: feature network.
      images: the reference set, usually the training images.
      num_features: features kept for precision and recall; fewer if there are fewer images.
      batch_size: images per call of the network.

    Raises:
      ValueError: as `extract`, or with fewer than 2 images.
    """
    features, _ = extract(network, images, batch_size)
    kept = features[:num_features].astype(np.float16).astype(np.float32)
    return Reference(gaussian_statistics(features), kept, network_id(network))


def save_reference(path: str | Path, reference: Reference) -> None:
    """Writes a reference as .npz: mean, cov, count, features (float16), network_id."""
    np.savez_compressed(
        path,
        mean=reference.statistics.mean,
        cov=reference.statistics.cov,
        count=reference.statistics.count,
        features=reference.features.astype(np.float16),
        network_id=reference.network_id,
    )


def load_reference(path: str | Path, network: FeatureNetwork) -> Reference:
    """Reads a reference written by `save_reference`, for use with `network`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it lacks an entry or was made with another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such reference file. Make one with make_reference and save_reference.'
        )
    with np.load(path) as file:
        if missing := {'mean', 'cov', 'count', 'features', 'network_id'} - set(file.files):
            raise ValueError(
                f'{path}: the entries {sorted(missing)} are missing: expected a file written by '
                'save_reference.'
            )
        statistics = GaussianStatistics(file['mean'], file['cov'], int(file['count']))
        reference = Reference(
            statistics, file['features'].astype(np.float32), str(file['network_id'])
        )
    if reference.network_id != network_id(network):
        raise ValueError(
            f'{path}: made with the feature network {reference.network_id}, but the one given is '
            f'{network_id(network)}. Make the reference again with make_reference.'
        )
    return reference
