"""Integer products on the tensor cores of NVIDIA GPUs; imports triton, so is imported late.

One kernel, three modes: W8A8; W4A8, packed weights as they are stored; W4A4, both packed, by
4-bit instructions where the GPU has them (`gemm_s4mma`) and as W4A8 elsewhere. The main loop
knows no scale: everything real follows in the epilogue.
"""

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int8, Int32, UInt8

from kernels import triton_parts as parts
from kernels import triton_shim as shim
from kernels.epilogue import Epilogue


def _name(specialization) -> str:
    """Of the compiled kernel: `triton_ptx` looks for its mark."""
    return 'gemm_s4mma' if specialization.constants['NATIVE'] else 'gemm'


@triton.jit(repr=_name)
def _gemm(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, row_ptr, zero_ptr, w_sum_ptr, bias_ptr, down_ptr,
    up_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    W4: tl.constexpr, X4: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SCALED: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, ROWS_PER_ENTRY: tl.constexpr,
    NUM_ROWS: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = (K + 1) // 2 if W4 else K  # bytes in a row of w
    X_L: tl.constexpr = L if X4 else K
    tile_m, tile_n = parts.tile_of_program(M, N, BM, BN, GROUP)
    batch = tl.program_id(1)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the edge read other rows and are not stored: cheaper than a mask in the loop.
    x_at = x_ptr + batch.to(tl.int64) * (M * X_L) + (m % M)[None, :] * X_L + k[:, None]
    w_at = w_ptr + batch.to(tl.int64) * (N * L) + (n % N)[:, None] * L + k[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for start in range(0, L, BK):
        if L % BK == 0 and (X_L == L or K % 2 == 0):
            w = tl.load(w_at)
            x = tl.load(x_at)
            x_high = tl.load(x_at + L) if W4 and not X4 else x
        else:
            left = L - start
            w = tl.load(w_at, mask=k[None, :] < left, other=0)
            x = tl.load(x_at, mask=k[:, None] < left, other=0)
            # With odd K the last high nibble is 0 and meets nothing.
            x_high = (
                tl.load(x_at + L, mask=k[:, None] < left - K % 2, other=0) if W4 and not X4 else x
            )
        acc = parts.multiply(acc, w, x, x_high, W4, X4, NATIVE, ASM)
        x_at += BK
        w_at += BK
    acc = parts.unscale(acc, W4, X4, NATIVE)
    parts.write(
        acc, out_ptr + batch.to(tl.int64) * (M * N), w_scale_ptr, x_scale_ptr, row_ptr, zero_ptr,
        w_sum_ptr, bias_ptr, down_ptr, up_ptr, m, n, batch, M, N,
        SCALED, ZERO, BIAS, ROWS_PER_ENTRY, NUM_ROWS, RANK,
    )  # fmt: skip


def int_matmul(
    x: Int8[Array, '*batch M K'] | UInt8[Array, '*batch M L'],
    w: Int8[Array, '*batch N K'] | UInt8[Array, '*batch N L'],
    *,
    length: int,
    epilogue: Epilogue | None,
    w_sum: Int32[Array, '*batch N'] | None,
    out_dtype: str,
) -> Int32[Array, '*batch M N'] | Float[Array, '*batch M N']:
    """The product of `reference.int_matmul`, and its epilogue.

    Args:
      x: int8 codes, or uint8 with two signed 4-bit codes per byte (then w too).
      w: the same.
      length: K, number of codes per row.
      epilogue: checked, or None for the integer sums.
      w_sum: sum of the codes of each row of w, where the epilogue has a zero point.
      out_dtype: of the result, where there is an epilogue.
    """
    batch = x.shape[:-2]

    def grouped(array):
        return None if array is None else array.reshape(-1, *array.shape[len(batch) :])

    if epilogue is not None:
        epilogue = epilogue._replace(row=epilogue.row.reshape(-1))
    out = _call(
        (grouped(x), grouped(w), epilogue, grouped(w_sum)),
        length=length,
        out_dtype='int32' if epilogue is None else out_dtype,
    )
    return out.reshape(*batch, *out.shape[1:])


def _call(operands, **options):
    return shim.call('int_matmul', _launch, _fold, operands, **options)


def _fold(axis_size, in_batched, operands, **options):
    """Another axis in front: rows of one product if w is shared, else more products."""
    x, w, epilogue, w_sum = operands
    x_batched, w_batched, epilogue_batched, sum_batched = in_batched
    shared = not w_batched and w.shape[0] == 1 and not sum_batched
    has_branch = epilogue is not None and epilogue.low_rank is not None
    if shim.tables_are_batched(epilogue_batched) or (has_branch and not shared):
        return shim.sequentially(
            lambda *parts: _call(parts, **options), axis_size, in_batched, operands
        )
    epilogue = shim.merge_rows(epilogue, epilogue_batched, axis_size)
    num_groups, num_rows = (x.shape[1:] if x_batched else x.shape)[:2]
    x = shim.merge_axis(x, x_batched, axis_size)
    if shared:
        x = x.reshape(1, axis_size * num_rows, x.shape[-1])
    else:
        w = shim.merge_axis(w, w_batched, axis_size)
        w_sum = None if w_sum is None else shim.merge_axis(w_sum, sum_batched, axis_size)
    out = _call((x, w, epilogue, w_sum), **options)
    return out.reshape(axis_size, num_groups, num_rows, -1)


def _launch(x, w, epilogue, w_sum, *, length, out_dtype):
    groups, M, _ = x.shape
    N = w.shape[1]
    return shim.launch_tiles(
        _gemm,
        'int_matmul',
        (x, w, epilogue, w_sum),
        jax.ShapeDtypeStruct((groups, M, N), out_dtype),
        groups=groups,
        x_size=M * length,
        w_size=N * length,
        constants={'M': M, 'N': N, 'K': length},
    )
