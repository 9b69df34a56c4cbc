import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.methods import low_rank

# Sums of 3 products in float32.
TOLERANCE = 4 * float(np.finfo(np.float32).eps)
SHAPES = {'dense': (6, 5), 'conv': (3, 2, 4, 5)}


def start(shape, rank, seed=0):
    return low_rank.init({'only': jnp.zeros(shape)}, rank, jax.random.key(seed))['only']


def random_update(shape, rank):
    update = start(shape, rank)
    up = np.random.default_rng(0).standard_normal(update['up'].shape).astype(np.float32)
    return update | {'up': jnp.asarray(up)}


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_an_update_starts_at_zero_with_down_in_its_bounds(shape):
    update = start(shape, 3)
    np.testing.assert_array_equal(low_rank.delta(update), np.zeros(shape))
    bound = 1 / np.sqrt(np.prod(shape[:-1]))
    down = np.asarray(update['down'])
    assert down.shape == (*shape[:-1], 3) and update['up'].shape == (3, shape[-1])
    assert 0.5 * bound < np.abs(down).max() <= bound
    assert down.min() < 0 < down.max()


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_an_update_is_the_product_of_its_factors_tap_by_tap(shape):
    update = random_update(shape, 3)
    down, up = (np.asarray(update[name], np.float64) for name in ('down', 'up'))
    want = np.empty(shape)
    for tap in np.ndindex(shape[:-2]):
        want[tap] = down[tap] @ up
    np.testing.assert_allclose(low_rank.delta(update), want, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_an_update_as_a_matrix_has_the_rank_asked_for(shape):
    matrix = np.asarray(low_rank.delta(random_update(shape, 2))).reshape(-1, shape[-1])
    assert np.linalg.matrix_rank(matrix, tol=1e-5) == 2


@pytest.mark.parametrize('shape, rank', [((6, 5), 5), ((3, 8), 3), ((3, 3, 1, 64), 9)])
def test_a_rank_beyond_the_smaller_side_is_cut(shape, rank):
    update = start(shape, 32)
    assert update['up'].shape == (rank, shape[-1])


def test_keys_make_different_updates():
    first, second = (start((6, 5), 3, seed)['down'] for seed in range(2))
    assert not np.array_equal(first, second)


def test_kernels_have_numbers_of_their_own():
    kernels = {'a': jnp.zeros((6, 5)), 'b': jnp.zeros((6, 5)), 'c': jnp.zeros((7, 5))}
    updates = low_rank.init(kernels, 3, jax.random.key(0))
    numbers = [update['down'].ravel() * np.sqrt(len(update['down'])) for update in updates.values()]
    drawn = np.concatenate(numbers).round(5)
    assert len(set(drawn.tolist())) == drawn.size == 18 + 18 + 21
