"""A convolution of a few images, or of some of their rows, at a time: less memory, in caches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from kernels.int_matmul.xla import row_major


def fixed(padded: Int8[Array, 'B Hp Wp C']) -> Int8[Array, 'B Hp Wp C']:
    """`padded`, fixed in memory: what makes it would otherwise run again for each of its terms.

    Not on several devices, which would gather images that they share.
    """
    return row_major(padded) if jax.device_count() == 1 else padded


def group_size(
    num_images: int, num_rows: int, row_bytes: int, most_bytes: int, *, in_strips: bool = False
) -> tuple[int, int]:
    """How many images, and how many rows of each, stay below `most_bytes`; divisors of all.

    All of them on several devices: a loop over images that these share would gather them.

    Args:
      num_images: of the batch.
      num_rows: of an output image.
      row_bytes: what one row of it takes on the way.
      most_bytes: of a group.
      in_strips: whether an image that is too large by itself is taken apart.
    """
    if jax.device_count() > 1:
        return num_images, num_rows
    images = _largest_divisor(num_images, most_bytes // max(1, num_rows * row_bytes))
    if not in_strips or images * num_rows * row_bytes <= most_bytes:
        return images, num_rows
    return images, _largest_divisor(num_rows, most_bytes // max(1, row_bytes))


def _largest_divisor(number: int, most: int) -> int:
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), 1)


def by_groups(
    convolve: Callable[[Int8[Array, 'b hp Wp C']], Int32[Array, 'b h Wo O']],
    padded: Int8[Array, 'B Hp Wp C'],
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    kernel_rows: int,
    stride: int,
) -> Int32[Array, 'B Ho Wo O']:
    """`convolve` of as many images and output rows at a time as `group_size` says.

    Args:
      convolve: of a part of `padded`.
      padded: the images, surrounded with the code for zero.
      shape: of the result, [B, Ho, Wo, O].
      size: from `group_size`.
      kernel_rows: input rows that an output row is made of.
      stride: of the output rows.
    """
    images, rows = size
    if size == shape[:2]:
        return convolve(padded)
    strips = shape[1] // rows
    input_rows = padded.shape[1] if strips == 1 else (rows - 1) * stride + kernel_rows

    def body(index, y):
        begin, row = index // strips * images, index % strips * rows
        part = lax.dynamic_slice(
            padded, (begin, row * stride, 0, 0), (images, input_rows, *padded.shape[2:])
        )
        return lax.dynamic_update_slice(y, convolve(part), (begin, row, 0, 0))

    # Any number would do, but only once the codes are there: XLA for CPU otherwise makes the empty
    # results of all layers first and keeps them all.
    start = (padded[0, 0, 0, 0] == -128).astype(jnp.int32)
    return lax.fori_loop(0, shape[0] // images * strips, body, jnp.broadcast_to(start, shape))
