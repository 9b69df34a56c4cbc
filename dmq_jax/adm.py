"""The evaluation of guided-diffusion (ADM, arXiv:2105.05233) and what is quoted beside it.

Two sets of images, a reference and samples, through the Inception network of 2015: FID, sFID,
Inception Score, precision and recall by ADM's protocol; kernel distance, density and coverage; and,
for two sets drawn from the same noise, the distance of each pair. A file that carries statistics
(`mu`, `sigma`, `mu_s`, `sigma_s`) is taken at its word for FID and sFID, on either side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jaxtyping import UInt8

from dmq_jax import features
from dmq_jax.files.images import ImageStream, ReferenceStatistics, write_reference
from dmq_jax.metrics import inception, inception_score, kernel_distance, neighbours, similarity
from dmq_jax.metrics.frechet import GaussianStatistics, bootstrap_frechet, frechet_distance
from dmq_jax.runtime import log, mesh

METRICS = ('fid', 'sfid', 'is', 'pr', 'kid', 'dc', 'paired')
ADM_METRICS = METRICS[:4]
PR_DTYPES = {'float32': 'exact', 'adm-fp16': 'adm-fp16'}
K, DENSITY_K = 3, 5  # neighbours of precision and recall; of density and coverage


class Options(NamedTuple):
    """How the metrics are computed.

    Attributes:
      metrics: some of `METRICS`.
      pr_dtype: distances between features: 'float32' decides like exact arithmetic, 'adm-fp16'
        rounds as ADM's TensorFlow graph does.
      batch_size: images per call of the network; changes no result beyond float rounding.
      num_resamples: of the bootstrap of FID; 0 for none.
      kept_in: folder of features kept between calls; None keeps nothing.
      device_mesh: devices; None takes all there are.
    """

    metrics: Sequence[str] = ADM_METRICS
    pr_dtype: str = 'float32'
    batch_size: int = features.DEFAULT_BATCH_SIZE
    num_resamples: int = 0
    kept_in: Path | None = None
    device_mesh: mesh.Mesh | None = None


DEFAULTS = Options()


class Evaluation(NamedTuple):
    """The result.

    Attributes:
      metrics: by name, in the order of the printed lines.
      protocol: everything the numbers depend on.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


class ImageSet(NamedTuple):
    """One of the two sets.

    Attributes:
      stream: its images.
      features: of every image; None where a file's statistics are all that is needed.
      gaussian: of the pooled features, the file's own where it carries any.
      spatial_gaussian: of the spatial features.
    """

    stream: ImageStream
    features: features.SetFeatures | None
    gaussian: GaussianStatistics
    spatial_gaussian: GaussianStatistics


def run(
    network: inception.InceptionNetwork,
    reference: ImageStream,
    samples: ImageStream,
    options: Options = DEFAULTS,
) -> Evaluation:
    """Every metric asked for.

    Args:
      network: the weights.
      reference: real images, or a reference file.
      samples: generated images.
      options: which metrics, and how.

    Raises:
      ValueError: an unknown metric, or too few images for one; see also `features.extract`.
    """
    check(reference, samples, options)
    asked = set(options.metrics)
    of_images = bool(asked & {'pr', 'kid', 'dc', 'paired'})
    of_samples = of_images or 'is' in asked or options.num_resamples > 0
    real = read_set(network, reference, options, needs_images=of_images)
    drawn = read_set(network, samples, options, needs_images=of_samples)
    return Evaluation(compare(real, drawn, options), _protocol(network, real, drawn, options))


def read_set(
    network: inception.InceptionNetwork,
    stream: ImageStream,
    options: Options = DEFAULTS,
    *,
    needs_images: bool = True,
) -> ImageSet:
    """Features of a set, and its Gaussians: the file's own where it carries them.

    Args:
      network: the weights.
      stream: the images.
      options: batch size, kept features and devices.
      needs_images: whether features of single images are needed even if the file has statistics.

    Raises:
      ValueError: as `features.extract`.
    """
    found = None
    if needs_images or stream.statistics is None:
        found = features.of_stream(
            network, stream, kept_in=options.kept_in, batch_size=options.batch_size,
            device_mesh=options.device_mesh,
        )  # fmt: skip
    if stream.statistics is None:
        return ImageSet(stream, found, found.gaussian, found.spatial_gaussian)
    mu, sigma, mu_s, sigma_s = (np.asarray(part, np.float64) for part in stream.statistics)
    return ImageSet(
        stream, found, GaussianStatistics(mu, sigma, None), GaussianStatistics(mu_s, sigma_s, None)
    )


def read_batches(
    network: inception.InceptionNetwork,
    batches: Iterable[UInt8[np.ndarray, 'b H W 3']],
    description: str,
    options: Options = DEFAULTS,
) -> ImageSet:
    """`read_set` of images that pass by once, e.g. straight from a sampler; none are kept.

    Args:
      network: the weights.
      batches: pixels, arrays of any lengths and one height and width.
      description: what they are, for messages and the protocol.
      options: batch size and devices.

    Raises:
      ValueError: as `features.extract`.
    """
    shapes = []

    def watched() -> Iterator[UInt8[np.ndarray, 'b H W 3']]:
        for images in batches:
            shapes[:] = [images.shape[1:]]
            yield images

    found = features.extract(
        network, watched(), num_images=None, description=f'features of {description}',
        batch_size=options.batch_size, device_mesh=options.device_mesh,
    )  # fmt: skip

    def gone(*_: int) -> NoReturn:
        raise ValueError(
            f'{description}: the images themselves were not kept; write them to a file to compare '
            'them in pairs.'
        )

    stream = ImageStream(
        description=description, num_images=len(found.pool), image_shape=shapes[0],
        statistics=None, read=gone, contents=gone,
    )  # fmt: skip
    return ImageSet(stream, found, found.gaussian, found.spatial_gaussian)


def compare(real: ImageSet, drawn: ImageSet, options: Options = DEFAULTS) -> dict[str, float]:
    """The metrics of two sets that were read.

    Args:
      real: the reference.
      drawn: the samples.
      options: which metrics, and how.

    Returns:
      `inception_score`, `fid` (`fid_low`, `fid_high`, `fid_standard_error`), `sfid`, `precision`,
      `recall`, `density`, `coverage`, `kid`, `kid_std`, `psnr`, `ssim`, `feature_distance`: those
      that were asked for. SSIM is left out for images smaller than its window.
    """
    asked = set(options.metrics)
    found: dict[str, float] = {}
    if 'is' in asked:
        rows = features.iterate(drawn.features.probabilities, inception_score.CHUNK_SIZE)
        found['inception_score'] = inception_score.inception_score(rows).mean
    if 'fid' in asked:
        found['fid'] = frechet_distance(drawn.gaussian, real.gaussian)
    if options.num_resamples:
        interval = bootstrap_frechet(
            drawn.features.pool, real.gaussian, num_resamples=options.num_resamples
        )
        found |= {'fid_low': interval.low, 'fid_high': interval.high,
                  'fid_standard_error': interval.standard_error}  # fmt: skip
    if 'sfid' in asked:
        found['sfid'] = frechet_distance(drawn.spatial_gaussian, real.spatial_gaussian)
    if asked & {'pr', 'dc'}:
        found |= _neighbours(drawn, real, asked, options)
    if 'kid' in asked:
        distance = kernel_distance.kernel_distance(drawn.features.pool, real.features.pool)
        found |= {'kid': distance.mean, 'kid_std': distance.std}
    if 'paired' in asked:
        found |= _paired(drawn, real, options.batch_size)
    return found


def check(reference: ImageStream, samples: ImageStream, options: Options) -> None:
    """Refuses what could not be measured, before a network runs.

    Raises:
      ValueError: naming the option or the set of images.
    """
    for name in options.metrics:
        if name not in METRICS:
            raise ValueError(f'metrics: {name!r} is none of {", ".join(METRICS)}.')
    if options.pr_dtype not in PR_DTYPES:
        raise ValueError(f'pr_dtype={options.pr_dtype!r}: expected {" or ".join(PR_DTYPES)}.')
    if options.batch_size < 1:
        raise ValueError(f'batch_size={options.batch_size}: expected at least 1.')
    if options.num_resamples < 0 or options.num_resamples == 1:
        raise ValueError(
            f'bootstrap: {options.num_resamples} resamples, expected none or at least 2.'
        )
    needed = {'fid': 2, 'sfid': 2, 'is': 1, 'pr': K + 1, 'dc': DENSITY_K + 1,
              'kid': kernel_distance.SUBSET_SIZE, 'paired': 1}  # fmt: skip
    for stream in (reference, samples):
        for name in options.metrics:
            from_file = stream.statistics is not None and name in ('fid', 'sfid')
            if stream.num_images < needed[name] and not from_file:
                raise ValueError(
                    f'{stream.description}: {stream.num_images} images, {name} needs at least '
                    f'{needed[name]}; give more, or leave {name} out of the metrics.'
                )
    if 'paired' in options.metrics:
        shapes = [(s.num_images, *s.image_shape) for s in (reference, samples)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'paired: {shapes[0]} and {shapes[1]} (N, H, W, C) of {reference.description} and '
                f'{samples.description}: expected equal shapes, image i of both from equal noise.'
            )


def make_reference(
    network: inception.InceptionNetwork,
    data: ImageStream,
    path: Path,
    options: Options = DEFAULTS,
) -> None:
    """Writes a reference file in ADM's layout.

    Statistics are of all images, whatever statistics `data` carries itself; 10,000 images, evenly
    spaced, are kept for precision and recall.

    Args:
      network: the weights.
      data: the images.
      path: of the `.npz` to write.
      options: batch size, kept features and devices.

    Raises:
      FileNotFoundError: no such folder to write to.
      ValueError: as `features.extract`.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f'{path.parent}: no such folder; make it first.')
    if path.suffix != '.npz':
        raise ValueError(f'{path}: expected a name that ends in .npz.')
    found = features.of_stream(
        network, data, kept_in=options.kept_in, batch_size=options.batch_size,
        device_mesh=options.device_mesh,
    )  # fmt: skip
    statistics = ReferenceStatistics(
        found.gaussian.mean, found.gaussian.cov,
        found.spatial_gaussian.mean, found.spatial_gaussian.cov,
    )  # fmt: skip
    write_reference(path, data, statistics)


def lines(metrics: Mapping[str, float]) -> list[str]:
    """What ADM's evaluator prints, then what it does not have."""
    names = {
        'inception_score': 'Inception Score', 'fid': 'FID', 'sfid': 'sFID',
        'precision': 'Precision', 'recall': 'Recall', 'fid_low': 'FID, bootstrap, 2.5 %',
        'fid_high': 'FID, bootstrap, 97.5 %', 'fid_standard_error': 'FID, standard error',
        'density': 'Density', 'coverage': 'Coverage', 'kid': 'KID',
        'kid_std': 'KID, std of subsets', 'psnr': 'PSNR of pairs (dB)', 'ssim': 'SSIM of pairs',
        'feature_distance': 'Feature distance of pairs',
    }  # fmt: skip
    return [f'{name}: {metrics[key]}' for key, name in names.items() if key in metrics]


def describe_network(network: inception.InceptionNetwork) -> dict[str, Any]:
    """What the features depend on, for a protocol."""
    return {
        'weights': {
            'file': network.path.name, 'sha256': network.sha256,
            'network_id': network.network_id,
        },
        'preprocessing': 'TensorFlow 1 bilinear resize to 299x299 without antialiasing, '
                         '(x - 128) / 128',
        'dtype': 'features float32 at highest precision, statistics float64',
    }  # fmt: skip


def _neighbours(
    drawn: ImageSet, real: ImageSet, asked: set[str], options: Options
) -> dict[str, float]:
    device = jax.local_devices()[0]
    found = neighbours.measure_neighbours(
        drawn.features.pool, real.features.pool, k=K,
        density_k=DENSITY_K if 'dc' in asked else K, arithmetic=PR_DTYPES[options.pr_dtype],
        device=device if device.platform == 'gpu' else None, workers=features.all_processes(),
    )  # fmt: skip
    result = {}
    if 'pr' in asked:
        result |= {'precision': found.precision, 'recall': found.recall}
    if 'dc' in asked:
        result |= {'density': found.density, 'coverage': found.coverage}
    return result


def _paired(drawn: ImageSet, real: ImageSet, batch_size: int) -> dict[str, float]:
    pairs = zip(drawn.stream.batches(batch_size), real.stream.batches(batch_size), strict=True)
    similar = similarity.compare_batches(pairs)
    distance = similarity.compute_feature_distance(drawn.features.pool, real.features.pool)
    found = {'psnr': similar.mean_psnr, 'ssim': similar.mean_ssim,
             'feature_distance': distance.mean_euclidean}  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _protocol(
    network: inception.InceptionNetwork, real: ImageSet, drawn: ImageSet, options: Options
) -> dict[str, Any]:
    def describe(side: ImageSet) -> dict[str, Any]:
        return {
            'source': side.stream.description,
            'num_images': side.stream.num_images,
            'image_shape': list(side.stream.image_shape),
            'statistics': 'computed' if side.stream.statistics is None else 'from the file',
        }

    return {
        'reference': describe(real),
        'samples': describe(drawn),
        **describe_network(network),
        'inception_score': f'chunks of {inception_score.CHUNK_SIZE} in order, 1008 classes, '
                           'no bias',
        'neighbours': {'k': K, 'density_k': DENSITY_K, 'pr_dtype': options.pr_dtype},
        'kid': {'subsets': kernel_distance.NUM_SUBSETS, 'subset_size': kernel_distance.SUBSET_SIZE,
                'seed': kernel_distance.SEED},
        'device': jax.devices()[0].device_kind,
        'num_devices': jax.device_count(),
        'versions': log.versions(),
        'revision': log.git_revision(),
    }  # fmt: skip
