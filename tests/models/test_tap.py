import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.models.tap import Attend, Product, Tap


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


class Attention(nn.Module):
    products: bool

    @nn.compact
    def __call__(self, q, k, v, mask=None):
        attend = Attend(name='attend')
        return (attend.by_products if self.products else attend)(q, k, v, mask)


def attention_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def attention_by_definition(q, k, v, mask=True):
    """Softmax attention in float64, one head and one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        scores = k[b, :, h] @ q[b, i, h] / np.sqrt(q.shape[3])
        visible = np.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))[b, i]
        weights = np.where(visible, np.exp(scores - scores.max()), 0.0)
        out[b, i, h] = weights / weights.sum() @ v[b, :, h]
    return out


CAUSAL = np.tril(np.ones((5, 7), bool))
OF_EACH_IMAGE = np.stack([CAUSAL, CAUSAL[::-1]])
MASKS = {'none': None, 'shared': CAUSAL, 'one for each image': OF_EACH_IMAGE}


@pytest.mark.parametrize('products', [False, True])
@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS)
def test_attention_is_its_definition_fused_or_by_products(products, mask):
    q, k, v = attention_inputs()
    out = Attention(products).apply({}, q, k, v, mask)
    reference = attention_by_definition(q, k, v, True if mask is None else mask)
    # A dozen roundings of numbers of size 1 (seen: 4e-7).
    assert np.abs(out - reference).max() < 2e-6


# A batch so large that pieces are of 64 queries; a ragged end; queries and keys of other lengths.
LONG = {
    'many pieces': (9, 320, 4096, None),
    'ragged end': (2, 600, 256, None),
    'few keys': (1, 1024, 77, None),
    'one mask': (2, 600, 256, 2),
    'a mask for each image': (2, 600, 120, 3),
}


@pytest.mark.parametrize('sizes', LONG.values(), ids=LONG)
def test_long_attention_in_pieces_is_the_products_with_its_gradients(sizes):
    batch, length, keys, dims = sizes
    rng = np.random.default_rng(0)
    mask = dims and jnp.asarray(rng.random((batch, length, keys)[-dims:]) < 0.5)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, n, 2, 4)), np.float32) for n in (length, keys, keys)
    )

    def value(products, *inputs):
        out = Attention(products).apply({}, *inputs, mask)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    results = [
        jax.jit(jax.value_and_grad(functools.partial(value, products), (0, 1, 2), has_aux=True))(
            q, k, v
        )
        for products in (False, True)
    ]
    (((_, pieces), found), ((_, whole), wanted)) = results
    # Sums of up to 4096 weights, in another order (seen: 6e-7, and 2e-6 of the largest entry).
    assert np.abs(pieces - whole).max() < 5e-6
    for mine, theirs in zip(found, wanted, strict=True):
        assert np.abs(mine - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize('products', [False, True])
@pytest.mark.parametrize('length', [7, 300])
def test_attention_keeps_bfloat16(products, length):
    inputs = attention_inputs(jnp.bfloat16)
    inputs = [jnp.tile(x, (1, -(-length // x.shape[1]), 1, 1))[:, :length] for x in inputs]
    out = Attention(products).apply({}, *inputs)
    assert out.dtype == jnp.bfloat16
    # A few roundings to eps(bfloat16) = 8e-3 of numbers up to 2.
    assert np.abs(np.asarray(out, np.float64) - attention_by_definition(*inputs)).max() < 5e-2


@pytest.mark.parametrize('products, paths', [(False, set()), (True, {'scores', 'mix'})])
def test_only_attention_by_products_runs_the_products(products, paths):
    found = set()

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, Product):
            found.add('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda *x: Attention(products).apply({}, *x), *attention_inputs())
    assert found == {f'attend/{path}' for path in paths}


def test_a_hook_may_run_the_products_in_place_of_the_module():
    paths = []

    def replace(next_fun, args, kwargs, context):
        if isinstance(context.module, Attend) and context.method_name == '__call__':
            return context.module.by_products(*args, **kwargs)
        if isinstance(context.module, Product):
            paths.append('/'.join(context.module.path))
        return next_fun(*args, **kwargs)

    network, inputs = Attention(products=False), attention_inputs()
    with nn.intercept_methods(replace):
        out = jax.jit(lambda *x: network.apply({}, *x))(*inputs)
    assert paths == ['attend/scores', 'attend/mix']
    assert np.abs(out - attention_by_definition(*inputs)).max() < 2e-6
