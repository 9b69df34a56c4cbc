"""Convolutions in other words of the same sum, where these are faster.

Few pixels of many channels become one matrix product; enlarged images are convolved before they are
enlarged.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# XLA on CPU divides a convolution by pixels, of which the coarse levels of a U-Net have too few.
# Seconds of a core relative to XLA's, jax 0.10.2 and 0.12.0: 8x8 pixels, 2560 channels 0.49 and
# 0.29; 16x16, 2560 0.79 and 0.49; 16x16, 768 0.90 and 0.56; 32x32, 960 1.10 and 0.98.
_MOST_PIXELS, _FEWEST_CHANNELS = 256, 512
# Of an image before it is enlarged. Speed of 3x3 convolutions of enlarged images relative to
# XLA's, likewise: 8x8 pixels 0.8 and 1.3; 16x16 1.4 and 2.0; 32x32 2.1 and 2.4; 128x128 2.6, 2.4.
_FEWEST_SMALL_PIXELS = 256


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


def upsampled(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    """Every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def convolve_enlarged(
    inputs: Float[Array, 'B H W C'],
    kernel: Float[Array, '3 3 C N'],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **settings: Any,
) -> Float[Array, 'B H W N']:
    """`convolve` of an image that was `upsampled`, padded by one pixel.

    The three columns that an output sees are two pixels of the small image, and so are the three
    rows: four kernels of 2x2, one for each output of a block, are less than half of the products.
    Whatever was done to the image since must have left the four pixels of a block equal, as
    rounding to a grid does.

    Args:
      inputs: images, of even sides.
      kernel: of 3x3.
      window_strides: 1.
      padding: one pixel on every side.
      **settings: other arguments of `jax.lax.conv_general_dilated`.
    """
    _, height, width, _ = inputs.shape
    is_large = height * width >= 4 * _FEWEST_SMALL_PIXELS and inputs.dtype == jnp.float32
    if not (is_large and jax.default_backend() == 'cpu'):
        return convolve(inputs, kernel, window_strides, padding, **settings)
    assert kernel.shape[:2] == (3, 3) and list(map(tuple, padding)) == [(1, 1), (1, 1)]
    plain = functools.partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **settings
    )
    return _convolve_small(plain, inputs[:, ::2, ::2], kernel)


def _by_corners(
    plain: Callable[..., Array], small: Float[Array, 'B h w C'], kernel: Float[Array, '3 3 C N']
) -> Float[Array, 'B H W N']:
    """`plain` of an image before it is enlarged."""
    batch, rows, columns, _ = small.shape
    # Kernels side by side: position (i, j) has all that blocks around that corner may need.
    halves = [half for pair in _halved(kernel, 0) for half in _halved(pair, 1)]
    corners = plain(small, jnp.concatenate(halves, axis=-1))
    corners = corners.reshape(batch, rows + 1, columns + 1, 2, 2, -1)
    blocks = [
        jnp.stack([corners[:, i : i + rows, j : j + columns, i, j] for j in (0, 1)], axis=3)
        for i in (0, 1)
    ]
    return jnp.stack(blocks, axis=2).reshape(batch, 2 * rows, 2 * columns, -1)


def _forward(plain, small, kernel):
    return _by_corners(plain, small, kernel), (small, kernel)


def _backward(plain, kept, g):
    """The image's gradient from the small convolution, the kernel's from the plain one.

    XLA for CPU takes 9 s for the gradient of the four small kernels and 0.06 s for the plain one
    (16x16 to 32x32 pixels, 256 channels, 8 images, two cores, jax 0.10.2 and 0.12.0).
    """
    small, kernel = kept
    _, to_image = jax.vjp(lambda small: _by_corners(plain, small, kernel), small)
    _, to_kernel = jax.vjp(lambda kernel: plain(upsampled(small), kernel), kernel)
    return *to_image(g), *to_kernel(g)


_convolve_small = jax.custom_vjp(_by_corners, nondiff_argnums=(0,))
_convolve_small.defvjp(_forward, _backward)


def _halved(kernel: Array, axis: int) -> tuple[Array, Array]:
    """For the first and the second pixel of a block, what two small pixels are multiplied by."""
    before, same, after = jnp.split(kernel, 3, axis)
    return (
        jnp.concatenate([before, same + after], axis),
        jnp.concatenate([before + same, after], axis),
    )
