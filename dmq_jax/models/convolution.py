"""Convolutions of few pixels and many channels as one matrix product, where that is faster."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA on CPU divides a convolution by pixels, of which the coarse levels of a U-Net have too few.
# Seconds of a core relative to XLA's, jax 0.10.2 and 0.12.0: 8x8 pixels, 2560 channels 0.49 and
# 0.29; 16x16, 2560 0.79 and 0.49; 16x16, 768 0.90 and 0.56; 32x32, 960 1.10 and 0.98.
_MOST_PIXELS, _FEWEST_CHANNELS = 256, 512


def convolve(
    inputs: Float[Array, 'B H W C'],
    kernel: Float[Array, 'h w C N'],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **settings: Any,
) -> Float[Array, 'B I J N']:
    """`jax.lax.conv_general_dilated`, for `conv_general_dilated` of a Flax `Conv`.

    The choice depends on the image and not on how many there are, so that images are the same
    whatever the batch.

    Args:
      inputs: images.
      kernel: one of 3x3 may be taken apart.
      window_strides: as there.
      padding: as there.
      **settings: its other arguments.
    """
    _, height, width, channels = inputs.shape
    is_small = height * width <= _MOST_PIXELS and channels >= _FEWEST_CHANNELS
    is_plain = (
        kernel.shape[:3] == (3, 3, channels)
        and tuple(window_strides) == (1, 1)
        and list(map(tuple, padding)) == [(1, 1), (1, 1)]
        and tuple(settings.get('rhs_dilation') or (1, 1)) == (1, 1)
        and tuple(settings.get('lhs_dilation') or (1, 1)) == (1, 1)
    )
    if not (is_small and is_plain and jax.default_backend() == 'cpu'):
        return jax.lax.conv_general_dilated(inputs, kernel, window_strides, padding, **settings)
    padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = jnp.concatenate(
        [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1
    )
    product = jax.lax.dot_general(
        neighbours.reshape(-1, 9 * channels), kernel.reshape(9 * channels, -1),
        (((1,), (0,)), ((), ())), precision=settings.get('precision'),
        preferred_element_type=settings.get('preferred_element_type'),
    )  # fmt: skip
    return product.reshape(*inputs.shape[:3], -1)
