"""Integer convolution by XLA: three exact algorithms, chosen by platform, version and shape.

* `direct`: one `conv_general_dilated` with an int32 accumulator. XLA for GPU does not compile it
  (jax issue 7637), and before jax 0.11 the CPU code is slower than a dot.
* `im2col`: the taps side by side along K, then one int8 dot. The copy is int8, kh * kw times x.
* `outputs_first`: one dot gives every tap's output at every pixel, then shifted sums. Only for
  very few outputs, such as the last layer of a U-Net (O = 3).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from kernels.int_conv.reference import pad_with_codes
from kernels.int_matmul import xla as dot

refusal = dot.refusal

# Measured by `python -m kernels.int_conv.bench` (README.md): with fewer channels direct
# convolution is no faster than im2col on CPU, with more it is on a par or slower.
DIRECT_CHANNELS_CPU = range(16, 193)
_DIRECT_IS_FAST_ON_CPU = jax.__version_info__ >= (0, 11)


def choose_algorithm(w_shape: tuple[int, int, int, int]) -> tuple[str, str]:
    """Name of the algorithm for weights [O, kh, kw, C] on this platform, and the reason."""
    num_outputs, kh, kw, channels = w_shape
    platform = jax.default_backend()
    if kh * kw == 1:
        return 'im2col', 'a 1x1 kernel is a dot without any copy'
    if platform == 'tpu':
        return 'direct', 'XLA for TPU has int8 convolutions'
    if kh * kw * num_outputs <= channels:
        return 'outputs_first', f'O={num_outputs}: every tap of the output is smaller than x'
    if platform == 'gpu':
        return 'im2col', 'XLA for GPU does not compile int8 convolutions to int32'
    if not _DIRECT_IS_FAST_ON_CPU:
        return 'im2col', f'jax {jax.__version__} < 0.11: the int8 dot is faster on CPU'
    if channels in DIRECT_CHANNELS_CPU:
        return 'direct', f'C={channels}: direct convolution is faster on CPU'
    return 'im2col', f'C={channels}: the int8 dot is as fast or faster on CPU'


def direct(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """One convolution instruction."""
    if not isinstance(pad_value, int) or pad_value != 0:
        x, padding = pad_with_codes(x, padding, pad_value), ((0, 0), (0, 0))
    return lax.conv_general_dilated(
        x,
        dot.row_major(w.transpose(1, 2, 3, 0)),  # HWIO in memory: the only fast order on CPU
        strides,
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        preferred_element_type=jnp.int32,
    )


def im2col(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """Taps side by side, then one product [B Ho Wo, kh kw C] x [O, kh kw C]."""
    padded = pad_with_codes(x, padding, pad_value)
    num_outputs, kh, kw, _ = w.shape
    taps = [_shift(padded, i, j, (kh, kw), strides) for i in range(kh) for j in range(kw)]
    columns = jnp.concatenate(taps, axis=-1)
    out = dot.int_matmul(columns.reshape(-1, columns.shape[-1]), w.reshape(num_outputs, -1))
    return out.reshape(*columns.shape[:3], num_outputs)


def outputs_first(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """One product [B H W, C] x [kh kw O, C], then the sum of its shifted slices."""
    padded = pad_with_codes(x, padding, pad_value)
    num_outputs, kh, kw, channels = w.shape
    rows = w.transpose(1, 2, 0, 3).reshape(-1, channels)
    products = dot.int_matmul(padded.reshape(-1, channels), rows)
    products = products.reshape(*padded.shape[:3], kh * kw, num_outputs)
    return sum(
        _shift(products[..., i * kw + j, :], i, j, (kh, kw), strides)
        for i in range(kh)
        for j in range(kw)
    )


ALGORITHMS = {'direct': direct, 'im2col': im2col, 'outputs_first': outputs_first}


def int_conv(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """The convolution of `reference.int_conv`, by the algorithm of `choose_algorithm`."""
    name, _ = choose_algorithm(w.shape)
    return ALGORITHMS[name](x, w, strides=strides, padding=padding, pad_value=pad_value)


def _shift(
    padded: Array, i: int, j: int, kernel_size: tuple[int, int], strides: tuple[int, int]
) -> Array:
    """What tap (i, j) sees: every stride-th pixel from (i, j) on."""
    batch, height, width, channels = padded.shape
    return lax.slice(
        padded,
        (0, i, j, 0),
        (batch, height - kernel_size[0] + i + 1, width - kernel_size[1] + j + 1, channels),
        (1, *strides, 1),
    )
