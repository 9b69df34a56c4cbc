"""Products of two real operands that lie on integer grids: their value, and their gradients.

While a student is trained, the value of a product comes from integers where they are faster than
float32, and the gradients are those of the float product (straight through). On CPU the gradient
of a convolution's kernel is not XLA's: see `kernel_gradient`. Measured ratios: README, "Speed".
"""

import functools

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dmq_jax.quant import winograd

Pads = tuple[tuple[int, int], tuple[int, int]]
Geometry = tuple[tuple[int, int], Pads] | None  # strides and padding; None for a Dense layer


def integers_are_faster() -> bool:
    """Whether a training step takes the values of its products from integers here.

    On CPU only (see kernels/README.md); elsewhere it has not been measured.
    """
    return jax.default_backend() == 'cpu'


def product(
    x: Float[Array, 'B ...'], kernel: Float[Array, '...'], geometry: Geometry
) -> Float[Array, 'B ...']:
    """The float product of a `Dense` or `Conv` layer."""
    if geometry is None:
        return x @ kernel
    return jax.lax.conv_general_dilated(
        x, kernel, *geometry, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_float_gradients(
    geometry: Geometry,
    x: Float[Array, 'B ...'],
    kernel: Float[Array, '...'],
    value: Float[Array, 'B ...'],
) -> Float[Array, 'B ...']:
    """`value`, which is `product(x, kernel, geometry)` made otherwise, with that one's gradients.

    Args:
      geometry: of the convolution; None for a Dense layer.
      x: real input.
      kernel: real kernel.
      value: the product; receives no gradient.
    """
    del geometry, x, kernel
    return value


def _forward(geometry, x, kernel, value):
    del geometry
    return value, (x, kernel)


def _backward(geometry, operands, g):
    x, kernel = operands
    _, pull_back = jax.vjp(lambda x: product(x, kernel, geometry), x)
    return *pull_back(g), kernel_gradient(x, kernel, g, geometry), None


with_float_gradients.defvjp(_forward, _backward)


def kernel_gradient(
    x: Float[Array, 'B ...'],
    kernel: Float[Array, '...'],
    g: Float[Array, 'B ...'],
    geometry: Geometry,
) -> Float[Array, '...']:
    """The gradient of `product` with respect to the kernel.

    XLA's own, or on CPU `winograd.kernel_gradient` where that is faster. Milliseconds of both, four
    cores, batch 8, jax 0.10.2 and 0.12.0: 32x32 pixels, 128 channels 20 and 18, 36 and 10; 16x16,
    256 channels 15 and 8, 29 and 8; 16x16, 512 to 256 25 and 14, 52 and 13.

    Args:
      x: the input.
      kernel: the kernel.
      g: gradient of the output.
      geometry: of the convolution; None for a Dense layer.
    """
    # Several devices would tell one another 36 sums for each of the 9 taps.
    if geometry and jax.default_backend() == 'cpu' and jax.device_count() == 1:
        strides, padding = geometry
        if winograd.is_fast(kernel.shape, strides, g.shape):
            return winograd.kernel_gradient(x, g, padding)
    _, pull_back = jax.vjp(lambda kernel: product(x, kernel, geometry), kernel)
    return pull_back(g)[0]


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
