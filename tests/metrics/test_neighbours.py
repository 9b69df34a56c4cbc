import tracemalloc

import jax
import numpy as np
import pytest

from dmq_jax.metrics import neighbours
from dmq_jax.metrics.neighbours import (
    measure_neighbours,
    precision_recall,
    squared_distances,
    to_fixed_point,
)
from tests.oracles import metrics as oracle


def random_sets(seed, num_generated=60, num_reference=45, width=6):
    rng = np.random.default_rng(seed)
    generated = rng.normal(size=(num_generated, width)) * 0.8 + 1.0
    return generated.astype(np.float32), rng.normal(size=(num_reference, width)).astype(np.float32)


@pytest.mark.parametrize('k', [1, 3, 5])
@pytest.mark.parametrize('block_size', [7, 45, 4096])
def test_equals_the_brute_force_oracle(k, block_size):
    for seed in range(3):
        sets = random_sets(seed)
        expected = oracle.precision_recall(*sets, k)
        assert 0 < expected[0] < 1 and 0 < expected[1] < 1
        assert precision_recall(*sets, k=k, block_size=block_size) == expected


def test_ties_on_a_surface_count_as_inside():
    # Integers tie often; the oracle's distances are exact here.
    rng = np.random.default_rng(1)
    sets = rng.integers(-2, 3, (40, 3)), rng.integers(-1, 4, (50, 3))
    sets = tuple(s.astype(np.float32) for s in sets)
    assert precision_recall(*sets, block_size=16) == oracle.precision_recall(*sets, 3)
    line = np.arange(5.0, dtype=np.float32)[:, None]
    # k = 1: balls of radius 1 around 0..4, so 5 is on a surface and 6 is outside.
    outside = np.array([[5.0], [6.0]], np.float32)
    assert precision_recall(outside, line, k=1).precision == 0.5


def test_copies_of_the_reference_have_full_precision_and_recall():
    _, reference = random_sets(2)
    # Four copies each: every radius is exactly 0 and only exact distances cover the points.
    reference = np.repeat(reference * 1000, 4, axis=0)
    order = np.random.default_rng(0).permutation(len(reference))
    assert precision_recall(reference[order], reference, block_size=13) == (1.0, 1.0)


def test_disjoint_sets_have_none_and_a_collapsed_generator_has_no_recall():
    generated, reference = random_sets(3)
    assert precision_recall(generated + 100, reference) == (0.0, 0.0)
    collapsed = reference[:1] + np.float32(1e-3) * generated
    precision, recall = precision_recall(collapsed, reference)
    assert precision == 1.0
    assert recall <= 1 / len(reference)


def test_swapping_the_sets_swaps_precision_and_recall():
    generated, reference = random_sets(4)
    forward, backward = (
        precision_recall(generated, reference),
        precision_recall(reference, generated),
    )
    assert forward == tuple(reversed(backward))


@pytest.mark.parametrize('width', [1, 64, 2048])
def test_fixed_point_distances_are_exact_integers(width):
    rng = np.random.default_rng(5)
    (points,) = to_fixed_point(rng.uniform(-1, 1, (20, width)) * 3.9)
    expected = [[sum(int(d) ** 2 for d in u - v) for v in points] for u in points]
    got = squared_distances(points, points)
    assert [[int(d) for d in row] for row in got] == expected
    assert (got == np.rint(got)).all()


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('k, density_k', [(3, 5), (4, 2)])
def test_all_four_equal_the_brute_force_oracle(seed, k, density_k):
    sets = random_sets(seed)
    expected = oracle.neighbour_metrics(*sets, k, density_k)
    assert measure_neighbours(*sets, k=k, density_k=density_k, block_size=16) == expected


def test_all_four_are_exact_where_most_distances_tie():
    rng = np.random.default_rng(7)
    sets = rng.integers(0, 3, (60, 4)), rng.integers(0, 3, (50, 4))
    expected = oracle.neighbour_metrics(*sets, 3, 5)
    sets = [s.astype(np.float32) for s in sets]
    for block_size in (1, 9, 4096):
        assert measure_neighbours(*sets, block_size=block_size) == expected


def wide_sets(offset):
    """Features of a width, and with an offset, where float32 distances are visibly wrong."""
    rng = np.random.default_rng(8)
    reference = rng.normal(size=(150, 300)) + offset
    generated = np.concatenate([reference[:50] + rng.normal(size=(50, 300)) * 1.3, reference[:70]])
    return generated.astype(np.float32), reference.astype(np.float32)


@pytest.mark.parametrize('offset', [0.0, 1e3])
def test_float32_only_rules_out_and_never_decides(offset):
    sets = wide_sets(offset)
    expected = oracle.neighbour_metrics(*to_fixed_point(*sets), 3, 5)
    for block_size in (11, 64, 4096):
        assert measure_neighbours(*sets, block_size=block_size) == expected
    if offset:
        # The law would be empty if float32 alone got the same distances.
        u, v = (s.astype(np.float32) for s in sets)
        direct = (u**2).sum(1)[:, None] + (v**2).sum(1) - 2 * (u @ v.T)
        exact = squared_distances(u, v)
        assert np.abs(direct - exact).max() > 0.1 * np.median(exact)


def test_the_rounding_bound_holds_for_float32_products():
    rng = np.random.default_rng(9)
    for width in (64, 2048):
        u, v = to_fixed_point(
            np.abs(rng.normal(size=(40, width))) + 3, rng.normal(size=(30, width))
        )
        norms = (np.square(u, dtype=np.float64).sum(1), np.square(v, dtype=np.float64).sum(1))
        approximate = norms[0][:, None] + norms[1] - 2 * (u @ v.T).astype(np.float64)
        error = np.abs(approximate - squared_distances(u, v)) / (norms[0][:, None] + norms[1])
        assert error.max() < neighbours.rounding_share(width)


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_dense_and_sparse_ways_of_computing_pairs_agree(monkeypatch, share):
    sets = wide_sets(1e3)
    expected = measure_neighbours(*sets, block_size=32)
    monkeypatch.setattr(neighbours, 'DENSE_SHARE', share)
    assert measure_neighbours(*sets, block_size=32) == expected


def test_products_on_a_device_give_the_same_result():
    sets = wide_sets(1.0)
    expected = measure_neighbours(*sets, block_size=50)
    assert measure_neighbours(*sets, block_size=50, device=jax.devices('cpu')[-1]) == expected


def test_equal_distributions_have_density_one():
    rng = np.random.default_rng(10)
    result = measure_neighbours(*rng.normal(size=(2, 1000, 3)))
    # Mean of 1000 counts of about 5 +- 2.2 (neighbouring counts move together: seen 0.03).
    assert result.density == pytest.approx(1.0, abs=0.1)
    assert result.coverage > 0.9  # 1 - 2^-5 in expectation (arXiv:2002.09797, eq. 9)


@pytest.mark.parametrize('scale', [1, 100])
def test_float16_distances_are_those_of_guided_diffusion(scale, monkeypatch):
    # Integers, so that float32 sums are exact in any order and float16 still rounds them. Times
    # 100 their squared norms overflow float16, and blocks are computed again without it.
    rng = np.random.default_rng(12)
    reference = rng.integers(-8, 9, (150, 300))
    generated = np.concatenate([reference[:80] + rng.integers(-11, 12, (80, 300)), reference[:40]])
    generated, reference = ((s * scale).astype(np.float32) for s in (generated, reference))
    result = measure_neighbours(generated, reference, arithmetic='adm-fp16')
    expected = oracle.adm_precision_recall(generated, reference, 3)
    assert result[:2] == expected and 0 < min(expected) and max(expected) < 1
    distances = neighbours.adm_distances(generated, reference)
    is_half = np.array_equal(distances, neighbours.to_half(distances))
    assert is_half == (scale == 1) and np.isfinite(distances).all()
    monkeypatch.setattr(neighbours, 'ADM_BLOCK_SIZE', 40)
    assert measure_neighbours(generated, reference, arithmetic='adm-fp16') == result


def test_float16_moves_the_result_little():
    generated, reference = random_sets(11, 300, 300, 64)
    exact = measure_neighbours(generated, reference)
    half = measure_neighbours(generated, reference, arithmetic='adm-fp16')
    # 300 points: a handful of decisions on ties of float16 (seen: 0.01).
    assert np.abs(np.subtract(exact, half)).max() < 0.05


def test_memory_stays_far_below_one_matrix_of_distances():
    count, width = 3000, 4
    points = np.random.default_rng(6).normal(size=(count, width))
    tracemalloc.start()
    precision_recall(points, points, block_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * count * 8 / 10


@pytest.mark.parametrize(
    'options, message',
    [
        ({'density_k': 9}, '9 reference features: expected more than density_k=9'),
        ({'arithmetic': 'float8'}, "arithmetic='float8': expected one of exact, adm-fp16"),
        ({'block_size': 0}, 'block_size=0: expected at least 1'),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure_neighbours(np.ones((9, 2)), np.ones((9, 2)), **options)


@pytest.mark.parametrize(
    'generated, reference, k, message',
    [
        (np.zeros(3), np.zeros((9, 3)), 3, 'generated features have shape'),
        (np.zeros((9, 3)), np.zeros((9, 4)), 3, 'same feature network'),
        (np.zeros((9, 3)), np.zeros((3, 3)), 3, '3 reference features: expected more than k=3'),
        (np.full((9, 3), np.nan), np.zeros((9, 3)), 3, '27 of 27 values of the generated'),
        (np.zeros((9, 3)), np.zeros((9, 3)), 0, 'k=0'),
    ],
)
def test_bad_input_is_refused(generated, reference, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(generated, reference, k=k)
