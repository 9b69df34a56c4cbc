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


def neighbour_metrics(generated, reference, k, density_k):
    """Precision, recall, density, coverage: every ball by a full sort of exact distances."""
    generated, reference = np.asarray(generated, np.float64), np.asarray(reference, np.float64)

    def distances(a, b):
        return np.array([[np.sum((u - v) ** 2) for v in b] for u in a])

    def radii(points, k):
        between = distances(points, points)
        others = [np.delete(row, i) for i, row in enumerate(between)]
        return np.array([np.sort(row)[k - 1] for row in others])

    across = distances(reference, generated)
    in_balls = across <= radii(reference, density_k)[:, None]
    return (
        float(np.mean((across <= radii(reference, k)[:, None]).any(axis=0))),
        float(np.mean((across <= radii(generated, k)[None]).any(axis=1))),
        float(in_balls.sum() / (density_k * len(generated))),
        float(np.mean(in_balls.any(axis=1))),
    )


def adm_precision_recall(generated, reference, k):
    """The float16 recipe on whole matrices, operation by operation, in NumPy's float16."""
    half = np.float16

    def distances(a, b):
        with np.errstate(over='ignore', invalid='ignore'):
            u, v = a.astype(half), b.astype(half)
            norms = [np.sum((w * w).astype(np.float32), axis=1).astype(half) for w in (u, v)]
            products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(half)
            result = (norms[0][:, None] - half(2) * products) + norms[1][None]
            result = np.maximum(result, half(0)).astype(np.float32)
        if np.isfinite(result).all():
            return result
        return np.array([[np.sum((x - y) ** 2) for y in b] for x in a], np.float32)

    def radii(points):
        return np.sort(distances(points, points), axis=1)[:, k]

    across = distances(reference, generated)
    return (
        float(np.mean((across <= radii(reference)[:, None]).any(axis=0))),
        float(np.mean((across <= radii(generated)[None]).any(axis=1))),
    )


def kernel_distances(generated, reference, num_subsets, subset_size, seed):
    """Bińkowski et al. 2018, one kernel value at a time; one estimate per subset."""
    rng = np.random.RandomState(seed)
    generated, reference = np.asarray(generated, np.float64), np.asarray(reference, np.float64)

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    values = []
    for _ in range(num_subsets):
        x = generated[rng.choice(len(generated), subset_size, replace=False)]
        y = reference[rng.choice(len(reference), subset_size, replace=False)]
        pairs = list(itertools.permutations(range(subset_size), 2))
        within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs)
        across = sum(kernel(a, b) for a, b in itertools.product(x, y))
        values.append(within / len(pairs) - 2 * across / subset_size**2)
    return values


def inception_score(probabilities, chunk_size):
    """The evaluator of guided-diffusion, formula for formula, in float64."""
    scores = []
    for start in range(0, len(probabilities), chunk_size):
        p = np.asarray(probabilities[start : start + chunk_size], np.float64)
        divergence = p * (np.log(p) - np.log(np.mean(p, axis=0, keepdims=True)))
        scores.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    return float(np.mean(scores))


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
