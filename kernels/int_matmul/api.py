"""Front door of the integer product: checks, unpacking, choice of the back end."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32, UInt8

from kernels import packing
from kernels.int_matmul import reference, xla

INT32_MAX = 2**31 - 1


class Backend(NamedTuple):
    """One way to compute: `run(x, w)`, and `refusal() -> str | None`, why it cannot run here."""

    run: Callable[..., Array]
    refusal: Callable[[], str | None]


class Choice(NamedTuple):
    """Name of the back end that will run, and why."""

    implementation: str
    reason: str


# In order of preference; the reference, last, accepts everything.
BACKENDS = {
    'xla': Backend(xla.int_matmul, xla.refusal),
    'reference': Backend(reference.int_matmul, reference.refusal),
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


def choose_backend(backends: dict[str, Backend], implementation: str | None) -> Choice:
    """The back end to run, in the order of `backends` unless one is named.

    Args:
      backends: what there is, in order of preference.
      implementation: a name that must be honoured, or None.

    Raises:
      ValueError: if there is no such name.
      NotImplementedError: if the named one cannot run here, with its reason.
    """
    if implementation is None:
        refusals = []
        for name, backend in backends.items():
            refusal = backend.refusal()
            if refusal is None:
                return Choice(name, '; '.join([*refusals, f'{name} is the first that can run']))
            refusals.append(f'{name}: {refusal}')
        raise AssertionError('the reference accepts every input')
    if implementation not in backends:
        raise ValueError(f'implementation={implementation!r}: expected None or {list(backends)}.')
    refusal = backends[implementation].refusal()
    if refusal is not None:
        raise NotImplementedError(f'{implementation}: {refusal}.')
    return Choice(implementation, 'named by the caller')


def choose(implementation: str | None = None) -> Choice:
    """The back end that `int_matmul` runs on this machine, and why; raises as it does."""
    return choose_backend(BACKENDS, implementation)


def int_matmul(
    x: Int8[Array, '*batch M K'],
    w: Int8[Array, '*batch N K'] | UInt8[Array, '*batch N L'],
    *,
    bits: int | None = None,
    signed: bool = True,
    x_max: int = 128,
    w_max: int | None = None,
    implementation: str | None = None,
) -> Int32[Array, '*batch M N']:
    """Exact integer product: out[..., m, n] = sum over k of x[..., m, k] w[..., n, k].

    Both operands hold K last; q times k^T needs no transpose, softmax times v takes
    `w=swapaxes(v, -1, -2)`. Leading batch dimensions must be equal.

    Args:
      x: int8 codes.
      w: int8 codes, or codes packed by `packing.pack` (uint8, then `bits` is needed).
      bits: width of packed codes, 2..8; None for int8.
      signed: whether packed codes are signed; ignored for int8.
      x_max: largest |code| in x, a promise used only to bound the accumulator.
      w_max: the same for w; None takes it from `bits` and `signed`.
      implementation: None, or the name of a back end that must run ('xla', 'reference').

    Returns:
      int32 sums, equal for every back end.

    Raises:
      ValueError: if dtypes or shapes disagree, or a sum might not fit int32.
      NotImplementedError: if the named back end cannot run here.
    """
    run = BACKENDS[choose(implementation).implementation].run
    if x.dtype != jnp.int8:
        raise ValueError(f'x is {x.dtype}: expected int8.')
    code_max = check_weight(w, bits, signed)
    length = (
        None
        if x.ndim < 2
        else x.shape[-1]
        if bits is None
        else packing.packed_length(x.shape[-1], bits)
    )
    if x.ndim < 2 or x.shape[:-2] != w.shape[:-2] or w.ndim != x.ndim or w.shape[-1] != length:
        raise ValueError(
            f'x {x.shape} and w {w.shape} (bits={bits}): expected [..., M, K] and [..., N, K], or '
            '[..., N, packed_length(K, bits)] if packed, with equal leading dimensions.'
        )
    check_accumulator(x.shape[-1], x_max, code_max if w_max is None else w_max)
    if bits is not None:
        w = packing.unpack(w, bits, signed=signed, length=x.shape[-1])
    return run(x, w)
