import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packing

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
LENGTHS = (1, 2, 3, 4, 7, 8, 13, 256)


def all_codes(bits: int, signed: bool) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    return np.arange(low, low + 2**bits).astype(np.int8 if signed or bits < 8 else np.uint8)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', WIDTHS)
def test_every_code_survives_the_round_trip_at_every_length(bits, signed):
    codes = all_codes(bits, signed)
    for length in LENGTHS:
        rows = np.resize(codes, (max(2, -(-codes.size // length)), length))
        packed = packing.pack(rows, bits)
        assert packed.dtype == np.uint8
        assert packed.shape == (rows.shape[0], packing.packed_length(length, bits))
        got = packing.unpack(packed, bits, signed=signed, length=length)
        assert got.dtype == codes.dtype
        np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', WIDTHS)
def test_jax_and_numpy_give_the_same_bytes_and_codes_inside_jit(bits, signed):
    rows = np.resize(all_codes(bits, signed), (3, 2, 13))
    packed = packing.pack(rows, bits)
    np.testing.assert_array_equal(jax.jit(packing.pack, static_argnums=1)(rows, bits), packed)
    np.testing.assert_array_equal(packing.pack(jnp.asarray(rows), bits), packed)

    @jax.jit
    def unpack(packed):
        return packing.unpack(packed, bits, signed=signed, length=13)

    np.testing.assert_array_equal(unpack(packed), rows)


def test_int4_byte_j_holds_j_low_and_j_plus_half_high():
    packed = packing.pack(np.array([1, 2, 3, -1, -2, -8], np.int8), 4)
    np.testing.assert_array_equal(packed, np.array([0xF1, 0xE2, 0x83], np.uint8))


def test_int2_byte_j_holds_the_quarters_from_low_to_high():
    packed = packing.pack(np.array([0, 1, 1, 2, 2, 3, 3, 0], np.int8), 2)
    np.testing.assert_array_equal(packed, np.array([0b11100100, 0b00111001], np.uint8))


@pytest.mark.parametrize(
    ('bits', 'stored'), [(2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)]
)
def test_widths_without_a_layout_use_the_next_wider(bits, stored):
    assert packing.container_bits(bits) == stored
    assert packing.packed_length(16, bits) == 16 * stored // 8


def test_a_tap_is_packed_by_itself():
    weights = np.random.default_rng(0).integers(-8, 8, (5, 9, 7)).astype(np.int8)
    packed = packing.pack(weights, 4)
    assert packed.shape == (5, 9, 4)
    np.testing.assert_array_equal(packed[2, 3], packing.pack(weights[2, 3], 4))


@pytest.mark.parametrize('codes', [[8, -1], [-9, 0], [16, 0]])
def test_codes_outside_the_width_are_refused(codes):
    with pytest.raises(ValueError, match='expected'):
        packing.pack(np.array(codes, np.int8), 4)


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match=r'bits=9: expected 2\.\.8'):
        packing.pack(np.zeros(4, np.int8), 9)
    with pytest.raises(ValueError, match='expected int8 or uint8'):
        packing.pack(np.zeros(4, np.int32), 4)
    with pytest.raises(ValueError, match='expected uint8'):
        packing.unpack(np.zeros(4, np.int8), 4, signed=True, length=8)
    with pytest.raises(ValueError, match='expected 5 for length=9'):
        packing.unpack(np.zeros(4, np.uint8), 4, signed=True, length=9)
