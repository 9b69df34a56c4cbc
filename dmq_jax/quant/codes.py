"""Integers as the products of integer mode take them: int8 codes, packed weights, epilogues.

Inputs become int8 codes; weights of up to 4 bits stay packed in memory. Where a zero point does not
fit beside its code, it is carried along and taken out of the sums.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmq_jax.quant import numerics
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.rows import Rows, per_image
from dmq_jax.quant.tensor import QuantizedTensor, QuantSpec, expand, unpack_rows
from kernels import packing
from kernels.epilogue import Epilogue

NIBBLE = 4  # bits of the widest codes that are stored two to a byte


def carry_codes(
    x: Float[Array, 'B ...'], rows: Rows, spec: QuantSpec, *, keep_width: bool = False
) -> tuple[Int[Array, 'B ...'], Array | None]:
    """int8 codes of `x`, and the code that means 0.0 (None: it is 0).

    Up to 7 bits the zero point is subtracted at once: the difference of two codes still fits
    int8, and zero padding is exact for free. At 8 bits, or to `keep_width`, codes are shifted by
    half of the grid into a signed one.
    """
    qmin, qmax = spec.grid
    scale, zero_point = (per_image(rows[name], x.ndim) for name in ('scale', 'zero_point'))
    codes = numerics.quantize(x.astype(jnp.float32), scale, zero_point, qmin, qmax)
    if spec.symmetric:
        return codes.astype(jnp.int8), None
    rounded = jnp.round(zero_point)
    if spec.bits < 8 and not keep_width:
        return (codes - rounded).astype(jnp.int8), None
    half = 2 ** (spec.bits - 1)
    zero_code = jnp.round(rows['zero_point']).astype(jnp.int32) - half
    return (codes - float(half)).astype(jnp.int8), zero_code


def largest_code(spec: QuantSpec) -> int:
    """The largest |code - zero point| of a tensor of `spec`, at least any |code| that int8 holds.

    It bounds the sum with the zero points taken out; on the way there int32 may wrap around.
    """
    return 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1


def integer_weight(tensor: QuantizedTensor, inputs: QuantSpec | None = None) -> dict[str, Array]:
    """The entry `weight` of the collection `quant` for integer mode.

    `codes` have the output channel first. Of up to 4 bits they stay packed (uint8), and each call
    unpacks what its back end does not take, which costs little (kernels/README.md, "Integer
    sampling on CPU"). Wider ones are int8: up to 7 bits an asymmetric weight's zero point is
    subtracted at once; at 8 bits codes and zero point are shifted by 128 into int8.

    Args:
      tensor: packed.
      inputs: spec of the layer's inputs. Codes that are carried with their zero point need
        `tap_sum`, the sum over the channels of each tap, which is then computed once.
    """
    spec, scale = tensor.spec, jnp.asarray(tensor.scale)
    zero_point = jnp.asarray(tensor.zero_point)
    if spec.bits <= NIBBLE:
        entry = {'codes': jnp.asarray(tensor.packed), 'scale': scale, 'zero_point': zero_point}
    else:
        codes = jnp.asarray(unpack_rows(tensor)).astype(jnp.int32)
        entry = int8_weight(codes, scale, zero_point, spec, tensor.shape)
    keeps_zero = inputs is not None and not inputs.symmetric and inputs.bits in (NIBBLE, 8)
    if keeps_zero and fits_epilogue(entry, LayerSpec(weight=spec, inputs=inputs)):
        entry['tap_sum'] = _tap_sum(entry, spec, tensor.shape[-2], tensor.shape[:-2])
    return entry


# As one program a shape: operation by operation, those of a network take seconds to compile.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _tap_sum(entry, spec, channels, kernel_size):
    codes = int8_codes(entry, spec, channels, kernel_size)
    return jnp.sum(codes, axis=-1, dtype=jnp.int32).reshape(codes.shape[0], -1)


def int8_weight(
    codes: Int[Array, 'N ...'],
    scale: Float[Array, '...'],
    zero_point: Int[Array, '...'],
    spec: QuantSpec,
    shape: tuple[int, ...],
) -> dict[str, Array]:
    """`integer_weight` of int32 codes with the output channel first, shape [N, ..., K]."""
    if keeps_zero_point(spec):
        codes, zero_point = codes - 128, zero_point - 128
    elif not spec.symmetric:
        zeros = jnp.broadcast_to(expand(zero_point, shape), shape)
        codes, zero_point = codes - jnp.moveaxis(zeros, -1, 0), jnp.zeros_like(zero_point)
    return {'codes': codes.astype(jnp.int8), 'scale': scale, 'zero_point': zero_point}


def int8_codes(
    weight: Mapping[str, Array], spec: QuantSpec, channels: int, kernel_size: tuple[int, ...]
) -> Int[Array, 'N ...']:
    """int8 codes [N, *kernel_size, K] of an entry, zero point taken out unless it is kept."""
    codes = weight['codes']
    if codes.dtype != jnp.uint8:
        return codes
    codes = packing.unpack(codes, spec.bits, signed=spec.symmetric, length=channels)
    codes = codes.reshape(codes.shape[0], *kernel_size, channels)
    if spec.symmetric:
        return codes
    shape = (*codes.shape[1:], codes.shape[0])
    return codes - jnp.moveaxis(
        jnp.broadcast_to(expand(weight['zero_point'], shape), shape), -1, 0
    ).astype(jnp.int8)


def real_kernel(
    weight: Mapping[str, Array], spec: QuantSpec, channels: int, kernel_size: tuple[int, ...]
) -> Float[Array, '...']:
    """The float kernel that an entry of `integer_weight` stands for."""
    codes = int8_codes(weight, spec, channels, kernel_size)
    codes = jnp.moveaxis(codes, 0, -1).astype(jnp.float32)
    zero_point = jnp.zeros(())
    if keeps_zero_point(spec):
        zero_point = expand(weight['zero_point'].astype(jnp.float32), codes.shape)
    return numerics.dequantize(codes, expand(weight['scale'], codes.shape), zero_point)


def keeps_zero_point(spec: QuantSpec) -> bool:
    """Whether codes minus zero point would not fit int8."""
    return spec.bits == 8 and not spec.symmetric


def fits_epilogue(weight: Mapping[str, Array], spec: LayerSpec) -> bool:
    """Whether one scale per output, and no zero point of the weight, serves the whole sum."""
    return weight['scale'].shape[-2] == 1 and not keeps_zero_point(spec.weight)


def make_epilogue(
    w_scale: Float[Array, '...'],
    scale: Float[Array, '...'],
    zero_code: Int[Array, '...'] | None,
    bias: Array | None,
) -> Epilogue:
    """What follows a product, for rows ([] or one per image) that were picked already."""
    table = scale.reshape(-1)
    row = jnp.zeros((), jnp.int32) if scale.ndim == 0 else jnp.arange(table.size, dtype=jnp.int32)
    zero_point = None if zero_code is None else zero_code.reshape(-1)
    return Epilogue(w_scale, table, row, zero_point, bias)
