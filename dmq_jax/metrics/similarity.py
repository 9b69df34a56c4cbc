"""Similarity of paired images: PSNR, SSIM and distance of features. NumPy, float64, on the host.

For comparing a quantized student with its teacher image by image, from equal keys. SSIM is that
of Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
eq. 13, with the constants and the window of its section III-C: an 11x11 Gaussian of standard
deviation 1.5 whose weights sum to 1, K1 = 0.01, K2 = 0.03, L = 255. Windows lie fully inside the
image, and the values of colour channels are averaged.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8

from dmq_jax.metrics.frechet import check_finite
from dmq_jax.metrics.workers import ALONE, Workers

DATA_RANGE = 255.0
# Identical images have infinite PSNR, which would make every mean infinite. 100 dB lies beyond
# a single pixel off by one in an image of 32x32x3 (83 dB) or of 128x128x3 (95 dB).
MAX_PSNR = 100.0

WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5
K1 = 0.01
K2 = 0.03

# Images whose windows are held in memory at once.
BLOCK_SIZE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of each pair of images.

    Attributes:
      psnr: in decibels, at most `MAX_PSNR`.
      ssim: in -1..1, 1 for identical images; None where images are smaller than its window.
    """

    psnr: Float[np.ndarray, 'N']
    ssim: Float[np.ndarray, 'N'] | None

    @property
    def mean_psnr(self) -> float:
        """Mean of the decibels over the pairs."""
        return float(self.psnr.mean())

    @property
    def mean_ssim(self) -> float | None:
        """Mean over the pairs, if there is any."""
        return None if self.ssim is None else float(self.ssim.mean())


def compare_images(
    images: UInt8[np.ndarray, 'N H W C'],
    reference: UInt8[np.ndarray, 'N H W C'],
    workers: Workers = ALONE,
) -> Similarity:
    """PSNR and SSIM of image i with reference image i.

    Args:
      images: pixels.
      reference: those of the reference images.
      workers: processes with the same images, each of which compares a share of them.

    Raises:
      ValueError: as `compute_psnr`.
    """
    check_pairs(images, reference)
    has_ssim = min(images.shape[1:3]) >= WINDOW_SIZE
    values = np.zeros((2 if has_ssim else 1, len(images)))
    for start in workers.share(range(0, len(images), BLOCK_SIZE)):
        rows = slice(start, start + BLOCK_SIZE)
        values[0, rows] = compute_psnr(images[rows], reference[rows])
        if has_ssim:
            values[1, rows] = compute_ssim(images[rows], reference[rows])
    # Every image is one worker's, and 0 with the others.
    values = np.sum([found for (found,) in workers.gather((values,))], axis=0)
    return Similarity(values[0], values[1] if has_ssim else None)


def compare_batches(
    pairs: Iterable[tuple[UInt8[np.ndarray, 'n H W C'], UInt8[np.ndarray, 'n H W C']]],
) -> Similarity:
    """`compare_images` of two sets that arrive in batches of one height and width.

    Raises:
      ValueError: as `compute_psnr`, or if there is no batch.
    """
    psnr, ssim = [], []
    for images, reference in pairs:
        psnr.append(compute_psnr(images, reference))
        if min(images.shape[1:3]) >= WINDOW_SIZE:
            ssim.append(compute_ssim(images, reference))
    if not psnr:
        raise ValueError('there are no images: expected at least 1 pair.')
    return Similarity(np.concatenate(psnr), np.concatenate(ssim) if ssim else None)


def compute_psnr(
    images: UInt8[np.ndarray, 'N H W C'], reference: UInt8[np.ndarray, 'N H W C']
) -> Float[np.ndarray, 'N']:
    """Peak signal-to-noise ratio of each pair in decibels, capped at `MAX_PSNR`.

    10 log10(255² / MSE), with the MSE over all pixels and channels of the pair.

    Raises:
      ValueError: if an array is not uint8 [N, H, W, C], N is 0 or the shapes differ.
    """
    check_pairs(images, reference)
    psnr = np.empty(len(images))
    for start in range(0, len(images), BLOCK_SIZE):
        rows = slice(start, start + BLOCK_SIZE)
        difference = images[rows].astype(np.float64) - reference[rows]
        mse = np.mean(np.square(difference), axis=(1, 2, 3))
        smallest = DATA_RANGE**2 / 10 ** (MAX_PSNR / 10)
        psnr[rows] = 10 * np.log10(DATA_RANGE**2 / np.maximum(mse, smallest))
    return psnr


def compute_ssim(
    images: UInt8[np.ndarray, 'N H W C'], reference: UInt8[np.ndarray, 'N H W C']
) -> Float[np.ndarray, 'N']:
    """Mean structural similarity of each pair.

    Raises:
      ValueError: as `compute_psnr`, or if a side is shorter than the window of 11.
    """
    check_pairs(images, reference)
    if min(images.shape[1:3]) < WINDOW_SIZE:
        raise ValueError(
            f'images are {images.shape[1]}x{images.shape[2]}: SSIM expects sides of at least '
            f'{WINDOW_SIZE}, its window. Use compute_psnr for smaller images.'
        )
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    ssim = np.empty(len(images))
    for start in range(0, len(images), BLOCK_SIZE):
        rows = slice(start, start + BLOCK_SIZE)
        x, y = images[rows].astype(np.float64), reference[rows].astype(np.float64)
        mean_x, mean_y = window_mean(x), window_mean(y)
        variance_x = window_mean(x * x) - mean_x**2
        variance_y = window_mean(y * y) - mean_y**2
        covariance = window_mean(x * y) - mean_x * mean_y
        # eq. 13
        numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
        ssim[rows] = np.mean(numerator / denominator, axis=(1, 2, 3))
    return ssim


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureDistance:
    """Distance of the features of each pair of images.

    Attributes:
      euclidean: |a − b|.
      cosine: 1 − a·b / |a||b|, 0..2; 0 where both features are 0, 1 where one is.
    """

    euclidean: Float[np.ndarray, 'N']
    cosine: Float[np.ndarray, 'N']

    @property
    def mean_euclidean(self) -> float:
        """Mean over the pairs."""
        return float(self.euclidean.mean())

    @property
    def mean_cosine(self) -> float:
        """Mean over the pairs."""
        return float(self.cosine.mean())


def compute_feature_distance(
    features_a: Float[np.ndarray, 'N D'], features_b: Float[np.ndarray, 'N D']
) -> FeatureDistance:
    """Distance between feature i of one set and feature i of the other.

    For images of two networks drawn from equal noise: how far each one moved, where the Fréchet
    distance only sees the sets.

    Raises:
      ValueError: if the shapes are not equal [N, D] with N > 0, or a value is not finite.
    """
    if np.ndim(features_a) != 2 or np.shape(features_a) != np.shape(features_b):
        raise ValueError(
            f'features have shapes {np.shape(features_a)} and {np.shape(features_b)}: expected '
            'equal [N, D], row i of one paired with row i of the other.'
        )
    if not len(features_a):
        raise ValueError('there are no features: expected those of at least 1 pair of images.')
    check_finite('first features', features_a)
    check_finite('second features', features_b)
    euclidean, cosine = np.empty((2, len(features_a)))
    for start in range(0, len(features_a), BLOCK_SIZE):
        rows = slice(start, start + BLOCK_SIZE)
        a, b = (np.asarray(f[rows], np.float64) for f in (features_a, features_b))
        euclidean[rows] = np.linalg.norm(a - b, axis=1)
        length_a, length_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        # Half the squared distance of unit vectors: exactly 0 for equal features.
        unit_a = a / np.where(length_a, length_a, 1)[:, None]
        unit_b = b / np.where(length_b, length_b, 1)[:, None]
        halved = np.square(unit_a - unit_b).sum(axis=1) / 2
        cosine[rows] = np.where((length_a == 0) != (length_b == 0), 1.0, halved)
    return FeatureDistance(euclidean, cosine)


def window_mean(values: Float[np.ndarray, 'N H W C']) -> Float[np.ndarray, 'N H2 W2 C']:
    """Gaussian-weighted mean of every window that lies inside the image."""
    offsets = np.arange(WINDOW_SIZE) - WINDOW_SIZE // 2
    weights = np.exp(-np.square(offsets) / (2 * WINDOW_SIGMA**2))
    # A Gaussian is a product of its axes, so two one-dimensional sums do.
    weights /= weights.sum()
    height, width = (size - WINDOW_SIZE + 1 for size in values.shape[1:3])
    values = sum(w * values[:, i : i + height] for i, w in enumerate(weights))
    return sum(w * values[:, :, i : i + width] for i, w in enumerate(weights))


def check_pairs(
    images: UInt8[np.ndarray, 'N H W C'], reference: UInt8[np.ndarray, 'N H W C']
) -> None:
    """Raises a ValueError unless both are uint8 [N, H, W, C] of one shape with N > 0."""
    for name, array in (('images', images), ('reference', reference)):
        if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
            raise ValueError(
                f'{name}: {array.dtype} {array.shape} given, expected uint8 [N, H, W, C], N > 0.'
            )
    if images.shape != reference.shape:
        raise ValueError(
            f'images {images.shape} and reference {reference.shape}: expected equal shapes, '
            'image i paired with reference image i.'
        )
