"""Fréchet distance between Gaussians fitted to features. NumPy, float64, on the host.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule" (arXiv:1706.08500), eq. 6:

    d² = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

The trace of (Σ_a Σ_b)^½ is taken from the symmetric matrix Σ_a^½ Σ_b Σ_a^½, which has the same
eigenvalues: no complex numbers, and singular covariances (fewer samples than dimensions) need no
added diagonal.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of features.

    Laws: float64; `cov` is symmetric and its divisor is `count` − 1.

    Attributes:
      mean: the mean feature.
      cov: unbiased covariance.
      count: number of samples behind both.
    """

    mean: Float[np.ndarray, 'D']
    cov: Float[np.ndarray, 'D D']
    count: int


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque 1979 ("Updating formulae
    and a pairwise algorithm for computing sample variances"), which never subtracts two large
    sums; the result does not depend on how the samples were split, up to float64 rounding.
    """

    def __init__(self):
        self._count = 0
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._count

    def update(self, features: Float[np.ndarray, 'n D']) -> None:
        """Adds a batch; an empty one changes nothing.

        Args:
          features: one row per sample, any float dtype.

        Raises:
          ValueError: if the shape is not [n, D], D differs from earlier batches, or a value is
            not finite. The statistics are then unchanged.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2:
            raise ValueError(f'features have shape {features.shape}: expected [n, D].')
        if self._mean is not None and features.shape[1] != self._mean.size:
            raise ValueError(
                f'features have width {features.shape[1]}: expected {self._mean.size}, the width '
                'of the batches before. Use one FeatureStatistics per feature network.'
            )
        check_finite('features', features)
        num_new = len(features)
        if not num_new:
            return
        mean = features.mean(axis=0)
        centred = features - mean
        scatter = centred.T @ centred
        if self._mean is None:
            self._count, self._mean, self._scatter = num_new, mean, scatter
            return
        total = self._count + num_new
        shift = mean - self._mean
        self._scatter += scatter + np.outer(shift, shift) * (self._count * num_new / total)
        self._mean = self._mean + shift * (num_new / total)
        self._count = total

    def finish(self) -> GaussianStatistics:
        """The statistics of everything seen so far; more batches may follow.

        Raises:
          ValueError: with fewer than 2 samples, for which a covariance is undefined.
        """
        if self._count < 2:
            raise ValueError(
                f'{self._count} samples seen: a covariance needs at least 2. Add more images.'
            )
        cov = self._scatter / (self._count - 1)
        return GaussianStatistics(self._mean.copy(), (cov + cov.T) / 2, self._count)


def gaussian_statistics(
    features: Float[np.ndarray, 'n D'] | Iterable[Float[np.ndarray, 'n D']],
) -> GaussianStatistics:
    """Statistics of one array of features, or of all batches of an iterable.

    Raises:
      ValueError: as `FeatureStatistics.update` and `FeatureStatistics.finish`.
    """
    statistics = FeatureStatistics()
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
        if statistics.count < 2:
            raise ValueError(
                f'the {name} statistics come from {statistics.count} samples: expected at least 2.'
            )
        check_finite(f'mean of the {name} statistics', statistics.mean)
        check_finite(f'covariance of the {name} statistics', statistics.cov)
    root_a = symmetric_sqrt(np.asarray(a.cov, np.float64))
    eigenvalues = np.linalg.eigvalsh(symmetrize(root_a @ np.asarray(b.cov, np.float64) @ root_a))
    # Rounding makes the zero eigenvalues of singular covariances slightly negative.
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    difference = np.asarray(a.mean, np.float64) - np.asarray(b.mean, np.float64)
    distance = difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * trace_of_root
    return float(max(distance, 0.0))


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
