"""Metrics computed by several workers are those of one; each does a share of the work."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dmq_jax.metrics import frechet, neighbours, similarity
from dmq_jax.metrics.workers import ALONE, Workers

# The order of float64 sums of some thousand terms.
ORDER_TOLERANCE = 1e-12
COUNTS = [2, 3, 5]


def together(count, function):
    """What `function` gives each of `count` workers, one a thread."""
    barrier, told = threading.Barrier(count, timeout=60), [None] * count

    def gather(index, arrays):
        told[index] = arrays
        barrier.wait()
        found = list(told)
        barrier.wait()
        assert len({tuple((a.shape, a.dtype) for a in arrays) for arrays in found}) == 1
        return found

    def work(index):
        return function(Workers(index, count, lambda arrays: gather(index, arrays)))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize('count', [1, 2, 3, 7])
def test_every_item_is_one_of_exactly_one_worker(count):
    shares = [Workers(index, count, None).share(range(5)) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize('num_rows', [40, 1024, 4500])
@pytest.mark.parametrize('count', COUNTS)
def test_a_gaussian_of_several_is_that_of_one(count, num_rows):
    rows = np.random.default_rng(0).normal(size=(num_rows, 6)).astype(np.float32) + 30
    whole = frechet.gaussian_statistics(rows)
    for found in together(count, lambda workers: frechet.gaussian_statistics(rows, workers)):
        assert found.count == num_rows
        np.testing.assert_allclose(found.mean, whole.mean, rtol=ORDER_TOLERANCE)
        np.testing.assert_allclose(found.cov, whole.cov, rtol=ORDER_TOLERANCE, atol=1e-12)


@pytest.mark.parametrize('count', COUNTS)
def test_each_sums_its_share(count, monkeypatch):
    summed, compute = [], frechet.compute_moments
    monkeypatch.setattr(
        frechet, 'compute_moments',
        lambda rows: summed.append((threading.get_ident(), len(rows))) or compute(rows),
    )  # fmt: skip
    rows = np.zeros((5 * frechet.FOLD_SIZE + 9, 2), np.float32)
    batches = np.array_split(rows, 40)
    together(count, lambda workers: frechet.gaussian_statistics(batches, workers))
    assert sum(length for _, length in summed) == len(rows)
    assert len({thread for thread, _ in summed}) == count


@pytest.mark.parametrize('arithmetic', ['exact', 'adm-fp16'])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('count', COUNTS)
def test_neighbours_found_by_several_are_those_found_by_one(count, ties, arithmetic, monkeypatch):
    monkeypatch.setattr(neighbours, 'ADM_BLOCK_SIZE', 32)
    rng = np.random.default_rng(1)
    if ties:
        sets = [rng.integers(0, 3, (size, 4)).astype(np.float32) for size in (130, 100)]
    else:
        sets = [rng.normal(size=(size, 5)).astype(np.float32) for size in (130, 100)]
    options = {'arithmetic': arithmetic, 'block_size': 16}
    whole = neighbours.measure_neighbours(*sets, **options, workers=ALONE)
    assert 0 < whole.precision < 1 or ties
    found = together(
        count, lambda workers: neighbours.measure_neighbours(*sets, **options, workers=workers)
    )
    assert found == [whole] * count


@pytest.mark.parametrize('side', [8, 16])
@pytest.mark.parametrize('count', COUNTS)
def test_images_compared_by_several_are_as_similar(count, side, monkeypatch):
    monkeypatch.setattr(similarity, 'BLOCK_SIZE', 2)
    images, reference = np.random.default_rng(2).integers(0, 256, (2, 7, side, side, 1), np.uint8)
    whole = similarity.compare_images(images, reference)
    for found in together(
        count, lambda workers: similarity.compare_images(images, reference, workers)
    ):
        np.testing.assert_array_equal(found.psnr, whole.psnr)
        assert (found.ssim is None) == (side < similarity.WINDOW_SIZE)
        if found.ssim is not None:
            np.testing.assert_array_equal(found.ssim, whole.ssim)
