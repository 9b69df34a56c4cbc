import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.tap import Product, Tap


class Model(nn.Module):
    @nn.compact
    def __call__(self, lhs, rhs):
        return Tap(name='tap')(Product(name='product')(lhs, rhs))


def random(*shape):
    return np.random.default_rng(len(shape)).integers(-8, 8, shape).astype(np.float32)


@pytest.mark.parametrize('batch', [(), (3,), (2, 3)])
def test_a_product_contracts_the_last_axis_of_both(batch):
    lhs, rhs = random(*batch, 4, 5), random(*batch, 6, 5)
    out = Product().apply({}, lhs, rhs)
    # Small integers: every order of summation is exact in float32.
    np.testing.assert_array_equal(out, lhs @ rhs.swapaxes(-1, -2))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_product_keeps_the_dtype_of_its_operands(dtype):
    assert Product().apply({}, jnp.ones((2, 3), dtype), jnp.ones((4, 3), dtype)).dtype == dtype


def test_a_tap_changes_nothing():
    x = random(2, 3)
    np.testing.assert_array_equal(Tap().apply({}, x), x)


def test_product_and_tap_have_paths_and_no_parameters():
    paths = []

    def record(next_fun, args, kwargs, context):
        paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        variables = Model().init(jax.random.key(0), random(4, 5), random(6, 5))
    assert set(paths) == {'', 'product', 'tap'}
    assert variables == {}
