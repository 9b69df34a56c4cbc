"""Front door of the integer convolution: checks, unpacking, choice of the back end."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Int32, UInt8

from kernels import choices, packing, triton_shim
from kernels.epilogue import Epilogue, apply, check, picked_row
from kernels.int_conv import reference, xla
from kernels.int_matmul.api import (
    Backend,
    Choice,
    Problem,
    check_accumulator,
    check_input,
    check_weight,
    choose_backend,
    largest_term,
    mode_of,
    never,
    num_codes,
    triton_refusal,
)


def _triton_reluctance(problem: Problem | None) -> str | None:
    if problem is not None and problem.row_bytes % 16:
        return (
            f'taps of {problem.row_bytes} bytes: not a multiple of 16, so loads are narrow and '
            'most of a step may be empty'
        )
    return triton_shim.reluctance()


# In order of preference; the reference, last, accepts everything.
BACKENDS = {
    'triton': Backend(triton_refusal, _triton_reluctance),
    'xla': Backend(lambda problem: xla.refusal(), never),
    'reference': Backend(never, never),
}


def choose(
    w_shape: tuple[int, int, int, int],
    implementation: str | None = None,
    problem: Problem | None = None,
    *,
    strides: tuple[int, int] = (1, 1),
    w_max: int = 128,
) -> Choice:
    """The back end that `int_conv` runs for weights [O, kh, kw, C] here, and why.

    Raises as `int_conv` does for an unknown or refused name.

    Args:
      w_shape: of unpacked weights.
      implementation: as for `int_conv`.
      problem: sizes; None decides by platform alone.
      strides: along H and W.
      w_max: as for `int_conv`.
    """
    choice = choose_backend(BACKENDS, implementation, problem)
    if choice.implementation != 'xla':
        return choice
    bounds = {} if problem is None else {'x_max': problem.x_max, 'num_pixels': problem.M}
    algorithm, reason = xla.choose_algorithm(w_shape, strides=strides, w_max=w_max, **bounds)
    return Choice('xla', f'{choice.reason}; {algorithm}: {reason}')


def takes_nibbles(
    x_shape: tuple[int, int, int, int],
    w_shape: tuple[int, int, int, int],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> bool:
    """Whether 4-bit x beside packed 4-bit w is best given packed too (`x_bits=4`) here.

    Args:
      x_shape: [B, H, W, C], of the codes.
      w_shape: [O, kh, kw, C], of the codes.
      strides: as for `int_conv`.
      padding: as for `int_conv`.
    """
    height, width = reference.output_size(x_shape[1:3], w_shape[1:3], strides, padding)
    problem = Problem(
        'W4A4', 1, x_shape[0] * height * width, w_shape[0], math.prod(w_shape[1:]),
        packing.packed_length(x_shape[-1], 4), 8, True, math.prod(x_shape),
    )  # fmt: skip
    return choose_backend(BACKENDS, None, problem).implementation == 'triton'


def int_conv(
    x: Int8[Array, 'B H W C'] | UInt8[Array, 'B H W Lx'],
    w: Int8[Array, 'O kh kw C'] | UInt8[Array, 'O taps L'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int
    | np.integer
    | Int[Array | np.ndarray, '']
    | Int[Array | np.ndarray, 'B']
    | None = None,
    bits: int | None = None,
    signed: bool = True,
    kernel_size: tuple[int, int] | None = None,
    x_bits: int | None = None,
    x_max: int = 128,
    w_max: int | None = None,
    epilogue: Epilogue | None = None,
    tap_sum: Int32[Array, 'O taps'] | None = None,
    out_dtype: str = 'float32',
    implementation: str | None = None,
) -> Int32[Array, 'B Ho Wo O'] | Float[Array, 'B Ho Wo O']:
    """Exact integer convolution (correlation, no groups, no dilation).

    out[b, h, w, o] = sum over i, j, c of padded[b, h s + i, w s + j, c] w[o, i, j, c]

    Args:
      x: int8 codes, or signed codes, each pixel packed along C by `packing.pack` (uint8, then
        `x_bits` is needed).
      w: int8 codes [O, kh, kw, C], or uint8 [O, kh * kw, packed_length(C, bits)], each tap packed
        along C by `packing.pack`.
      strides: along H and W.
      padding: ((top, bottom), (left, right)) in pixels, each >= 0.
      pad_value: the code that means 0.0 (the zero point of x), in [-128, 127]: one for all
        images, or an integer array [B] with one for each. None takes it from the epilogue, else 0.
      bits: width of packed codes, 2..8; None for int8.
      signed: whether packed codes are signed; ignored for int8.
      kernel_size: (kh, kw) of packed weights; None means a square kernel. Ignored for int8.
      x_bits: width of packed codes of x; None for int8.
      x_max: largest |code| in x and pad_value, a promise that bounds the accumulator, and by
        which an algorithm for narrow codes may be chosen.
      w_max: the same for w; None takes it from `bits` and `signed`.
      epilogue: makes real values of the sums; None returns them. Its low-rank branch is given
        as [B, Ho, Wo, R].
      tap_sum: sum over c of w, if known; used with codes for zero other than 0.
      out_dtype: 'float32', 'bfloat16' or 'float16', with an epilogue only.
      implementation: None, or the name of a back end that must run ('triton', 'xla',
        'reference').

    Returns:
      int32 sums, equal for every back end; or their epilogue, equal but for the last bits.

    Raises:
      ValueError: if dtypes or shapes disagree, or a sum might not fit int32.
      NotImplementedError: if the named back end cannot run here.
    """
    choose_backend(BACKENDS, implementation)
    x, w = jnp.asarray(x), jnp.asarray(w)
    check_input(x, x_bits)
    code_max = check_weight(w, bits, signed)
    w_shape = _weight_shape(x, w, bits=bits, x_bits=x_bits, kernel_size=kernel_size)
    num_outputs, *kernel_size, C = w_shape
    _check_geometry(x.shape, w_shape, strides, padding)
    K = math.prod(w_shape[1:])
    w_max = code_max if w_max is None else w_max
    check_accumulator(K, largest_term(x_max, epilogue), w_max)
    rows_shape = (x.shape[0], *reference.output_size(x.shape[1:3], kernel_size, strides, padding))
    if epilogue is not None:
        check(epilogue, out_dtype, rows_shape=rows_shape, num_outputs=num_outputs)
    has_zero = epilogue is not None and epilogue.zero_point is not None
    if pad_value is None and has_zero:
        pad_value = picked_row(epilogue.zero_point, epilogue.row)
    pad_value = _check_pad_value(0 if pad_value is None else pad_value, x.shape[0], x_max)
    mode = mode_of(w, bits, signed, x_bits)
    problem = Problem(
        mode, 1, math.prod(rows_shape), num_outputs, K, w.shape[-1], x_max,
        epilogue is not None, math.prod(x.shape[:3]) * C,
    )  # fmt: skip
    choice = choose(w_shape, implementation, problem, strides=strides, w_max=w_max)
    name = choice.implementation
    choices.note(choices.Call('int_conv', *choice, problem))
    packed_w = w
    if bits is not None:
        # Where the kernel takes them packed, XLA drops this unless the sums below need it.
        w = packing.unpack(w, bits, signed=signed, length=C).reshape(w_shape)
    if x_bits is not None and not (name == 'triton' and mode == 'W4A4'):
        x = packing.unpack(x, x_bits, signed=True, length=C)
    if tap_sum is None and (has_zero or not isinstance(pad_value, int) or pad_value != 0):
        tap_sum = jnp.sum(w, axis=-1, dtype=jnp.int32).reshape(num_outputs, -1)
    geometry = {'strides': tuple(strides), 'padding': padding, 'pad_value': pad_value}
    if name == 'triton':
        from kernels.int_conv import triton

        return triton.int_conv(
            x,
            w.reshape(num_outputs, -1, C) if mode == 'W8A8' else packed_w,
            channels=C,
            kernel_size=tuple(kernel_size),
            epilogue=epilogue,
            tap_sum=tap_sum,
            out_dtype=out_dtype,
            **geometry,
        )
    if name == 'xla':
        total = xla.int_conv(x, w, **geometry, x_max=x_max, w_max=w_max)
    else:
        total = reference.int_conv(x, w, **geometry)
    if epilogue is None:
        return total
    w_sum = jnp.sum(tap_sum, axis=-1) if has_zero else None
    return apply(total, epilogue, w_sum, out_dtype)


def _weight_shape(
    x: Array, w: Array, *, bits: int | None, x_bits: int | None, kernel_size: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """[O, kh, kw, C] of the codes of w, once the shapes of both operands agree."""
    if x.ndim != 4:
        raise ValueError(f'x is {x.dtype} {x.shape}: expected int8 [B, H, W, C].')
    C = num_codes(x, w, bits, x_bits)
    if x_bits is not None and x.shape[-1] != packing.packed_length(C, x_bits):
        raise ValueError(
            f'x has {x.shape[-1]} bytes per pixel: expected {packing.packed_length(C, x_bits)} '
            f'for C={C}, x_bits={x_bits}.'
        )
    if bits is not None:
        return w.shape[0], *_check_taps(w, bits, kernel_size, channels=C), C
    if w.ndim != 4 or w.shape[-1] != C:
        raise ValueError(f'w {w.shape} for x {x.shape}: expected [O, kh, kw, C={C}].')
    return w.shape


def _check_taps(
    w: Array, bits: int, kernel_size: tuple[int, int] | None, *, channels: int
) -> tuple[int, int]:
    """Checks packed weights [O, kh * kw, bytes]; returns (kh, kw)."""
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
    return tuple(kernel_size)


def _check_geometry(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Strides of two positive ints, padding of explicit ints, at least one output pixel."""
    if not _are_integers(strides, 2, at_least=1):
        raise ValueError(f'strides={strides!r}: expected two integers >= 1.')
    is_pair = isinstance(padding, Sequence) and len(padding) == 2
    if not is_pair or not all(_are_integers(sides, 2, at_least=0) for sides in padding):
        raise ValueError(
            f'padding={padding!r}: expected ((top, bottom), (left, right)), each >= 0.'
        )
    for axis in (0, 1):
        if x_shape[1 + axis] + sum(padding[axis]) < w_shape[1 + axis]:
            raise ValueError(
                f'x {x_shape} padded by {padding} is smaller than the kernel {w_shape[1:3]}.'
            )


def _are_integers(values: Any, count: int, *, at_least: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, int | np.integer) and value >= at_least for value in values)
    )


def _check_pad_value(
    pad_value: int | np.integer | Array | np.ndarray, batch_size: int, x_max: int
) -> int | Array:
    """The pad value as a Python int, or an int32 array of shape [] or [B]."""
    if not isinstance(pad_value, jax.Array) and jnp.ndim(pad_value) == 0:
        if int(pad_value) != pad_value or not -128 <= pad_value <= 127:
            raise ValueError(f'pad_value={pad_value}: expected an integer in [-128, 127].')
        if abs(int(pad_value)) > x_max:
            raise ValueError(f'pad_value={pad_value} with x_max={x_max}: expected a larger x_max.')
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
