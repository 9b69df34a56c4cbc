import numpy as np
import pytest

from dmq_jax.metrics import frechet
from dmq_jax.metrics.frechet import (
    FeatureStatistics,
    GaussianStatistics,
    bootstrap_frechet,
    compute_moments,
    frechet_distance,
    gaussian_statistics,
    weighted_statistics,
)
from tests.oracles import metrics as oracle

WIDTH = 64
# Two float64 eigendecompositions at D = 64 (seen: 1e-13 relative).
CLOSED_FORM_TOLERANCE = 1e-9
# scipy.linalg.sqrtm is the less accurate side on products of random covariances.
SQRTM_TOLERANCE = 1e-7
# float64 sums of a few hundred terms, merged in another order.
MERGE_TOLERANCE = 1e-12
# A root halves the digits: zero eigenvalues computed as 1e-16 |Σ|² contribute 1e-8 |Σ| each.
SINGULAR_TOLERANCE = 1e-6


def random_statistics(seed, width=WIDTH, count=500):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / np.sqrt(width)
    return gaussian_statistics(rng.normal(size=(count, width)) @ mixing + rng.normal(size=width))


def test_commuting_covariances_hit_the_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    a, b = rng.uniform(0.01, 10, (2, WIDTH))
    mean_a, mean_b = rng.normal(size=(2, WIDTH))
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    got = frechet_distance(
        GaussianStatistics(mean_a, (basis * a) @ basis.T, 100),
        GaussianStatistics(mean_b, (basis * b) @ basis.T, 100),
    )
    error = abs(got - expected)
    assert error < CLOSED_FORM_TOLERANCE, f'{error:.2e}'


def test_random_covariances_agree_with_scipy_sqrtm():
    pytest.importorskip('scipy', reason='the oracle is scipy.linalg.sqrtm')
    a, b = random_statistics(1), random_statistics(2)
    expected = oracle.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    error = abs(frechet_distance(a, b) / expected - 1)
    assert error < SQRTM_TOLERANCE, f'{error:.2e}'


def test_equal_gaussians_with_shifted_means_are_the_squared_shift_apart():
    a = random_statistics(3)
    b = GaussianStatistics(a.mean + 2.0, a.cov, a.count)
    assert frechet_distance(a, b) == pytest.approx(4.0 * WIDTH, rel=CLOSED_FORM_TOLERANCE)


def test_distance_is_symmetric_and_zero_only_for_equals():
    a, b = random_statistics(4), random_statistics(5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) < CLOSED_FORM_TOLERANCE
    assert frechet_distance(a, b) > 0.1


def test_fewer_samples_than_dimensions_are_enough():
    few = random_statistics(6, count=10)
    assert np.linalg.matrix_rank(few.cov) == 9
    assert 0 <= frechet_distance(few, few) < SINGULAR_TOLERANCE
    # With Σ_b = I the root of the product is the root of Σ_a.
    unit = GaussianStatistics(few.mean, np.eye(WIDTH), 1000)
    eigenvalues = np.maximum(np.linalg.eigvalsh(few.cov), 0)
    expected = np.sum((np.sqrt(eigenvalues) - 1) ** 2)
    assert frechet_distance(few, unit) == pytest.approx(expected, rel=SINGULAR_TOLERANCE)


@pytest.mark.parametrize('split', [[1] * 7 + [293], [100, 100, 100], [299, 1], [0, 300, 0]])
def test_streaming_equals_batch(split):
    # A mean far from 0 is where sums of squares would lose their digits.
    features = np.random.default_rng(7).normal(size=(300, 5)) + 1e6
    statistics = FeatureStatistics()
    for part in np.split(features, np.cumsum(split)[:-1]):
        statistics.update(part)
    got = statistics.finish()
    assert got.count == statistics.count == 300
    np.testing.assert_allclose(got.mean, features.mean(axis=0), rtol=MERGE_TOLERANCE)
    # The data itself carry 1e6 * eps of absolute rounding.
    np.testing.assert_allclose(got.cov, np.cov(features, rowvar=False), atol=1e-8)


@pytest.mark.parametrize('sizes', [[1] * 40, [700, 700, 1300], [2700], [1023, 1, 1, 1024, 651]])
def test_batches_of_any_size_are_summed_in_the_same_parts(sizes, monkeypatch):
    parts = []

    def record(features):
        parts.append(features.copy())
        return compute_moments(features)

    monkeypatch.setattr(frechet, 'compute_moments', record)
    features = np.random.default_rng(9).normal(size=(2700, 3)).astype(np.float32)[: sum(sizes)]
    whole = gaussian_statistics(features)
    expected, parts[:] = list(parts), []
    batched = gaussian_statistics(np.split(features, np.cumsum(sizes)[:-1]))
    assert len(parts) == len(expected) == -(-sum(sizes) // frechet.FOLD_SIZE)
    for part, wanted in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, wanted)
    # Not bit for bit: a threaded BLAS need not repeat itself.
    np.testing.assert_allclose(batched.mean, whole.mean, rtol=MERGE_TOLERANCE)
    np.testing.assert_allclose(batched.cov, whole.cov, rtol=MERGE_TOLERANCE, atol=1e-13)


def test_the_caller_may_reuse_its_array():
    features = np.random.default_rng(11).normal(size=(20, 3))
    statistics = FeatureStatistics()
    buffer = features.copy()
    statistics.update(buffer)
    buffer[...] = 0
    expected = gaussian_statistics(features).mean
    np.testing.assert_allclose(statistics.finish().mean, expected, rtol=MERGE_TOLERANCE)


@pytest.mark.parametrize('width', [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_unit_gaussians_one_apart_in_every_dimension_are_their_width_apart(width):
    zero, one = (GaussianStatistics(np.full(width, m), np.eye(width), None) for m in (0.0, 1.0))
    # Eigenvalues that are 1 within a few ulps each.
    assert frechet_distance(zero, one) == pytest.approx(width, abs=1e-9)


def test_diagonal_covariances_of_which_many_are_zero_hit_the_closed_form():
    rng = np.random.default_rng(12)
    a, b = rng.uniform(0, 3, (2, WIDTH)) * (rng.uniform(size=(2, WIDTH)) < 0.5)
    zero = np.zeros(WIDTH)
    got = frechet_distance(
        GaussianStatistics(zero, np.diag(a), 5), GaussianStatistics(zero, np.diag(b), 5)
    )
    assert got == pytest.approx(np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), abs=CLOSED_FORM_TOLERANCE)


def test_weighted_statistics_are_those_of_repeated_rows():
    rng = np.random.default_rng(13)
    features = rng.normal(size=(30, 4)) + 50
    repeats = rng.multinomial(30, np.full(30, 1 / 30))
    expected = gaussian_statistics(np.repeat(features, repeats, axis=0))
    got = weighted_statistics(features, repeats, features.mean(axis=0))
    assert got.count == expected.count == 30 and (repeats == 0).any()
    np.testing.assert_allclose(got.mean, expected.mean, rtol=MERGE_TOLERANCE)
    np.testing.assert_allclose(got.cov, expected.cov, rtol=1e-11, atol=1e-12)


def test_the_bootstrap_standard_error_is_the_spread_of_new_samples():
    # One dimension, equal variances: the distance is about the squared shift of the mean, whose
    # standard error is 2 |shift| / sqrt(n), known without simulation.
    rng = np.random.default_rng(14)
    count, shift = 400, 3.0
    reference = GaussianStatistics(np.zeros(1), np.eye(1), None)
    features = rng.normal(size=(count, 1)) + shift
    result = bootstrap_frechet(features, reference, num_resamples=400, seed=1)
    expected = frechet_distance(reference, gaussian_statistics(features))
    assert result.value == pytest.approx(expected, rel=CLOSED_FORM_TOLERANCE)
    assert result.low < result.value < result.high
    # 400 replicates estimate a standard error within 1 / sqrt(800) = 4 %.
    assert result.standard_error == pytest.approx(2 * shift / np.sqrt(count), rel=0.2)
    width = result.high - result.low
    assert width == pytest.approx(2 * 1.96 * result.standard_error, rel=0.2)
    again = bootstrap_frechet(features, reference, num_resamples=400, seed=1)
    np.testing.assert_allclose(again.replicates, result.replicates, rtol=CLOSED_FORM_TOLERANCE)
    with pytest.raises(ValueError, match='num_resamples=1'):
        bootstrap_frechet(features, reference, num_resamples=1)


def test_statistics_are_the_unbiased_float64_ones_of_float32_batches():
    features = np.random.default_rng(8).normal(size=(50, 4)).astype(np.float32)
    got = gaussian_statistics(iter([features[:20], features[20:]]))
    assert got.mean.dtype == got.cov.dtype == np.float64
    np.testing.assert_allclose(
        got.cov, np.cov(features.astype(np.float64), rowvar=False), rtol=MERGE_TOLERANCE
    )
    np.testing.assert_array_equal(got.cov, got.cov.T)


def test_bad_batches_are_refused_and_leave_the_statistics_alone():
    statistics = FeatureStatistics()
    statistics.update(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r'shape \(3,\).*\[n, D\]'):
        statistics.update(np.ones(3))
    with pytest.raises(ValueError, match='width 4: expected 3'):
        statistics.update(np.ones((2, 4)))
    with pytest.raises(ValueError, match='1 of 3 values of the features'):
        statistics.update(np.array([[0.0, np.nan, 1.0]]))
    assert statistics.count == 2


@pytest.mark.parametrize('count', [0, 1])
def test_fewer_than_two_samples_are_an_error(count):
    with pytest.raises(ValueError, match=f'{count} samples'):
        gaussian_statistics(np.zeros((count, 3)))
    good = GaussianStatistics(np.zeros(3), np.eye(3), 2)
    with pytest.raises(ValueError, match=f'second statistics come from {count} samples'):
        frechet_distance(good, GaussianStatistics(np.zeros(3), np.eye(3), count))


def test_statistics_that_do_not_fit_are_an_error():
    good = GaussianStatistics(np.zeros(3), np.eye(3), 9)
    with pytest.raises(ValueError, match='same feature network'):
        frechet_distance(good, GaussianStatistics(np.zeros(4), np.eye(4), 9))
    with pytest.raises(ValueError, match=r'expected \[D\] and \[D, D\]'):
        frechet_distance(good, GaussianStatistics(np.zeros(3), np.eye(4), 9))
    with pytest.raises(ValueError, match='covariance of the second statistics'):
        frechet_distance(good, GaussianStatistics(np.zeros(3), np.diag([1, np.inf, 1]), 9))
