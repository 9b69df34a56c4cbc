"""Products of two activations on integers: those of attention, on every grid of a softmax."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmq_jax.quant import numerics
from dmq_jax.quant.codes import carry_codes, largest_code, make_epilogue
from dmq_jax.quant.rows import Rows, per_image
from dmq_jax.quant.tensor import QuantSpec
from kernels.int_matmul.api import int_matmul

WIDE = 16  # bits of the only codes that int8 does not carry, those of a softmax


def integer_product(
    lhs: Float[Array, 'B *batch M K'],
    rhs: Float[Array, 'B *batch N K'],
    lhs_rows: Rows,
    rhs_rows: Rows,
    *,
    lhs_spec: QuantSpec,
    rhs_spec: QuantSpec,
) -> Float[Array, 'B *batch M N']:
    """A product of two activations on integers, zero points taken out of the sum exactly."""
    if 'powers' in lhs_rows or 'roots' in lhs_rows:
        return _product_of_powers(lhs, rhs, lhs_rows, rhs_rows, lhs_spec, rhs_spec)
    if lhs_spec.bits == WIDE:
        return _product_of_wide(lhs, rhs, lhs_rows, rhs_rows, lhs_spec, rhs_spec)
    a, a_zero = carry_codes(lhs, lhs_rows, lhs_spec)
    b, b_zero = carry_codes(rhs, rhs_rows, rhs_spec)
    bounds = {'x_max': largest_code(lhs_spec), 'w_max': largest_code(rhs_spec)}
    scale = lhs_rows['scale'] * rhs_rows['scale']
    if a_zero is None and b_zero is None:
        epilogue = make_epilogue(jnp.ones(()), scale, None, None)
        return int_matmul(a, b, **bounds, epilogue=epilogue, out_dtype=lhs.dtype.name)
    total = int_matmul(a, b, **bounds)
    # sum (a - za)(b - zb) = sum ab - za sum b - zb sum a + K za zb
    none = jnp.zeros((), jnp.int32)
    za, zb = (none if z is None else per_image(z, a.ndim) for z in (a_zero, b_zero))
    a_sum = jnp.sum(a.astype(jnp.int32), axis=-1)[..., :, None]
    b_sum = jnp.sum(b.astype(jnp.int32), axis=-1)[..., None, :]
    total = total - za * b_sum - zb * a_sum + a.shape[-1] * za * zb
    return (total.astype(jnp.float32) * per_image(scale, total.ndim)).astype(lhs.dtype)


def _product_of_powers(lhs, rhs, lhs_rows, rhs_rows, lhs_spec, rhs_spec):
    """`integer_product` whose `lhs` is on a grid of powers, or on an even one, as its rows say.

    None has a zero point. A value is an integer w times a unit: w is the code of an even grid, or
    2^(largest - q); powers of sqrt(2) are such integers as well, the odd ones times sqrt(2).
    """
    x = lhs.astype(jnp.float32)
    operand = carry_codes(rhs, rhs_rows, rhs_spec), largest_code(rhs_spec)
    if 'roots' in lhs_rows:
        top = numerics.largest_root(lhs_spec.bits)
        largest = top // 2
        scale = per_image(lhs_rows['roots'], x.ndim)
        q = numerics.exponents(x, scale, top, per_octave=2).astype(jnp.int32)
        w = jnp.where(q < top, jnp.left_shift(1, largest - (q + 1) // 2), 0)
        is_odd = q % 2 == 1
        total = _digit_products(jnp.where(is_odd, 0, w), *operand, largest + 1)
        odd = _digit_products(jnp.where(is_odd, w, 0), *operand, largest + 1)
        total = total + odd * np.float32(np.sqrt(2))
        unit = lhs_rows['roots'] * 2.0**-largest
    else:
        largest = numerics.largest_exponent(lhs_spec.bits)
        scale, powers = (per_image(lhs_rows[name], lhs.ndim) for name in ('scale', 'powers'))
        codes = numerics.quantize(x, scale, jnp.zeros_like(scale), *lhs_spec.grid)
        q = numerics.exponents(x, jnp.where(powers > 0, powers, 1.0), largest).astype(jnp.int32)
        w = jnp.where(powers > 0, jnp.left_shift(1, largest - q), codes.astype(jnp.int32))
        total = _digit_products(w, *operand, max(largest + 1, lhs_spec.bits))
        unit = jnp.where(
            lhs_rows['powers'] > 0, lhs_rows['powers'] * 2.0**-largest, lhs_rows['scale']
        )
    scale = per_image(unit, total.ndim) * per_image(rhs_rows['scale'], total.ndim)
    return (total * scale).astype(lhs.dtype)


def _product_of_wide(lhs, rhs, lhs_rows, rhs_rows, lhs_spec, rhs_spec):
    """`integer_product` of unsigned 16-bit codes: two int8 products, one for each byte."""
    scale, zero_point = (per_image(lhs_rows[name], lhs.ndim) for name in ('scale', 'zero_point'))
    w = numerics.quantize(lhs.astype(jnp.float32), scale, zero_point, *lhs_spec.grid)
    codes, zero = carry_codes(rhs, rhs_rows, rhs_spec)
    total = _digit_products(
        w.astype(jnp.int32), (codes, zero), largest_code(rhs_spec), lhs_spec.bits
    )
    # What the zero point adds, which is 0 unless a method has learnt another.
    sums = jnp.sum(codes.astype(jnp.int32), axis=-1)[..., None, :]
    if zero is not None:
        sums = sums - codes.shape[-1] * per_image(zero, sums.ndim)
    total = total - jnp.round(zero_point) * sums.astype(jnp.float32)
    unit = per_image(lhs_rows['scale'] * rhs_rows['scale'], total.ndim)
    return (total * unit).astype(lhs.dtype)


def _digit_products(w, carried, rhs_max, num_bits):
    """W times the codes of an operand, minus its zero point, for integers 0 <= w < 2^num_bits.

    The bytes of w, shifted into int8, are the operands of a few int8 products, whose sums are
    exact, whichever grid is in use at a timestep.
    """
    codes, zero = carried
    code_sums = jnp.sum(codes.astype(jnp.int32), axis=-1)[..., None, :]
    total = 0.0
    for index in range(-(-num_bits // 8)):
        digit = jnp.right_shift(w, 8 * index) & 255
        acc = int_matmul((digit - 128).astype(jnp.int8), codes, x_max=255, w_max=rhs_max)
        acc = acc + 128 * code_sums
        if zero is not None:
            acc = acc - per_image(zero, acc.ndim) * jnp.sum(digit, axis=-1)[..., :, None]
        total = total + acc.astype(jnp.float32) * 2.0 ** (8 * index)
    return total
