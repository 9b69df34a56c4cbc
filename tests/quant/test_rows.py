import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant.rows import at_timestep, scale_channels

EPS = float(np.finfo(np.float32).eps)
TIMESTEPS = jnp.asarray([90, 60, 30, 0], jnp.int32)


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_rows_of_listed_timesteps_are_returned_as_they_are(lookup):
    # 20 sampling steps on the tables of 100.
    timesteps = jnp.arange(991, 0, -10)
    table = jnp.asarray(np.random.default_rng(0).uniform(size=100).astype(np.float32))
    got = at_timestep({'a': table}, timesteps, timesteps[::5], lookup=lookup)['a']
    np.testing.assert_array_equal(got, table[::5])


@pytest.mark.parametrize(
    't, row', [(90, 0), (76, 0), (74, 1), (46, 1), (44, 2), (1, 3), (0, 3), (500, 0), (-7, 3)]
)
def test_nearest_takes_the_closest_timestep_also_beyond_the_ends(t, row):
    table = jnp.arange(4.0)
    assert float(at_timestep(table, TIMESTEPS, jnp.int32(t))) == row
    np.testing.assert_array_equal(at_timestep(table, TIMESTEPS, jnp.asarray([t, t])), [row, row])


@pytest.mark.parametrize(
    't, value', [(90, 0.0), (75, 0.5), (60, 1.0), (40, 5 / 3), (10, 8 / 3), (500, 0.0), (-7, 3.0)]
)
def test_linear_interpolates_and_holds_the_ends(t, value):
    table = jnp.arange(4.0)
    got = at_timestep(table, TIMESTEPS, jnp.int32(t), lookup='linear')
    assert float(got) == pytest.approx(value, abs=4 * EPS)
    wide = at_timestep(
        jnp.stack([table, -table], -1), TIMESTEPS, jnp.asarray([t, t]), lookup='linear'
    )
    np.testing.assert_allclose(wide, [[value, -value]] * 2, atol=4 * EPS)


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_t_may_be_any_kind_of_number(lookup):
    table = jnp.arange(4.0)
    for t in (60, 60.0, np.int32(60), np.float32(60), jnp.int32(60), jnp.uint8(60)):
        assert float(at_timestep(table, TIMESTEPS, t, lookup=lookup)) == 1.0
    assert float(at_timestep(table, np.asarray(TIMESTEPS), 60, lookup=lookup)) == 1.0


@pytest.mark.parametrize('lookup', ['nearest', 'linear'])
def test_a_single_row_serves_every_timestep(lookup):
    table = jnp.asarray([7.0])
    assert float(at_timestep(table, TIMESTEPS, 33, lookup=lookup)) == 7.0
    np.testing.assert_array_equal(
        at_timestep(table, TIMESTEPS, jnp.asarray([3, 90]), lookup=lookup), [7.0, 7.0]
    )
    assert float(at_timestep(table, TIMESTEPS[:1], 33, lookup=lookup)) == 7.0


def test_an_unknown_lookup_is_refused():
    with pytest.raises(ValueError, match="timestep_lookup='cubic': expected 'nearest'"):
        at_timestep(jnp.zeros(4), TIMESTEPS, 0, lookup='cubic')


def test_factors_of_channels_multiply_the_last_axis_for_all_images_or_for_each():
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
    one, each = np.float32([1, 2, 4]), np.float32([[1, 2, 4], [3, 5, 7]])
    channels = {'input': jnp.asarray(one), 'output': jnp.asarray(each)}
    np.testing.assert_array_equal(scale_channels(x, channels, 'input'), x * one)
    want = x * each[:, None, None, :]
    np.testing.assert_array_equal(scale_channels(x, channels, 'output'), want)


def test_a_layer_without_factors_is_left_alone():
    x = jnp.ones((2, 3))
    assert scale_channels(x, None, 'input') is x
    assert scale_channels(x, {'output': jnp.ones(3)}, 'input') is x
