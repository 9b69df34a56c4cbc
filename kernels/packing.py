"""The bit layout of low-bit integers, shared by the kernels and by exported files.

Codes are packed along the last axis, the one a product contracts over, and split by parts: with
`P` codes per byte and `L` bytes per row, byte j holds the codes k = j, j + L, j + 2 L, ... from
the low bits to the high ones. For INT4 (P = 2) that is k = j in the low nibble and k = j + K/2 in
the high; for INT2 the four quarters. Unpacking is then shifts and one concatenation, and a kernel
can multiply each part with a contiguous slice of the other operand, whatever its block size.

Weights of a product are `[N, K]`, of a convolution `[O, kh * kw, C]` (each tap packed along C).
Widths without their own layout use the next wider one: 3 bits are stored in 4; 5, 6, 7 in 8.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, UInt8

# A width of b bits is stored in _CONTAINER_BITS[b]; a byte holds whole codes only.
_CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def container_bits(bits: int) -> int:
    """Bits that one code of width `bits` occupies in a packed array: 2, 4 or 8.

    Args:
      bits: width of the codes, 2..8.

    Raises:
      ValueError: for any other width.
    """
    if bits not in _CONTAINER_BITS:
        raise ValueError(f'bits={bits}: expected 2..8.')
    return _CONTAINER_BITS[bits]


def packed_length(length: int, bits: int) -> int:
    """Bytes that a row of `length` codes of width `bits` occupies."""
    return -(-length * container_bits(bits) // 8)


def pack(
    codes: Int8[Array | np.ndarray, '*rows K'] | UInt8[Array | np.ndarray, '*rows K'], bits: int
) -> UInt8[Array | np.ndarray, '*rows L']:
    """Packs integer codes along the last axis; NumPy in, NumPy out; JAX in, JAX out.

    Args:
      codes: signed in [-2^(b-1), 2^(b-1) - 1] or unsigned in [0, 2^b - 1], b = `bits`. A NumPy
        array is checked; of a JAX array, which may be a tracer, only the low bits are kept.
      bits: width of the codes, 2..8.

    Returns:
      `packed_length(K, bits)` bytes per row. A row that does not fill its last byte is padded
      with zero codes, which `unpack` removes given the length.

    Raises:
      ValueError: if `bits`, the dtype or a NumPy code is out of range.
    """
    width = container_bits(bits)
    if codes.dtype not in (np.int8, np.uint8):
        raise ValueError(f'codes are {codes.dtype}: expected int8 or uint8.')
    array_module = jnp if isinstance(codes, jax.Array) else np
    if array_module is np and codes.size:
        low, high = int(codes.min()), int(codes.max())
        if low < -(2 ** (bits - 1)) or high > 2**bits - 1 - (2 ** (bits - 1) if low < 0 else 0):
            raise ValueError(
                f'codes span [{low}, {high}]: expected [{-(2 ** (bits - 1))}, '
                f'{2 ** (bits - 1) - 1}] or [0, {2**bits - 1}] for bits={bits}.'
            )
    num_parts = 8 // width
    missing = packed_length(codes.shape[-1], bits) * num_parts - codes.shape[-1]
    fields = codes.astype(np.uint8) & (2**width - 1)
    if missing:
        fields = array_module.pad(fields, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    packed, *others = array_module.split(fields, num_parts, axis=-1)
    for index, part in enumerate(others, start=1):
        packed = packed | (part << (index * width))
    return packed


def unpack(
    packed: UInt8[Array | np.ndarray, '*rows L'], bits: int, *, signed: bool, length: int
) -> Int8[Array | np.ndarray, '*rows K'] | UInt8[Array | np.ndarray, '*rows K']:
    """The codes that `pack` was given; works on NumPy and JAX arrays, also inside jit.

    Args:
      packed: bytes in the layout of this module.
      bits: width of the codes, 2..8.
      signed: whether the codes were signed, i.e. whether the top bit is a sign.
      length: K, number of codes per row.

    Returns:
      int8 codes; uint8 for unsigned codes of 8 bits, which do not fit int8.

    Raises:
      ValueError: if the dtype is not uint8 or `length` does not belong to this number of bytes.
    """
    width = container_bits(bits)
    if packed.dtype != np.uint8:
        raise ValueError(f'packed is {packed.dtype}: expected uint8.')
    if packed.shape[-1] != packed_length(length, bits):
        raise ValueError(
            f'{packed.shape[-1]} bytes per row: expected {packed_length(length, bits)} for '
            f'length={length}, bits={bits}.'
        )
    array_module = jnp if isinstance(packed, jax.Array) else np
    parts = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    codes = array_module.concatenate(parts, axis=-1)[..., :length]
    if not signed and bits == 8:
        return codes
    codes = codes.astype(np.int8)
    if signed and width < 8:
        half = 2 ** (width - 1)
        codes = (codes ^ half) - half  # the top bit of the field becomes the sign
    return codes
