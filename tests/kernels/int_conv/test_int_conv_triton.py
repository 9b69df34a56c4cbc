import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packing
from kernels.epilogue import Epilogue
from kernels.int_conv import choose, int_conv
from kernels.int_conv.shapes import SMALL, Shape
from kernels.int_matmul.api import Problem

SHAPES = {
    **SMALL,
    'several_tiles': Shape(2, 5, 4, 64, 33, 3, 1, (1, 1)),
    'two_steps_per_tap': Shape(1, 3, 3, 80, 20, 3, 2, (1, 1)),
    'wide_padding': Shape(1, 2, 3, 7, 6, 3, 1, (2, 3)),
}
# The loop is that of W4A8 but for what it loads; the rest of the shapes is for that.
SHAPES_OF_W4A4 = ('ragged', 'stride_2_pad_0_1', 'pointwise', 'two_steps_per_tap')

# As in test_int_matmul_triton.py: three float32 roundings relative to the largest term.
FLOAT32_TOLERANCE = 1e-6

RANGES = {
    'W8A8': ((-128, 127), (-128, 127)),
    'W4A8': ((-128, 127), (-8, 7)),
    'W4A4': ((-8, 7), (-8, 7)),
}

pytestmark = pytest.mark.usefixtures('interpreted')


def oracle(x, w, strides, padding, pad_value=0):
    """int64, one output pixel at a time."""
    (top, bottom), (left, right) = padding
    B, H, W, C = x.shape
    O, kh, kw, _ = w.shape  # noqa: E741
    padded = np.empty((B, top + H + bottom, left + W + right, C), np.int64)
    padded[:] = np.broadcast_to(np.asarray(pad_value), (B,))[:, None, None, None]
    padded[:, top : top + H, left : left + W] = x
    height = (padded.shape[1] - kh) // strides[0] + 1
    width = (padded.shape[2] - kw) // strides[1] + 1
    out = np.empty((B, height, width, O), np.int64)
    for i in range(height):
        for j in range(width):
            row, column = i * strides[0], j * strides[1]
            window = padded[:, row : row + kh, column : column + kw]
            out[:, i, j] = window.reshape(B, -1) @ w.reshape(O, -1).astype(np.int64).T
    return out


def operands(shape, mode):
    rng = np.random.default_rng(0)
    (x_low, x_high), (w_low, w_high) = RANGES[mode]
    x = rng.integers(x_low, x_high + 1, (shape.B, shape.H, shape.W, shape.C)).astype(np.int8)
    size = (shape.O, shape.kernel, shape.kernel, shape.C)
    w = rng.integers(w_low, w_high + 1, size).astype(np.int8)
    return x, w, {'strides': (shape.stride,) * 2, 'padding': (shape.padding,) * 2}


def convolve(x, w, mode, **options):
    """int_conv by the kernel, operands packed as `mode` says."""
    options['implementation'] = 'triton'
    if mode != 'W8A8':
        options |= {'bits': 4, 'kernel_size': w.shape[1:3]}
        w = packing.pack(w.reshape(w.shape[0], -1, w.shape[-1]), 4)
    if mode == 'W4A4':
        x, options['x_bits'] = packing.pack(x, 4), 4
    run = jax.jit(lambda x, w: int_conv(x, w, **options))
    return run(x, w)


@pytest.mark.parametrize(
    ('name', 'mode'),
    [(name, mode) for name in SHAPES for mode in ('W8A8', 'W4A8')]
    + [(name, 'W4A4') for name in SHAPES_OF_W4A4],
)
def test_sums_equal_int64_exactly_whatever_code_pads(name, mode, interpreted):
    shape = SHAPES[name]
    x, w, geometry = operands(shape, mode)
    per_image = np.linspace(*RANGES[mode][0], shape.B).astype(np.int32)
    for pad_value in (0, jnp.asarray(per_image)):
        got = convolve(x, w, mode, pad_value=pad_value, **geometry)
        assert got.dtype == jnp.int32
        expected = oracle(x, w, **geometry, pad_value=np.asarray(pad_value))
        np.testing.assert_array_equal(got, expected)
    pointwise = shape.kernel == 1 and shape.stride == 1
    assert {call[0] for call in interpreted.calls} == {'_gemm' if pointwise else '_conv'}


@pytest.mark.parametrize('mode', RANGES)
def test_both_ends_of_both_ranges_are_exact_beyond_float32(mode):
    # 9 * 128 * 128^2 = 1.9e7 exceeds 2^24: a float32 accumulator would round the odd sums.
    geometry = {'strides': (1, 1), 'padding': ((1, 1), (1, 1))}
    for x_code in RANGES[mode][0]:
        for w_code in RANGES[mode][1]:
            x = np.full((1, 2, 2, 128), x_code, np.int8)
            w = np.full((2, 3, 3, 128), w_code, np.int8)
            x[0, 0, 0, 0] = 1
            got = convolve(x, w, mode, pad_value=x_code, **geometry)
            np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=x_code))


@pytest.mark.parametrize('mode', RANGES)
def test_uneven_geometry_on_each_axis_is_exact(mode):
    x, _, _ = operands(Shape(2, 6, 9, 20, 4, 1, 1, (0, 0)), mode)
    w = np.random.default_rng(2).integers(-8, 8, (4, 2, 3, 20)).astype(np.int8)
    geometry = {'strides': (1, 2), 'padding': ((0, 1), (2, 0))}
    got = convolve(x, w, mode, pad_value=3, **geometry)
    np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=3))


def epilogue_of(shape, rows_shape, *, entries, zero=True, rank=0):
    rng = np.random.default_rng(1)
    rows = 6
    low_rank = None
    if rank:
        down = rng.standard_normal((*rows_shape, rank))
        low_rank = tuple(
            jnp.asarray(a, jnp.float32) for a in (down, rng.standard_normal((shape.O, rank)))
        )
    return Epilogue(
        w_scale=jnp.asarray(rng.uniform(0.001, 0.02, shape.O), jnp.float32),
        x_scale=jnp.asarray(rng.uniform(0.001, 0.02, rows), jnp.float32),
        row=jnp.asarray(rng.integers(0, rows, (entries,) if entries else ()), jnp.int32),
        zero_point=jnp.asarray(rng.integers(-128, 128, rows), jnp.int32) if zero else None,
        bias=jnp.asarray(rng.standard_normal(shape.O), jnp.float32),
        low_rank=low_rank,
    )


def real_convolution(x, w, geometry, e):
    """float64: codes become real values first, padding is 0.0; and the size of the terms."""
    x_scale, w_scale = np.float64(e.x_scale), np.float64(e.w_scale)
    row = np.broadcast_to(np.asarray(e.row), (x.shape[0],))
    zero = np.zeros(6, np.int64) if e.zero_point is None else np.asarray(e.zero_point, np.int64)
    # Centred codes are integers still, so the oracle's sums of them are exact.
    centred = x.astype(np.int64) - zero[row][:, None, None, None]
    total = oracle(centred, w, **geometry)
    y = total * x_scale[row][:, None, None, None] * w_scale + np.float64(e.bias)
    size = abs(y).max() + abs(np.float64(e.bias)).max()
    if e.low_rank is not None:
        down, up = (np.asarray(a, np.float64) for a in e.low_rank)
        y = y + np.einsum('bhwr,nr->bhwn', down, up)
        size += np.einsum('bhwr,nr->bhwn', abs(down), abs(up)).max()
    return y, size


def within(got, want, size):
    return (abs(np.asarray(got, np.float64) - want) <= FLOAT32_TOLERANCE * size).all()


@pytest.mark.parametrize(
    ('name', 'mode', 'per_image'),
    [
        ('ragged', 'W8A8', True),
        ('stride_2_pad_0_1', 'W4A8', False),
        ('stride_2_pad_0_1', 'W4A4', True),
        ('pointwise', 'W4A8', True),
        ('several_tiles', 'W8A8', False),
    ],
)
def test_zero_points_scales_bias_and_branch_are_the_real_convolution(name, mode, per_image):
    shape = SHAPES[name]
    x, w, geometry = operands(shape, mode)
    rows_shape = oracle(x, w, **geometry).shape[:3]
    entries = shape.B if per_image else 0
    e = epilogue_of(shape, rows_shape, entries=entries, rank=3 if per_image else 0)
    got = convolve(x, w, mode, epilogue=e, **geometry)
    assert got.dtype == jnp.float32
    assert within(got, *real_convolution(x, w, geometry, e))


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_other_back_ends_give_the_same_real_convolution(implementation):
    shape = SHAPES['ragged']
    x, w, geometry = operands(shape, 'W4A4')
    rows_shape = oracle(x, w, **geometry).shape[:3]
    e = epilogue_of(shape, rows_shape, entries=shape.B, rank=3)
    expected = real_convolution(x, w, geometry, e)
    packed = packing.pack(w.reshape(shape.O, -1, shape.C), 4)
    for x_given, x_bits in ((x, None), (packing.pack(x, 4), 4)):
        got = int_conv(
            jnp.asarray(x_given), jnp.asarray(packed), bits=4, x_bits=x_bits, epilogue=e,
            implementation=implementation, **geometry,
        )  # fmt: skip
        assert within(got[..., : shape.O], *expected)


@pytest.mark.parametrize('in_axes', [(0, None, None), (0, None, 0), (None, 0, 0), (0, 0, None)])
def test_vmap_equals_the_parts(in_axes):
    shape = SHAPES['ragged']
    x, w, geometry = operands(shape, 'W8A8')
    x, w = np.stack([x, x[::-1]]), np.stack([w, w[::-1]])
    e = epilogue_of(shape, (), entries=shape.B)
    rows = jnp.stack([e.row, 5 - e.row])

    def run(x, w, row):
        return convolve(x, w, 'W8A8', epilogue=e._replace(row=row), **geometry)

    parts = [a if axis == 0 else a[0] for a, axis in zip((x, w, rows), in_axes, strict=True)]
    got = jax.jit(jax.vmap(run, in_axes))(*(jnp.asarray(part) for part in parts))
    for index in range(2):
        xi, wi, row = (
            part[index] if axis == 0 else part for part, axis in zip(parts, in_axes, strict=True)
        )
        assert within(got[index], *real_convolution(xi, wi, geometry, e._replace(row=row)))


def test_images_sharded_over_devices_equal_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
    images = jax.sharding.PartitionSpec('data')
    x, w, geometry = operands(SHAPES['aligned'], 'W8A8')
    split = jax.shard_map(
        lambda x, w: convolve(x, w, 'W8A8', **geometry),
        mesh=mesh,
        in_specs=(images, jax.sharding.PartitionSpec()),
        out_specs=images,
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(split)(x, w), oracle(x, w, **geometry))


def test_a_gradient_is_an_error_that_says_what_to_do():
    shape = SHAPES['ragged']
    x, w, geometry = operands(shape, 'W8A8')
    e = epilogue_of(shape, (), entries=0)

    def loss(scale):
        return convolve(x, w, 'W8A8', epilogue=e._replace(w_scale=scale), **geometry).sum()

    with pytest.raises(NotImplementedError, match='int_conv.*has no gradient: stop_gradient'):
        jax.grad(loss)(e.w_scale)


def test_none_prefers_the_kernel_unless_taps_are_narrow():
    problem = Problem('W8A8', 1, 256, 128, 9 * 128, 128, 128, False)
    choice = choose((128, 3, 3, 128), None, problem)
    assert choice == ('triton', 'triton is the first that can run')
    choice = choose((128, 3, 3, 3), None, problem._replace(row_bytes=3))
    assert choice.implementation == 'xla'
    assert 'triton: taps of 3 bytes' in choice.reason and 'im2col' in choice.reason
