"""Integer convolution by XLA: four exact algorithms, chosen by platform, version and shape.

* `direct`: one `conv_general_dilated` with an int32 accumulator. XLA for GPU does not compile it
  (jax issue 7637), and before jax 0.11 the CPU code is slower than a dot.
* `im2col`: the taps side by side along K, then one int8 dot. The copy is int8, kh * kw times x; on
  CPU it is made of a few images, or of some rows of one, at a time.
* `outputs_first`: one dot gives every tap's output at every pixel, then shifted sums. Only for
  very few outputs, such as the last layer of a U-Net (O = 3).
* `winograd`: 3x3 at stride 1 for codes of up to 4 bits; see winograd.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32

from kernels import cpu
from kernels.int_conv import groups, reference, winograd
from kernels.int_conv.reference import output_size, pad_with_codes
from kernels.int_matmul import xla as dot

refusal = dot.refusal

# Each number was measured by `python -m kernels.int_conv.bench` (README.md, "Speed on CPU").
# Channels for which direct convolution is faster than im2col from jax 0.11 on.
DIRECT_CHANNELS_CPU = range(16, 193)
# Before, XLA for CPU is given no convolution of int8, and may be told how to make those of floats.
DIRECT_IS_FAST_ON_CPU = jax.__version_info__ >= (0, 11)
# Bytes of the columns of a group of images. Where there is more, direct convolution is as fast or
# faster from jax 0.11 on; before, groups are 1.3 to 1.7 times as fast as all images at once.
LARGEST_COLUMNS = 10_000_000
# With fewer channels or outputs the transforms may cost more than the products they save.
WINOGRAD_CHANNELS, WINOGRAD_OUTPUTS = 32, 32


def choose_algorithm(
    w_shape: tuple[int, int, int, int],
    *,
    strides: tuple[int, int] = (1, 1),
    x_max: int = 128,
    w_max: int = 128,
    num_pixels: int = 0,
) -> tuple[str, str]:
    """Name of the algorithm for weights [O, kh, kw, C] on this platform, and the reason.

    Args:
      w_shape: of the weights.
      strides: along H and W.
      x_max: largest |code| in x and its padding.
      w_max: the same for w.
      num_pixels: of the output, B Ho Wo; 0 if unknown.
    """
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
    no_winograd = winograd_refusal(w_shape, strides, x_max, w_max)
    if no_winograd is None:
        return 'winograd', (
            f'no int8 dot instructions here, and codes up to {x_max} and {w_max}: 2.25 times fewer '
            'products'
        )
    algorithm, reason = _choose_for_cpu(channels, num_pixels * kh * kw * channels)
    return algorithm, f'{reason}; no winograd: {no_winograd}'


def winograd_refusal(
    w_shape: tuple[int, int, int, int], strides: tuple[int, int], x_max: int, w_max: int
) -> str | None:
    """Why Winograd's algorithm is not taken on this CPU, None if it is."""
    if cpu.has_int8_dot():
        return 'with int8 dot instructions the products are no longer what takes the time'
    if w_shape[-1] < WINOGRAD_CHANNELS or w_shape[0] < WINOGRAD_OUTPUTS:
        return f'C={w_shape[-1]}, O={w_shape[0]}: too few products to pay for the transforms'
    return winograd.refusal(w_shape, strides, x_max, w_max)


def _choose_for_cpu(channels: int, num_columns: int) -> tuple[str, str]:
    """Direct convolution or im2col; the latter copies `num_columns` codes."""
    if not DIRECT_IS_FAST_ON_CPU:
        return 'im2col', f'jax {jax.__version__} < 0.11: the int8 dot is faster on CPU'
    if num_columns > LARGEST_COLUMNS:
        return 'direct', f'im2col would copy {num_columns / 1e6:.0f} MB'
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
    padded = groups.fixed(pad_with_codes(x, padding, pad_value))
    num_outputs, kh, kw, channels = w.shape

    def convolve(padded):
        taps = [_shift(padded, i, j, (kh, kw), strides) for i in range(kh) for j in range(kw)]
        columns = jnp.concatenate(taps, axis=-1)
        out = dot.int_matmul(columns.reshape(-1, columns.shape[-1]), w.reshape(num_outputs, -1))
        return out.reshape(*columns.shape[:3], num_outputs)

    height, width = output_size(x.shape[1:3], (kh, kw), strides, padding)
    # A kernel of 1x1 copies nothing.
    if jax.default_backend() != 'cpu' or kh * kw == 1:
        return convolve(padded)
    size = groups.group_size(
        x.shape[0], height, kh * kw * width * channels, LARGEST_COLUMNS, in_strips=True
    )
    return groups.by_groups(
        convolve, padded, (x.shape[0], height, width, num_outputs), size,
        kernel_rows=kh, stride=strides[0],
    )  # fmt: skip


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


ALGORITHMS = {
    'direct': direct,
    'im2col': im2col,
    'outputs_first': outputs_first,
    'winograd': winograd.int_conv,
}


def int_conv(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
    x_max: int = 128,
    w_max: int = 128,
) -> Int32[Array, 'B Ho Wo O']:
    """The convolution of `reference.int_conv`, by the algorithm of `choose_algorithm`."""
    height, width = output_size(x.shape[1:3], w.shape[1:3], strides, padding)
    if 0 in (*x.shape, *w.shape):  # no algorithm need care for what it does not multiply
        return reference.int_conv(x, w, strides=strides, padding=padding, pad_value=pad_value)
    name, _ = choose_algorithm(
        w.shape, strides=strides, x_max=x_max, w_max=w_max,
        num_pixels=x.shape[0] * height * width,
    )  # fmt: skip
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
