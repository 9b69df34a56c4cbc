import numpy as np
import pytest

from dmq_jax.metrics import similarity
from tests.oracles import metrics as oracle

# Variances as E[x²] − E[x]² lose eps(float64) * 255² ~ 1e-11 against c2 = 58.5.
SSIM_TOLERANCE = 1e-10


def random_pair(seed, shape=(5, 16, 13, 3), noise=20):
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 256, shape)
    images = np.clip(reference + rng.integers(-noise, noise + 1, shape), 0, 255)
    return images.astype(np.uint8), reference.astype(np.uint8)


@pytest.mark.parametrize('shape', [(3, 16, 13, 3), (2, 11, 11, 1)])
def test_ssim_equals_the_definition(shape):
    images, reference = random_pair(0, shape)
    got = similarity.compute_ssim(images, reference)
    expected = [oracle.ssim(*pair) for pair in zip(images, reference, strict=True)]
    error = np.max(np.abs(got - expected))
    assert error < SSIM_TOLERANCE, f'{error:.2e}'


def test_ssim_of_flat_images_is_the_luminance_term():
    a, b = np.full((1, 12, 12, 1), 100, np.uint8), np.full((1, 12, 12, 1), 50, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)
    assert similarity.compute_ssim(a, b) == pytest.approx(expected, abs=SSIM_TOLERANCE)


def test_psnr_of_a_constant_error_is_its_decibels():
    reference = np.full((2, 4, 4, 3), 100, np.uint8)
    images = reference + np.array([1, 10], np.uint8)[:, None, None, None]
    expected = 20 * np.log10(255 / np.array([1.0, 10.0]))
    np.testing.assert_allclose(similarity.compute_psnr(images, reference), expected, rtol=1e-14)


def test_identical_images_have_the_largest_values():
    images, _ = random_pair(1)
    result = similarity.compare_images(images, images)
    np.testing.assert_array_equal(result.psnr, similarity.MAX_PSNR)
    np.testing.assert_allclose(result.ssim, 1.0, atol=SSIM_TOLERANCE)
    assert result.mean_psnr == 100.0


def test_one_pixel_off_by_one_is_below_the_cap():
    reference = np.zeros((1, 128, 128, 3), np.uint8)
    images = reference.copy()
    images[0, 5, 5, 0] = 1
    assert 95 < similarity.compute_psnr(images, reference)[0] < similarity.MAX_PSNR


def test_more_noise_is_less_similar_and_order_is_kept():
    images = [random_pair(2, noise=noise)[0] for noise in (5, 20, 80)]
    reference = random_pair(2)[1]
    results = [similarity.compare_images(i, reference) for i in images]
    for better, worse in zip(results, results[1:], strict=False):
        assert better.mean_psnr > worse.mean_psnr and better.mean_ssim > worse.mean_ssim
    flipped = similarity.compare_images(images[0][::-1], reference[::-1])
    np.testing.assert_allclose(flipped.ssim, results[0].ssim[::-1], rtol=1e-12)


def test_blocks_do_not_change_the_result(monkeypatch):
    images, reference = random_pair(3)
    whole = similarity.compare_images(images, reference)
    monkeypatch.setattr(similarity, 'BLOCK_SIZE', 2)
    parts = similarity.compare_images(images, reference)
    np.testing.assert_allclose(parts.psnr, whole.psnr, rtol=1e-12)
    np.testing.assert_allclose(parts.ssim, whole.ssim, rtol=1e-12)
    assert whole.psnr.shape == whole.ssim.shape == (len(images),)


def test_bad_input_is_refused():
    images, reference = random_pair(4)
    with pytest.raises(ValueError, match='images: float64 .*expected uint8'):
        similarity.compute_psnr(images / 255, reference)
    with pytest.raises(ValueError, match='expected equal shapes'):
        similarity.compute_ssim(images[:-1], reference)
    with pytest.raises(ValueError, match=r'5x5.*at least 11'):
        similarity.compute_ssim(images[:, :5, :5], reference[:, :5, :5])


def test_feature_distances_are_those_of_the_pairs():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0, 0.0], [0.0, 2.0], [-2.0, -2.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    result = similarity.compute_feature_distance(a, b)
    expected = [5.0, np.sqrt(5), 3 * np.sqrt(2), 0.0, 1.0]
    np.testing.assert_allclose(result.euclidean, expected, rtol=1e-15)
    np.testing.assert_allclose(result.cosine, [1.0, 1.0, 2.0, 0.0, 1.0], rtol=1e-15)
    assert result.mean_euclidean == pytest.approx(np.mean(expected))
    assert result.mean_cosine == pytest.approx(1.0)


def test_equal_features_are_exactly_0_apart_and_blocks_do_not_matter(monkeypatch):
    a, b = np.random.default_rng(5).normal(size=(2, 20, 7)).astype(np.float32)
    same = similarity.compute_feature_distance(a, a)
    assert not same.euclidean.any() and not same.cosine.any()
    whole = similarity.compute_feature_distance(a, b)
    dot = np.sum(a.astype(np.float64) * b, axis=1)
    lengths = np.linalg.norm(a.astype(np.float64), axis=1) * np.linalg.norm(b.astype(float), axis=1)
    np.testing.assert_allclose(whole.cosine, 1 - dot / lengths, atol=1e-14)
    monkeypatch.setattr(similarity, 'BLOCK_SIZE', 3)
    parts = similarity.compute_feature_distance(a, b)
    np.testing.assert_array_equal(parts.euclidean, whole.euclidean)


def test_features_that_are_not_pairs_are_refused():
    good = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 3\)'):
        similarity.compute_feature_distance(good, np.zeros((3, 3)))
    with pytest.raises(ValueError, match='there are no features'):
        similarity.compute_feature_distance(good[:0], good[:0])
    with pytest.raises(ValueError, match='1 of 6 values of the second features'):
        similarity.compute_feature_distance(good, np.array([[0, 0, 0], [0, np.nan, 0]]))


def test_batches_of_pairs_are_the_pairs_of_all():
    a, b = (
        np.random.default_rng(seed).integers(0, 256, (5, 12, 13, 3), np.uint8) for seed in (0, 1)
    )
    whole = similarity.compare_images(a, b)
    parts = similarity.compare_batches((a[rows], b[rows]) for rows in (slice(2), slice(2, 5)))
    np.testing.assert_array_equal(parts.psnr, whole.psnr)
    np.testing.assert_array_equal(parts.ssim, whole.ssim)
    with pytest.raises(ValueError, match='at least 1 pair'):
        similarity.compare_batches([])


def test_images_smaller_than_the_window_have_a_psnr_and_no_ssim():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    small = similarity.compare_images(images, images)
    assert small.mean_psnr == similarity.MAX_PSNR
    assert small.ssim is None and small.mean_ssim is None
