"""Integer grids, rounding, and the only gradient rule of the project.

Conventions, each held by a test:

* `x ≈ (q - zero_point) * scale`; the scale multiplies and is > 0; the zero point is an integer.
* `q = clip(round(x / scale) + zero_point, qmin, qmax)`, half to even, rounded before the zero
  point is added.
* Grid: symmetric `[-2^(b-1), 2^(b-1) - 1]` with zero point 0, asymmetric `[0, 2^b - 1]`.
* Straight-through gradient: 1 for every value whose code lies in `[qmin, qmax]`, the ends
  included, 0 beyond. (`jnp.clip` alone has 0.5 at the ends, where at 2 bits a third of all values
  of a Gaussian sit.) The gradients of scale and zero point, LSQ's (arXiv:1902.08153, eq. 3) and
  LSQ+'s (arXiv:2004.09576, eq. 5), fall out of the arithmetic around it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def integer_grid(bits: int, symmetric: bool) -> tuple[int, int]:
    """The ends (qmin, qmax) of the grid.

    Args:
      bits: width, 2..8, or 16.
      symmetric: signed around zero, or unsigned with a zero point.

    Raises:
      ValueError: for another width.
    """
    if not 2 <= bits <= 8 and bits != 16:
        raise ValueError(f'bits={bits}: expected 2..8, or 16.')
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@jax.custom_vjp
def straight_through_round(v: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """Rounds half to even; gradient 1."""
    return jnp.round(v)


straight_through_round.defvjp(lambda v: (jnp.round(v), None), lambda _, g: (g,))


@jax.custom_vjp
def straight_through_clip(
    q: Float[Array, '*shape'], qmin: Float[Array, ''], qmax: Float[Array, '']
) -> Float[Array, '*shape']:
    """Clips to [qmin, qmax]; gradient 1 inside and at the ends, 0 beyond."""
    return jnp.clip(q, qmin, qmax)


def _clip_forward(q, qmin, qmax):
    return jnp.clip(q, qmin, qmax), is_inside(q, qmin, qmax)


def _clip_backward(inside, g):
    zero = jnp.zeros((), g.dtype)
    return jnp.where(inside, g, zero), zero, zero


straight_through_clip.defvjp(_clip_forward, _clip_backward)


def is_inside(q: Float[Array, '*shape'], qmin: Array, qmax: Array) -> Bool[Array, '*shape']:
    """Whether a code, not yet clipped, lies on the grid."""
    return (q >= qmin) & (q <= qmax)


def quantize(
    x: Float[Array, '*shape'],
    scale: Float[Array, '*broadcast'],
    zero_point: Float[Array, '*broadcast'],
    qmin: int,
    qmax: int,
) -> Float[Array, '*shape']:
    """Real values -> integer codes, carried in the dtype of `x`, with straight-through gradients.

    Args:
      x: real values.
      scale: > 0, broadcasts against `x`.
      zero_point: rounded here with a straight-through gradient, so that a learnt one stays real
        between steps and an integer in use; broadcasts against `x`.
      qmin: lowest code.
      qmax: highest code.
    """
    codes = straight_through_round(x / scale) + straight_through_round(zero_point)
    return straight_through_clip(codes, jnp.asarray(qmin, x.dtype), jnp.asarray(qmax, x.dtype))


def dequantize(
    codes: Float[Array, '*shape'],
    scale: Float[Array, '*broadcast'],
    zero_point: Float[Array, '*broadcast'],
) -> Float[Array, '*shape']:
    """Integer codes -> the real values they stand for."""
    return (codes - straight_through_round(zero_point)) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fake_quantize(
    x: Float[Array, '*shape'],
    scale: Float[Array, '*broadcast'],
    zero_point: Float[Array, '*broadcast'],
    qmin: float,
    qmax: float,
) -> Float[Array, '*shape']:
    """`dequantize(quantize(x))`: the nearest values that the integers can represent.

    Its gradients are those of the two functions, summed at once. Of `x` alone is kept for them.
    """
    return dequantize(quantize(x, scale, zero_point, qmin, qmax), scale, zero_point)


def _fake_forward(x, scale, zero_point, qmin, qmax):
    kept = tuple(map(jnp.asarray, (x, scale, zero_point)))
    return fake_quantize(x, scale, zero_point, qmin, qmax), kept


def _fake_backward(qmin, qmax, kept, g):
    x, scale, zero_point = kept
    zero = jnp.round(zero_point)
    codes = jnp.round(x / scale) + zero
    x_slope = jnp.where(is_inside(codes, qmin, qmax), g, jnp.zeros((), g.dtype))
    value = (jnp.clip(codes, qmin, qmax) - zero) * scale
    # Where a code is inside, a larger scale moves its value by (value - x) / scale, and a larger
    # zero point does not; at the ends by value / scale, and by -scale.
    scale_slope = _sum_like(g * value - x_slope * x, scale) / scale
    zero_slope = _sum_like(x_slope - g, jnp.add(scale, zero_point)) * scale
    return x_slope, scale_slope, _sum_like(zero_slope, zero_point)


fake_quantize.defvjp(_fake_forward, _fake_backward)


def _sum_like(x: Array, like: Array) -> Array:
    """`x` summed over what `like` is broadcast along."""
    missing = x.ndim - like.ndim
    axes = [i for i in range(x.ndim) if i < missing or like.shape[i - missing] < x.shape[i]]
    return jnp.sum(x, axis=tuple(axes), keepdims=True).reshape(like.shape) if axes else x


# Beyond, a power of two is less than 2^-27 of the scale: nothing, beside the other terms of a sum.
LARGEST_EXPONENT = 27


def largest_exponent(bits: int) -> int:
    """The largest code q of a logarithmic grid of this width, whose values are scale * 2^-q."""
    return min(2**bits - 1, LARGEST_EXPONENT)


def largest_root(bits: int) -> int:
    """The largest code of a grid of powers of sqrt(2); it stands for 0."""
    return min(2**bits - 1, 2 * LARGEST_EXPONENT)


def exponents(
    x: Float[Array, '*shape'],
    scale: Float[Array, '*broadcast'],
    largest: int,
    *,
    per_octave: int = 1,
) -> Float[Array, '*shape']:
    """Codes clip(round(-per_octave log2(x / scale)), 0, largest) of values not below 0."""
    smallest = 2.0 ** -((largest + 1) / per_octave)
    code = jnp.round(-per_octave * jnp.log2(jnp.maximum(x / scale, smallest)))
    return jnp.clip(code, 0.0, float(largest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _nearest_power(x, scale, largest, per_octave):
    powers = 2.0 ** -(np.arange(largest + 1) / per_octave)
    if per_octave > 1:
        powers[largest] = 0.0
    codes = exponents(x, scale, largest, per_octave=per_octave).astype(jnp.int32)
    return scale * jnp.asarray(powers, x.dtype)[codes]


def _power_forward(x, scale, largest, per_octave):
    return _nearest_power(x, scale, largest, per_octave), x <= scale


def _power_backward(largest, per_octave, inside, g):
    del largest, per_octave
    zero = jnp.zeros((), g.dtype)
    return jnp.where(inside, g, zero), jnp.where(inside, zero, g)


_nearest_power.defvjp(_power_forward, _power_backward)


def fake_quantize_powers(
    x: Float[Array, '*shape'], scale: Float[Array, '*broadcast'], largest: int
) -> Float[Array, '*shape']:
    """The nearest (in the exponent) of the values scale * 2^-q, q in [0, largest].

    Gradient: 1 for `x` up to `scale`, beyond which it goes to `scale`.

    Args:
      x: not negative.
      scale: > 0, the largest value; broadcasts against `x`.
      largest: see `largest_exponent`.
    """
    return _nearest_power(x, jnp.broadcast_to(scale, x.shape), largest, 1)


def fake_quantize_roots(
    x: Float[Array, '*shape'], scale: Float[Array, '*broadcast'], largest: int
) -> Float[Array, '*shape']:
    """The nearest (in the exponent) of scale * 2^(-q / 2), q below `largest`, or 0 beyond.

    Args:
      x: not negative.
      scale: > 0, the largest value; broadcasts against `x`.
      largest: see `largest_root`.
    """
    return _nearest_power(x, jnp.broadcast_to(scale, x.shape), largest, 2)
