"""Image sets -> features of the FID network: streamed, on all devices, kept for the next metric.

What is kept of a set: its pooled features and class probabilities, which grow with the number of
images, and the Gaussians of pooled and spatial features, which do not. A folder of kept features
is named by the content of the images and by the weights, so a renamed file is found again and a
changed one is not.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dmq_jax import artefacts
from dmq_jax.files import npz
from dmq_jax.files.images import ImageStream
from dmq_jax.metrics import inception
from dmq_jax.metrics.frechet import FeatureStatistics, GaussianStatistics
from dmq_jax.metrics.workers import Workers
from dmq_jax.runtime import hosts, mesh
from dmq_jax.runtime.progress import progress

DEFAULT_BATCH_SIZE = 32  # about 1 GB; divided by one, two, ... 32 devices


class SetFeatures(NamedTuple):
    """What the metrics read of one set of images.

    Attributes:
      pool: pool_3 of every image, in the order of the set; maybe mapped from a file.
      probabilities: softmax over 1008 classes.
      gaussian: of the pooled features.
      spatial_gaussian: of the spatial features.
    """

    pool: Float[np.ndarray, 'N 2048']
    probabilities: Float[np.ndarray, 'N 1008']
    gaussian: GaussianStatistics
    spatial_gaussian: GaussianStatistics


def all_processes() -> Workers:
    """The processes of this run, to share the work of metrics on features that all have."""
    return Workers(jax.process_index(), jax.process_count(), hosts.gather)


def extract(
    network: inception.InceptionNetwork,
    batches: Iterable[UInt8[np.ndarray, 'b H W 3']],
    *,
    num_images: int | None,
    description: str,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device_mesh: mesh.Mesh | None = None,
) -> SetFeatures:
    """Features of images as they come, from a file or straight from a sampler.

    Args:
      network: weights.
      batches: pixels, arrays of any lengths and one height and width.
      num_images: how many there are, for the progress shown; None if unknown.
      description: shown beside the progress.
      batch_size: images per call of the network; changes no result beyond float rounding.
      device_mesh: every batch is split over its devices; None takes all there are.

    Raises:
      ValueError: a batch size that the devices do not divide, images that are not uint8 RGB of
        one size, features that are not finite (damaged weights), or fewer than 2 images.
    """
    device_mesh = mesh.make_mesh() if device_mesh is None else device_mesh
    mesh.check_batch_size(device_mesh, batch_size)
    network = network._replace(params=mesh.replicate(device_mesh, network.params))
    parts = inception.extract_batches(
        network, batches, batch_size,
        put=lambda images: mesh.shard_batch(device_mesh, images),
        fetch=lambda found: mesh.fetch(device_mesh, found),
    )  # fmt: skip
    total = None if num_images is None else -(-num_images // batch_size)
    pool, probabilities = _Rows(num_images), _Rows(num_images)
    workers = all_processes()
    gaussian, spatial_gaussian = FeatureStatistics(workers), FeatureStatistics(workers)
    for part in progress(parts, description, total=total):
        if not all(np.isfinite(array).all() for array in part):
            raise ValueError(
                f'{description}: features are not finite; are the weights in {network.path} whole?'
            )
        pool.append(part.pool)
        probabilities.append(part.probabilities)
        gaussian.update(part.pool)
        spatial_gaussian.update(part.spatial)
    if gaussian.count < 2:
        raise ValueError(f'{description}: {gaussian.count} images; a covariance needs at least 2.')
    return SetFeatures(
        pool.finish(), probabilities.finish(), gaussian.finish(), spatial_gaussian.finish()
    )


class _Rows:
    """Rows that arrive in parts, in one array; without a copy where their number is known."""

    def __init__(self, num_rows: int | None):
        self._num_rows, self._count = num_rows, 0
        self._whole: np.ndarray | None = None
        self._parts: list[np.ndarray] = []

    def append(self, rows: np.ndarray) -> None:
        if self._num_rows is None:
            self._parts.append(rows)
            return
        if self._whole is None:
            self._whole = np.empty((self._num_rows, *rows.shape[1:]), rows.dtype)
        end = self._count + len(rows)
        if end > self._num_rows:
            raise ValueError(f'more images than the {self._num_rows} announced.')
        self._whole[self._count : end] = rows
        self._count = end

    def finish(self) -> np.ndarray:
        if self._num_rows is None:
            return np.concatenate(self._parts)
        if self._count != self._num_rows:
            raise ValueError(f'{self._count} images came, {self._num_rows} were announced.')
        return self._whole


def of_stream(
    network: inception.InceptionNetwork,
    stream: ImageStream,
    *,
    kept_in: Path | None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device_mesh: mesh.Mesh | None = None,
) -> SetFeatures:
    """Features of an image set, read from `kept_in` where an earlier call left them.

    Args:
      network: weights.
      stream: the images.
      kept_in: folder of kept features; None keeps nothing.
      batch_size: images per call of the network.
      device_mesh: devices; None takes all there are.

    Raises:
      ValueError: as `extract` and `ImageStream.batches`.
    """

    def make() -> SetFeatures:
        return extract(
            network, stream.batches(batch_size), num_images=stream.num_images,
            description=f'features of {Path(stream.description).name}', batch_size=batch_size,
            device_mesh=device_mesh,
        )  # fmt: skip

    if kept_in is None:
        return make()
    options = {'images': stream.fingerprint(), 'network': network.network_id}
    name = f'{options["images"][:16]}-{options["network"]}'
    return artefacts.artefact(kept_in / name, options, make=make, save=_save, load=_load)


def _save(folder: Path, features: SetFeatures) -> None:
    np.save(folder / 'pool.npy', features.pool)
    np.save(folder / 'probabilities.npy', features.probabilities)
    gaussians = {'': features.gaussian, '_spatial': features.spatial_gaussian}
    arrays = {f'{part}{end}': getattr(g, part) for end, g in gaussians.items()
              for part in ('mean', 'cov')}  # fmt: skip
    npz.write_arrays(folder / 'statistics.npz', arrays)


def _load(folder: Path) -> SetFeatures:
    pool = np.load(folder / 'pool.npy', mmap_mode='r', allow_pickle=False)
    probabilities = np.load(folder / 'probabilities.npy', mmap_mode='r', allow_pickle=False)
    statistics = folder / 'statistics.npz'
    gaussians = [
        GaussianStatistics(
            npz.read_array(statistics, f'mean{end}'),
            npz.read_array(statistics, f'cov{end}'),
            len(pool),
        )
        for end in ('', '_spatial')
    ]
    return SetFeatures(pool, probabilities, *gaussians)


def iterate(features: np.ndarray, num_rows: int) -> Iterator[np.ndarray]:
    """Consecutive rows, so that a mapped file is never in memory whole."""
    for start in range(0, len(features), num_rows):
        yield np.asarray(features[start : start + num_rows])
