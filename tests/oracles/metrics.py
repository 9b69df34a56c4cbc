"""Metrics written as their definitions, in NumPy and SciPy float64; slow and independent."""

import itertools

import numpy as np


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """The formula of arXiv:1706.08500 with SciPy's root of the unsymmetric product."""
    import scipy.linalg

    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    difference = mean_a - mean_b
    return float(
        difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real
    )


def precision_recall(generated, reference, k):
    """Every distance from its own difference vector, every ball by a full sort."""

    def distance(u, v):
        return float(np.sum((u - v) ** 2))

    def covered(points, centres):
        radii = [
            sorted(distance(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, c in enumerate(centres)
        ]
        hits = [
            any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return float(np.mean(hits))

    generated, reference = np.asarray(generated, np.float64), np.asarray(reference, np.float64)
    return covered(generated, reference), covered(reference, generated)


def ssim(image, reference):
    """Wang et al. 2004: one two-dimensional window at a time, central moments; one [H, W, C]."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    height, width, num_channels = image.shape
    values = []
    for row, column, channel in itertools.product(
        range(height - 10), range(width - 10), range(num_channels)
    ):
        x = image[row : row + 11, column : column + 11, channel].astype(np.float64)
        y = reference[row : row + 11, column : column + 11, channel].astype(np.float64)
        mean_x, mean_y = np.sum(window * x), np.sum(window * y)
        variance_x = np.sum(window * (x - mean_x) ** 2)
        variance_y = np.sum(window * (y - mean_y) ** 2)
        covariance = np.sum(window * (x - mean_x) * (y - mean_y))
        values.append(
            (2 * mean_x * mean_y + c1)
            * (2 * covariance + c2)
            / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
        )
    return float(np.mean(values))
