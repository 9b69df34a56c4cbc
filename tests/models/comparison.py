"""Random parameters, and how far two results are apart."""

import jax
import numpy as np


def relative_error(out, reference):
    """The norm of the difference over that of `reference`, in float64."""
    assert out.shape == reference.shape
    reference = np.asarray(reference, np.float64)
    return np.linalg.norm(np.asarray(out, np.float64) - reference) / np.linalg.norm(reference)


def random_like(shapes, *, scale=1.0, seed=0):
    """Normal float32 numbers of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )
