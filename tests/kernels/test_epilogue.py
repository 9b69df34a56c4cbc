import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import epilogue
from kernels.epilogue import Epilogue

N, ROWS = 5, 4


def arrays(**changes):
    fields = {
        'w_scale': jnp.linspace(0.01, 0.02, N),
        'x_scale': jnp.linspace(0.1, 0.4, ROWS),
        'row': jnp.int32(2),
        'zero_point': jnp.array([3, -7, 11, 100], jnp.int32),
        'bias': jnp.linspace(-1.0, 1.0, N),
    }
    return Epilogue(**(fields | changes))


def test_one_and_several_rows_of_the_table_are_the_equation():
    rng = np.random.default_rng(0)
    total, w = rng.integers(-5000, 5000, (3, 2, N)), rng.integers(-8, 8, (N, 6))
    for row in (2, [0, 3, 1]):
        e = arrays(row=jnp.asarray(row, jnp.int32))
        w_sum = jnp.asarray(w.sum(-1), jnp.int32)
        got = epilogue.apply(jnp.asarray(total, jnp.int32), e, w_sum, 'float32')
        lead = (-1, 1, 1)
        zero = np.asarray(e.zero_point)[row].reshape(lead)
        scale = np.float64(e.x_scale)[row].reshape(lead)
        want = (total - zero * w.sum(-1)) * np.float64(e.w_scale) * scale + np.float64(e.bias)
        # Three float32 roundings of numbers up to 50.
        np.testing.assert_allclose(got, want, rtol=0, atol=50 * 3 * 2.0**-24)


def test_the_bracket_is_exact_where_float32_is_not():
    total, w_sum = jnp.full((1, 1), 2**24 + 1, jnp.int32), jnp.ones(1, jnp.int32)
    e = Epilogue(jnp.ones(1), jnp.ones(1), jnp.int32(0), jnp.array([2**24], jnp.int32))
    assert epilogue.apply(total, e, w_sum, 'float32')[0, 0] == 1.0


def test_gradients_reach_the_row_that_was_used_and_no_other():
    total = jnp.ones((2, N), jnp.int32)

    def loss(x_scale):
        e = arrays(x_scale=x_scale)
        return epilogue.apply(total, e, jnp.ones(N, jnp.int32), 'float32').sum()

    gradient = jax.grad(loss)(jnp.ones(ROWS))
    assert gradient[2] != 0 and not gradient[jnp.array([0, 1, 3])].any()


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'w_scale': jnp.ones(3)}, r'epilogue.w_scale is float32 \(3,\): expected floating'),
        ({'x_scale': jnp.ones((2, 2))}, 'epilogue.x_scale'),
        ({'row': jnp.float32(0)}, 'epilogue.row is float32 .*expected integer'),
        ({'row': jnp.zeros(2, jnp.int32)}, r'shape \(\) or \(3,\)'),
        ({'zero_point': jnp.zeros(2, jnp.int32)}, 'epilogue.zero_point'),
        ({'bias': jnp.zeros(())}, 'epilogue.bias'),
        ({'low_rank': (jnp.ones((3, 1, 2)), jnp.ones((N, 2)))}, r'epilogue.low_rank\[0\]'),
        ({'low_rank': (jnp.ones((3, 2, 2)), jnp.ones((N, 3)))}, r'epilogue.low_rank\[1\]'),
    ],
)
def test_an_array_that_does_not_fit_is_named(changes, text):
    with pytest.raises(ValueError, match=text):
        epilogue.check(arrays(**changes), 'float32', rows_shape=(3, 2), num_outputs=N)


def test_other_dtypes_of_the_result_are_refused():
    with pytest.raises(ValueError, match="out_dtype='int32': expected one of .'float32'"):
        epilogue.check(arrays(), 'int32', rows_shape=(3, 2), num_outputs=N)
