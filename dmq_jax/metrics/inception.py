"""Inception-v3 of 2015-12-05, the network that FID, sFID, IS, precision and recall are defined on.

Owns the network (Szegedy et al. 2016, arXiv:1512.00567, in the variant of the frozen graph
`classify_image_graph_def.pb`) and its preprocessing; `inception_weights` reads its files. It is not
torchvision's `inception_v3`: other weights, 1008 classes, average pools that count valid pixels
only, and a *max* pool in the last block.

Batch normalisation is folded into the convolutions in float64 when the weights are read. Every
product is computed in full float32: the TF32 that GPUs use by default moves FID visibly.

    python -m dmq_jax.metrics.inception --convert IN OUT

rewrites published weights as one `.safetensors` and prints its sha256. Nothing is ever downloaded.
"""

import argparse
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util
from jax import lax
from jaxtyping import Array, Float, Num, UInt8

from dmq_jax.metrics import inception_weights
from dmq_jax.metrics.classifier import rebatch
from dmq_jax.runtime import programs

SIZE = 299
NUM_CLASSES = 1008
# sFID reads the first channels of mixed_6/conv only (Nash et al. 2021, arXiv:2103.03841).
SPATIAL_CHANNELS = 7
TAPS = ('64', '192', '768', 'spatial', '2048', 'logits')


def resize_bilinear_tf1(
    images: Num[Array, 'B H W C'], size: tuple[int, int] = (SIZE, SIZE)
) -> Float[Array, 'B H2 W2 C']:
    """`ResizeBilinear` of TensorFlow 1: corners not aligned, no half-pixel centres, no antialias.

    Equal bit for bit to its formula in float32: source position i * (in / out), horizontal before
    vertical, each a + (b - a) * fraction. An image of the size asked for comes back unchanged.

    Args:
      images: any values; converted to float32.
      size: new height and width.
    """
    x = images.astype(jnp.float32)
    x = _interpolate(x, size[1], axis=2)
    return _interpolate(x, size[0], axis=1)


def _interpolate(x: Float[Array, '*shape'], length: int, axis: int) -> Float[Array, '*shape2']:
    if x.shape[axis] == length:
        return x
    position = np.arange(length, dtype=np.float32) * (
        np.float32(x.shape[axis]) / np.float32(length)
    )
    low = np.floor(position).astype(np.int32)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    fraction = (position - low.astype(np.float32)).reshape(-1, *[1] * (x.ndim - axis - 1))
    a, b = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
    product = (b - a) * jnp.asarray(fraction)[(None,) * axis]
    # The minimum changes nothing but keeps product and sum apart: compilers fuse them to one
    # operation, which rounds once in place of twice.
    return a + lax.min(product, np.finfo(np.float32).max)


def _conv(
    x: Float[Array, 'B H W C'],
    name: str,
    features: int,
    kernel_size: tuple[int, int] = (1, 1),
) -> Float[Array, 'B H W features']:
    """Convolution over the zero-padded image, bias and ReLU; batch normalisation is folded in."""
    conv = nn.Conv(features, kernel_size, precision=lax.Precision.HIGHEST, name=name)
    return nn.relu(conv(x))


def _valid_conv(
    x: Float[Array, 'B H W C'], name: str, features: int, stride: int = 1
) -> Float[Array, 'B H2 W2 features']:
    """As `_conv`, 3x3 and without padding."""
    precision = lax.Precision.HIGHEST
    conv = nn.Conv(features, (3, 3), stride, 'VALID', precision=precision, name=name)
    return nn.relu(conv(x))


def _tower(x: Float[Array, 'B H W C'], name: str, *layers: tuple) -> Float[Array, 'B H W N']:
    """Convolutions in a row, called `name`_conv, `name`_conv_1, ...; a layer is (N, kernel)."""
    for index, (features, kernel_size) in enumerate(layers):
        suffix = f'_{index}' if index else ''
        x = _conv(x, f'{name}_conv{suffix}', features, kernel_size)
    return x


def _windows(x: Float[Array, 'B H W C'], axis: int, stride: int) -> list[Float[Array, 'B H2 W2 C']]:
    """First, second and third position of every window of three along an axis."""
    # Slices: XLA's CPU back end takes 3 to 8 times longer for the same as a windowed reduction.
    length = (x.shape[axis] - 3) // stride * stride + 1
    return [
        lax.slice_in_dim(x, start, start + length, stride=stride, axis=axis) for start in range(3)
    ]


def _max_pool(
    x: Float[Array, 'B H W C'], *, stride: int = 2, padding: int = 0
) -> Float[Array, 'B H2 W2 C']:
    """Maximum of each 3x3 of values that are not negative: padding is 0."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for axis in (1, 2):
        first, second, third = _windows(x, axis, stride)
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def _average_pool(x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
    """Mean of each 3x3, at the border of the pixels that exist."""
    for axis in (1, 2):
        counts = np.full([x.shape[axis] if a == axis else 1 for a in range(4)], 3, np.float32)
        counts[(slice(None),) * axis + ([0, -1],)] = 2
        padding = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        x = sum(_windows(jnp.pad(x, padding), axis, stride=1)) / counts
    return x


def _average_pool_conv(
    x: Float[Array, 'B H W C'], name: str, features: int
) -> Float[Array, 'B H W features']:
    """`_average_pool`, then as `_conv`, 1x1."""
    # Both are linear and the weights of the mean add up to 1, so the convolution and its bias
    # may come first, which leaves fewer channels to pool.
    x = nn.Conv(features, (1, 1), precision=lax.Precision.HIGHEST, name=name)(x)
    return nn.relu(_average_pool(x))


class BlockA(nn.Module):
    """Inception block at 35x35."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W N']:
        """224 + `pool_features` channels."""
        branches = [
            _conv(x, 'conv', 64),
            _tower(x, 'tower', (48, (1, 1)), (64, (5, 5))),
            _tower(x, 'tower_1', (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            _average_pool_conv(x, 'tower_2_conv', self.pool_features),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """From 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H2 W2 N']:
        """480 channels beside those of `x`."""
        tower = _tower(x, 'tower', (64, (1, 1)), (96, (3, 3)))
        branches = [
            _valid_conv(x, 'conv', 384, stride=2),
            _valid_conv(tower, 'tower_conv_2', 96, stride=2),
            _max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """Inception block at 17x17, its 7x7 convolutions split in two."""

    inner: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W 768']:
        """The first 192 channels are those of `conv`."""
        c, row, column = self.inner, (1, 7), (7, 1)
        branches = [
            _conv(x, 'conv', 192),
            _tower(x, 'tower', (c, (1, 1)), (c, row), (192, column)),
            _tower(x, 'tower_1', (c, (1, 1)), (c, column), (c, row), (c, column), (192, row)),
            _average_pool_conv(x, 'tower_2_conv', 192),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """From 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H2 W2 N']:
        """512 channels beside those of `x`."""
        tower = _tower(x, 'tower', (192, (1, 1)))
        tower_1 = _tower(x, 'tower_1', (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        branches = [
            _valid_conv(tower, 'tower_conv_1', 320, stride=2),
            _valid_conv(tower_1, 'tower_1_conv_3', 192, stride=2),
            _max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """Inception block at 8x8.

    Attributes:
      is_max_pooled: the pool of `tower_2` takes the maximum; so in the last block of the 2015
        graph, though not in the paper.
    """

    is_max_pooled: bool

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W 2048']:
        """Concatenated branches, the two that fork adjacent."""
        tower = _tower(x, 'tower', (384, (1, 1)))
        tower_1 = _tower(x, 'tower_1', (448, (1, 1)), (384, (3, 3)))
        if self.is_max_pooled:
            tower_2 = _conv(_max_pool(x, stride=1, padding=1), 'tower_2_conv', 192)
        else:
            tower_2 = _average_pool_conv(x, 'tower_2_conv', 192)
        branches = [
            _conv(x, 'conv', 320),
            _conv(tower, 'tower_mixed_conv', 384, (1, 3)),
            _conv(tower, 'tower_mixed_conv_1', 384, (3, 1)),
            _conv(tower_1, 'tower_1_mixed_conv', 384, (1, 3)),
            _conv(tower_1, 'tower_1_mixed_conv_1', 384, (3, 1)),
            tower_2,
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """The network, preprocessing included; modules are named as in the TensorFlow graph."""

    @nn.compact
    def __call__(self, images: Num[Array, 'B H W 3']) -> dict[str, Float[Array, 'B D']]:
        """Named features of images with values 0..255.

        Returns:
          '64', '192', '768': means over the positions of the outputs of the first and second max
            pool and of mixed_7, as pytorch-fid's --dims.
          'spatial': 7 channels of mixed_6/conv at 17x17, in the order H, W, C; 2023 numbers.
          '2048': pool_3.
          'logits': of 1008 classes, without the bias, as the Inception Score of ADM takes them.
        """
        taps = {}
        x = (resize_bilinear_tf1(images) - 128.0) * 0.0078125
        x = _valid_conv(x, 'conv', 32, stride=2)
        x = _valid_conv(x, 'conv_1', 32)
        x = _conv(x, 'conv_2', 64, (3, 3))
        x = _max_pool(x)
        taps['64'] = jnp.mean(x, axis=(1, 2))
        x = _conv(x, 'conv_3', 80)
        x = _valid_conv(x, 'conv_4', 192)
        x = _max_pool(x)
        taps['192'] = jnp.mean(x, axis=(1, 2))
        for index, pool_features in enumerate((32, 64, 64)):
            x = BlockA(pool_features, name=f'mixed_{index}' if index else 'mixed')(x)
        x = BlockB(name='mixed_3')(x)
        for index, inner in enumerate((128, 160, 160, 192), start=4):
            x = BlockC(inner, name=f'mixed_{index}')(x)
            if index == 6:
                taps['spatial'] = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        taps['768'] = jnp.mean(x, axis=(1, 2))
        x = BlockD(name='mixed_8')(x)
        x = BlockE(is_max_pooled=False, name='mixed_9')(x)
        x = BlockE(is_max_pooled=True, name='mixed_10')(x)
        taps['2048'] = jnp.mean(x, axis=(1, 2))
        head = nn.Dense(
            NUM_CLASSES, use_bias=False, precision=lax.Precision.HIGHEST, name='softmax'
        )
        taps['logits'] = head(taps['2048'])
        return taps


class InceptionFeatures(NamedTuple):
    """What the metrics read, one row per image, float32.

    Attributes:
      pool: pool_3, for FID, precision and recall.
      spatial: channels of mixed_6/conv, for sFID.
      probabilities: softmax of the logits without bias, for the Inception Score.
    """

    pool: Float[Array, 'N 2048']
    spatial: Float[Array, 'N 2023']
    probabilities: Float[Array, 'N 1008']


class InceptionNetwork(NamedTuple):
    """The network with its weights.

    Attributes:
      model: the architecture.
      params: its parameters, float32, batch normalisation folded in.
      sha256: of the file the weights were read from, in hex.
      path: that file.
      network_id: names the weights, whichever kind of file they came from.
    """

    model: InceptionV3
    params: Mapping[str, Any]
    sha256: str
    path: Path
    network_id: str


def compute_network_id(params: Mapping[str, Any]) -> str:
    """Sixteen hex digits that name the weights, whichever kind of file they came from."""
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(dict(params), sep='/').items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).astype('<f4').tobytes())
    return digest.hexdigest()[:16]


@functools.partial(programs.NetworkProgram, static_argnums=0)
def _features(
    model: InceptionV3, params: Mapping[str, Any], images: UInt8[Array, 'B H W 3']
) -> InceptionFeatures:
    taps = model.apply({'params': params}, images)
    return InceptionFeatures(taps['2048'], taps['spatial'], jax.nn.softmax(taps['logits'], axis=-1))


def make_extractor(
    network: InceptionNetwork,
) -> Callable[[UInt8[Array, 'B H W 3']], InceptionFeatures]:
    """The compiled function from one batch of images to features, still on the device.

    It compiles once for each batch size, height and width.
    """
    return functools.partial(_features, network.model, network.params)


def extract_batches(
    network: InceptionNetwork,
    batches: Iterable[UInt8[np.ndarray, '_ H W 3']],
    batch_size: int = 64,
    *,
    put: Callable[[np.ndarray], Array] = jax.device_put,
    fetch: Callable[[InceptionFeatures], InceptionFeatures] = jax.device_get,
) -> Iterator[InceptionFeatures]:
    """Features of an image set, NumPy arrays, in its order and each image once.

    The last batch is filled up with zeros, whose results are dropped: there is one compilation
    whatever the number of images, and an image's features do not depend on its neighbours.

    Args:
      network: weights.
      batches: arrays of any lengths and one height and width, values 0..255.
      batch_size: images per call of the network; at 64 it needs about 2 GB.
      put: places a batch on the devices that compute it.
      fetch: brings features back as NumPy arrays.

    Yields:
      Features of `batch_size` images; of what is left, the last time.

    Raises:
      ValueError: if an array is not uint8 [n, H, W, 3], if heights or widths differ, or if
        batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size}: expected at least 1.')
    extractor = make_extractor(network)
    waiting = None
    for batch in rebatch(batches, batch_size):
        if batch.shape[3] != 3 or 0 in batch.shape:
            raise ValueError(
                f'images are {batch.shape[1:]}: expected [H, W, 3]. Repeat the channel of grey '
                'images three times.'
            )
        padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)
        features = extractor(put(np.concatenate([batch, padding])))
        # Fetched one batch late: the device computes while the next images are read.
        if waiting is not None:
            yield _fetch(fetch, *waiting)
        waiting = features, len(batch)
    if waiting is not None:
        yield _fetch(fetch, *waiting)


def extract(
    network: InceptionNetwork,
    images: UInt8[np.ndarray, 'N H W 3'] | Iterable[UInt8[np.ndarray, '_ H W 3']],
    batch_size: int = 64,
) -> InceptionFeatures:
    """`extract_batches`, joined to one array each.

    Raises:
      ValueError: as `extract_batches`, or if there is no image.
    """
    batches = [images] if isinstance(images, np.ndarray) else images
    parts = list(extract_batches(network, batches, batch_size))
    if not parts:
        raise ValueError('there are no images: expected at least 1.')
    return InceptionFeatures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _fetch(
    fetch: Callable[[InceptionFeatures], InceptionFeatures],
    features: InceptionFeatures,
    num_images: int,
) -> InceptionFeatures:
    return InceptionFeatures(*(a[:num_images] for a in fetch(features)))


def load_inception(path: str | os.PathLike | None = None) -> InceptionNetwork:
    """The network with the weights of a published file; its kind is told by its content.

    Args:
      path: the file; without it, the one that the environment variable DMQ_INCEPTION_WEIGHTS
        names.

    Raises:
      FileNotFoundError: no path given, or no such file; lists the files that work.
      ValueError: see `inception_weights.read`.
    """
    path = inception_weights.find(path)
    with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    flat = inception_weights.read(path, _parameter_shapes())
    # Copies: a CPU would go on reading the mapped file. `jnp.array` compiles for every shape.
    copies = {name: np.array(array) for name, array in flat.items()}
    params = traverse_util.unflatten_dict(jax.device_put(copies), sep='/')
    return InceptionNetwork(InceptionV3(), params, sha256, path, compute_network_id(params))


@functools.cache
def _parameter_shapes() -> dict[str, tuple[int, ...]]:
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    template = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)['params']
    return {k: v.shape for k, v in traverse_util.flatten_dict(template, sep='/').items()}


def convert(source: str | os.PathLike, destination: str | os.PathLike) -> str:
    """Writes published weights as one `.safetensors`, with their origin in its metadata.

    Returns:
      The sha256 of the file written.

    Raises:
      FileNotFoundError: no such source, or no such folder to write to.
      ValueError: as `load_inception`, or a destination of another suffix.
    """
    destination = Path(destination)
    if destination.suffix != '.safetensors':
        raise ValueError(f'{destination}: expected a name that ends in .safetensors.')
    if not destination.parent.is_dir():
        raise FileNotFoundError(f'{destination.parent}: no such folder; make it first.')
    network = load_inception(source)
    flat = traverse_util.flatten_dict(dict(network.params), sep='/')
    header = {
        'format': inception_weights.FORMAT,
        'network': 'Inception-v3 of 2015-12-05, batch normalisation folded in',
        'source': network.path.name,
        'source_sha256': network.sha256,
        'network_id': network.network_id,
    }
    data = safetensors.numpy.save({name: np.asarray(leaf) for name, leaf in flat.items()}, header)
    # Renamed when complete: a kill must not leave half a file to be found.
    partial = destination.with_suffix('.partial')
    partial.write_bytes(data)
    os.replace(partial, destination)
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    """Entry point of `python -m dmq_jax.metrics.inception`; returns the exit status."""
    parser = argparse.ArgumentParser(prog='python -m dmq_jax.metrics.inception')
    parser.add_argument(
        '--convert', nargs=2, required=True, metavar=('IN', 'OUT'),
        help='published weights, and the .safetensors to make of them',
    )  # fmt: skip
    source, destination = parser.parse_args().convert
    try:
        sha256 = convert(source, destination)
    except (ValueError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2
    print(f'{sha256}  {destination}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
