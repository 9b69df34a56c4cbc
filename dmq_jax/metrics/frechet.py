"""Fréchet distance between Gaussians fitted to features. NumPy, float64, on the host.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule" (arXiv:1706.08500), eq. 6:

    d² = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

The trace of (Σ_a Σ_b)^½ is taken from the symmetric matrix Σ_a^½ Σ_b Σ_a^½, which has the same
eigenvalues: no complex numbers, and singular covariances (fewer samples than dimensions) need no
added diagonal, so the fallback of guided-diffusion and pytorch-fid (1e-6 on both diagonals where
`sqrtm` fails) has no counterpart here. Of Inception's pooled features the distance is called FID;
of the spatial ones, sFID (Nash et al. 2021, arXiv:2103.03841).
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dmq_jax.metrics.workers import ALONE, Workers

# Rows folded into the covariance at once: enough for the product to outweigh the update of a
# D x D matrix, and the same whatever the batches.
FOLD_SIZE = 1024
# Bootstrap: share of the replicates between the ends of the interval.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of features.

    Laws: float64; `cov` is symmetric and its divisor is `count` − 1.

    Attributes:
      mean: the mean feature.
      cov: unbiased covariance.
      count: number of samples behind both; None where a file does not say.
    """

    mean: Float[np.ndarray, 'D']
    cov: Float[np.ndarray, 'D D']
    count: int | None


class Moments(NamedTuple):
    """Sums behind a mean and a covariance.

    Attributes:
      count: number of samples.
      mean: their mean; 0 of none.
      scatter: sum of (x − mean)(x − mean)ᵀ.
    """

    count: Int[np.ndarray, '']
    mean: Float[np.ndarray, 'D']
    scatter: Float[np.ndarray, 'D D']


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches.

    Parts are merged by the pairwise update of Chan, Golub and LeVeque 1979 ("Updating formulae
    and a pairwise algorithm for computing sample variances"), which never subtracts two large
    sums. Whatever the batches, the same rows are summed together, so the result is the same as far
    as the BLAS library repeats itself; other numbers of workers agree up to float64 rounding.

    Args:
      workers: processes that all see all batches, each of which sums a share of them.
    """

    def __init__(self, workers: Workers = ALONE):
        self.count = 0  # of samples seen
        self.width: int | None = None  # D; None before the first batch
        self._workers = workers
        self._moments: Moments | None = None
        self._pending: list[np.ndarray] = []

    def update(self, features: Float[np.ndarray, 'n D']) -> None:
        """Adds a batch; an empty one changes nothing.

        Args:
          features: one row per sample, any float dtype.

        Raises:
          ValueError: if the shape is not [n, D], D differs from earlier batches, or a value is
            not finite. The statistics are then unchanged.
        """
        features = np.asarray(features)
        if features.ndim != 2:
            raise ValueError(f'features have shape {features.shape}: expected [n, D].')
        if self.width not in (None, features.shape[1]):
            raise ValueError(
                f'features have width {features.shape[1]}: expected {self.width}, the width '
                'of the batches before. Use one FeatureStatistics per feature network.'
            )
        check_finite('features', features)
        if not len(features):
            return
        self.width = features.shape[1]
        begun = self.count // FOLD_SIZE  # parts of FOLD_SIZE rows before the pending ones
        self.count += len(features)
        self._pending.append(np.array(features))  # the caller may reuse its array
        if complete := self.count // FOLD_SIZE - begun:
            rows = np.concatenate(self._pending)
            for part in range(complete):
                self._fold(begun + part, rows[part * FOLD_SIZE : (part + 1) * FOLD_SIZE])
            rest = rows[complete * FOLD_SIZE :]
            self._pending = [rest.copy()] if len(rest) else []

    def finish(self) -> GaussianStatistics:
        """The statistics of everything seen; nothing may follow.

        Raises:
          ValueError: with fewer than 2 samples, for which a covariance is undefined.
        """
        if self.count < 2:
            raise ValueError(
                f'{self.count} samples seen: a covariance needs at least 2. Add more images.'
            )
        if self._pending:
            self._fold(self.count // FOLD_SIZE, np.concatenate(self._pending))
            self._pending = []
        nothing = Moments(
            np.zeros((), np.int64), np.zeros(self.width), np.zeros((self.width, self.width))
        )
        own = nothing if self._moments is None else self._moments
        moments = None
        for part in self._workers.gather(own):
            moments = merge_moments(moments, Moments(*part))
        assert moments.count == self.count
        cov = moments.scatter / (self.count - 1)
        return GaussianStatistics(moments.mean, symmetrize(cov), self.count)

    def _fold(self, part: int, rows: Float[np.ndarray, 'n D']) -> None:
        if part % self._workers.count == self._workers.index:
            self._moments = merge_moments(self._moments, compute_moments(rows))


def compute_moments(features: Float[np.ndarray, 'n D']) -> Moments:
    """Moments of at least one row."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    return Moments(np.asarray(len(features), np.int64), mean, features.T @ features)


def merge_moments(a: Moments | None, b: Moments) -> Moments:
    """Moments of two disjoint sets together; None stands for an empty one."""
    if a is None or a.count == 0:
        return b
    if b.count == 0:
        return a
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = np.outer(shift, shift * (a.count * b.count / count))
    scatter += a.scatter
    scatter += b.scatter
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def gaussian_statistics(
    features: Float[np.ndarray, 'n D'] | Iterable[Float[np.ndarray, 'n D']],
    workers: Workers = ALONE,
) -> GaussianStatistics:
    """Statistics of one array of features, or of all batches of an iterable.

    Args:
      features: one row per sample, the same in every worker.
      workers: processes that share the work.

    Raises:
      ValueError: as `FeatureStatistics.update` and `FeatureStatistics.finish`.
    """
    statistics = FeatureStatistics(workers)
    for batch in [features] if isinstance(features, np.ndarray) else features:
        statistics.update(batch)
    return statistics.finish()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared Fréchet distance of two Gaussians; 0 for equal ones, symmetric, never negative.

    Args:
      a: statistics of one set of features.
      b: statistics of the other, from the same feature network.

    Returns:
      The distance, in squared units of the features ("FID" if they are Inception's).

    Raises:
      ValueError: if the widths differ, a count is below 2, or a value is not finite.
    """
    check_statistics(a, b)
    root_a = symmetric_sqrt(np.asarray(a.cov, np.float64))
    return distance_from_root(a, root_a, b)


@dataclasses.dataclass(frozen=True, eq=False)
class BootstrapInterval:
    """How far a Fréchet distance would move with other samples of the same generator.

    Attributes:
      value: distance of the features themselves.
      low: lower end of the percentile interval of the replicates.
      high: upper end.
      standard_error: standard deviation of the replicates.
      replicates: the distance of every resample.
    """

    value: float
    low: float
    high: float
    standard_error: float
    replicates: Float[np.ndarray, 'R']


def bootstrap_frechet(
    features: Float[np.ndarray, 'N D'],
    reference: GaussianStatistics,
    *,
    num_resamples: int = 20,
    seed: int = 0,
) -> BootstrapInterval:
    """Percentile interval of 95 % of the distance between features and a reference.

    Efron 1979, "Bootstrap Methods: Another Look at the Jackknife". The reference is taken as
    given. A resample repeats some samples and lacks others, and the distance grows as distinct
    samples get fewer, so the replicates lie above `value`, as a run with fewer images would: read
    the width of the interval, not its place. With D = 2048 each resample costs a covariance and
    the eigenvalues of one matrix, some seconds.

    Args:
      features: one row per generated image.
      reference: statistics of the real images, from the same network.
      num_resamples: how many; a percentile interval wants some hundreds, a standard error 20.
      seed: of the resampling.

    Raises:
      ValueError: as `frechet_distance`, or if num_resamples is below 2.
    """
    if num_resamples < 2:
        raise ValueError(f'num_resamples={num_resamples}: expected at least 2.')
    statistics = gaussian_statistics(features)
    check_statistics(reference, statistics)
    root = symmetric_sqrt(np.asarray(reference.cov, np.float64))
    rng = np.random.default_rng(seed)
    count = len(features)
    replicates = np.empty(num_resamples)
    for index in range(num_resamples):
        repeats = rng.multinomial(count, np.full(count, 1 / count))
        resample = weighted_statistics(features, repeats, statistics.mean)
        replicates[index] = distance_from_root(reference, root, resample)
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return BootstrapInterval(
        value=distance_from_root(reference, root, statistics),
        low=float(low),
        high=float(high),
        standard_error=float(np.std(replicates, ddof=1)),
        replicates=replicates,
    )


def weighted_statistics(
    features: Float[np.ndarray, 'N D'],
    repeats: Int[np.ndarray, 'N'],
    centre: Float[np.ndarray, 'D'],
) -> GaussianStatistics:
    """Statistics of the set in which row i occurs `repeats[i]` times.

    Args:
      features: the rows.
      repeats: their numbers of occurrences.
      centre: any vector near the mean; sums are taken around it so as to keep their digits.
    """
    width = features.shape[1]
    total, products = np.zeros(width), np.zeros((width, width))
    kept = np.flatnonzero(repeats)
    for start in range(0, len(kept), FOLD_SIZE):
        rows = kept[start : start + FOLD_SIZE]
        shifted = features[rows].astype(np.float64) - centre
        total += repeats[rows].astype(np.float64) @ shifted
        shifted *= np.sqrt(repeats[rows].astype(np.float64))[:, None]
        products += shifted.T @ shifted
    count = int(repeats.sum())
    shift = total / count
    cov = (products - count * np.outer(shift, shift)) / (count - 1)
    return GaussianStatistics(centre + shift, symmetrize(cov), count)


def distance_from_root(
    a: GaussianStatistics, root_a: Float[np.ndarray, 'D D'], b: GaussianStatistics
) -> float:
    """`frechet_distance` where the root of the covariance of `a` is at hand."""
    eigenvalues = np.linalg.eigvalsh(symmetrize(root_a @ np.asarray(b.cov, np.float64) @ root_a))
    # Rounding makes the zero eigenvalues of singular covariances slightly negative.
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = np.asarray(a.mean, np.float64) - np.asarray(b.mean, np.float64)
    distance = difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * trace_of_root
    return float(max(distance, 0.0))


def check_statistics(a: GaussianStatistics, b: GaussianStatistics) -> None:
    """Raises a ValueError unless two Gaussians can be compared; see `frechet_distance`."""
    if np.shape(a.mean) != np.shape(b.mean):
        raise ValueError(
            f'means have shapes {np.shape(a.mean)} and {np.shape(b.mean)}: expected equal widths. '
            'Compute both with the same feature network.'
        )
    for name, statistics in (('first', a), ('second', b)):
        width = np.size(statistics.mean)
        if np.shape(statistics.mean) != (width,) or np.shape(statistics.cov) != (width, width):
            raise ValueError(
                f'the {name} statistics have mean {np.shape(statistics.mean)} and covariance '
                f'{np.shape(statistics.cov)}: expected [D] and [D, D].'
            )
        if statistics.count is not None and statistics.count < 2:
            raise ValueError(
                f'the {name} statistics come from {statistics.count} samples: expected at least 2.'
            )
        check_finite(f'mean of the {name} statistics', statistics.mean)
        check_finite(f'covariance of the {name} statistics', statistics.cov)


def symmetric_sqrt(matrix: Float[np.ndarray, 'D D']) -> Float[np.ndarray, 'D D']:
    """Symmetric root of a symmetric matrix; negative eigenvalues count as 0."""
    eigenvalues, vectors = np.linalg.eigh(symmetrize(matrix))
    return (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T


def symmetrize(matrix: Float[np.ndarray, 'D D']) -> Float[np.ndarray, 'D D']:
    """The symmetric part of a matrix."""
    return (matrix + matrix.T) / 2


def check_finite(name: str, values: Float[np.ndarray, '...']) -> None:
    """Raises a ValueError that counts the values of `name` that are infinite or NaN."""
    if num_bad := int(np.size(values) - np.isfinite(values).sum()):
        raise ValueError(
            f'{num_bad} of {np.size(values)} values of the {name} are infinite or NaN: expected '
            'finite ones. Check the images and the weights of the feature network.'
        )
