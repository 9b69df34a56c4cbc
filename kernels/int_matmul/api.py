"""Front door of the integer product: checks, unpacking, choice of the back end."""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, UInt8

from kernels import choices, packing, triton_shim
from kernels.epilogue import Epilogue, apply, check
from kernels.int_matmul import reference, xla

INT32_MAX = 2**31 - 1


class Problem(NamedTuple):
    """What a back end may decide by; a convolution counts pixels as M and kh kw C as K.

    Attributes:
      mode: 'W8A8', 'W4A8' or 'W4A4': how the operands are packed; other widths are W8A8.
      batch: number of products.
      M: rows.
      N: outputs.
      K: products per sum.
      row_bytes: bytes of a contiguous row of w (one tap of a convolution).
      x_max: largest |code| of x.
      has_epilogue: whether the result is scaled.
      x_size: elements of x of one product, None for M K.
    """

    mode: str
    batch: int
    M: int
    N: int
    K: int
    row_bytes: int
    x_max: int
    has_epilogue: bool
    x_size: int | None = None


class Backend(NamedTuple):
    """One way to compute.

    Attributes:
      refusal: problem, or None for any → why it cannot run here, None if it can.
      reluctance: problem → why it should not be chosen unless named, None if it should.
    """

    refusal: Callable[[Problem | None], str | None]
    reluctance: Callable[[Problem | None], str | None]


class Choice(NamedTuple):
    """Name of the back end that will run, and why."""

    implementation: str
    reason: str


def triton_refusal(problem: Problem | None) -> str | None:
    """Why the Triton kernels cannot compute `problem` here, None if they can."""
    refusal = triton_shim.refusal()
    if refusal is not None or problem is None:
        return refusal
    if min(problem.batch, problem.M, problem.N, problem.K) == 0:
        return 'an operand is empty'
    # Nibbles are 16 times their value while they are summed.
    x_max = 128 if problem.mode == 'W4A4' else problem.x_max
    if problem.mode != 'W8A8' and problem.K * x_max * 128 > INT32_MAX:
        return f'K={problem.K}: sums of 16 times the codes may exceed int32; pass int8 weights'
    x_size = problem.M * problem.K if problem.x_size is None else problem.x_size
    return triton_shim.size_refusal(
        problem.batch, x_size, problem.N * problem.K, problem.M * problem.N
    )


def _triton_reluctance(problem: Problem | None) -> str | None:
    if problem is None or (problem.mode == 'W8A8' and not problem.has_epilogue):
        return 'for int8 times int8 to int32 XLA uses the same instructions'
    if problem.row_bytes % 16:
        return f'rows of {problem.row_bytes} bytes: not a multiple of 16, so loads are narrow'
    if problem.M < 16:
        return f'M={problem.M} < 16: most of a tile would be empty'
    return triton_shim.reluctance()


def never(problem: Problem | None) -> None:
    """The reluctance of a back end that may always be chosen, the refusal of the definition."""
    del problem


# In order of preference; the reference, last, accepts everything.
BACKENDS = {
    'triton': Backend(triton_refusal, _triton_reluctance),
    'xla': Backend(lambda problem: xla.refusal(), never),
    'reference': Backend(never, never),
}


def check_accumulator(num_products: int, x_max: int, w_max: int) -> None:
    """Raises unless a sum of products of codes must fit int32.

    Args:
      num_products: terms of the sum (K, or kh * kw * C).
      x_max: largest |code| of the one operand.
      w_max: largest |code| of the other.

    Raises:
      ValueError: if num_products * x_max * w_max exceeds 2^31 - 1.
    """
    if num_products * x_max * w_max > INT32_MAX:
        raise ValueError(
            f'{num_products} products of codes up to {x_max} and {w_max} may exceed int32 '
            f'({num_products * x_max * w_max} > {INT32_MAX}): give the true x_max and w_max, or '
            'split the contraction.'
        )


def largest_term(x_max: int, epilogue: Epilogue | None) -> int:
    """The largest |code|, or |code - zero point| where an epilogue takes one out of the sums."""
    if epilogue is None or epilogue.zero_point is None:
        return x_max
    return max(x_max, min(x_max, 127) + 128)


def check_weight(w: Array, bits: int | None, signed: bool) -> int:
    """Checks dtype and `bits` of a weight; returns the largest |code| it can hold.

    Args:
      w: int8 codes, or packed uint8.
      bits: width of packed codes; None for int8 codes.
      signed: whether packed codes are signed.

    Raises:
      ValueError: if dtype and `bits` disagree, or the codes do not fit int8.
    """
    if w.dtype == jnp.int8:
        if bits is not None:
            raise ValueError(f'bits={bits} with int8 w: expected bits=None, or packed uint8 w.')
        return 128
    if w.dtype != jnp.uint8 or bits is None:
        raise ValueError(
            f'w is {w.dtype} with bits={bits}: expected int8, or packed uint8 with bits=2..8.'
        )
    packing.container_bits(bits)
    if bits == 8 and not signed:
        raise ValueError(
            'unsigned 8-bit w does not fit int8: store q - 128, with zero_point - 128, signed.'
        )
    return 2 ** (bits - 1) if signed else 2**bits - 1


def choose_backend(
    backends: dict[str, Backend], implementation: str | None, problem: Problem | None = None
) -> Choice:
    """The back end to run, in the order of `backends` unless one is named.

    Args:
      backends: what there is, in order of preference.
      implementation: a name that must be honoured, or None: then the environment variable
        KERNELS_IMPLEMENTATION may name one.
      problem: sizes; None decides by platform alone.

    Raises:
      ValueError: if there is no such name.
      NotImplementedError: if the named one cannot run here, with its reason.
    """
    named_by = 'named by the caller'
    if implementation is None and os.environ.get('KERNELS_IMPLEMENTATION'):
        implementation = os.environ['KERNELS_IMPLEMENTATION']
        named_by = 'named by KERNELS_IMPLEMENTATION'
    if implementation is None:
        refusals = []
        for name, backend in backends.items():
            refusal = backend.refusal(problem) or backend.reluctance(problem)
            if refusal is None:
                return Choice(name, '; '.join([*refusals, f'{name} is the first that can run']))
            refusals.append(f'{name}: {refusal}')
        raise AssertionError('the reference accepts every input')
    if implementation not in backends:
        raise ValueError(f'implementation={implementation!r}: expected None or {list(backends)}.')
    refusal = backends[implementation].refusal(problem)
    if refusal is not None:
        raise NotImplementedError(f'{implementation}: {refusal}.')
    return Choice(implementation, named_by)


def choose(implementation: str | None = None, problem: Problem | None = None) -> Choice:
    """The back end that `int_matmul` runs on this machine, and why; raises as it does.

    Args:
      implementation: as for `int_matmul`.
      problem: sizes; None decides by platform alone.
    """
    return choose_backend(BACKENDS, implementation, problem)


def takes_nibbles(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> bool:
    """Whether 4-bit x beside packed 4-bit w is best given packed too (`x_bits=4`) here.

    Args:
      x_shape: [..., M, K], of the codes.
      w_shape: [N, K], of the codes.
    """
    N, K = w_shape
    problem = Problem(
        'W4A4', 1, math.prod(x_shape[:-1]), N, K, packing.packed_length(K, 4), 8, True
    )
    return choose_backend(BACKENDS, None, problem).implementation == 'triton'


def mode_of(w: Array, bits: int | None, signed: bool, x_bits: int | None) -> str:
    """'W4A4', 'W4A8' or 'W8A8': what the kernels take packed; the rest is unpacked to int8."""
    if bits is None or not signed or packing.container_bits(bits) != 4:
        return 'W8A8'
    return 'W4A8' if x_bits is None or packing.container_bits(x_bits) != 4 else 'W4A4'


def num_codes(x: Array, w: Array, bits: int | None, x_bits: int | None) -> int:
    """K, or C: the number of codes per row, of packed operands as many as both have bytes for."""

    def capacity(array, width):
        return array.shape[-1] * (1 if width is None else 8 // packing.container_bits(width))

    if x_bits is None:
        return x.shape[-1]
    return min(capacity(x, x_bits), capacity(w, bits))


def check_input(x: Array, x_bits: int | None) -> None:
    """Raises ValueError unless x is int8, or uint8 with `x_bits`."""
    if x_bits is not None:
        packing.container_bits(x_bits)
    expected = jnp.int8 if x_bits is None else jnp.uint8
    if x.dtype != expected:
        raise ValueError(
            f'x is {x.dtype}: expected {expected.__name__}'
            f'{", or packed uint8 with x_bits" if x_bits is None else f" with x_bits={x_bits}"}.'
        )


def int_matmul(
    x: Int8[Array, '*batch M K'] | UInt8[Array, '*batch M Lx'],
    w: Int8[Array, '*batch N K'] | UInt8[Array, '*batch N L'],
    *,
    bits: int | None = None,
    signed: bool = True,
    x_bits: int | None = None,
    x_max: int = 128,
    w_max: int | None = None,
    epilogue: Epilogue | None = None,
    w_sum: Int32[Array, '*batch N'] | None = None,
    out_dtype: str = 'float32',
    implementation: str | None = None,
) -> Int32[Array, '*batch M N'] | Float[Array, '*batch M N']:
    """Exact integer product: out[..., m, n] = sum over k of x[..., m, k] w[..., n, k].

    Both operands hold K last; q times k^T needs no transpose, softmax times v takes
    `w=swapaxes(v, -1, -2)`. Leading batch dimensions must be equal; a w of two axes is shared.

    Args:
      x: int8 codes, or signed codes packed by `packing.pack` (uint8, then `x_bits` is needed).
      w: int8 codes, or codes packed by `packing.pack` (uint8, then `bits` is needed).
      bits: width of packed codes, 2..8; None for int8.
      signed: whether packed codes are signed; ignored for int8.
      x_bits: width of packed codes of x; None for int8.
      x_max: largest |code| in x, a promise used only to bound the accumulator.
      w_max: the same for w; None takes it from `bits` and `signed`.
      epilogue: makes real values of the sums; None returns them.
      w_sum: sum over k of w, if known; used with `epilogue.zero_point` only.
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
    K = num_codes(x, w, bits, x_bits)
    lengths = tuple(K if b is None else packing.packed_length(K, b) for b in (x_bits, bits))
    is_shared = x.ndim > 2 and w.ndim == 2
    if (
        min(x.ndim, w.ndim) < 2
        or (x.shape[-1], w.shape[-1]) != lengths
        or not (is_shared or x.shape[:-2] == w.shape[:-2])
    ):
        raise ValueError(
            f'x {x.shape} and w {w.shape} (bits={bits}): expected [..., M, K] and [..., N, K], or '
            '[..., N, packed_length(K, bits)] if packed, with equal leading dimensions.'
        )
    w_max = code_max if w_max is None else w_max
    check_accumulator(K, largest_term(x_max, epilogue), w_max)
    N = w.shape[-2]
    if epilogue is not None:
        check(epilogue, out_dtype, rows_shape=x.shape[:-1], num_outputs=N)
        if w.ndim > 2 and epilogue.low_rank is not None:
            raise ValueError('epilogue.low_rank with a batch of weights: expected w [N, K].')
    mode = mode_of(w, bits, signed, x_bits)
    batch = 1 if is_shared else math.prod(x.shape[:-2])
    M = math.prod(x.shape[:-1]) // max(batch, 1)
    problem = Problem(mode, batch, M, N, K, w.shape[-1], x_max, epilogue is not None)
    choice = choose(implementation, problem)
    name = choice.implementation
    choices.note(choices.Call('int_matmul', *choice, problem))
    packs = name == 'triton'
    if bits is not None and not (packs and mode != 'W8A8'):
        w = packing.unpack(w, bits, signed=signed, length=K)
    if x_bits is not None and not (packs and mode == 'W4A4'):
        x = packing.unpack(x, x_bits, signed=True, length=K)
    if epilogue is not None and epilogue.zero_point is not None and w_sum is None:
        codes = w if w.dtype == jnp.int8 else packing.unpack(w, bits, signed=True, length=K)
        w_sum = jnp.sum(codes, axis=-1, dtype=jnp.int32)
    rows_shape = x.shape[:-1]
    if is_shared:
        x = x.reshape(M, x.shape[-1])
    if name == 'triton':
        from kernels.int_matmul import triton

        if is_shared and epilogue is not None and epilogue.low_rank is not None:
            down, up = epilogue.low_rank
            epilogue = epilogue._replace(low_rank=(down.reshape(M, -1), up))
        out = triton.int_matmul(x, w, length=K, epilogue=epilogue, w_sum=w_sum, out_dtype=out_dtype)
        return out.reshape(*rows_shape, N)
    run = xla.int_matmul if name == 'xla' else reference.int_matmul
    total = run(x, w).reshape(*rows_shape, N)
    return total if epilogue is None else apply(total, epilogue, w_sum, out_dtype)
