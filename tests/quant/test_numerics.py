import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant import numerics
from tests.oracles import quantization as oracle

EPS = float(np.finfo(np.float32).eps)
# One division, one subtraction and one product in float32.
ROUNDING = 4 * EPS
BITS = range(2, 9)
# (symmetric, zero point as a share of the grid)
GRIDS = [(True, 0.0), (False, 0.0), (False, 0.4), (False, 1.0)]


def fake(x, scale, zero_point, grid):
    return numerics.fake_quantize(
        jnp.float32(x), jnp.float32(scale), jnp.float32(zero_point), *map(float, grid)
    )


def random_case(bits, symmetric, share, *, num_values=400):
    """Values inside and outside the range, scale, zero point, grid."""
    grid = numerics.integer_grid(bits, symmetric)
    zero_point = float(round(share * grid[1])) if not symmetric else 0.0
    scale = 0.37
    low, high = ((end - zero_point) * scale for end in grid)
    margin = 0.3 * (high - low)
    rng = np.random.default_rng(bits)
    x = rng.uniform(low - margin, high + margin, num_values).astype(np.float32)
    return x, scale, zero_point, grid


@pytest.mark.parametrize('bits', BITS)
def test_the_grid_has_two_to_the_bits_integers(bits):
    assert numerics.integer_grid(bits, True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert numerics.integer_grid(bits, False) == (0, 2**bits - 1)


@pytest.mark.parametrize('bits', [1, 9, 0, -4])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f'bits={bits}: expected 2..8'):
        numerics.integer_grid(bits, True)


@pytest.mark.parametrize(
    'v, value, dx, dscale',
    [
        (0.2, 0.0, 1.0, -0.2),  # interior
        (7.2, 7.0, 1.0, -0.2),  # inside the outermost bin: jnp.clip alone gives 0.5
        (-8.4, -8.0, 1.0, 0.4),
        (-7.5, -8.0, 1.0, -0.5),  # half to even
        (6.5, 6.0, 1.0, -0.5),
        (7.6, 7.0, 0.0, 7.0),  # clipped: the scale alone learns
        (-9.0, -8.0, 0.0, -8.0),
    ],
)
def test_straight_through_at_the_bin_edges(v, value, dx, dscale):
    scale = 0.5
    assert float(fake(v * scale, scale, 0, (-8, 7))) == pytest.approx(value * scale, rel=ROUNDING)
    gradients = jax.grad(numerics.fake_quantize, (0, 1))(v * scale, scale, 0.0, -8.0, 7.0)
    # x / scale near 8 carries an error of 8 eps into round(u) - u.
    assert gradients == pytest.approx((dx, dscale), abs=16 * EPS)


@pytest.mark.parametrize('zero_point', [0.0, 3.0, 6.4, 15.0])
def test_gradients_follow_the_table_of_learned_steps(zero_point):
    scale, grid = 0.5, (0.0, 15.0)
    # Off the exact halves: there float32 and float64 agree on every code.
    x = np.arange(-20.3, 20.3, 0.37, dtype=np.float32)
    per_value = jax.vmap(jax.grad(numerics.fake_quantize, (0, 1, 2)), (0, None, None, None, None))
    got = per_value(jnp.asarray(x), scale, zero_point, *grid)
    want = [oracle.fake_quantize_gradients(v, scale, zero_point, *grid) for v in x]
    regions = {tuple(np.sign([w[0], w[2]])) for w in want}
    assert regions == {(1.0, 0.0), (0.0, -1.0)}, 'the points cover inside and outside'
    # u up to 41: an error of 41 eps in round(u) - u.
    np.testing.assert_allclose(np.stack(got, axis=-1), want, rtol=0, atol=41 * EPS)


def test_halves_round_to_even_before_an_odd_zero_point_is_added():
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5])
    codes = numerics.quantize(x, jnp.float32(1), jnp.float32(3), 0, 15)
    # Rounding the sum x / scale + zero_point would give 4, 4, 6, 2, 2.
    np.testing.assert_array_equal(codes, [3, 5, 5, 3, 1])


def test_the_scale_multiplies():
    assert float(numerics.dequantize(jnp.float32(7), jnp.float32(0.25), jnp.float32(3))) == 1.0


@pytest.mark.parametrize('symmetric, share', GRIDS)
@pytest.mark.parametrize('bits', BITS)
def test_fake_quantize_equals_the_float64_oracle(bits, symmetric, share):
    x, scale, zero_point, grid = random_case(bits, symmetric, share)
    got = fake(x, scale, zero_point, grid)
    want = oracle.fake_quantize(x, np.float32(scale), zero_point, *grid)
    np.testing.assert_allclose(got, want, rtol=ROUNDING, atol=0)
    codes = numerics.quantize(jnp.asarray(x), jnp.float32(scale), jnp.float32(zero_point), *grid)
    np.testing.assert_array_equal(codes, oracle.quantize(x, np.float32(scale), zero_point, *grid))
    assert codes.min() == grid[0] and codes.max() == grid[1]


@pytest.mark.parametrize('symmetric, share', GRIDS)
@pytest.mark.parametrize('bits', BITS)
def test_fake_quantize_is_idempotent_exact_at_zero_and_within_half_a_step(bits, symmetric, share):
    x, scale, zero_point, grid = random_case(bits, symmetric, share)
    once = fake(x, scale, zero_point, grid)
    np.testing.assert_array_equal(fake(once, scale, zero_point, grid), once)
    assert float(fake(0.0, scale, zero_point, grid)) == 0.0
    low, high = ((end - zero_point) * scale for end in grid)
    inside = (x >= low) & (x <= high)
    assert inside.any() and not inside.all()
    error = np.abs(np.asarray(once) - x)[inside]
    assert error.max() <= scale / 2 + ROUNDING * max(-low, high)


@pytest.mark.parametrize('zero_point', [-3.7, 0.0, 0.49, 2.5, 7.31, 15.0, 40.2])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_any_real_zero_point_leaves_at_most_two_to_the_bits_values(bits, zero_point):
    grid = numerics.integer_grid(bits, False)
    x = jnp.linspace(-60.0, 60.0, 5001)
    values = np.unique(np.asarray(fake(x, 0.7, zero_point, grid)))
    assert len(values) <= 2**bits
    steps = values / np.float32(0.7)
    # The values stay multiples of the scale, so that codes and zero point are integers.
    np.testing.assert_allclose(steps, np.rint(steps), rtol=ROUNDING, atol=0)


def test_gradients_inside_jit_and_vmap_equal_the_plain_ones():
    x, scale, zero_point, grid = random_case(4, False, 0.4, num_values=64)
    rows = jnp.asarray(x.reshape(4, 16))
    scales = jnp.asarray([0.2, 0.3, 0.4, 0.5])

    def loss(x, scale):
        return jnp.sum(numerics.fake_quantize(x, scale, jnp.float32(zero_point), *grid) ** 2)

    plain = [jax.grad(loss, (0, 1))(row, s) for row, s in zip(rows, scales, strict=True)]
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(rows, scales)
    for got, want in zip(mapped, zip(*plain, strict=True), strict=True):
        # Sums of 16 terms in another order.
        np.testing.assert_allclose(got, np.stack(want), rtol=16 * EPS, atol=16 * EPS * 40)


def test_a_shared_scale_sums_the_gradients_of_its_elements():
    x, scale, zero_point, grid = random_case(3, False, 0.4)
    gradient = jax.grad(lambda s: fake_sum(x, s, zero_point, grid))(jnp.float32(scale))
    terms = [oracle.fake_quantize_gradients(v, np.float32(scale), zero_point, *grid)[1] for v in x]
    # A float32 sum of 400 terms of size up to qmax.
    assert abs(float(gradient) - sum(terms)) < 400 * EPS * max(map(abs, terms))


def fake_sum(x, scale, zero_point, grid):
    return jnp.sum(
        numerics.fake_quantize(jnp.asarray(x), scale, jnp.float32(zero_point), *map(float, grid))
    )


def test_a_gaussian_at_two_bits_keeps_the_gradient_of_its_outermost_bins():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(2000).astype(np.float32))
    gradient = jax.grad(
        lambda x: jnp.sum(numerics.fake_quantize(x, jnp.float32(1), jnp.float32(0), -2.0, 1.0))
    )(x)
    inside = (x >= -2.5) & (x <= 1.5)
    np.testing.assert_array_equal(gradient, inside.astype(jnp.float32))


def test_powers_are_the_nearest_in_the_exponent_and_exact():
    x = jnp.asarray([0.0, 2.0**-20, 0.7, 0.71, 1.0, 0.3, 5.0])
    got = numerics.fake_quantize_powers(x, jnp.asarray(1.0), numerics.largest_exponent(4))
    # Codes 15 (clipped), 15, 1 (0.7 < sqrt(1/2)), 0, 0, 2, 0 (clipped).
    np.testing.assert_array_equal(got, [2.0**-15, 2.0**-15, 0.5, 1.0, 1.0, 0.25, 1.0])
    assert numerics.largest_exponent(3) == 7 and numerics.largest_exponent(8) == 27


def test_the_gradient_of_powers_goes_through_below_the_scale_and_to_it_beyond():
    def total(x, scale):
        return jnp.sum(numerics.fake_quantize_powers(x, scale, 7))

    x = jnp.asarray([0.1, 0.4, 0.5, 0.8])
    of_x, of_scale = jax.grad(total, (0, 1))(x, jnp.asarray(0.5))
    np.testing.assert_array_equal(of_x, [1, 1, 1, 0])
    assert float(of_scale) == 1


def test_roots_are_powers_of_the_square_root_of_two_and_zero():
    largest = numerics.largest_root(3)
    x = jnp.asarray([1.0, 0.72, 0.5, 0.36, 2.0**-3, 2.0**-3.2, 2.0**-3.3, 0.0, 3.0])
    got = numerics.fake_quantize_roots(x, jnp.asarray(1.0), largest)
    # Codes 0, 1, 2, 3, 6, 6, 7 (zero), 7 (zero), 0 (clipped).
    want = [1.0, 2**-0.5, 0.5, 2**-1.5, 2**-3, 2**-3, 0.0, 0.0, 1.0]
    np.testing.assert_array_equal(got, np.float32(want))
    assert largest == 7 and numerics.largest_root(8) == 54
