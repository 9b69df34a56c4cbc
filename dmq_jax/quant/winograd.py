"""The gradient of a 3x3 kernel with a quarter of the products: faster than XLA's own on CPU.

Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308, section 4): in one dimension, the four
outputs that a kernel w makes of six inputs d are OUTPUTS (KERNEL w * INPUT d). The same products,
transposed, give the gradient of w: KERNEL^T (INPUT d * OUTPUTS^T g), tiles summed before KERNEL^T.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.int_conv import groups

TILE = 4  # outputs of a tile, along one axis
TERMS = TILE + 2  # of its products, and of its inputs
INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    np.float32,
)
KERNEL = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32
) / np.float32(24)
OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    np.float32,
)

# Images are taken in groups whose terms stay below this. No less: the sums of all groups, 36 times
# K N, are read and written for each of them.
GROUP_BYTES = 64_000_000
# Fewer tiles do not pay for sums of 36 products in place of 9, nor fewer channels for the terms.
LEAST_TILES, LEAST_CHANNELS = 64, 32

Pads = tuple[tuple[int, int], tuple[int, int]]


def is_fast(
    kernel_shape: tuple[int, int, int, int], strides: tuple[int, int], out_shape: tuple[int, ...]
) -> bool:
    """Whether `kernel_gradient` is the faster one, of a convolution to [B, Ho, Wo, N] on CPU."""
    batch, height, width, _ = out_shape
    return (
        (kernel_shape[:2], strides) == ((3, 3), (1, 1))
        and min(kernel_shape[2:]) >= LEAST_CHANNELS
        and batch * _num_tiles(height) * _num_tiles(width) >= LEAST_TILES
    )


def kernel_gradient(
    x: Float[Array, 'B H W K'], g: Float[Array, 'B Ho Wo N'], padding: Pads
) -> Float[Array, '3 3 K N']:
    """The gradient of the kernel of a 3x3 convolution at stride 1.

    Float32 rounds it by 3e-6 of its norm; XLA's own by a quarter of that.

    Args:
      x: the input.
      g: gradient of the output.
      padding: of the input, (low, high) along H and W.
    """
    batch, height, width, num_outputs = g.shape
    channels = x.shape[-1]
    rows, columns = _num_tiles(height), _num_tiles(width)
    # Tiles that overhang the output see zeros there, and have no gradient.
    last = TILE * rows - height, TILE * columns - width
    x = _padded(x, *((low, high + n) for (low, high), n in zip(padding, last, strict=True)))
    g = _padded(g, *((0, n) for n in last))

    def products(x, g):
        terms = _transform_input(x, rows, columns), _transform_gradient(g, rows, columns)
        return jax.lax.dot_general(*terms, (((1,), (1,)), ((0,), (0,))))

    row_bytes = 4 * TERMS**2 * columns * (channels + num_outputs)
    size, _ = groups.group_size(batch, rows, row_bytes, GROUP_BYTES)
    if size == batch:
        total = products(x, g)
    else:
        parts = [a.reshape(-1, size, *a.shape[1:]) for a in (x, g)]
        zeros = jnp.zeros((TERMS**2, channels, num_outputs), x.dtype)
        total, _ = jax.lax.scan(lambda sums, part: (sums + products(*part), None), zeros, parts)
    # The column of a term within its tile comes first, then its row.
    by_row = _combine(KERNEL.T, list(total.reshape(TERMS, TERMS, channels, num_outputs)))
    return _combine(KERNEL.T, [by_row[:, i] for i in range(TERMS)])


def _num_tiles(size: int) -> int:
    return -(-size // TILE)


def _padded(images: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """`images` with zeros around them, fixed in memory: each is read for several terms."""
    return jax.lax.optimization_barrier(jnp.pad(images, ((0, 0), rows, columns, (0, 0))))


def _transform_input(x, rows, columns):
    """INPUT d INPUT^T of the 6x6 tiles d at every fourth pixel: [36, tiles, K]."""
    # Of all lines of tiles first, then of the tiles within them.
    lines = _combine(INPUT, [x[:, i : i + TILE * rows : TILE] for i in range(TERMS)])
    terms = _combine(INPUT, [lines[:, :, :, j : j + TILE * columns : TILE] for j in range(TERMS)])
    return terms.reshape(TERMS**2, -1, x.shape[-1])


def _transform_gradient(g, rows, columns):
    """OUTPUTS^T g OUTPUTS of the 4x4 tiles of g: [36, tiles, N]."""
    g = g.reshape(-1, rows, TILE, columns, TILE, g.shape[-1])
    lines = _combine(OUTPUTS.T, [g[:, :, i] for i in range(TILE)])
    terms = _combine(OUTPUTS.T, [lines[:, :, :, :, j] for j in range(TILE)])
    return terms.reshape(TERMS**2, -1, g.shape[-1])


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> Array:
    """The product of `matrix` with a vector of arrays, stacked."""

    def combined(row):
        terms = [part if c == 1 else part * c for c, part in zip(row, parts, strict=True) if c]
        return sum(terms[1:], terms[0])

    return jnp.stack([combined(row) for row in matrix])
