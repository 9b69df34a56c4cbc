"""Kernel inception distance: an unbiased distance of feature sets. NumPy, float64, on the host.

Bińkowski et al. 2018, "Demystifying MMD GANs" (arXiv:1801.01401), section 4: the squared maximum
mean discrepancy with the kernel (x·y / D + 1)³, estimated without bias on subsets and averaged.
Subsets are drawn as torch-fidelity draws them (its default seed, generated before reference), so
equal features give its numbers up to rounding. Unlike the Fréchet distance it does not grow as
samples get fewer; near 0 it can be slightly negative.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmq_jax.metrics.frechet import check_finite

SEED = 2020  # of torch-fidelity
NUM_SUBSETS, SUBSET_SIZE = 100, 1000


class KernelDistance(NamedTuple):
    """Mean and standard deviation (divisor: number of subsets) over the subsets."""

    mean: float
    std: float


def kernel_distance(
    generated: Float[np.ndarray, 'N D'],
    reference: Float[np.ndarray, 'M D'],
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:
    """Kernel distance ("KID" if the features are Inception's); often quoted times 1000.

    Args:
      generated: features of generated images.
      reference: features of real images, from the same network.
      num_subsets: subsets drawn of each set.
      subset_size: samples of each subset, drawn without replacement.
      seed: of the drawing.

    Raises:
      ValueError: if a shape is not [n, D], the widths differ, a set has fewer samples than a
        subset, a value is not finite, num_subsets is below 1 or subset_size below 2.
    """
    generated, reference = np.asarray(generated), np.asarray(reference)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f'num_subsets={num_subsets}, subset_size={subset_size}: expected at least 1 and 2.'
        )
    for name, features in (('generated', generated), ('reference', reference)):
        if features.ndim != 2:
            raise ValueError(f'{name} features have shape {features.shape}: expected [n, D].')
        if len(features) < subset_size:
            raise ValueError(
                f'{len(features)} {name} features: expected at least subset_size={subset_size}. '
                'Add more images, or choose smaller subsets.'
            )
        check_finite(f'{name} features', features)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f'features have widths {generated.shape[1]} and {reference.shape[1]}: expected equal '
            'ones. Compute both with the same feature network.'
        )
    # The legacy generator: its stream is fixed for good, and it is the one torch-fidelity uses.
    rng = np.random.RandomState(seed)
    values = np.empty(num_subsets)
    for index in range(num_subsets):
        x = generated[rng.choice(len(generated), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        values[index] = unbiased_mmd(x, y)
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def unbiased_mmd(x: Float[np.ndarray, 'm D'], y: Float[np.ndarray, 'm D']) -> float:
    """Unbiased estimate of the squared discrepancy of two sets of m > 1 samples."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    m = len(x)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (cubic(x, x), cubic(y, y)))
    return float(within / (m * (m - 1)) - 2 * cubic(x, y).sum() / m**2)


def cubic(x: Float[np.ndarray, 'm D'], y: Float[np.ndarray, 'n D']) -> Float[np.ndarray, 'm n']:
    """The kernel (x·y / D + 1)³ of all pairs."""
    base = x @ y.T
    base /= x.shape[1]
    base += 1
    result = base * base
    result *= base
    return result
