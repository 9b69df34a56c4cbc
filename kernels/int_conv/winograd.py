"""3x3 convolutions of narrow codes with 2.25 times fewer products, exact in int8 and int32.

Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308, section 4.1): an output tile of 2x2 needs
16 products per channel in place of 36. In floating point it costs accuracy; on integers it costs
bits instead: with

    V = B^T d B,   U = (2 G) g (2 G)^T,   Y = A^T [U * V] A / 4

every number is an integer. A sum or difference of two codes in each direction makes V up to four
times a code, the doubled rows of G (2 0 0), (1 1 1), (1 -1 1), (0 0 2) make U up to nine times
one. Both fit int8 for 4-bit codes, also with their zero point taken out, and not for 8-bit ones.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from kernels.int_conv import groups
from kernels.int_conv.reference import pad_with_codes
from kernels.int_matmul import xla as dot

INT8_MAX = 127

# Images are taken in groups whose 16 terms stay below this: as fast or faster than all at once on
# the widest layers of the CIFAR-10 U-Net, with 2.5 times less memory.
GROUP_BYTES = 8_000_000


def refusal(
    w_shape: tuple[int, int, int, int], strides: tuple[int, int], x_max: int, w_max: int
) -> str | None:
    """Why this algorithm cannot compute a convolution exactly, None if it can.

    Args:
      w_shape: [O, kh, kw, C].
      strides: along H and W.
      x_max: largest |code| in x and its padding.
      w_max: the same for w.
    """
    if tuple(w_shape[1:3]) != (3, 3) or tuple(strides) != (1, 1):
        return 'only kernels of 3x3 at stride 1 have this form'
    if 4 * x_max > INT8_MAX or 9 * w_max > INT8_MAX:
        return f'codes up to {x_max} and {w_max} do not fit int8 once transformed'
    return None


def int_conv(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O 3 3 C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """The convolution of `reference.int_conv`, where `refusal` has nothing to say."""
    del strides
    padded = pad_with_codes(x, padding, pad_value)
    B, Hp, Wp, C = padded.shape
    height, width, num_outputs = Hp - 2, Wp - 2, w.shape[0]
    rows, columns = -(-height // 2), -(-width // 2)
    # Codes below the last row and beyond the last column reach only outputs that are cut off.
    padded = jnp.pad(padded, ((0, 0), (0, 2 * rows + 2 - Hp), (0, 2 * columns + 2 - Wp), (0, 0)))
    # A barrier: what makes the codes would otherwise run again for each of the 16 terms.
    padded = lax.optimization_barrier(padded)
    u = _transform_weight(w).reshape(16, num_outputs, C)

    def convolve(images):
        v = _transform_input(images, rows, columns).reshape(16, -1, C)
        # Not `dot.int_matmul`: its rule on the order of x, which needs none here, would gather
        # images that several devices share.
        products = lax.dot_general(
            v, dot.row_major(u), (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.int32
        )
        products = products.reshape(4, 4, images.shape[0], rows, columns, num_outputs)
        return _transform_output(products)

    shape = B, 2 * rows, 2 * columns, num_outputs
    size = groups.group_size(B, 2 * rows, 32 * columns * num_outputs, GROUP_BYTES)
    y = groups.by_groups(convolve, padded, shape, size, kernel_rows=3, stride=1)
    return y[:, :height, :width]


def _transform_input(padded, rows, columns):
    """B^T d B for the 4x4 tiles d at every second pixel: [4, 4, B, rows, columns, C]."""
    B, _, _, C = padded.shape
    padded = groups.fixed(padded)
    pixels = padded.reshape(B, rows + 1, 2, columns + 1, 2, C)
    # What int8 wraps around on the way cancels, since the result fits.
    lines = jnp.stack(
        _combine(pixels[:, :-1, 0], pixels[:, :-1, 1], pixels[:, 1:, 0], pixels[:, 1:, 1])
    )  # [4, B, rows, columns + 1, 2, C]
    # A stack of one stack, not of four: nested ones compile to as many loops as there are terms.
    return jnp.stack(
        _combine(
            lines[:, :, :, :-1, 0], lines[:, :, :, :-1, 1],
            lines[:, :, :, 1:, 0], lines[:, :, :, 1:, 1],
        ),
        axis=1,
    )  # fmt: skip


def _combine(d0, d1, d2, d3):
    """B^T along one axis."""
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _transform_weight(w):
    """(2 G) g (2 G)^T: [4, 4, O, C]."""

    def spread(g0, g1, g2):
        outer = g0 + g2
        return g0 + g0, outer + g1, outer - g1, g2 + g2

    w = dot.row_major(jnp.asarray(w))
    lines = jnp.stack(spread(w[:, 0], w[:, 1], w[:, 2]))  # [4, O, 3, C]
    return jnp.stack(spread(lines[:, :, 0], lines[:, :, 1], lines[:, :, 2]), axis=1)


def _transform_output(m):
    """A^T m A / 4, tiles side by side: [B, 2 rows, 2 columns, O]."""

    def gather(m0, m1, m2, m3):
        return m0 + m1 + m2, m1 - m2 - m3

    lines = [gather(m[0, j], m[1, j], m[2, j], m[3, j]) for j in range(4)]
    # Each sum is four times an integer, so the shift is exact.
    tiles = [
        jnp.stack(gather(*(line[i] for line in lines)), axis=3) >> jnp.int32(2) for i in range(2)
    ]
    y = jnp.stack(tiles, axis=2)  # [B, rows, 2, columns, 2, O]
    B, rows, _, columns, _, num_outputs = y.shape
    return y.reshape(B, 2 * rows, 2 * columns, num_outputs)
