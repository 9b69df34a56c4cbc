"""Layers whose products run on integers: the arithmetic behind integer mode and training.

Inputs become int8 codes, or two to a byte where the kernel multiplies nibbles; weights of up to 4
bits stay packed in memory. Zero points are taken out of the int32 sums exactly, so that the result
stands for the same number as rounding in float. Scales, zero points and bias are the epilogue of
the product wherever one scale per output serves the whole sum.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmq_jax.quant import numerics, products
from dmq_jax.quant.plan import LayerSpec, Part
from dmq_jax.quant.rows import Rows, fake_quantize_input, per_image, scale_channels
from dmq_jax.quant.tensor import QuantizedTensor, QuantSpec, expand, unpack_rows
from kernels import packing
from kernels.epilogue import Epilogue
from kernels.int_conv import api as int_conv_api
from kernels.int_conv.api import int_conv
from kernels.int_matmul import api as int_matmul_api
from kernels.int_matmul.api import int_matmul

WIDE = 16  # bits of the only codes that int8 does not carry, those of a softmax
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
    bounds = {'x_max': _largest(lhs_spec), 'w_max': _largest(rhs_spec)}
    scale = lhs_rows['scale'] * rhs_rows['scale']
    if a_zero is None and b_zero is None:
        epilogue = _epilogue(jnp.ones(()), scale, None, None)
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
    operand = carry_codes(rhs, rhs_rows, rhs_spec), _largest(rhs_spec)
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
    total = _digit_products(w.astype(jnp.int32), (codes, zero), _largest(rhs_spec), lhs_spec.bits)
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


def integer_layer(
    module: nn.Dense | nn.Conv,
    x: Float[Array, 'B ...'],
    rows: Rows | None,
    weight: Mapping[str, Array] | None,
    spec: LayerSpec,
    channels: Rows | None = None,
    *,
    part: Part | None = None,
) -> Float[Array, 'B ...']:
    """A `Dense` or `Conv` on integer codes, with its bias.

    `channels` are factors of the channels of input and product; see `rows.scale_channels`. Of a
    `part`, `x` is what it sees; the bias comes with the first.

    Raises:
      NotImplementedError: grouped or dilated convolutions, or string paddings other than SAME and
        VALID.
    """
    bias = _bias(module, part)
    dtype = jnp.dtype(module.dtype or x.dtype)
    x = scale_channels(x, channels, 'input')
    is_scaled = channels is not None and not channels.keys().isdisjoint(('output', 'offset'))
    if weight is None or rows is None:
        y = _half_quantized(module, x, rows, weight, spec, part)
    elif _fits_epilogue(weight, spec) and not is_scaled:
        return _fused(module, x, rows, weight, spec, bias, dtype)
    else:
        y = _accumulate(module, x, rows, weight, spec)
    return _with_bias(module, scale_channels(y, channels, 'output'), part).astype(dtype)


def straight_through_layer(
    module: nn.Dense | nn.Conv,
    x: Float[Array, 'B ...'],
    rows: Rows | None,
    weight: Mapping[str, Array],
    spec: LayerSpec,
    channels: Rows | None = None,
    *,
    part: Part | None = None,
) -> Float[Array, 'B ...']:
    """A `Dense` or `Conv` of integer codes, with the gradients of the float layer.

    Its value is that of integer mode where that is faster than float (`products`), its gradients
    those of the product of the real values that the codes stand for. `channels` and `part` as in
    `integer_layer`. Codes of an integer dtype are those of `integer_weight` and stand still: they
    have no gradient, and no float copy of them waits for the backward pass.

    Raises:
      NotImplementedError: see `integer_layer`.
    """
    geometry = None if isinstance(module, nn.Dense) else conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    if jnp.issubdtype(weight['codes'].dtype, jnp.integer):
        y = _frozen_product(module, geometry, scaled, rows, dict(weight), spec)
        y = scale_channels(y, channels, 'output')
        return _with_bias(module, y, part).astype(module.dtype or x.dtype)

    # A checkpoint for each layer: only `x` and the codes wait for the backward pass, and what is
    # repeated there is repeated when this layer's turn comes, one layer at a time.
    @jax.checkpoint
    def multiply(x, rows, weight):
        shape = weight['codes'].shape
        kernel = numerics.dequantize(
            weight['codes'], expand(weight['scale'], shape), expand(weight['zero_point'], shape)
        )
        x_hat = x if rows is None else fake_quantize_input(x, rows, spec.inputs)
        if rows is None or 'gate' in rows or not products.integers_are_faster():
            value = products.product(x_hat, kernel, geometry)
        else:
            entry = _int8_weight(
                jnp.moveaxis(weight['codes'], -1, 0).astype(jnp.int32),
                weight['scale'], jnp.round(weight['zero_point']).astype(jnp.int32),
                spec.weight, shape,
            )  # fmt: skip
            value = _accumulate(module, *jax.lax.stop_gradient((x, rows, entry)), spec)
        return products.with_float_gradients(geometry, x_hat, kernel, jax.lax.stop_gradient(value))

    y = scale_channels(multiply(scaled, rows, dict(weight)), channels, 'output')
    return _with_bias(module, y, part).astype(module.dtype or x.dtype)


class _Frozen(NamedTuple):
    """What a product of integers that stand still is, besides its operands."""

    geometry: products.Geometry
    kernel_size: tuple[int, ...]
    spec: QuantSpec
    x_shape: tuple[int, ...]

    def kernel(self, weight: Mapping[str, Array], after: Array) -> Array:
        """The real kernel, once `after` is there."""
        weight = {**weight, 'codes': _ordered(after, weight['codes'])}
        return _real_kernel(weight, self.spec, self.x_shape[-1], self.kernel_size)


def _frozen_product(module, geometry, x, rows, weight, spec):
    """The product with the integers of an entry of `integer_weight`."""
    frozen = _Frozen(geometry, _kernel_size(module), spec.weight, x.shape)
    x_hat = x if rows is None else fake_quantize_input(x, rows, spec.inputs)
    if rows is None or 'gate' in rows or not products.integers_are_faster():
        kernel = frozen.kernel(weight, x_hat)
        value = products.product(jax.lax.stop_gradient(x_hat), kernel, geometry)
    else:
        value = _accumulate(module, *jax.lax.stop_gradient((x, rows)), weight, spec)
    return _with_input_gradient(frozen, x_hat, weight, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_input_gradient(frozen, x, weight, value):
    """`value`, made otherwise, with the gradient for `x` of its product with the integers."""
    del frozen, x, weight
    return value


def _keep_integers(frozen, x, weight, value):
    del frozen, x
    return value, weight


def _to_input(frozen, weight, g):
    kernel = frozen.kernel(weight, g)
    shape = jax.ShapeDtypeStruct(frozen.x_shape, g.dtype)
    transposed = jax.linear_transpose(
        lambda x: products.product(x, kernel, frozen.geometry), shape
    )  # fmt: skip
    return *transposed(g), None, None


_with_input_gradient.defvjp(_keep_integers, _to_input)


def scaled_layer(
    module: nn.Dense | nn.Conv,
    x: Float[Array, 'B ...'],
    rows: Rows | None,
    channels: Rows | None,
    spec: LayerSpec,
    *,
    part: Part | None = None,
) -> Float[Array, 'B ...']:
    """A `Dense` or `Conv` whose kernel is rounded already; `channels`, `part`: `integer_layer`.

    Raises:
      NotImplementedError: see `integer_layer`.
    """
    geometry = None if isinstance(module, nn.Dense) else conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    if rows is not None:
        scaled = fake_quantize_input(scaled, rows, spec.inputs)
    kernel = _kernel(module, part).astype(jnp.float32)
    y = scale_channels(products.product(scaled, kernel, geometry), channels, 'output')
    return _with_bias(module, y, part).astype(module.dtype or x.dtype)


def float_branch(
    module: nn.Dense | nn.Conv,
    x: Float[Array, 'B ...'],
    channels: Rows | None,
    branch: Mapping[str, Array],
) -> Float[Array, 'B ...']:
    """The product of low rank that a layer adds to that of its integers.

    Args:
      module: says strides and padding.
      x: input of the layer, or of the part of it that the branch belongs to.
      channels: of the layer.
      branch: 'down' [..., K, R] and 'up' [R, N].
    """
    geometry = None if isinstance(module, nn.Dense) else conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    y = products.product(scaled, branch['down'], geometry) @ branch['up']
    return y.astype(module.dtype or x.dtype)


def _kernel(module: nn.Dense | nn.Conv, part: Part | None) -> Array:
    """The kernel of a layer, or of a part of it, from the network's parameters."""
    kernel = module.get_variable('params', 'kernel')
    return kernel if part is None else kernel[..., part.begin : part.end, :]


def _with_bias(module: nn.Dense | nn.Conv, y: Array, part: Part | None) -> Array:
    bias = _bias(module, part)
    return y if bias is None else y + _as_last(bias.astype(jnp.float32), y.ndim)


def _bias(module: nn.Dense | nn.Conv, part: Part | None) -> Array | None:
    """The bias of a whole layer, or of the first of its parts; None: it has none."""
    if not module.use_bias or (part is not None and part.begin > 0):
        return None
    return module.get_variable('params', 'bias')


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
        entry = _int8_weight(codes, scale, zero_point, spec, tensor.shape)
    keeps_zero = inputs is not None and not inputs.symmetric and inputs.bits in (NIBBLE, 8)
    if keeps_zero and _fits_epilogue(entry, LayerSpec(weight=spec, inputs=inputs)):
        codes = _int8_codes(entry, spec, tensor.shape[-2], tensor.shape[:-2])
        entry['tap_sum'] = jnp.sum(codes, axis=-1, dtype=jnp.int32).reshape(codes.shape[0], -1)
    return entry


def _int8_weight(codes, scale, zero_point, spec, shape):
    """`integer_weight` of int32 codes with the output channel first, shape [N, ..., K]."""
    if _keeps_zero_point(spec):
        codes, zero_point = codes - 128, zero_point - 128
    elif not spec.symmetric:
        zeros = jnp.broadcast_to(expand(zero_point, shape), shape)
        codes, zero_point = codes - jnp.moveaxis(zeros, -1, 0), jnp.zeros_like(zero_point)
    return {'codes': codes.astype(jnp.int8), 'scale': scale, 'zero_point': zero_point}


def _int8_codes(weight, spec, channels, kernel_size):
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


def _kernel_size(module: nn.Dense | nn.Conv) -> tuple[int, ...]:
    """Of a convolution; () for a Dense layer."""
    return () if isinstance(module, nn.Dense) else tuple(module.kernel_size)


def _fits_epilogue(weight: Mapping[str, Array], spec: LayerSpec) -> bool:
    """Whether one scale per output, and no zero point of the weight, serves the whole sum."""
    return weight['scale'].shape[-2] == 1 and not _keeps_zero_point(spec.weight)


def _epilogue(w_scale, scale, zero_code, bias) -> Epilogue:
    """What follows a product, for rows ([] or one per image) that were picked already."""
    table = scale.reshape(-1)
    row = jnp.zeros((), jnp.int32) if scale.ndim == 0 else jnp.arange(table.size, dtype=jnp.int32)
    zero_point = None if zero_code is None else zero_code.reshape(-1)
    return Epilogue(w_scale, table, row, zero_point, bias)


def _fused(module, x, rows, weight, spec, bias, dtype):
    """A layer as one call of a kernel: codes, packed weights, epilogue."""
    channels, kernel_size = x.shape[-1], _kernel_size(module)
    num_outputs = weight['codes'].shape[0]
    geometry = {}
    if kernel_size:
        geometry = dict(zip(('strides', 'padding'), conv_geometry(module, x.shape), strict=True))
    packed = weight['codes'].dtype == jnp.uint8 and spec.weight.symmetric
    nibbles = packed and _takes_nibbles(
        x.shape, (num_outputs, *kernel_size, channels), spec, geometry
    )
    x_codes, x_zero = carry_codes(x, rows, spec.inputs, keep_width=nibbles)
    options = {
        'x_max': _largest(spec.inputs),
        'w_max': _largest(spec.weight),
        'epilogue': _epilogue(_channels(weight['scale'], 0), rows['scale'], x_zero, bias),
        'out_dtype': dtype.name,
        **geometry,
    }
    if nibbles:
        x_codes = packing.pack(x_codes, NIBBLE)
        options['x_bits'] = NIBBLE
    w = _after(x, weight['codes'])
    if packed:
        options['bits'] = spec.weight.bits
    else:
        w = _int8_codes({**weight, 'codes': w}, spec.weight, channels, kernel_size)
    tap_sum = weight.get('tap_sum')
    if not kernel_size:
        w_sum = None if tap_sum is None else tap_sum[:, 0]
        return int_matmul(x_codes, w, w_sum=w_sum, **options)
    if packed:
        options['kernel_size'] = kernel_size
    return int_conv(x_codes, w, tap_sum=tap_sum, **options)


def _after(x: Array, codes: Array) -> Array:
    """`codes`, packed ones only once `x` is there, so that they are unpacked layer by layer.

    XLA for CPU otherwise unpacks the weights of all layers first, and outside the loop of a
    sampler: 2.5 times the memory of the whole model. It drops optimization barriers before it
    schedules, so the order is a dependency that it cannot see through: on NaN, which no integer
    represents anyway. Not on several devices, which would have to tell one another of it.
    """
    return _ordered(x, codes) if codes.dtype == jnp.uint8 else codes


def _ordered(x: Array, codes: Array) -> Array:
    """`codes`, not before `x` is there; see `_after`."""
    if jax.default_backend() != 'cpu' or jax.device_count() > 1:
        return codes
    first = x[(0,) * x.ndim]
    return codes ^ (first != first).astype(codes.dtype)


def _takes_nibbles(x_shape, w_shape, spec, geometry):
    """Whether the kernel that runs here multiplies 4-bit inputs two to a byte."""
    if spec.inputs.bits != NIBBLE or packing.container_bits(spec.weight.bits) != NIBBLE:
        return False
    api = int_conv_api if geometry else int_matmul_api
    return api.takes_nibbles(x_shape, w_shape, **geometry)


def _keeps_zero_point(spec: QuantSpec) -> bool:
    """Whether codes minus zero point would not fit int8."""
    return spec.bits == 8 and not spec.symmetric


def _half_quantized(module, x, rows, weight, spec, part):
    """A layer with float activations or float weights: the product of what they stand for."""
    if rows is not None:
        x = fake_quantize_input(x, rows, spec.inputs)
    if weight is None:
        kernel = _kernel(module, part)
    else:
        kernel = _real_kernel(weight, spec.weight, x.shape[-1], _kernel_size(module))
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if isinstance(module, nn.Dense):
        return x @ kernel
    strides, padding = conv_geometry(module, x.shape)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _real_kernel(weight, spec, channels, kernel_size):
    """The float kernel that an entry of `integer_weight` stands for."""
    codes = _int8_codes(weight, spec, channels, kernel_size)
    codes = jnp.moveaxis(codes, 0, -1).astype(jnp.float32)
    zero_point = jnp.zeros(())
    if _keeps_zero_point(spec):
        zero_point = expand(weight['zero_point'].astype(jnp.float32), codes.shape)
    return numerics.dequantize(codes, expand(weight['scale'], codes.shape), zero_point)


def _accumulate(module, x, rows, weight, spec):
    """scale_x * sum over groups of scale_w * (integer accumulator), zero points taken out."""
    x_codes, x_zero = carry_codes(x, rows, spec.inputs)
    codes = _int8_codes(weight, spec.weight, x.shape[-1], _kernel_size(module))
    w_scale = weight['scale']
    bounds = {'x_max': _largest(spec.inputs), 'w_max': _largest(spec.weight)}
    groups = w_scale.shape[-2]
    size = codes.shape[-1] // groups
    total = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        w, xs = codes[..., part], x_codes[..., part]
        acc = _multiply(module, xs, w, x_zero, bounds)
        if _keeps_zero_point(spec.weight):
            # What a weight of ones would give: the sum of the codes under the kernel.
            ones = jnp.ones((1, *w.shape[1:]), jnp.int8)
            zero = _channels(weight['zero_point'], g)
            acc = acc - _multiply(module, xs, ones, x_zero, bounds) * _as_last(zero, acc.ndim)
        scaled = acc.astype(jnp.float32) * _as_last(_channels(w_scale, g), acc.ndim)
        total = scaled if total is None else total + scaled
    return total * per_image(rows['scale'], total.ndim)


def _largest(spec: QuantSpec) -> int:
    """The largest |code - zero point| of a tensor of `spec`, at least any |code| that int8 holds.

    It bounds the sum with the zero points taken out; on the way there int32 may wrap around.
    """
    return 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1


def _multiply(module, x, w, x_zero, bounds):
    """Integer product or convolution, the zero point of `x` taken out."""
    if isinstance(module, nn.Dense):
        acc = int_matmul(x.reshape(-1, x.shape[-1]), w, **bounds)
        acc = acc.reshape(*x.shape[:-1], w.shape[0])
    else:
        strides, padding = conv_geometry(module, x.shape)
        pad_value = 0 if x_zero is None else x_zero
        acc = int_conv(x, w, strides=strides, padding=padding, pad_value=pad_value, **bounds)
    if x_zero is None:
        return acc
    column_sum = jnp.sum(w.astype(jnp.int32), axis=tuple(range(1, w.ndim)))
    return acc - per_image(x_zero, acc.ndim) * _as_last(column_sum, acc.ndim)


def _channels(table: Array, group: int) -> Array:
    """Entry `group` of a `scale_shape` table: [] or [N]."""
    return table.reshape(()) if table.size == 1 else table.reshape(-1, table.shape[-1])[group]


def _as_last(vector: Array, ndim: int) -> Array:
    """[N] or [] with axes of size 1 before it: ranks are never matched implicitly."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def conv_geometry(
    module: nn.Conv, x_shape: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]:
    """Strides and explicit padding of a Flax convolution over images of `x_shape`.

    Raises:
      NotImplementedError: groups, dilation, other than two spatial axes, or an unusual padding.
    """
    path = '/'.join(module.path)
    sizes = module.kernel_size
    if len(sizes) != 2:
        raise NotImplementedError(f'{path}: {len(sizes)} spatial axes; integers need 2.')
    pair = functools.partial(_as_pair, path=path)
    dilated = pair(module.kernel_dilation) != (1, 1) or pair(module.input_dilation) != (1, 1)
    if module.feature_group_count != 1 or dilated:
        raise NotImplementedError(
            f'{path}: grouped or dilated convolutions have no integer form here; leave the layer '
            f'float with a rule.'
        )
    strides = pair(module.strides)
    padding = module.padding
    if isinstance(padding, str):
        if padding not in ('SAME', 'VALID'):
            raise NotImplementedError(f"{path}: padding={padding!r}; expected 'SAME' or 'VALID'.")
        return strides, tuple(jax.lax.padtype_to_pads(x_shape[1:3], sizes, strides, padding))
    sides = [padding, padding] if isinstance(padding, int) else padding
    return strides, tuple((s, s) if isinstance(s, int) else tuple(s) for s in sides)


def _as_pair(value, *, path):
    if value is None:
        return (1, 1)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise NotImplementedError(f'{path}: {value} for two spatial axes.')
    return pair
