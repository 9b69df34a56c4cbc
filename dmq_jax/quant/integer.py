"""Layers whose products run on integers: the arithmetic behind integer mode and training.

Zero points are taken out of the int32 sums exactly, so that the result stands for the same number
as rounding in float. Scales, zero points and bias are the epilogue of the product wherever one
scale per output serves the whole sum.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmq_jax.quant import numerics, products
from dmq_jax.quant.codes import (
    NIBBLE,
    carry_codes,
    fits_epilogue,
    int8_codes,
    int8_weight,
    keeps_zero_point,
    largest_code,
    make_epilogue,
    real_kernel,
)
from dmq_jax.quant.order import not_before
from dmq_jax.quant.plan import LayerSpec, Part
from dmq_jax.quant.rows import Rows, fake_quantize_input, per_image, scale_channels
from dmq_jax.quant.tensor import QuantSpec, expand
from kernels import packing
from kernels.int_conv import api as int_conv_api
from kernels.int_conv.api import int_conv
from kernels.int_matmul import api as int_matmul_api
from kernels.int_matmul.api import int_matmul


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
    elif fits_epilogue(weight, spec) and not is_scaled:
        return _fused(module, x, rows, weight, spec, bias, dtype)
    else:
        y = _accumulate(module, x, rows, weight, spec)
    return _with_bias(scale_channels(y, channels, 'output'), bias).astype(dtype)


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
    geometry = None if isinstance(module, nn.Dense) else products.conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    if jnp.issubdtype(weight['codes'].dtype, jnp.integer):
        y = _frozen_product(module, geometry, scaled, rows, dict(weight), spec)
        y = scale_channels(y, channels, 'output')
        return _with_bias(y, _bias(module, part)).astype(module.dtype or x.dtype)

    def multiply(x, rows, weight, channels, bias):
        shape = weight['codes'].shape
        kernel = numerics.dequantize(
            weight['codes'], expand(weight['scale'], shape), expand(weight['zero_point'], shape)
        )
        x_hat = x if rows is None else fake_quantize_input(x, rows, spec.inputs)
        if not _takes_integers(rows):
            value = products.product(x_hat, kernel, geometry)
        else:
            entry = int8_weight(
                jnp.moveaxis(weight['codes'], -1, 0).astype(jnp.int32),
                weight['scale'], jnp.round(weight['zero_point']).astype(jnp.int32),
                spec.weight, shape,
            )  # fmt: skip
            value = _accumulate(module, *jax.lax.stop_gradient((x, rows, entry)), spec)
        y = products.with_float_gradients(geometry, x_hat, kernel, jax.lax.stop_gradient(value))
        return _with_bias(scale_channels(y, channels, 'output'), bias)

    y = _keeping_bytes(multiply, spec.weight)(
        scaled, rows, dict(weight), channels, _bias(module, part)
    )
    return y.astype(module.dtype or x.dtype)


def _takes_integers(rows: Rows | None) -> bool:
    """Whether the value of a product in training is that of integers here."""
    return rows is not None and 'gate' not in rows and products.integers_are_faster()


def _keeping_bytes(multiply: Callable[..., Array], spec: QuantSpec) -> Callable[..., Array]:
    """`multiply(x, rows, weight, ...)`, which keeps `x` and a byte per code for its gradients.

    All else is computed again when this layer's turn comes: `jax.checkpoint` that keeps an argument
    in fewer bits. The gradient of `x` comes last: those of the others are sums over activations,
    which would otherwise wait for the optimizer's update, and the activations with them.
    """
    qmin, _ = spec.grid
    narrow = jnp.int8 if qmin < 0 else jnp.uint8

    def forward(x, rows, weight, *rest):
        kept = weight | {'codes': weight['codes'].astype(narrow)}
        return multiply(x, rows, weight, *rest), (x, rows, kept, *rest)

    def backward(kept, g):
        x, rows, weight, *rest = kept
        weight = weight | {'codes': weight['codes'].astype(jnp.float32)}
        x_slope, *slopes = jax.vjp(multiply, x, rows, weight, *rest)[1](g)
        (x_slope,) = not_before(jax.tree.leaves(slopes), [x_slope])
        return x_slope, *slopes

    call = jax.custom_vjp(multiply)
    call.defvjp(forward, backward)
    return call


class _Frozen(NamedTuple):
    """What a product of integers that stand still is, besides its operands."""

    geometry: products.Geometry
    kernel_size: tuple[int, ...]
    spec: QuantSpec
    x_shape: tuple[int, ...]

    def kernel(self, weight: Mapping[str, Array], after: Array) -> Array:
        """The real kernel, once `after` is there."""
        weight = {**weight, 'codes': _ordered(after, weight['codes'])}
        return real_kernel(weight, self.spec, self.x_shape[-1], self.kernel_size)


def _frozen_product(module, geometry, x, rows, weight, spec):
    """The product with the integers of an entry of `integer_weight`."""
    frozen = _Frozen(geometry, _kernel_size(module), spec.weight, x.shape)
    x_hat = x if rows is None else fake_quantize_input(x, rows, spec.inputs)
    if not _takes_integers(rows):
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
    geometry = None if isinstance(module, nn.Dense) else products.conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    if rows is not None:
        scaled = fake_quantize_input(scaled, rows, spec.inputs)
    kernel = _kernel(module, part).astype(jnp.float32)
    y = scale_channels(products.product(scaled, kernel, geometry), channels, 'output')
    return _with_bias(y, _bias(module, part)).astype(module.dtype or x.dtype)


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
    geometry = None if isinstance(module, nn.Dense) else products.conv_geometry(module, x.shape)
    scaled = scale_channels(x.astype(jnp.float32), channels, 'input')
    y = products.product(scaled, branch['down'], geometry) @ branch['up']
    return y.astype(module.dtype or x.dtype)


def _kernel(module: nn.Dense | nn.Conv, part: Part | None) -> Array:
    """The kernel of a layer, or of a part of it, from the network's parameters."""
    kernel = module.get_variable('params', 'kernel')
    return kernel if part is None else kernel[..., part.begin : part.end, :]


def _with_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + _as_last(bias.astype(jnp.float32), y.ndim)


def _bias(module: nn.Dense | nn.Conv, part: Part | None) -> Array | None:
    """The bias of a whole layer, or of the first of its parts; None: it has none."""
    if not module.use_bias or (part is not None and part.begin > 0):
        return None
    return module.get_variable('params', 'bias')


def _kernel_size(module: nn.Dense | nn.Conv) -> tuple[int, ...]:
    """Of a convolution; () for a Dense layer."""
    return () if isinstance(module, nn.Dense) else tuple(module.kernel_size)


def _fused(module, x, rows, weight, spec, bias, dtype):
    """A layer as one call of a kernel: codes, packed weights, epilogue."""
    channels, kernel_size = x.shape[-1], _kernel_size(module)
    num_outputs = weight['codes'].shape[0]
    geometry = {}
    if kernel_size:
        geometry = dict(
            zip(('strides', 'padding'), products.conv_geometry(module, x.shape), strict=True)
        )
    packed = weight['codes'].dtype == jnp.uint8 and spec.weight.symmetric
    nibbles = packed and _takes_nibbles(
        x.shape, (num_outputs, *kernel_size, channels), spec, geometry
    )
    x_codes, x_zero = carry_codes(x, rows, spec.inputs, keep_width=nibbles)
    options = {
        'x_max': largest_code(spec.inputs),
        'w_max': largest_code(spec.weight),
        'epilogue': make_epilogue(_channels(weight['scale'], 0), rows['scale'], x_zero, bias),
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
        w = int8_codes({**weight, 'codes': w}, spec.weight, channels, kernel_size)
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


def _half_quantized(module, x, rows, weight, spec, part):
    """A layer with float activations or float weights: the product of what they stand for."""
    if rows is not None:
        x = fake_quantize_input(x, rows, spec.inputs)
    if weight is None:
        kernel = _kernel(module, part)
    else:
        kernel = real_kernel(weight, spec.weight, x.shape[-1], _kernel_size(module))
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if isinstance(module, nn.Dense):
        return x @ kernel
    strides, padding = products.conv_geometry(module, x.shape)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _accumulate(module, x, rows, weight, spec):
    """scale_x * sum over groups of scale_w * (integer accumulator), zero points taken out."""
    x_codes, x_zero = carry_codes(x, rows, spec.inputs)
    codes = int8_codes(weight, spec.weight, x.shape[-1], _kernel_size(module))
    w_scale = weight['scale']
    bounds = {'x_max': largest_code(spec.inputs), 'w_max': largest_code(spec.weight)}
    groups = w_scale.shape[-2]
    size = codes.shape[-1] // groups
    total = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        w, xs = codes[..., part], x_codes[..., part]
        acc = _multiply(module, xs, w, x_zero, bounds)
        if keeps_zero_point(spec.weight):
            # What a weight of ones would give: the sum of the codes under the kernel.
            ones = jnp.ones((1, *w.shape[1:]), jnp.int8)
            zero = _channels(weight['zero_point'], g)
            acc = acc - _multiply(module, xs, ones, x_zero, bounds) * _as_last(zero, acc.ndim)
        scaled = acc.astype(jnp.float32) * _as_last(_channels(w_scale, g), acc.ndim)
        total = scaled if total is None else total + scaled
    return total * per_image(rows['scale'], total.ndim)


def _multiply(module, x, w, x_zero, bounds):
    """Integer product or convolution, the zero point of `x` taken out."""
    if isinstance(module, nn.Dense):
        acc = int_matmul(x.reshape(-1, x.shape[-1]), w, **bounds)
        acc = acc.reshape(*x.shape[:-1], w.shape[0])
    else:
        strides, padding = products.conv_geometry(module, x.shape)
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
