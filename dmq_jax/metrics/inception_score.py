"""Inception Score of class probabilities. NumPy, float64 sums, on the host.

Salimans et al. 2016, "Improved Techniques for Training GANs" (arXiv:1606.03498), section 4:
exp(E_x KL(p(y|x) || p(y))). As in the evaluator of guided-diffusion, images are taken in the order
of their file in chunks of 5000, p(y) is the mean within a chunk, a last short chunk weighs as much
as the others, and the score is the mean over the chunks. Other implementations shuffle and make
ten chunks; their numbers differ.

KL is computed as mean_i Σ_c p log p − Σ_c m log m with m = mean_i p, so no probabilities need to
be kept. 0 log 0 counts as its limit 0, where guided-diffusion prints NaN.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

CHUNK_SIZE = 5000
# float32 softmax over 1008 classes sums to 1 within 1e-6, float16 storage within 1e-2.
SUM_TOLERANCE = 2e-2


class InceptionScore(NamedTuple):
    """What `inception_score` found.

    Attributes:
      mean: the score, 1 to the number of classes.
      std: standard deviation over the chunks; 0 for a single one.
      num_zeros: probabilities that are exactly 0; with any, guided-diffusion prints NaN.
    """

    mean: float
    std: float
    num_zeros: int


def inception_score(
    probabilities: Float[np.ndarray, 'n K'] | Iterable[Float[np.ndarray, 'n K']],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> InceptionScore:
    """Score of one array of class probabilities, or of all batches of an iterable.

    Args:
      probabilities: one row per image, after the softmax, in the order of the images.
      chunk_size: images per chunk.

    Raises:
      ValueError: if a shape is not [n, K], K differs between batches, rows are no probabilities,
        chunk_size is below 1, or there are no images.
    """
    if chunk_size < 1:
        raise ValueError(f'chunk_size={chunk_size}: expected at least 1.')
    batches = [probabilities] if isinstance(probabilities, np.ndarray) else probabilities
    scores, num_zeros = [], 0
    count, negative_entropy, total = 0, 0.0, None

    def close_chunk() -> None:
        mean = total / count
        scores.append(np.exp(negative_entropy / count - np.sum(mean * safe_log(mean))))

    for batch in batches:
        batch = np.asarray(batch)
        check_probabilities(batch)
        if total is not None and batch.shape[1] != len(total):
            raise ValueError(
                f'probabilities of {batch.shape[1]} classes follow some of {len(total)}: '
                'expected one network.'
            )
        while len(batch):
            rows = batch[: chunk_size - count].astype(np.float64)
            batch = batch[chunk_size - count :]
            num_zeros += int(np.sum(rows == 0))
            negative_entropy += float(np.sum(rows * safe_log(rows)))
            total = rows.sum(axis=0) if total is None else total + rows.sum(axis=0)
            count += len(rows)
            if count == chunk_size:
                close_chunk()
                count, negative_entropy, total = 0, 0.0, np.zeros_like(total)
    if count:
        close_chunk()
    if not scores:
        raise ValueError('there are no probabilities: expected those of at least 1 image.')
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), num_zeros)


def softmax(logits: Float[np.ndarray, 'n K']) -> Float[np.ndarray, 'n K']:
    """Class probabilities in float64, where exact zeros need logits 745 apart."""
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def safe_log(values: Float[np.ndarray, '*shape']) -> Float[np.ndarray, '*shape']:
    """The logarithm where positive, 0 at 0, so that p log p takes its limit."""
    return np.log(np.where(values > 0, values, 1.0))


def check_probabilities(batch: Float[np.ndarray, 'n K']) -> None:
    """Raises a ValueError unless every row of a batch is a distribution over classes."""
    if batch.ndim != 2:
        raise ValueError(f'probabilities have shape {batch.shape}: expected [n, K].')
    # Written so that NaN fails.
    if not np.all(batch >= 0) or not np.all(np.abs(batch.sum(axis=1) - 1) <= SUM_TOLERANCE):
        raise ValueError(
            'some rows are not probabilities (negative, NaN, or not of sum 1): expected the '
            'softmax of the logits.'
        )
