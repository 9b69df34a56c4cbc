"""The integers of integer mode against the real numbers that they stand for, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant import codes, tensor
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests.oracles import quantization as oracle

BITS = range(2, 9)
RNG = np.random.default_rng(0)


def spec(bits, symmetric):
    return QuantSpec(bits=bits, symmetric=symmetric)


def rows(bits, symmetric):
    """Scale and zero point of three images."""
    zeros = [0, 0, 0] if symmetric else [0, 2 ** (bits - 1), 2**bits - 1]
    return np.array([0.5, 0.25, 2], np.float32), np.array(zeros, np.float32)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('keep_width', [False, True])
def test_carried_codes_stand_for_the_rounded_numbers(bits, symmetric, keep_width):
    scale, zero_point = rows(bits, symmetric)
    # Multiples of an eighth, so that nothing is rounded on the way; beyond both ends of the grid.
    x = RNG.integers(-(2**12), 2**12, (3, 5, 7)).astype(np.float32) / 8
    got, zero = codes.carry_codes(
        jnp.asarray(x), {'scale': jnp.asarray(scale), 'zero_point': jnp.asarray(zero_point)},
        spec(bits, symmetric), keep_width=keep_width,
    )  # fmt: skip
    assert got.dtype == jnp.int8
    zero = np.zeros(3) if zero is None else np.asarray(zero, np.float64)
    of_image = (3, 1, 1)
    value = (np.asarray(got, np.float64) - zero.reshape(of_image)) * scale.reshape(of_image)
    want = oracle.fake_quantize(
        x, scale.reshape(of_image), zero_point.reshape(of_image),
        *oracle.integer_grid(bits, symmetric),
    )  # fmt: skip
    np.testing.assert_array_equal(value, want)
    carried = np.abs(np.asarray(got, np.int64) - zero.astype(np.int64).reshape(of_image))
    assert carried.max() <= codes.largest_code(spec(bits, symmetric))
    if keep_width:
        signed = np.asarray(got, np.int64)
        assert -(2 ** (bits - 1)) <= signed.min() and signed.max() < 2 ** (bits - 1)


def packed(bits, symmetric, shape, group_size=None):
    made = QuantSpec(bits=bits, symmetric=symmetric, per_channel=True, group_size=group_size)
    qmin, qmax = made.grid
    table = tensor.scale_shape(shape, made)
    scale = RNG.uniform(0.5, 2, table).astype(np.float32)
    zeros = np.zeros(table) if symmetric else RNG.integers(qmin, qmax + 1, table)
    numbers = RNG.integers(qmin, qmax + 1, shape)
    return tensor.pack(numbers, scale, zeros.astype(np.int32), spec=made), numbers


@pytest.mark.parametrize('shape', [(7, 5), (3, 3, 6, 4)], ids=['dense', 'conv'])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', BITS)
def test_an_entry_of_integer_mode_stands_for_the_same_kernel(bits, symmetric, shape):
    made, numbers = packed(bits, symmetric, shape)
    entry = codes.integer_weight(made)
    zeros = np.asarray(tensor.expand(jnp.asarray(made.zero_point), shape), np.float64)
    scale = np.asarray(tensor.expand(jnp.asarray(made.scale), shape), np.float64)
    kernel = codes.real_kernel(entry, made.spec, shape[-2], shape[:-2])
    # One product in float32.
    np.testing.assert_allclose(kernel, (numbers - zeros) * scale, rtol=1e-7)
    # Up to 4 bits nothing is unpacked before a product asks for it.
    assert entry['codes'].dtype == (jnp.uint8 if bits <= codes.NIBBLE else jnp.int8)
    assert 'tap_sum' not in entry


@pytest.mark.parametrize('weight_bits', [4, 7])
def test_the_sums_of_each_tap_are_kept_where_inputs_keep_their_zero_point(weight_bits):
    shape = (3, 3, 6, 4)
    made, numbers = packed(weight_bits, True, shape)
    for bits, symmetric, expected in ((8, False, True), (4, False, True), (6, False, False),
                                      (8, True, False)):  # fmt: skip
        entry = codes.integer_weight(made, spec(bits, symmetric))
        assert ('tap_sum' in entry) == expected
    entry = codes.integer_weight(made, spec(8, False))
    sums = numbers.astype(np.int64).sum(axis=-2).reshape(9, 4).T
    np.testing.assert_array_equal(entry['tap_sum'], sums)


@pytest.mark.parametrize(
    ('bits', 'symmetric', 'group_size', 'fits'),
    [(4, True, None, True), (4, False, None, True), (8, True, None, True),
     (8, False, None, False), (4, True, 3, False)],
)  # fmt: skip
def test_one_scale_for_the_whole_sum_fits_an_epilogue(bits, symmetric, group_size, fits):
    made, _ = packed(bits, symmetric, (6, 5), group_size)
    layer = LayerSpec(weight=made.spec, inputs=spec(8, False))
    assert codes.fits_epilogue(codes.integer_weight(made), layer) == fits


@pytest.mark.parametrize('batch', [None, 3])
def test_an_epilogue_takes_a_row_for_each_image(batch):
    scale = jnp.float32(0.5) if batch is None else jnp.arange(1.0, 4)
    zero = jnp.int32(3) if batch is None else jnp.arange(3, dtype=jnp.int32)
    made = codes.make_epilogue(jnp.ones(2), scale, zero, None)
    picked = made.x_scale[made.row], made.zero_point[made.row]
    for got, want in zip(picked, (scale, zero), strict=True):
        np.testing.assert_array_equal(got, want)
