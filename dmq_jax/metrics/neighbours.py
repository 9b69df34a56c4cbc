"""Precision, recall, density and coverage, by nearest neighbours of features.

Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models"
(arXiv:1904.06991), eq. 1 and 2: the manifold of a set is the union of balls around its points,
each reaching the k-th nearest other point of the set. Precision is the share of generated points
inside the manifold of the real ones, recall the share of real points inside that of the generated.
Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"
(arXiv:2002.09797), eq. 4 and 5: density counts the balls of real points that hold a generated one,
coverage is the share of real balls that hold any. Their code asks `<`, ours `<=` throughout.

Distances are squared on both sides, and a point on the surface of a ball is inside (`<=`).
Features are first rounded to a fixed-point grid so fine that their squared distances are exact
integers in float64. Ties, such as copies of one image, are thus decided by arithmetic rather than
by rounding, and the result depends neither on the block size nor on the machine. Speed comes from
float32: a product of blocks with a proven bound on its rounding rules out almost every pair, and
only the others are computed exactly.

The evaluator of guided-diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) does all of it in
float16, which moves the third digit; `arithmetic='adm-fp16'` repeats that, up to the order of
sums, which float16 hardware leaves open.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Float, Int, Num

from dmq_jax.metrics.frechet import check_finite
from dmq_jax.metrics.workers import ALONE, Workers

Arithmetic = Literal['exact', 'adm-fp16']

# Bits of the integers that float64 represents without gaps.
EXACT_BITS = 53
# Differences of grid points, one bit longer, must be exact in float32.
MAX_GRID_BITS = 23
# From about this share of a block on, one float64 product is faster than single pairs (measured
# at D = 2048 on four cores: 3.5 us a pair, 0.47 s a block of 4096).
DENSE_SHARE = 1 / 128
# Pairs whose coordinates fit in a core's cache.
PAIRS_AT_ONCE = 128
# Side of the blocks in which guided-diffusion looks for overflow; part of its definition.
ADM_BLOCK_SIZE = 10_000
STRIP_SIZE = 250
# Rows held in float64 while features become grid points.
CONVERTED_AT_ONCE = 512

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


class PrecisionRecall(NamedTuple):
    """Shares in 0..1.

    Attributes:
      precision: generated points that look real.
      recall: real points that the generator covers.
    """

    precision: float
    recall: float


class NeighbourMetrics(NamedTuple):
    """What `measure_neighbours` found.

    Attributes:
      precision: share of generated points that look real.
      recall: share of real points that the generator covers.
      density: real balls around a generated point, relative to k; 1 for equal distributions, and
        not bounded by 1.
      coverage: share of real balls with a generated point.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Grid(NamedTuple):
    """Points of a fixed-point grid.

    Attributes:
      points: integers, exact in float32.
      squared_norms: their squared lengths, exact in float64.
    """

    points: Float[np.ndarray, 'N D']
    squared_norms: Float[np.ndarray, 'N']

    def __getitem__(self, rows: slice) -> 'Grid':
        return Grid(self.points[rows], self.squared_norms[rows])


class Pairs(NamedTuple):
    """Some entries of a block of distances, each once."""

    rows: Int[np.ndarray, 'P']
    columns: Int[np.ndarray, 'P']
    distances: Float[np.ndarray, 'P']


def precision_recall(
    generated: Float[np.ndarray, 'N D'],
    reference: Float[np.ndarray, 'M D'],
    k: int = 3,
    block_size: int = 2048,
    workers: Workers = ALONE,
) -> PrecisionRecall:
    """Precision and recall alone; see `measure_neighbours`."""
    result = measure_neighbours(
        generated, reference, k=k, density_k=k, block_size=block_size, workers=workers
    )
    return PrecisionRecall(result.precision, result.recall)


def measure_neighbours(
    generated: Num[np.ndarray, 'N D'],
    reference: Num[np.ndarray, 'M D'],
    *,
    k: int = 3,
    density_k: int = 5,
    arithmetic: Arithmetic = 'exact',
    block_size: int = 4096,
    device: jax.Device | None = None,
    workers: Workers = ALONE,
) -> NeighbourMetrics:
    """Precision, recall, density and coverage of generated features against real ones.

    Memory holds the points in float32 and blocks of `block_size` squared; no N x M matrix is made.
    All numbers depend on N and M: compare only results for equal counts. The time of 'exact'
    does not grow by more than about three times whatever the ties.

    Args:
      generated: features of generated images.
      reference: features of real images, from the same network.
      k: which neighbour sets the radius of a ball for precision and recall; the paper uses 3.
      density_k: the same for density and coverage; the paper uses 5.
      arithmetic: 'exact', or 'adm-fp16' for the float16 of guided-diffusion.
      block_size: rows and columns of distances held at once by 'exact'; changes no result.
      device: a CPU or GPU that multiplies the blocks of 'exact'; None multiplies with NumPy.
        Changes no result.
      workers: processes with the same features, each of which looks at its share of the blocks.
        Changes no result.

    Raises:
      ValueError: if a shape is not [n, D], the widths differ, a set has no k-th neighbour, a
        value is not finite, k, density_k or block_size is below 1, the arithmetic is unknown or
        the device is a TPU.
    """
    generated, reference = np.asarray(generated), np.asarray(reference)
    if min(k, density_k, block_size) < 1:
        raise ValueError(
            f'k={k}, density_k={density_k}, block_size={block_size}: expected at least 1 for all.'
        )
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(
            f'arithmetic={arithmetic!r}: expected one of {", ".join(get_args(Arithmetic))}.'
        )
    largest_k = max(k, density_k)
    for name, features, needed, option in (
        ('generated', generated, k, f'k={k}'),
        (
            'reference',
            reference,
            largest_k,
            f'{"k" if k >= density_k else "density_k"}={largest_k}',
        ),
    ):
        if features.ndim != 2:
            raise ValueError(f'{name} features have shape {features.shape}: expected [n, D].')
        if len(features) <= needed:
            raise ValueError(
                f'{len(features)} {name} features: expected more than {option}. Add more images.'
            )
        check_finite(f'{name} features', features)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f'features have widths {generated.shape[1]} and {reference.shape[1]}: expected equal '
            'ones. Compute both with the same feature network.'
        )
    if arithmetic == 'exact':
        product = make_product(device)
        generated, reference = map(make_grid, to_fixed_point(generated, reference))
        reference_near = nearest_distances(reference, largest_k, block_size, product, workers)
        generated_near = nearest_distances(generated, k, block_size, product, workers)
    else:
        generated, reference = (f.astype(np.float32, copy=False) for f in (generated, reference))
        reference_near = adm_nearest_distances(reference, largest_k, workers)
        generated_near = adm_nearest_distances(generated, k, workers)
    reference_radii, ball_radii = reference_near[:, k - 1], reference_near[:, density_k - 1]
    generated_radii = generated_near[:, k - 1]
    row_limits = np.maximum(reference_radii, ball_radii)
    if arithmetic == 'exact':
        found = pairs_within(
            reference, generated, row_limits, generated_radii, block_size, product, workers
        )
    else:
        found = adm_pairs_within(reference, generated, row_limits, generated_radii, workers)
    real_looking = np.zeros(len(generated_radii), bool)
    recalled, covered = np.zeros((2, len(row_limits)), bool)
    num_in_balls = np.zeros((), np.int64)
    for rows, columns, distances in found:
        real_looking[columns[distances <= reference_radii[rows]]] = True
        recalled[rows[distances <= generated_radii[columns]]] = True
        in_ball = distances <= ball_radii[rows]
        covered[rows[in_ball]] = True
        num_in_balls += in_ball.sum()
    found = workers.gather((real_looking, recalled, covered, num_in_balls))
    *anywhere, in_balls = zip(*found, strict=True)
    precision, recall, coverage = (float(np.mean(np.any(parts, axis=0))) for parts in anywhere)
    density = int(np.sum(in_balls)) / (density_k * len(generated_radii))
    return NeighbourMetrics(precision, recall, density, coverage)


def to_fixed_point(
    *sets: Num[np.ndarray, '_ D'],
) -> tuple[Float[np.ndarray, '_ D'], ...]:
    """The sets in one integer grid, as float32, scaled by a common power of two.

    With D = 64 the grid has 2^22 steps between 0 and the power of two above the largest absolute
    value, with D = 2048 2^20. Any |u|² + |v|² − 2 u·v, partial sums included, is then an integer
    below 2^53, and any u − v one that float32 holds.
    """
    width = sets[0].shape[1]
    bits = (EXACT_BITS - 2 - int(np.ceil(np.log2(max(width, 1))))) // 2
    bits = min(bits, MAX_GRID_BITS)
    largest = max(float(np.max(np.abs(features), initial=0)) for features in sets)
    scale = np.ldexp(1.0, bits - int(np.frexp(largest)[1]))
    result = []
    for features in sets:
        grid = np.empty(features.shape, np.float32)
        for rows in blocks(len(features), CONVERTED_AT_ONCE):
            grid[rows] = np.rint(features[rows].astype(np.float64) * scale)
        result.append(grid)
    return tuple(result)


def make_grid(points: Float[np.ndarray, 'N D']) -> Grid:
    """Points from `to_fixed_point` with their squared lengths."""
    squared_norms = np.empty(len(points))
    for rows in blocks(len(points), CONVERTED_AT_ONCE):
        values = points[rows].astype(np.float64)
        squared_norms[rows] = np.einsum('nd,nd->n', values, values)
    return Grid(points, squared_norms)


def make_product(device: jax.Device | None) -> Product:
    """u, v -> a writable float32 array u vᵀ, by NumPy or on a device.

    Raises:
      ValueError: for a TPU, whose float32 products do not keep the bound of `rounding_share`.
    """
    if device is None:
        return lambda u, v: u @ v.T
    if device.platform == 'tpu':
        raise ValueError(f'device={device}: expected a CPU or GPU; TPUs multiply in bfloat16.')

    @jax.jit
    def product(u, v):
        dimensions = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(u, v, dimensions, precision=jax.lax.Precision.HIGHEST)

    return lambda u, v: np.array(product(jax.device_put(u, device), jax.device_put(v, device)))


def nearest_distances(
    grid: Grid, k: int, block_size: int, product: Product, workers: Workers
) -> Float[np.ndarray, 'N k']:
    """Squared distances of every point to its k nearest other points, ascending, exact.

    Every pair of blocks is visited once, for both of its sides, by one of the workers.
    """
    count = len(grid.points)
    parts = list(blocks(count, block_size))
    nearest = np.full((count, k), np.inf)
    for rows in workers.share(parts):
        distances = squared_distances(grid[rows].points, grid[rows].points)
        np.fill_diagonal(distances, np.inf)  # not its own neighbour
        kept = keep_smallest(distances, k)
        nearest[rows, : kept.shape[1]] = kept
    # Rows are one worker's, and infinite with the others.
    nearest = np.min([found for (found,) in workers.gather((nearest,))], axis=0)
    # What all know limits what each looks for; only the first one counts it.
    limits = nearest.max(axis=1)
    if workers.index != 0:
        nearest = np.full_like(nearest, np.inf)
    pairs_of_parts = [(r, c) for r in parts for c in parts if c.start > r.start]
    for rows, columns in workers.share(pairs_of_parts):
        pairs = close_pairs(grid[rows], grid[columns], limits[rows], limits[columns], product)
        nearest[rows] = insert(nearest[rows], pairs.rows, pairs.distances)
        nearest[columns] = insert(nearest[columns], pairs.columns, pairs.distances)
        for part in (rows, columns):
            limits[part] = np.minimum(limits[part], nearest[part].max(axis=1))
    found = np.concatenate([found for (found,) in workers.gather((nearest,))], axis=1)
    return np.sort(keep_smallest(found, k), axis=1)


def keep_smallest(values: Float[np.ndarray, 'N M'], count: int) -> Float[np.ndarray, 'N kept']:
    """The `count` smallest values of every row, or all of a shorter row, in any order."""
    if values.shape[1] <= count:
        return values
    return np.partition(values, count - 1, axis=1)[:, :count]


def insert(
    nearest: Float[np.ndarray, 'N k'],
    rows: Int[np.ndarray, 'P'],
    distances: Float[np.ndarray, 'P'],
) -> Float[np.ndarray, 'N k']:
    """The k smallest per row among `nearest` and the distances given for some rows."""
    improves = distances < nearest.max(axis=1)[rows]
    rows, distances = rows[improves], distances[improves]
    order = np.argsort(rows, kind='stable')
    rows, distances = rows[order], distances[order]
    counts = np.bincount(rows, minlength=len(nearest))
    position = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    candidates = np.full((len(nearest), counts.max(initial=0)), np.inf)
    candidates[rows, position] = distances
    return keep_smallest(np.concatenate([nearest, candidates], axis=1), nearest.shape[1])


def pairs_within(
    u: Grid,
    v: Grid,
    row_limits: Float[np.ndarray, 'N'],
    column_limits: Float[np.ndarray, 'M'],
    block_size: int,
    product: Product,
    workers: Workers,
) -> Iterator[Pairs]:
    """Yields, block by block, this worker's share of the pairs of `close_pairs` of u and v."""
    for rows, columns in workers.share(pairs_of_blocks(len(u.points), len(v.points), block_size)):
        pairs = close_pairs(u[rows], v[columns], row_limits[rows], column_limits[columns], product)
        yield Pairs(pairs.rows + rows.start, pairs.columns + columns.start, pairs.distances)


def close_pairs(
    u: Grid,
    v: Grid,
    row_limits: Float[np.ndarray, 'N'],
    column_limits: Float[np.ndarray, 'M'],
    product: Product,
) -> Pairs:
    """The pairs (i, j) with |u_i − v_j|² <= row_limits[i] or <= column_limits[j], exactly."""
    kept = 1 - rounding_share(u.points.shape[1])
    bound = product(u.points, v.points)
    bound *= -2
    bound += (kept * u.squared_norms).astype(np.float32)[:, None]
    bound += (kept * v.squared_norms).astype(np.float32)[None]
    candidates = bound <= round_up(row_limits)[:, None]
    candidates |= bound <= round_up(column_limits)[None]
    found = np.flatnonzero(candidates)
    shape = bound.shape
    del bound
    if len(found) > DENSE_SHARE * candidates.size:
        exact = squared_distances(u.points, v.points)
        np.less_equal(exact, row_limits[:, None], out=candidates)
        candidates |= exact <= column_limits[None]
        found = np.flatnonzero(candidates)
        return Pairs(*np.unravel_index(found, shape), exact.ravel()[found])
    rows, columns = np.unravel_index(found, shape)
    distances = pair_distances(u.points, v.points, rows, columns)
    within = (distances <= row_limits[rows]) | (distances <= column_limits[columns])
    return Pairs(rows[within], columns[within], distances[within])


def rounding_share(width: int) -> float:
    """Bound on the float32 error of |u|² + |v|² − 2 u·v, relative to |u|² + |v|².

    A dot product of D terms is off by at most D ε / (1 − D ε) |u||v| in any order of summation,
    ε = 2^-24 (Higham 2002, "Accuracy and Stability of Numerical Algorithms", eq. 3.5), and
    2 |u||v| <= |u|² + |v|². Casting the squared norms and adding three terms costs at most 6 ε
    more; 16 leaves room for the second order.
    """
    total = (width + 16) * 2.0**-24
    return total / (1 - total)


def round_up(limits: Float[np.ndarray, 'N']) -> Float[np.ndarray, 'N']:
    """float32 values that are not below the float64 ones."""
    return np.nextafter(limits.astype(np.float32), np.float32(np.inf))


def squared_distances(
    u: Float[np.ndarray, 'N D'], v: Float[np.ndarray, 'M D']
) -> Float[np.ndarray, 'N M']:
    """|u|² + |v|² − 2 u·v in float64; exact for points from `to_fixed_point`."""
    u, v = u.astype(np.float64), v.astype(np.float64)
    distances = u @ (-2 * v.T)
    distances += np.square(u).sum(axis=1)[:, None]
    distances += np.square(v).sum(axis=1)
    return distances


def pair_distances(
    u: Float[np.ndarray, 'N D'],
    v: Float[np.ndarray, 'M D'],
    rows: Int[np.ndarray, 'P'],
    columns: Int[np.ndarray, 'P'],
) -> Float[np.ndarray, 'P']:
    """|u_i − v_j|² of single pairs; exact for points from `to_fixed_point`."""
    distances = np.empty(len(rows))
    for chunk in blocks(len(rows), PAIRS_AT_ONCE):
        difference = u[rows[chunk]]
        difference -= v[columns[chunk]]
        difference = difference.astype(np.float64)
        distances[chunk] = np.einsum('nd,nd->n', difference, difference)
    return distances


def blocks(length: int, block_size: int) -> Iterator[slice]:
    """Consecutive slices of at most `block_size` that cover 0..length."""
    return (slice(i, min(i + block_size, length)) for i in range(0, length, block_size))


def pairs_of_blocks(num_rows: int, num_columns: int, block_size: int) -> list[tuple[slice, slice]]:
    """The blocks of a matrix, row by row of blocks."""
    return list(itertools.product(blocks(num_rows, block_size), blocks(num_columns, block_size)))


def adm_distances(
    u: Float[np.ndarray, 'N D'], v: Float[np.ndarray, 'M D']
) -> Float[np.ndarray, 'N M']:
    """Squared distances of one block as guided-diffusion has them, float32.

    max(|u|² − 2 u·v + |v|², 0), every operation rounded to float16 and sums taken in float32; if
    any entry overflows, the whole block without float16.
    """
    half_u, half_v = (to_half(points) for points in (u, v))
    distances = half_u @ half_v.T
    norms_u, norms_v = (
        to_half(to_half(np.square(half)).sum(axis=1, dtype=np.float32)) for half in (half_u, half_v)
    )

    def finish(rows: slice) -> bool:
        block = distances[rows]
        block *= 2
        with np.errstate(invalid='ignore'):  # infinity − infinity: overflow, found below
            np.subtract(norms_u[rows, None], to_half(block), out=block)
            block[...] = to_half(to_half(block) + norms_v[None])
        np.maximum(block, 0, out=block)
        return bool(np.isfinite(block).all())

    with ThreadPoolExecutor() as pool:
        finite = all(list(pool.map(finish, blocks(len(u), STRIP_SIZE))))
    if not finite:
        distances = u @ (-2 * v.T)
        distances += np.square(u).sum(axis=1)[:, None]
        distances += np.square(v).sum(axis=1)[None]
        np.maximum(distances, 0, out=distances)
    return distances


def to_half(values: Float[np.ndarray, '*shape']) -> Float[np.ndarray, '*shape']:
    """float32 values rounded to float16, beyond 65504 to infinity."""
    with np.errstate(over='ignore'):
        return values.astype(np.float16).astype(np.float32)


def adm_nearest_distances(
    points: Float[np.ndarray, 'N D'], k: int, workers: Workers
) -> Float[np.ndarray, 'N k']:
    """`nearest_distances` in float16.

    A point's distance to itself, which float16 need not make 0, takes the place of a neighbour:
    the k-th nearest other point is the entry k of the sorted distances.
    """
    nearest = np.full((len(points), k), np.inf, np.float32)
    for rows in workers.share(list(blocks(len(points), ADM_BLOCK_SIZE))):
        kept = np.empty((len(points[rows]), 0), np.float32)
        for columns in blocks(len(points), ADM_BLOCK_SIZE):
            distances = adm_distances(points[rows], points[columns])
            kept = np.concatenate([kept, keep_smallest(distances, k + 1)], axis=1)
        nearest[rows] = np.sort(kept, axis=1)[:, 1 : k + 1]
    return np.min([found for (found,) in workers.gather((nearest,))], axis=0)


def adm_pairs_within(
    u: Float[np.ndarray, 'N D'],
    v: Float[np.ndarray, 'M D'],
    row_limits: Float[np.ndarray, 'N'],
    column_limits: Float[np.ndarray, 'M'],
    workers: Workers,
) -> Iterator[Pairs]:
    """`pairs_within` in float16."""
    for rows, columns in workers.share(pairs_of_blocks(len(u), len(v), ADM_BLOCK_SIZE)):
        distances = adm_distances(u[rows], v[columns])
        within = distances <= row_limits[rows, None]
        within |= distances <= column_limits[None, columns]
        found = np.flatnonzero(within)
        i, j = np.unravel_index(found, distances.shape)
        yield Pairs(i + rows.start, j + columns.start, distances.ravel()[found])
