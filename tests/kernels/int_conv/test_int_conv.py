import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choices, cpu, packing
from kernels.epilogue import Epilogue
from kernels.int_conv import choose, groups, int_conv, winograd, xla
from kernels.int_conv.shapes import REAL, SMALL, Shape

# Those that run without a GPU; the test of the kernel has the other.
PORTABLE = ('xla', 'reference')
NAMES = [None, *PORTABLE]


def oracle(x, w, strides, padding, pad_value=0):
    """int64, one output pixel at a time."""
    (top, bottom), (left, right) = padding
    B, H, W, C = x.shape
    O, kh, kw, _ = w.shape  # noqa: E741
    codes = np.broadcast_to(np.asarray(pad_value), (B,)).astype(np.int64)
    padded = np.empty((B, top + H + bottom, left + W + right, C), np.int64)
    padded[:] = codes[:, None, None, None]
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


def operands(shape, low=-128, high=127):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (shape.B, shape.H, shape.W, shape.C)).astype(np.int8)
    size = (shape.O, shape.kernel, shape.kernel, shape.C)
    w = rng.integers(low, high + 1, size).astype(np.int8)
    return x, w, {'strides': (shape.stride,) * 2, 'padding': (shape.padding,) * 2}


# What Winograd's transforms leave within int8.
NARROW_X, NARROW_W = 31, 14


def operands_for(algorithm, shape):
    """Codes that an algorithm accepts: for Winograd's narrow ones, their ends among them."""
    x, w, geometry = operands(shape)
    if algorithm != 'winograd':
        return x, w, geometry
    return np.clip(x, -NARROW_X, NARROW_X), np.clip(w, -NARROW_W, NARROW_W), geometry


def within_jit(function, *arrays, **options):
    """A call as layers make it; by itself it would compile a program for every operation."""
    return jax.jit(functools.partial(function, **options))(*arrays)


def pad_values(batch_size):
    per_image = np.linspace(-128, 127, batch_size).astype(np.int32)
    return [0, -128, 127, np.int32(3), jnp.int32(-5), jnp.asarray(per_image), per_image]


@pytest.mark.parametrize('implementation', NAMES)
@pytest.mark.parametrize('shape', SMALL.values(), ids=SMALL)
def test_matches_int64_exactly(shape, implementation):
    x, w, geometry = operands(shape)
    got = jax.jit(lambda x, w: int_conv(x, w, implementation=implementation, **geometry))(x, w)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle(x, w, **geometry))


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize('name', ['ragged', 'stride_2_pad_0_1'])
def test_padding_holds_the_code_of_zero_of_all_images_or_of_each(name, implementation):
    shape = SMALL[name]
    x, w, geometry = operands(shape)
    for pad_value in pad_values(shape.B):
        got = within_jit(
            int_conv, x, w, pad_value=pad_value, implementation=implementation, **geometry
        )
        np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=pad_value))


@pytest.mark.parametrize(
    'name, algorithm',
    [
        (name, algorithm)
        for name, shape in SMALL.items()
        for algorithm in xla.ALGORITHMS
        if algorithm != 'winograd' or (shape.kernel, shape.stride) == (3, 1)
    ],
)
def test_every_algorithm_is_exact_whichever_this_platform_chooses(name, algorithm):
    shape = SMALL[name]
    x, w, geometry = operands_for(algorithm, shape)
    for pad_value in (0, jnp.arange(shape.B, dtype=jnp.int32) - 2):
        got = jax.jit(
            lambda x, w, pad_value=pad_value: xla.ALGORITHMS[algorithm](
                x, w, pad_value=pad_value, **geometry
            )
        )(x, w)
        np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=pad_value))


@pytest.mark.parametrize('implementation', NAMES)
@pytest.mark.parametrize(
    ('bits', 'signed'), [(2, True), (3, True), (4, True), (4, False), (8, True)]
)
def test_packed_weights_match_int64_exactly_under_jit(bits, signed, implementation):
    low = -(2 ** (bits - 1)) if signed else 0
    for name in ('ragged', 'stride_2_pad_0_1'):
        shape = SMALL[name]
        x, w, geometry = operands(shape, low, low + 2**bits - 1)
        packed = packing.pack(w.reshape(shape.O, -1, shape.C), bits)

        @jax.jit
        def run(x, packed, geometry=geometry):
            return int_conv(
                x, packed, bits=bits, signed=signed, implementation=implementation, **geometry
            )

        np.testing.assert_array_equal(run(x, packed), oracle(x, w, **geometry))


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize('x_code', [-128, 127])
@pytest.mark.parametrize('w_code', [-128, 127])
def test_both_ends_of_the_range_are_exact_beyond_float32(w_code, x_code, implementation):
    # 9 * 256 * 128^2 = 3.8e7 exceeds 2^24: a float32 accumulator would round the odd sums.
    x, w = np.full((1, 3, 3, 256), x_code, np.int8), np.full((2, 3, 3, 256), w_code, np.int8)
    x[0, 0, 0, 0] = 1
    geometry = {'strides': (1, 1), 'padding': ((1, 1), (1, 1))}
    got = int_conv(jnp.asarray(x), jnp.asarray(w), implementation=implementation, **geometry)
    np.testing.assert_array_equal(got, oracle(x, w, **geometry))


@pytest.mark.parametrize('name', ['conv_4x4_256_b8', 'conv_out_b8', 'conv_in_b8'])
def test_layers_of_the_cifar_unet_are_exact(name):
    shape = REAL[name]._replace(B=1)
    x, w, geometry = operands(shape)
    got = within_jit(int_conv, x, w, pad_value=-7, **geometry)
    np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=-7))


def test_uneven_geometry_on_each_axis_is_exact():
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (2, 6, 9, 20)).astype(np.int8)
    w = rng.integers(-128, 128, (4, 2, 3, 20)).astype(np.int8)
    geometry = {'strides': (1, 2), 'padding': ((0, 1), (2, 0))}
    packed = packing.pack(w.reshape(4, 6, 20), 8)
    for implementation in PORTABLE:
        options = {'bits': 8, 'kernel_size': (2, 3), 'implementation': implementation}
        got = within_jit(int_conv, x, packed, **options, **geometry)
        np.testing.assert_array_equal(got, oracle(x, w, **geometry))


@pytest.mark.parametrize('implementation', ['reference', *xla.ALGORITHMS])
@pytest.mark.parametrize('in_axes', [(0, None), (None, 0), (0, 0)])
def test_vmap_equals_the_parts(in_axes, implementation):
    x, w, geometry = operands_for(implementation, SMALL['ragged'])
    x, w = np.stack([x, x[::-1]]), np.stack([w, w[::-1]])
    pad_value = jnp.array([4, -3, 0], jnp.int32)

    def run(x, w):
        if implementation in xla.ALGORITHMS:
            return xla.ALGORITHMS[implementation](x, w, pad_value=pad_value, **geometry)
        return int_conv(x, w, pad_value=pad_value, implementation=implementation, **geometry)

    operands_ = [a if axis == 0 else a[0] for a, axis in zip((x, w), in_axes, strict=True)]
    got = jax.jit(jax.vmap(run, in_axes))(*operands_)
    for index in range(2):
        parts = [a[index] if axis == 0 else a[0] for a, axis in zip((x, w), in_axes, strict=True)]
        expected = oracle(*parts, **geometry, pad_value=np.asarray(pad_value))
        np.testing.assert_array_equal(got[index], expected)


def test_pad_value_may_be_traced():
    x, w, geometry = operands(SMALL['ragged'])
    run = jax.jit(lambda x, w, pad_value: int_conv(x, w, pad_value=pad_value, **geometry))
    for pad_value in (0, 9, -128):
        got = run(x, w, jnp.int32(pad_value))
        np.testing.assert_array_equal(got, oracle(x, w, **geometry, pad_value=pad_value))
    assert run._cache_size() == 1


@pytest.mark.parametrize('signs', ['equal', 'alternating'])
@pytest.mark.parametrize('padding', [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 0), (0, 3))])
def test_winograd_is_exact_at_both_ends_of_its_range(padding, signs):
    # Alternating signs reach the ends of the transformed differences, equal ones of the sums.
    pattern = np.ones(7) if signs == 'equal' else (-1) ** np.arange(7)
    plane = np.multiply.outer(pattern, pattern)[None, :, :, None]
    for sign in (1, -1):
        x = (sign * NARROW_X * np.broadcast_to(plane, (2, 7, 7, 40))).astype(np.int8)
        w = (NARROW_W * np.broadcast_to(plane[:, :3, :3], (3, 3, 3, 40))).astype(np.int8)
        geometry = {'strides': (1, 1), 'padding': padding}
        got = within_jit(winograd.int_conv, x, w, pad_value=sign * NARROW_X, **geometry)
        want = oracle(x, w, **geometry, pad_value=sign * NARROW_X)
        np.testing.assert_array_equal(got, want)


def test_winograd_takes_images_in_groups_with_the_same_result(monkeypatch):
    x, w, geometry = operands_for('winograd', SMALL['ragged']._replace(B=6))
    want = oracle(x, w, **geometry)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    for group_bytes in (1, 64 * 12 * w.shape[0] * 2, 10**9):  # one image, two, all
        monkeypatch.setattr(winograd, 'GROUP_BYTES', group_bytes)
        got = within_jit(winograd.int_conv, x, w, pad_value=0, **geometry)
        np.testing.assert_array_equal(got, want)


def test_winograd_on_several_devices_tells_them_nothing_of_one_another():
    x, w, geometry = operands_for('winograd', SMALL['ragged']._replace(B=8))
    mesh = jax.sharding.Mesh(jax.devices(), ('data',))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    run = jax.jit(
        lambda x, w: winograd.int_conv(x, w, pad_value=0, **geometry), out_shardings=split
    )
    x = jax.device_put(x, split)
    text = run.lower(x, w).compile().as_text()
    assert 'all-gather' not in text and 'all-reduce' not in text
    np.testing.assert_array_equal(run(x, w), oracle(np.asarray(x), w, **geometry))


def test_winograd_refuses_what_would_not_fit_int8():
    shape, ones = (64, 3, 3, 64), (1, 1)
    assert winograd.refusal(shape, ones, NARROW_X, NARROW_W) is None
    assert 'int8' in winograd.refusal(shape, ones, NARROW_X + 1, NARROW_W)
    assert 'int8' in winograd.refusal(shape, ones, NARROW_X, NARROW_W + 1)
    assert '3x3' in winograd.refusal(shape, (2, 2), 8, 8)
    assert '3x3' in winograd.refusal((64, 1, 1, 64), ones, 8, 8)


def test_narrow_codes_take_winograd_on_a_cpu_without_int8_dots(monkeypatch):
    x, w, geometry = operands(SMALL['ragged']._replace(C=32, O=32))
    x, w = x >> 4, w >> 4
    for has_dot, expected in ((False, True), (True, False)):
        monkeypatch.setattr(cpu, 'has_int8_dot', lambda has_dot=has_dot: has_dot)
        with choices.recorded() as calls:
            got = within_jit(int_conv, x, w, x_max=8, w_max=8, **geometry)
        np.testing.assert_array_equal(got, oracle(x, w, **geometry))
        (call,) = calls
        assert call.op == 'int_conv' and call.implementation == 'xla'
        assert ('2.25 times fewer' in call.reason) == expected


@pytest.mark.parametrize('platform', xla.dot.PLATFORMS)
def test_only_tpu_and_recent_cpu_use_the_direct_convolution(platform, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    monkeypatch.setattr(xla, 'DIRECT_IS_FAST_ON_CPU', True)
    algorithm, _ = xla.choose_algorithm((128, 3, 3, 128))
    assert algorithm == ('im2col' if platform == 'gpu' else 'direct')
    monkeypatch.setattr(xla, 'DIRECT_IS_FAST_ON_CPU', False)
    algorithm, _ = xla.choose_algorithm((128, 3, 3, 128))
    assert algorithm == ('direct' if platform == 'tpu' else 'im2col')


def test_columns_larger_than_the_caches_are_not_copied_on_cpu(monkeypatch):
    monkeypatch.setattr(xla, 'DIRECT_IS_FAST_ON_CPU', True)
    algorithm, reason = xla.choose_algorithm((128, 3, 3, 256), num_pixels=8192)
    assert algorithm == 'direct' and '19 MB' in reason
    assert xla.choose_algorithm((128, 3, 3, 256), num_pixels=512)[0] == 'im2col'
    # Before, in groups.
    monkeypatch.setattr(xla, 'DIRECT_IS_FAST_ON_CPU', False)
    assert xla.choose_algorithm((128, 3, 3, 256), num_pixels=8192)[0] == 'im2col'


# Of 4 images: all at once; two and one; strips of 3 rows and of 1 of the 6.
@pytest.mark.parametrize('most', [10**6, 2 * 6 * 504, 6 * 504, 3 * 504, 1])
@pytest.mark.parametrize('stride', [1, 2])
def test_columns_are_made_of_a_few_images_or_rows_at_a_time(most, stride, monkeypatch):
    shape = Shape(4, 6 * stride, 7 * stride, 8, 8, 3, stride, (1, 1) if stride == 1 else (0, 1))
    x, w, geometry = operands(shape)
    monkeypatch.setattr(xla, 'LARGEST_COLUMNS', most)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    sizes = []
    by_groups = groups.by_groups
    monkeypatch.setattr(
        groups, 'by_groups', lambda *args, **kw: sizes.append(args[3]) or by_groups(*args, **kw)
    )
    run = jax.jit(lambda x, w, pad: xla.im2col(x, w, **(geometry | {'pad_value': pad})))
    pad_value = jnp.asarray([3, -128, 0, 127], jnp.int32)
    got = run(jnp.asarray(x), jnp.asarray(w), pad_value)
    want = oracle(x, w, **(geometry | {'pad_value': np.asarray(pad_value)}))
    np.testing.assert_array_equal(got, want)
    expected = {10**6: (4, 6), 6048: (2, 6), 3024: (1, 6), 1512: (1, 3), 1: (1, 1)}
    assert sizes == [expected[most]]


def test_choose_names_what_runs_and_why():
    choice = choose((3, 3, 3, 128))
    assert choice.implementation == 'xla'
    assert 'outputs_first' in choice.reason
    assert choose((3, 3, 3, 128), 'reference') == ('reference', 'named by the caller')


def test_a_named_back_end_never_falls_back(monkeypatch):
    x, w, geometry = operands(SMALL['pointwise'])
    monkeypatch.setattr(jax, 'default_backend', lambda: 'metal')
    with pytest.raises(NotImplementedError, match='not metal'):
        int_conv(jnp.asarray(x), jnp.asarray(w), implementation='xla', **geometry)
    assert choose(w.shape).implementation == 'reference'


def test_a_sum_that_may_exceed_int32_is_an_error():
    x, w = jnp.ones((1, 3, 3, 14_564), jnp.int8), jnp.ones((1, 3, 3, 14_564), jnp.int8)
    geometry = {'strides': (1, 1), 'padding': ((0, 0), (0, 0))}
    with pytest.raises(ValueError, match='may exceed int32'):
        int_conv(x, w, **geometry)
    assert int_conv(x, w, w_max=1, **geometry).item() == 9 * 14_564


def test_what_the_zero_point_takes_out_counts_too():
    # 7400 channels of 9 taps fit by themselves, not with codes 255 away from the zero point.
    x, w = jnp.ones((1, 3, 3, 7_400), jnp.int8), jnp.ones((1, 3, 3, 7_400), jnp.int8)
    geometry = {'strides': (1, 1), 'padding': ((0, 0), (0, 0))}
    scales = Epilogue(jnp.ones(1), jnp.ones(1), jnp.int32(0))
    assert int_conv(x, w, epilogue=scales, **geometry).item() == 9 * 7_400
    shifted = scales._replace(zero_point=jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match='66600 products of codes up to 255 and 128'):
        int_conv(x, w, epilogue=shifted, **geometry)


@pytest.mark.parametrize('implementation', NAMES)
@pytest.mark.parametrize('limit', [128, 8])
def test_nothing_times_something_is_nothing(implementation, limit):
    options = {'x_max': limit, 'w_max': limit, 'implementation': implementation}
    geometry = {'strides': (1, 1), 'padding': ((1, 1), (1, 1))}
    for B, C, O in ((0, 32, 32), (2, 32, 0), (2, 0, 32)):  # noqa: E741
        x, w = np.ones((B, 4, 5, C), np.int8), np.ones((O, 3, 3, C), np.int8)
        got = within_jit(int_conv, x, w, **options, **geometry)
        np.testing.assert_array_equal(got, np.zeros((B, 4, 5, O)))


def test_wrong_operands_say_what_was_expected():
    x, w, geometry = operands(SMALL['ragged'])
    x, w = jnp.asarray(x), jnp.asarray(w)
    with pytest.raises(ValueError, match='expected int8 .B, H, W, C'):
        int_conv(x[0], w, **geometry)
    with pytest.raises(ValueError, match=r'expected \[O, kh, kw, C=3\]'):
        int_conv(x, w[..., :2], **geometry)
    with pytest.raises(ValueError, match='each >= 0'):
        int_conv(x, w, strides=(1, 1), padding='SAME')
    with pytest.raises(ValueError, match='two integers >= 1'):
        int_conv(x, w, strides=(0, 1), padding=((1, 1), (1, 1)))
    with pytest.raises(ValueError, match='smaller than the kernel'):
        int_conv(x[:, :2], w, strides=(1, 1), padding=((0, 0), (0, 0)))
    for strides in (1, (1.5, 1), (1,)):
        with pytest.raises(ValueError, match='two integers >= 1'):
            int_conv(x, w, strides=strides, padding=((1, 1), (1, 1)))
    with pytest.raises(ValueError, match=r'padding=\(1, 1\): expected \(\(top, bottom'):
        int_conv(x, w, strides=(1, 1), padding=(1, 1))
    with pytest.raises(ValueError, match='pad_value=-9 with x_max=8: expected a larger'):
        int_conv(x, w, pad_value=-9, x_max=8, **geometry)
    with pytest.raises(ValueError, match='pad_value=128'):
        int_conv(x, w, pad_value=128, **geometry)
    with pytest.raises(ValueError, match=r'shape \(\) or \(3,\)'):
        int_conv(x, w, pad_value=jnp.zeros(2, jnp.int32), **geometry)
    packed = jnp.asarray(packing.pack(np.zeros((5, 6, 3), np.int8), 4))
    with pytest.raises(ValueError, match='not square'):
        int_conv(x, packed, bits=4, **geometry)
    with pytest.raises(ValueError, match=r'expected \[O, kh \* kw, 1\]'):
        int_conv(x, packed, bits=2, **geometry)
