"""Front door of the integer convolution: checks, unpacking, choice of the back end."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, Int32, UInt8

from kernels import packing
from kernels.int_conv import reference, xla
from kernels.int_matmul.api import (
    Backend,
    Choice,
    check_accumulator,
    check_weight,
    choose_backend,
)

# In order of preference; the reference, last, accepts everything.
BACKENDS = {
    'xla': Backend(xla.int_conv, xla.refusal),
    'reference': Backend(reference.int_conv, reference.refusal),
}


def choose(w_shape: tuple[int, int, int, int], implementation: str | None = None) -> Choice:
    """The back end that `int_conv` runs for weights [O, kh, kw, C] here, and why.

    Raises as `int_conv` does for an unknown or refused name.
    """
    choice = choose_backend(BACKENDS, implementation)
    if choice.implementation != 'xla':
        return choice
    algorithm, reason = xla.choose_algorithm(w_shape)
    return Choice('xla', f'{choice.reason}; {algorithm}: {reason}')


def int_conv(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'] | UInt8[Array, 'O taps L'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | np.integer | Int[Array | np.ndarray, ''] | Int[Array | np.ndarray, 'B'] = 0,
    bits: int | None = None,
    signed: bool = True,
    kernel_size: tuple[int, int] | None = None,
    x_max: int = 128,
    w_max: int | None = None,
    implementation: str | None = None,
) -> Int32[Array, 'B Ho Wo O']:
    """Exact integer convolution (correlation, no groups, no dilation).

    out[b, h, w, o] = sum over i, j, c of padded[b, h s + i, w s + j, c] w[o, i, j, c]

    Args:
      x: int8 codes.
      w: int8 codes [O, kh, kw, C], or uint8 [O, kh * kw, packed_length(C, bits)], each tap packed
        along C by `packing.pack`.
      strides: along H and W.
      padding: ((top, bottom), (left, right)) in pixels, each >= 0.
      pad_value: the code that means 0.0 (the zero point of x), in [-128, 127]: one for all
        images, or an integer array [B] with one for each.
      bits: width of packed codes, 2..8; None for int8.
      signed: whether packed codes are signed; ignored for int8.
      kernel_size: (kh, kw) of packed weights; None means a square kernel. Ignored for int8.
      x_max: largest |code| in x and pad_value, a promise used only to bound the accumulator.
      w_max: the same for w; None takes it from `bits` and `signed`.
      implementation: None, or the name of a back end that must run ('xla', 'reference').

    Returns:
      int32 sums, equal for every back end.

    Raises:
      ValueError: if dtypes or shapes disagree, or a sum might not fit int32.
      NotImplementedError: if the named back end cannot run here.
    """
    run = BACKENDS[choose_backend(BACKENDS, implementation).implementation].run
    if x.dtype != jnp.int8 or x.ndim != 4:
        raise ValueError(f'x is {x.dtype} {x.shape}: expected int8 [B, H, W, C].')
    code_max = check_weight(w, bits, signed)
    if bits is not None:
        w = _unpack_taps(w, bits, signed, kernel_size, channels=x.shape[-1])
    if w.ndim != 4 or w.shape[-1] != x.shape[-1]:
        raise ValueError(f'w {w.shape} for x {x.shape}: expected [O, kh, kw, C={x.shape[-1]}].')
    _check_geometry(x.shape, w.shape, strides, padding)
    pad_value = _check_pad_value(pad_value, x.shape[0])
    check_accumulator(math.prod(w.shape[1:]), x_max, code_max if w_max is None else w_max)
    return run(x, w, strides=tuple(strides), padding=padding, pad_value=pad_value)


def _unpack_taps(
    w: Array, bits: int, signed: bool, kernel_size: tuple[int, int] | None, *, channels: int
) -> Array:
    """[O, kh * kw, bytes] → [O, kh, kw, C]."""
    length = packing.packed_length(channels, bits)
    if w.ndim != 3 or w.shape[-1] != length:
        raise ValueError(
            f'packed w {w.shape}: expected [O, kh * kw, {length}] for C={channels}, bits={bits}.'
        )
    num_taps = w.shape[1]
    if kernel_size is None:
        kernel_size = (math.isqrt(num_taps),) * 2
    if math.prod(kernel_size) != num_taps:
        raise ValueError(
            f'packed w has {num_taps} taps, kernel_size={tuple(kernel_size)}: expected kh * kw '
            'taps; give kernel_size if the kernel is not square.'
        )
    codes = packing.unpack(w, bits, signed=signed, length=channels)
    return codes.reshape(w.shape[0], *kernel_size, channels)


def _check_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Strides of two positive ints, padding of explicit ints, at least one output pixel."""
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f'strides={strides}: expected two integers >= 1.')
    if isinstance(padding, str) or len(padding) != 2 or min(map(min, padding)) < 0:
        raise ValueError(
            f'padding={padding!r}: expected ((top, bottom), (left, right)), each >= 0.'
        )
    for axis in (0, 1):
        if x_shape[1 + axis] + sum(padding[axis]) < w_shape[1 + axis]:
            raise ValueError(
                f'x {x_shape} padded by {padding} is smaller than the kernel {w_shape[1:3]}.'
            )


def _check_pad_value(
    pad_value: int | np.integer | Array | np.ndarray, batch_size: int
) -> int | Array:
    """The pad value as a Python int, or an int32 array of shape [] or [B]."""
    if not isinstance(pad_value, jax.Array) and jnp.ndim(pad_value) == 0:
        if int(pad_value) != pad_value or not -128 <= pad_value <= 127:
            raise ValueError(f'pad_value={pad_value}: expected an integer in [-128, 127].')
        return int(pad_value)
    pad_value = jnp.asarray(pad_value)
    if not jnp.issubdtype(pad_value.dtype, jnp.integer) or pad_value.shape not in (
        (),
        (batch_size,),
    ):
        raise ValueError(
            f'pad_value is {pad_value.dtype} {pad_value.shape}: expected an integer, or an '
            f'integer array of shape () or ({batch_size},).'
        )
    return pad_value.astype(jnp.int32)
