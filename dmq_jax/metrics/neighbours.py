"""Precision and recall of generated images, by nearest neighbours of features. NumPy, on the host.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models"
(arXiv:1904.06991), eq. 1 and 2: the manifold of a set is the union of balls around its points,
each reaching the k-th nearest other point of the set. Precision is the share of generated points
inside the manifold of the real ones, recall the share of real points inside that of the generated.

Distances are squared on both sides, and a point on the surface of a ball is inside (`<=`).
Features are first rounded to a fixed-point grid so fine that their squared distances are exact
integers in float64. Ties, such as copies of one image, are thus decided by arithmetic rather than
by rounding, and the result depends neither on the block size nor on the BLAS library.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dmq_jax.metrics.frechet import check_finite

# Bits of the integers that float64 represents without gaps.
EXACT_BITS = 53


class PrecisionRecall(NamedTuple):
    """Shares in 0..1.

    Attributes:
      precision: generated points that look real.
      recall: real points that the generator covers.
    """

    precision: float
    recall: float


def precision_recall(
    generated: Float[np.ndarray, 'N D'],
    reference: Float[np.ndarray, 'M D'],
    k: int = 3,
    block_size: int = 2048,
) -> PrecisionRecall:
    """Improved precision and recall of generated features against real ones.

    Memory holds blocks of `block_size` squared; no N x M matrix is made. Both numbers depend on
    N and M: compare only results for equal counts.

    Args:
      generated: features of generated images.
      reference: features of real images, from the same network.
      k: which neighbour sets the radius of a ball; the paper uses 3.
      block_size: rows and columns of distances held at once.

    Raises:
      ValueError: if a shape is not [n, D], the widths differ, a set has no k-th neighbour, a
        value is not finite, or k or block_size is below 1.
    """
    generated, reference = np.asarray(generated), np.asarray(reference)
    if k < 1 or block_size < 1:
        raise ValueError(f'k={k}, block_size={block_size}: expected both to be at least 1.')
    for name, features in (('generated', generated), ('reference', reference)):
        if features.ndim != 2:
            raise ValueError(f'{name} features have shape {features.shape}: expected [n, D].')
        if len(features) <= k:
            raise ValueError(
                f'{len(features)} {name} features: expected more than k={k}. Add more images.'
            )
        check_finite(f'{name} features', features)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f'features have widths {generated.shape[1]} and {reference.shape[1]}: expected equal '
            'ones. Compute both with the same feature network.'
        )
    generated, reference = to_fixed_point(generated, reference)
    reference_radii = squared_radii(reference, k, block_size)
    generated_radii = squared_radii(generated, k, block_size)
    return PrecisionRecall(
        float(np.mean(inside_manifold(generated, reference, reference_radii, block_size))),
        float(np.mean(inside_manifold(reference, generated, generated_radii, block_size))),
    )


def to_fixed_point(
    *sets: Float[np.ndarray, '_ D'],
) -> tuple[Float[np.ndarray, '_ D'], ...]:
    """The sets in one integer grid, as float64, scaled by a common power of two.

    With D = 64 the grid has 2^22 steps between 0 and the power of two above the largest absolute
    value, with D = 2048 2^20. Any |u|² + |v|² − 2 u·v, partial sums included, is then an integer
    below 2^53.
    """
    width = sets[0].shape[1]
    bits = (EXACT_BITS - 2 - int(np.ceil(np.log2(max(width, 1))))) // 2
    largest = max(float(np.max(np.abs(features), initial=0)) for features in sets)
    exponent = int(np.frexp(largest)[1])
    return tuple(np.rint(np.ldexp(f.astype(np.float64), bits - exponent)) for f in sets)


def squared_radii(
    points: Float[np.ndarray, 'N D'], k: int, block_size: int
) -> Float[np.ndarray, 'N']:
    """Squared distance of every point to its k-th nearest other point; points on an exact grid."""
    radii = np.empty(len(points))
    for rows in blocks(len(points), block_size):
        nearest = np.empty((len(points[rows]), 0))
        for columns in blocks(len(points), block_size):
            distances = squared_distances(points[rows], points[columns])
            # k + 1 because the point itself, at distance 0, is among the columns.
            nearest = np.concatenate([nearest, keep_smallest(distances, k + 1)], axis=1)
            nearest = keep_smallest(nearest, k + 1)
        radii[rows] = nearest.max(axis=1)
    return radii


def keep_smallest(values: Float[np.ndarray, 'N M'], count: int) -> Float[np.ndarray, 'N kept']:
    """The `count` smallest values of every row, or all of a shorter row, in any order."""
    if values.shape[1] <= count:
        return values
    return np.partition(values, count - 1, axis=1)[:, :count]


def inside_manifold(
    points: Float[np.ndarray, 'N D'],
    centres: Float[np.ndarray, 'M D'],
    radii: Float[np.ndarray, 'M'],
    block_size: int,
) -> Bool[np.ndarray, 'N']:
    """Which points lie in the ball of at least one centre, surfaces included."""
    inside = np.zeros(len(points), bool)
    for rows in blocks(len(points), block_size):
        for columns in blocks(len(centres), block_size):
            distances = squared_distances(points[rows], centres[columns])
            inside[rows] |= (distances <= radii[columns]).any(axis=1)
    return inside


def squared_distances(
    u: Float[np.ndarray, 'N D'], v: Float[np.ndarray, 'M D']
) -> Float[np.ndarray, 'N M']:
    """|u|² + |v|² − 2 u·v; exact for points from `to_fixed_point`."""
    distances = u @ (-2 * v.T)
    distances += np.square(u).sum(axis=1)[:, None]
    distances += np.square(v).sum(axis=1)
    return distances


def blocks(length: int, block_size: int) -> Iterator[slice]:
    """Consecutive slices of at most `block_size` that cover 0..length."""
    return (slice(i, min(i + block_size, length)) for i in range(0, length, block_size))
