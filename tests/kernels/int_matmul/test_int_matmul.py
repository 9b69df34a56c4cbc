import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packing
from kernels.int_matmul import choose, int_matmul
from kernels.int_matmul.shapes import REAL, SMALL

# Those that run without a GPU; the test of the kernel has the other.
PORTABLE = ('xla', 'reference')
NAMES = [None, *PORTABLE]


def oracle(x, w):
    return np.einsum('...mk,...nk->...mn', x.astype(np.int64), w.astype(np.int64))


def operands(shape, low=-128, high=127):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (*shape.batch, shape.M, shape.K)).astype(np.int8)
    w = rng.integers(low, high + 1, (*shape.batch, shape.N, shape.K)).astype(np.int8)
    return x, w


@pytest.mark.parametrize('implementation', NAMES)
@pytest.mark.parametrize('shape', SMALL.values(), ids=SMALL)
def test_matches_int64_exactly(shape, implementation):
    x, w = operands(shape)
    got = int_matmul(jnp.asarray(x), jnp.asarray(w), implementation=implementation)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle(x, w))


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize(
    ('bits', 'signed'),
    [(2, True), (3, True), (4, True), (6, True), (8, True), (2, False), (4, False), (7, False)],
)
def test_packed_weights_match_int64_exactly(bits, signed, implementation):
    low = -(2 ** (bits - 1)) if signed else 0
    for name in ('ragged', 'odd_k_heads'):
        x, w = operands(SMALL[name], low, low + 2**bits - 1)

        @jax.jit
        def run(x, packed):
            return int_matmul(x, packed, bits=bits, signed=signed, implementation=implementation)

        got = run(x, packing.pack(w, bits))
        np.testing.assert_array_equal(got, oracle(x, w))


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize('x_code', [-128, 127])
@pytest.mark.parametrize('w_code', [-128, 127])
def test_both_ends_of_the_range_are_exact_in_a_long_sum(w_code, x_code, implementation):
    x, w = np.full((2, 4099), x_code, np.int8), np.full((3, 4099), w_code, np.int8)
    got = int_matmul(jnp.asarray(x), jnp.asarray(w), implementation=implementation)
    np.testing.assert_array_equal(got, oracle(x, w))


def test_the_layer_shape_of_an_attention_projection_is_exact():
    x, w = operands(REAL['attention_projection_16x16'], -8, 7)
    got = int_matmul(jnp.asarray(x), jnp.asarray(packing.pack(w, 4)), bits=4)
    np.testing.assert_array_equal(got, oracle(x, w))


@pytest.mark.parametrize('implementation', PORTABLE)
def test_attention_products_of_split_heads_are_exact_under_jit(implementation):
    rng = np.random.default_rng(1)
    q, k, v = (rng.integers(-128, 128, (2, 6, 3, 5)).astype(np.int8) for _ in range(3))
    p = rng.integers(-128, 128, (2, 3, 6, 6)).astype(np.int8)

    @jax.jit
    def products(q, k, v, p):
        heads_first = [a.transpose(0, 2, 1, 3) for a in (q, k, v)]
        scores = int_matmul(heads_first[0], heads_first[1], implementation=implementation)
        values = heads_first[2].swapaxes(-1, -2)
        return scores, int_matmul(p, values, implementation=implementation)

    scores, mixed = products(q, k, v, p)
    q, k, v, p = (a.astype(np.int64) for a in (q, k, v, p))
    np.testing.assert_array_equal(scores, np.einsum('bqhd,bkhd->bhqk', q, k))
    np.testing.assert_array_equal(mixed, np.einsum('bhqk,bkhd->bhqd', p, v))


@pytest.mark.parametrize('implementation', PORTABLE)
@pytest.mark.parametrize('in_axes', [(0, None), (None, 0), (0, 0)])
def test_vmap_equals_the_parts(in_axes, implementation):
    shape = SMALL['odd_k_heads']._replace(batch=(3,))
    x, w = operands(shape)
    x, w = x if in_axes[0] == 0 else x[0], w if in_axes[1] == 0 else w[0]

    def run(x, w):
        return int_matmul(x, w, implementation=implementation)

    got = jax.jit(jax.vmap(run, in_axes))(x, w)
    np.testing.assert_array_equal(got, oracle(x, w))


def test_a_batch_sharded_over_devices_equals_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    x, w = operands(SMALL['attention']._replace(batch=(jax.device_count(),)))
    swapped = np.ascontiguousarray(w.swapaxes(-1, -2))
    got = jax.jit(lambda x, v: int_matmul(x, v.swapaxes(-1, -2)))(
        jax.device_put(x, rows), jax.device_put(swapped, rows)
    )
    np.testing.assert_array_equal(got, oracle(x, w))


def test_a_sum_that_may_exceed_int32_is_an_error_unless_the_codes_are_promised_small():
    x, w = jnp.ones((1, 131_072), jnp.int8), jnp.ones((1, 131_072), jnp.int8)
    with pytest.raises(ValueError, match='may exceed int32'):
        int_matmul(x, w)
    assert int_matmul(x, w, x_max=127)[0, 0] == 131_072
    assert int_matmul(x[:, :-1], w[:, :-1])[0, 0] == 131_071


@pytest.mark.parametrize('implementation', [None, 'xla', 'reference'])
def test_operands_of_numpy_and_empty_ones_are_products_too(implementation):
    x, w = np.full((3, 5), -128, np.int8), np.full((2, 5), -128, np.int8)
    np.testing.assert_array_equal(int_matmul(x, w, implementation=implementation), oracle(x, w))
    for x_part, w_part in ((x[:0], w), (x, w[:0]), (x[:, :0], w[:, :0])):
        got = int_matmul(x_part, w_part, implementation=implementation)
        np.testing.assert_array_equal(got, np.zeros((len(x_part), len(w_part))))


def test_wrong_operands_say_what_was_expected():
    x = jnp.zeros((4, 6), jnp.int8)
    with pytest.raises(ValueError, match='x is float32: expected int8'):
        int_matmul(x.astype(jnp.float32), x)
    with pytest.raises(ValueError, match=r'expected \[\.\.\., M, K\]'):
        int_matmul(x, jnp.zeros((4, 5), jnp.int8))
    with pytest.raises(ValueError, match='equal leading dimensions'):
        int_matmul(x[None], jnp.zeros((2, 4, 6), jnp.int8))
    with pytest.raises(ValueError, match='expected int8, or packed uint8'):
        int_matmul(x, x.astype(jnp.uint8))
    with pytest.raises(ValueError, match='bits=None'):
        int_matmul(x, x, bits=4)
    with pytest.raises(ValueError, match='does not fit int8'):
        int_matmul(x, x.astype(jnp.uint8), bits=8, signed=False)
    with pytest.raises(ValueError, match="expected None or .*'xla'"):
        int_matmul(x, x, implementation='cuda')


def test_a_named_back_end_never_falls_back(monkeypatch):
    x = jnp.ones((2, 3), jnp.int8)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'metal')
    with pytest.raises(NotImplementedError, match='not metal'):
        int_matmul(x, x, implementation='xla')
    assert choose().implementation == 'reference'
    assert 'metal' in choose().reason
    np.testing.assert_array_equal(int_matmul(x, x), oracle(np.ones((2, 3)), np.ones((2, 3))))


def test_choose_names_what_runs_and_why():
    assert choose().implementation == 'xla'
    assert choose('reference') == ('reference', 'named by the caller')
