import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant import observers
from dmq_jax.quant.tensor import (
    QuantSpec,
    dequantize,
    expand,
    pack,
    scale_shape,
    unpack,
    unpack_rows,
)
from kernels import packing

SHAPES = {'dense': (6, 5), 'dense_odd': (7, 3), 'conv': (3, 2, 6, 4), 'conv_odd': (1, 3, 5, 2)}


def random_codes(spec, shape):
    qmin, qmax = spec.grid
    return np.random.default_rng(spec.bits).integers(qmin, qmax + 1, shape)


def spec_of(bits, symmetric=True, **options):
    return QuantSpec(bits=bits, symmetric=symmetric, per_channel=True, **options)


def packed_random(spec, shape):
    rng = np.random.default_rng(1)
    codes = random_codes(spec, shape)
    scale = rng.uniform(0.1, 1.0, scale_shape(shape, spec)).astype(np.float32)
    zero_point = np.zeros_like(scale)
    if not spec.symmetric:
        zero_point = rng.integers(0, spec.grid[1] + 1, scale.shape).astype(np.float32)
    return codes, scale, zero_point, pack(codes, scale, zero_point, spec=spec)


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', range(2, 9))
def test_unpacking_gives_the_packed_codes(bits, symmetric, shape):
    spec = spec_of(bits, symmetric)
    codes, scale, zero_point, tensor = packed_random(spec, shape)
    np.testing.assert_array_equal(unpack(tensor), codes)
    np.testing.assert_array_equal(unpack_rows(tensor), np.moveaxis(codes, -1, 0))
    want = (codes - zero_point.astype(np.float64)) * scale
    # The product of an exact integer and a float32, rounded once.
    np.testing.assert_allclose(dequantize(tensor), want, rtol=np.finfo(np.float32).eps)
    row = packing.packed_length(shape[-2], bits)
    taps = int(np.prod(shape[:-2]))
    assert tensor.packed.size == shape[-1] * taps * row
    zero_points = 0 if symmetric else shape[-1]
    assert tensor.nbytes == tensor.packed.size + 4 * shape[-1] + zero_points


def test_a_dense_kernel_is_packed_by_halves_of_the_contraction_axis():
    # [K=4, N=2]: byte j of channel n holds k = j (low nibble) and k = j + 2 (high).
    codes = np.array([[1, -1], [2, -2], [3, -3], [4, -8]])
    tensor = pack(codes, np.ones((1, 2)), np.zeros((1, 2)), spec=spec_of(4))
    np.testing.assert_array_equal(tensor.packed, [[0x31, 0x42], [0xDF, 0x8E]])


def test_two_bits_are_packed_by_quarters():
    codes = np.array([[0], [1], [2], [3]])
    tensor = pack(codes, np.ones((1, 1)), np.zeros((1, 1)), spec=spec_of(2, symmetric=False))
    np.testing.assert_array_equal(tensor.packed, [[0b11100100]])


def test_a_conv_kernel_is_packed_tap_by_tap():
    codes = np.arange(8).reshape(1, 2, 2, 2)  # [kh, kw, C, O]: code = 4 kw + 2 c + o
    tensor = pack(
        codes, np.ones((1, 1, 1, 2)), np.zeros((1, 1, 1, 2)), spec=spec_of(4, symmetric=False)
    )
    assert tensor.packed.shape == (2, 2, 1)
    np.testing.assert_array_equal(tensor.packed[..., 0], [[0x20, 0x64], [0x31, 0x75]])


def test_an_odd_row_is_padded_with_zero_codes():
    tensor = pack(np.array([[5], [6], [7]]), np.ones((1, 1)), np.zeros((1, 1)), spec=spec_of(4))
    np.testing.assert_array_equal(tensor.packed, [[0x75, 0x06]])


@pytest.mark.parametrize('symmetric, code', [(True, 8), (True, -9), (False, -1), (False, 16)])
def test_a_code_outside_the_grid_is_refused(symmetric, code):
    codes = np.zeros((4, 2))
    codes[1, 1] = code
    with pytest.raises(ValueError, match='codes span .*: expected'):
        pack(codes, np.ones((1, 2)), np.zeros((1, 2)), spec=spec_of(4, symmetric))


@pytest.mark.parametrize('shape', [(6, 5), (3, 3, 6, 4)])
def test_groups_divide_the_contraction_axis_in_order(shape):
    spec = spec_of(4, symmetric=False, group_size=2)
    assert scale_shape(shape, spec) == (1,) * (len(shape) - 2) + (3, shape[-1])
    codes, scale, zero_point, tensor = packed_random(spec, shape)
    want = np.empty(shape)
    for k in range(shape[-2]):
        group = (..., k // 2, slice(None))
        want[..., k, :] = (codes[..., k, :] - zero_point[group].astype(np.float64)) * scale[group]
    np.testing.assert_allclose(dequantize(tensor), want, rtol=np.finfo(np.float32).eps)


def test_scales_are_shaped_by_granularity():
    per_tensor = QuantSpec(bits=4, symmetric=True)
    assert scale_shape((3, 3, 8, 4), per_tensor) == (1, 1, 1, 1)
    assert scale_shape((3, 3, 8, 4), spec_of(4)) == (1, 1, 1, 4)
    assert scale_shape((8, 4), spec_of(4, group_size=8)) == (1, 4)
    granularities = [s.granularity for s in (per_tensor, spec_of(4), spec_of(4, group_size=8))]
    assert granularities == ['per tensor', 'per channel', 'groups of 8']


def test_an_expanded_scale_broadcasts_against_the_weight():
    for spec in (QuantSpec(bits=4, symmetric=True), spec_of(4), spec_of(4, group_size=2)):
        for shape in ((6, 5), (3, 3, 6, 4)):
            scale = jnp.ones(scale_shape(shape, spec))
            assert (jnp.zeros(shape) * expand(scale, shape)).shape == shape


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match='group_size=4 does not divide the 6 inputs'):
        scale_shape((6, 5), spec_of(4, group_size=4))


def test_groups_without_channels_are_refused():
    with pytest.raises(ValueError, match='group_size needs per_channel=True'):
        QuantSpec(bits=4, symmetric=True, group_size=4)


def test_a_width_outside_the_grid_is_refused():
    with pytest.raises(ValueError, match='bits=9: expected 2..8'):
        QuantSpec(bits=9, symmetric=True)


def test_a_quantized_tensor_passes_through_jit_and_a_spec_is_hashable():
    _, _, _, tensor = packed_random(spec_of(4), (6, 5))
    np.testing.assert_array_equal(jax.jit(dequantize)(tensor), dequantize(tensor))
    assert len({spec_of(4), spec_of(4), spec_of(5)}) == 2


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_error_of_a_minmax_weight_is_at_most_half_a_step(bits, symmetric):
    spec = spec_of(bits, symmetric, observer='minmax', group_size=3)
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    scale, zero_point = observers.calibrate_weight(jnp.asarray(weight), spec)
    full_scale, full_zero = (np.asarray(expand(a, weight.shape)) for a in (scale, zero_point))
    codes = np.clip(np.rint(weight / full_scale) + full_zero, *spec.grid)
    error = np.abs(np.asarray(dequantize(pack(codes, scale, zero_point, spec=spec))) - weight)
    # An asymmetric zero point is rounded too, so an end of the range may be clipped by half a
    # step more than rounding loses.
    limit = (0.5 if symmetric else 1.0) * full_scale * (1 + 1e-5)
    assert (error <= limit).all()
