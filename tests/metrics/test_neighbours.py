import tracemalloc

import numpy as np
import pytest

from dmq_jax.metrics.neighbours import precision_recall, squared_distances, to_fixed_point
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


def test_memory_stays_far_below_one_matrix_of_distances():
    count, width = 3000, 4
    points = np.random.default_rng(6).normal(size=(count, width))
    tracemalloc.start()
    precision_recall(points, points, block_size=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * count * 8 / 10


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
