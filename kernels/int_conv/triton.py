"""Integer convolutions on the tensor cores of NVIDIA GPUs; imports triton, so is imported late.

An implicit product: rows are output pixels, sums run over taps and channels, nothing is copied.
Modes and epilogue are those of `kernels.int_matmul.triton`. Borders are loaded as zeros, whatever
code means 0.0: asynchronous copies fill in zeros for free and nothing else. What the right code
would have added is the code times the sum of the weights of the taps outside the image, exactly;
it is added after the loop.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int8, Int32, UInt8

from kernels import triton_parts as parts
from kernels import triton_shim as shim
from kernels.epilogue import Epilogue
from kernels.int_conv.reference import output_size
from kernels.int_matmul import triton as products


def _name(specialization) -> str:
    """Of the compiled kernel: `triton_ptx` looks for its mark."""
    return 'conv_s4mma' if specialization.constants['NATIVE'] else 'conv'


@triton.jit(repr=_name)
def _conv(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, row_ptr, zero_ptr, w_sum_ptr, bias_ptr, down_ptr,
    up_ptr, pad_ptr, tap_sum_ptr, out_ptr,
    B: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    HO: tl.constexpr, WO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    PADS: tl.constexpr, PIXELS_PER_PAD: tl.constexpr,
    W4: tl.constexpr, X4: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SCALED: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, ROWS_PER_ENTRY: tl.constexpr,
    NUM_ROWS: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = B * HO * WO
    L: tl.constexpr = (C + 1) // 2 if W4 else C  # bytes of one tap of w
    X_L: tl.constexpr = L if X4 else C
    STEPS: tl.constexpr = (L + BK - 1) // BK  # per tap
    EVEN: tl.constexpr = L % BK == 0 and (X_L == L or C % 2 == 0)
    tile_m, tile_n = parts.tile_of_program(M, N, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the edge read other rows and are not stored.
    pixel = m % M
    top = pixel // WO % HO * STRIDE_H - TOP
    left = pixel % WO * STRIDE_W - LEFT
    corner = (pixel // (HO * WO) * H + top) * W + left
    w_row = w_ptr + (n % N)[:, None] * (KH * KW * L) + k[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for step in range(0, KH * KW * STEPS):
        tap = step // STEPS
        c = step % STEPS * BK
        i = tap // KW
        j = tap % KW
        seen = (top + i >= 0) & (top + i < H) & (left + j >= 0) & (left + j < W)
        x_at = x_ptr + ((corner + i * W + j) * X_L + c)[None, :] + k[:, None]
        if EVEN:
            w = tl.load(w_row + (tap * L + c))
            x = tl.load(x_at, mask=seen[None, :], other=0)
            x_high = tl.load(x_at + L, mask=seen[None, :], other=0) if W4 and not X4 else x
        else:
            w = tl.load(w_row + (tap * L + c), mask=k[None, :] < L - c, other=0)
            x = tl.load(x_at, mask=seen[None, :] & (k[:, None] < L - c), other=0)
            x_high = (
                tl.load(x_at + L, mask=seen[None, :] & (k[:, None] < L - c - C % 2), other=0)
                if W4 and not X4
                else x
            )
        acc = parts.multiply(acc, w, x, x_high, W4, X4, NATIVE, ASM)
    acc = parts.unscale(acc, W4, X4, NATIVE)
    if PADS:
        pad = tl.load(pad_ptr + pixel // PIXELS_PER_PAD)
        for tap in range(0, KH * KW):
            i = tap // KW
            j = tap % KW
            seen = (top + i >= 0) & (top + i < H) & (left + j >= 0) & (left + j < W)
            tap_sum = tl.load(tap_sum_ptr + n % N * (KH * KW) + tap)
            acc += tap_sum[:, None] * tl.where(seen, 0, pad)[None, :]
    parts.write(
        acc, out_ptr, w_scale_ptr, x_scale_ptr, row_ptr, zero_ptr, w_sum_ptr, bias_ptr, down_ptr,
        up_ptr, m, n, 0, M, N, SCALED, ZERO, BIAS, ROWS_PER_ENTRY, NUM_ROWS, RANK,
    )  # fmt: skip


def int_conv(
    x: Int8[Array, 'B H W C'] | UInt8[Array, 'B H W L'],
    w: Int8[Array, 'O taps C'] | UInt8[Array, 'O taps L'],
    *,
    channels: int,
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
    epilogue: Epilogue | None,
    tap_sum: Int32[Array, 'O taps'] | None,
    out_dtype: str,
) -> Int32[Array, 'B Ho Wo O'] | Float[Array, 'B Ho Wo O']:
    """The convolution of `reference.int_conv`, and its epilogue.

    Args:
      x: int8 codes, or uint8 with two signed 4-bit codes per byte (then w too).
      w: the same.
      channels: C, number of codes per pixel.
      kernel_size: (kh, kw).
      strides: along H and W.
      padding: ((top, bottom), (left, right)).
      pad_value: the code that means 0.0; other than 0 needs `tap_sum`.
      epilogue: checked, or None for the integer sums.
      tap_sum: sum of the codes of each tap of w, for padding and zero points.
      out_dtype: of the result, where there is an epilogue.
    """
    out_dtype = 'int32' if epilogue is None else out_dtype
    w_sum = None if tap_sum is None else jnp.sum(tap_sum, axis=-1)
    sides = [side for pair in padding for side in pair]
    if math.prod(kernel_size) == 1 and tuple(strides) == (1, 1) and not any(sides):
        num_pixels = math.prod(x.shape[:-1])
        if epilogue is not None and epilogue.low_rank is not None:
            down, up = epilogue.low_rank
            epilogue = epilogue._replace(low_rank=(down.reshape(num_pixels, -1), up))
        out = products.int_matmul(
            x.reshape(num_pixels, -1),
            w.reshape(w.shape[0], -1),
            length=channels,
            epilogue=epilogue,
            w_sum=w_sum,
            out_dtype=out_dtype,
        )
        return out.reshape(*x.shape[:-1], -1)
    pads = any(sides) and not (isinstance(pad_value, int) and pad_value == 0)
    pad = jnp.asarray(pad_value if pads else 0, jnp.int32).reshape(-1)
    if epilogue is not None:
        epilogue = epilogue._replace(row=epilogue.row.reshape(-1))
        if epilogue.zero_point is None:
            w_sum = None
    operands = x, w, epilogue, w_sum, pad, tap_sum if pads else None
    return _call(
        operands,
        out_dtype=out_dtype,
        channels=channels,
        kernel_size=tuple(kernel_size),
        strides=tuple(strides),
        padding=padding,
    )


def _call(operands, **options):
    return shim.call('int_conv', _launch, _fold, operands, **options)


def _fold(axis_size, in_batched, operands, **options):
    """Another axis in front, as more images."""
    x, w, epilogue, w_sum, pad, tap_sum = operands
    x_batched, w_batched, epilogue_batched, sum_batched, pad_batched, tap_batched = in_batched
    if w_batched or sum_batched or tap_batched or shim.tables_are_batched(epilogue_batched):
        return shim.sequentially(
            lambda *parts: _call(parts, **options), axis_size, in_batched, operands
        )
    num_images = (x.shape[1:] if x_batched else x.shape)[0]
    if pad_batched or pad.shape[-1] > 1:
        pad = shim.merge_axis(pad, pad_batched, axis_size)
    epilogue = shim.merge_rows(epilogue, epilogue_batched, axis_size)
    x = shim.merge_axis(x, x_batched, axis_size)
    out = _call((x, w, epilogue, w_sum, pad, tap_sum), **options)
    return out.reshape(axis_size, num_images, *out.shape[1:])


def _launch(
    x, w, epilogue, w_sum, pad, tap_sum, *, out_dtype, channels, kernel_size, strides, padding
):
    B, H, W, _ = x.shape
    N = w.shape[0]
    HO, WO = output_size((H, W), kernel_size, strides, padding)
    geometry = {
        'B': B, 'H': H, 'W': W, 'C': channels, 'N': N, 'HO': HO, 'WO': WO,
        'KH': kernel_size[0], 'KW': kernel_size[1],
        'STRIDE_H': strides[0], 'STRIDE_W': strides[1],
        'TOP': padding[0][0], 'LEFT': padding[1][0],
        'PADS': tap_sum is not None, 'PIXELS_PER_PAD': B * HO * WO // pad.shape[0],
    }  # fmt: skip
    return shim.launch_tiles(
        _conv,
        'int_conv',
        (x, w, epilogue, w_sum),
        jax.ShapeDtypeStruct((B, HO, WO, N), out_dtype),
        groups=1,
        x_size=x.size,
        w_size=w.size,
        constants=geometry,
        others=(pad, pad if tap_sum is None else tap_sum),
    )
