"""Pieces of Triton code that the integer kernels share; imports triton, so is imported late.

A tile of the result is [BN, BM], outputs first: the weight is the first operand, so that each warp
unpacks its own rows once, and on Hopper they go to the tensor cores from registers.

Nibbles are unpacked as 16 times their value, which takes one or two 32-bit instructions for four
bytes instead of two shifts per byte; the sums are 16 or 256 times too large and are shifted back,
which is exact.
"""

import triton
import triton.language as tl


@triton.jit
def low_nibbles(packed, ASM: tl.constexpr):
    """16 times the signed low nibble of each byte, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            '{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }',
            '=r,r',
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (packed << 4).to(tl.int8)


@triton.jit
def high_nibbles(packed, ASM: tl.constexpr):
    """16 times the signed high nibble of each byte, int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            'and.b32 $0, $1, 0xF0F0F0F0;',
            '=r,r',
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (packed & -16).to(tl.int8)


@triton.jit
def tile_of_program(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, output tile) of this program: GROUP row tiles share the weights in the cache."""
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    group = program // (GROUP * num_n)
    size = tl.minimum(num_m - group * GROUP, GROUP)
    inside = program % (GROUP * num_n)
    return group * GROUP + inside % size, inside // size


@triton.jit
def multiply(
    acc, w, x, x_high, W4: tl.constexpr, X4: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr
):
    """Adds w x of one step; `x_high` is what the high nibbles of w meet if only w is packed."""
    if NATIVE or not W4:
        # NATIVE: bytes of two codes; `kernels.triton_ptx` makes the instruction one on 4 bits.
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    elif X4:
        acc = tl.dot(low_nibbles(w, ASM), low_nibbles(x, ASM), acc, out_dtype=tl.int32)
        acc = tl.dot(high_nibbles(w, ASM), high_nibbles(x, ASM), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(low_nibbles(w, ASM), x, acc, out_dtype=tl.int32)
        acc = tl.dot(high_nibbles(w, ASM), x_high, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def unscale(acc, W4: tl.constexpr, X4: tl.constexpr, NATIVE: tl.constexpr):
    """The sums of products of codes: takes the factors of 16 out, exactly."""
    if W4 and not NATIVE:
        if X4:
            acc = acc >> 8
        else:
            acc = acc >> 4
    return acc


@triton.jit
def write(
    acc, out_ptr, w_scale_ptr, x_scale_ptr, row_ptr, zero_ptr, w_sum_ptr, bias_ptr, down_ptr,
    up_ptr, m, n, batch, M, N,
    SCALED: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, ROWS_PER_ENTRY: tl.constexpr,
    NUM_ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The epilogue of `kernels.epilogue`, in its order, and the store of [BN, BM] as [M, N]."""
    mask = (m[None, :] < M) & (n[:, None] < N)
    if SCALED:
        entry = tl.load(row_ptr + (batch * M + m) // ROWS_PER_ENTRY, mask=m < M, other=0)
        entry = tl.minimum(tl.maximum(entry, 0), NUM_ROWS - 1)
        if ZERO:
            zero = tl.load(zero_ptr + entry)
            w_sum = tl.load(w_sum_ptr + batch * N + n, mask=n < N, other=0)
            acc = acc - w_sum[:, None] * zero[None, :]
        y = acc.to(tl.float32) * tl.load(w_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        y = y * tl.load(x_scale_ptr + entry)[None, :]
        if BIAS:
            y = y + tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
        if RANK > 0:
            # Parts of 16: a longer dot of float32 would spill registers.
            for start in range(0, RANK, 16):
                r = start + tl.arange(0, 16)
                up = tl.load(
                    up_ptr + n[:, None] * RANK + r[None, :],
                    mask=(n[:, None] < N) & (r[None, :] < RANK), other=0.0,
                )  # fmt: skip
                down = tl.load(
                    down_ptr + m[None, :] * RANK + r[:, None],
                    mask=(m[None, :] < M) & (r[:, None] < RANK), other=0.0,
                )  # fmt: skip
                y = tl.dot(up, down, y, input_precision='ieee')
        tl.store(out_ptr + m[None, :] * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + m[None, :] * N + n[:, None], acc, mask=mask)
