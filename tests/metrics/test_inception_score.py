import numpy as np
import pytest

from dmq_jax.metrics.inception_score import inception_score, softmax
from tests.oracles import metrics as oracle

# Two arrangements of float64 sums of a few thousand terms (seen: 1e-14).
TOLERANCE = 1e-12


def random_probabilities(count, num_classes=10, seed=0):
    return softmax(np.random.default_rng(seed).normal(size=(count, num_classes)) * 3)


@pytest.mark.parametrize('count, chunk_size', [(20, 5000), (60, 20), (61, 20), (25, 20)])
def test_equals_the_definition_with_a_short_last_chunk(count, chunk_size):
    probabilities = random_probabilities(count)
    got = inception_score(probabilities, chunk_size=chunk_size)
    assert got.mean == pytest.approx(
        oracle.inception_score(probabilities, chunk_size), rel=TOLERANCE
    )
    assert (got.std > 0) == (count > chunk_size) and got.num_zeros == 0


@pytest.mark.parametrize('batch_size', [1, 7, 20, 33])
def test_batches_do_not_change_the_score(batch_size):
    probabilities = random_probabilities(61).astype(np.float32)
    whole = inception_score(probabilities, chunk_size=20)
    parts = (probabilities[i : i + batch_size] for i in range(0, 61, batch_size))
    assert inception_score(parts, chunk_size=20) == pytest.approx(whole, rel=TOLERANCE)


def test_chunks_follow_the_order_of_the_images():
    # Sorted by class, every chunk has one class and the score is 1; mixed, it is higher.
    one_hot = np.repeat(np.eye(4), 25, axis=0) * 0.96 + 0.01
    assert inception_score(one_hot, chunk_size=25).mean == pytest.approx(1.0, rel=TOLERANCE)
    mixed = one_hot.reshape(4, 25, 4).swapaxes(0, 1).reshape(100, 4)
    assert inception_score(mixed, chunk_size=20).mean > 3


def test_certain_and_balanced_classes_score_their_number_and_zeros_are_counted():
    got = inception_score(np.tile(np.eye(5), (4, 1)))
    assert got.mean == pytest.approx(5.0, rel=TOLERANCE)
    assert got.num_zeros == 4 * 5 * 4
    with np.errstate(divide='ignore', invalid='ignore'):
        assert np.isnan(oracle.inception_score(np.eye(5), 5000))


def test_uninformative_classes_score_1():
    assert inception_score(np.full((9, 8), 1 / 8)).mean == pytest.approx(1.0, rel=TOLERANCE)


def test_the_softmax_is_that_of_the_logits():
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 1000.0]], np.float32)
    np.testing.assert_allclose(softmax(logits), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    'batches, message',
    [
        ([np.ones(3) / 3], r'shape \(3,\): expected \[n, K\]'),
        ([np.ones((2, 3))], 'not of sum 1'),
        ([np.array([[np.nan, 1.0]])], 'some rows are not probabilities'),
        ([np.array([[-0.5, 1.5]])], 'negative'),
        ([np.eye(3), np.eye(4)], '4 classes follow some of 3'),
        ([], 'there are no probabilities'),
    ],
)
def test_bad_input_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        inception_score(iter(batches))
