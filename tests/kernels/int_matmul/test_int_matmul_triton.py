import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import gpu, packing
from kernels.epilogue import Epilogue
from kernels.int_matmul import choose, int_matmul
from kernels.int_matmul.api import Problem
from kernels.int_matmul.shapes import SMALL, Shape

SHAPES = {
    **SMALL,
    'several_tiles': Shape((), 70, 45, 96),
    'even_steps': Shape((), 33, 17, 128),
    'odd_halves': Shape((), 20, 9, 66),
    'heads': Shape((2, 2), 40, 20, 33),
}
# The loop is that of W4A8 but for what it loads; the rest of the shapes is for that.
SHAPES_OF_W4A4 = ('ragged', 'one_row', 'several_tiles', 'heads')

# Three float32 roundings (w_scale, x_scale, bias) of at most 2^-24 each, relative to the largest
# term, and the sum of R products of the low-rank branch in another order.
FLOAT32_TOLERANCE = 1e-6
# Half a unit in the last place of the dtype of the result, besides; a whole one for bfloat16, to
# which the interpreter truncates (compiled code rounds, see test_machine_code.py).
OUT_TOLERANCE = {'float32': 0.0, 'float16': 2.0**-11, 'bfloat16': 2.0**-7}

pytestmark = pytest.mark.usefixtures('interpreted')


def oracle(x, w):
    return np.einsum('...mk,...nk->...mn', x.astype(np.int64), w.astype(np.int64))


def operands(shape, x_range=(-128, 127), w_range=(-128, 127)):
    rng = np.random.default_rng(0)
    x = rng.integers(x_range[0], x_range[1] + 1, (*shape.batch, shape.M, shape.K))
    w = rng.integers(w_range[0], w_range[1] + 1, (*shape.batch, shape.N, shape.K))
    return x.astype(np.int8), w.astype(np.int8)


def multiply(x, w, mode, **options):
    """int_matmul by the kernel, operands packed as `mode` says."""
    options['implementation'] = 'triton'
    if mode != 'W8A8':
        w, options['bits'] = packing.pack(w, 4), 4
    if mode == 'W4A4':
        x, options['x_bits'] = packing.pack(x, 4), 4
    run = jax.jit(lambda x, w: int_matmul(x, w, **options))
    return run(x, w)


RANGES = {
    'W8A8': ((-128, 127), (-128, 127)),
    'W4A8': ((-128, 127), (-8, 7)),
    'W4A4': ((-8, 7), (-8, 7)),
}


@pytest.mark.parametrize(
    ('name', 'mode'),
    [(name, mode) for name in SHAPES for mode in ('W8A8', 'W4A8')]
    + [(name, 'W4A4') for name in SHAPES_OF_W4A4],
)
def test_sums_equal_int64_exactly(name, mode, interpreted):
    shape = SHAPES[name]
    x, w = operands(shape, *RANGES[mode])
    got = multiply(x, w, mode)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, oracle(x, w))
    (call,) = interpreted.calls
    assert (call[1]['W4'], call[1]['X4']) == (mode != 'W8A8', mode == 'W4A4')


@pytest.mark.parametrize('mode', RANGES)
def test_both_ends_of_both_ranges_are_exact_in_a_long_sum(mode):
    for x_code in RANGES[mode][0]:
        for w_code in RANGES[mode][1]:
            x, w = np.full((2, 4099), x_code, np.int8), np.full((3, 4099), w_code, np.int8)
            np.testing.assert_array_equal(multiply(x, w, mode), oracle(x, w))


@pytest.mark.parametrize(('bits', 'signed'), [(2, True), (3, True), (4, False), (8, True)])
def test_widths_without_a_mode_are_unpacked_or_stored_in_one(bits, signed, interpreted):
    low = -(2 ** (bits - 1)) if signed else 0
    x, w = operands(SMALL['ragged'], w_range=(low, low + 2**bits - 1))
    got = int_matmul(
        jnp.asarray(x), jnp.asarray(packing.pack(w, bits)), bits=bits, signed=signed,
        implementation='triton',
    )  # fmt: skip
    np.testing.assert_array_equal(got, oracle(x, w))
    assert interpreted.calls[0][1]['W4'] == (bits == 3)


def epilogue_of(shape, *, entries, zero=True, bias=True, rank=0, rank_dtype=np.float32):
    rng = np.random.default_rng(1)
    rows = 6
    low_rank = None
    if rank:
        down = rng.standard_normal((*shape.batch, shape.M, rank)).astype(rank_dtype)
        low_rank = (
            jnp.asarray(down),
            jnp.asarray(rng.standard_normal((shape.N, rank)), rank_dtype),
        )
    row = rng.integers(0, rows, (entries,)) if entries else np.array(4)
    return Epilogue(
        w_scale=jnp.asarray(rng.uniform(0.001, 0.02, shape.N), jnp.float32),
        x_scale=jnp.asarray(rng.uniform(0.001, 0.02, rows), jnp.float32),
        row=jnp.asarray(row, jnp.int32),
        zero_point=jnp.asarray(rng.integers(-128, 128, rows), jnp.int32) if zero else None,
        bias=jnp.asarray(rng.standard_normal(shape.N), jnp.float32) if bias else None,
        low_rank=low_rank,
    )


def float64_epilogue(total, w, e):
    """The equation of kernels/epilogue.py in float64, and the size of its largest term."""
    row = np.asarray(e.row)
    lead = row.shape + (1,) * (total.ndim - row.ndim)
    if e.zero_point is not None:
        w_sum = w.astype(np.int64).sum(-1)
        w_sum = w_sum if w_sum.ndim == 1 else w_sum[..., None, :]
        total = total - np.asarray(e.zero_point, np.int64)[row].reshape(lead) * w_sum
    y = total * np.float64(e.w_scale) * np.float64(e.x_scale)[row].reshape(lead)
    size = abs(y).max()
    if e.bias is not None:
        y = y + np.float64(e.bias)
        size = max(size, abs(np.float64(e.bias)).max())
    if e.low_rank is not None:
        down, up = (np.asarray(a).astype(np.float64) for a in e.low_rank)
        y = y + np.einsum('...r,nr->...n', down, up)
        size = max(size, np.einsum('...r,nr->...n', abs(down), abs(up)).max())
    return y, size


@pytest.mark.parametrize(
    ('mode', 'out_dtype'),
    [(mode, 'float32') for mode in RANGES] + [('W8A8', 'float16'), ('W4A8', 'bfloat16')],
)
def test_the_epilogue_is_its_equation_within_float32(mode, out_dtype):
    shape = SHAPES['several_tiles']
    x, w = operands(shape, *RANGES[mode])
    e = epilogue_of(shape, entries=shape.M)
    got = multiply(x, w, mode, epilogue=e, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    want, size = float64_epilogue(oracle(x, w), w, e)
    tolerance = FLOAT32_TOLERANCE * size + OUT_TOLERANCE[out_dtype] * abs(want)
    assert (abs(np.asarray(got, np.float64) - want) <= tolerance).all()


def within(got, want, size):
    return (abs(np.asarray(got, np.float64) - want) <= FLOAT32_TOLERANCE * size).all()


@pytest.mark.parametrize(
    'terms',
    [
        {'entries': 0, 'zero': False, 'bias': False},
        {'entries': 0, 'rank': 5},
        {'entries': 7, 'rank': 20, 'bias': False},
        {'entries': 0, 'zero': False, 'rank': 3, 'rank_dtype': np.float16},
    ],
    ids=['scales', 'rank_5', 'rank_20', 'float16_rank_3'],
)
def test_terms_of_the_epilogue_may_be_left_out(terms):
    shape = SHAPES['ragged']
    x, w = operands(shape)
    e = epilogue_of(shape, **terms)
    assert within(multiply(x, w, 'W8A8', epilogue=e), *float64_epilogue(oracle(x, w), w, e))


def test_a_branch_of_two_dtypes_keeps_the_digits_of_both():
    shape = SHAPES['ragged']
    x, w = operands(shape)
    e = epilogue_of(shape, entries=0, rank=4)
    down, up = e.low_rank
    e = e._replace(low_rank=(down.astype(jnp.float16), up))
    assert within(multiply(x, w, 'W8A8', epilogue=e), *float64_epilogue(oracle(x, w), w, e))


def test_one_trace_serves_all_timesteps_and_rows_outside_the_table_are_its_ends():
    shape = SHAPES['ragged']
    x, w = operands(shape)
    e = epilogue_of(shape, entries=0)
    traces = []

    @jax.jit
    def run(row):
        traces.append(row)
        return multiply(x, w, 'W8A8', epilogue=e._replace(row=row))

    for row, used in [(0, 0), (3, 3), (5, 5), (6, 5), (-1, 0)]:
        expected = float64_epilogue(oracle(x, w), w, e._replace(row=np.array(used)))
        assert within(run(jnp.int32(row)), *expected)
    assert len(traces) == 1


def test_shared_weights_take_a_row_for_each_image():
    shape = Shape((3,), 5, 6, 16)
    x, w = operands(shape)
    w = w[0]
    e = epilogue_of(shape, entries=3, rank=4)
    for implementation in ('triton', 'xla', 'reference'):
        got = int_matmul(jnp.asarray(x), jnp.asarray(w), epilogue=e, implementation=implementation)
        total = np.einsum('bmk,nk->bmn', x.astype(np.int64), w.astype(np.int64))
        assert within(got, *float64_epilogue(total, w, e))


def test_attention_products_with_scales_are_their_equation():
    shape = Shape((2, 3), 8, 8, 5)
    q, k = operands(shape)
    e = epilogue_of(shape, entries=2, bias=False)._replace(w_scale=jnp.float32(0.003))
    p = np.random.default_rng(2).integers(-128, 128, (2, 3, 8, 8)).astype(np.int8)
    v = np.ascontiguousarray(np.swapaxes(k, -1, -2))  # softmax times v: w = v transposed
    for x, w in ((q, k), (p, v)):
        got = multiply(x, w, 'W8A8', epilogue=e)
        assert within(got, *float64_epilogue(oracle(x, w), w, e))


@pytest.mark.parametrize(
    ('in_axes', 'heads'),
    [
        ((0, None, None), ()),
        ((None, 0, None), ()),
        ((0, None, 0), ()),
        ((0, None, None), (2,)),
        ((0, 0, 0), (2,)),
    ],
)
def test_vmap_equals_the_parts(in_axes, heads):
    shape = Shape((3, *heads), 5, 4, 16)
    x, w = operands(shape)
    e = epilogue_of(Shape(heads, 5, 4, 16), entries=0)
    rows = jnp.array([5, 0, 2], jnp.int32)

    def run(x, w, row):
        return multiply(x, w, 'W8A8', epilogue=e._replace(row=row))

    parts = [a if axis == 0 else a[0] for a, axis in zip((x, w, rows), in_axes, strict=True)]
    got = jax.jit(jax.vmap(run, in_axes))(*(jnp.asarray(part) for part in parts))
    for index in range(3):
        xi, wi, row = (
            part[index] if axis == 0 else part for part, axis in zip(parts, in_axes, strict=True)
        )
        expected = float64_epilogue(oracle(xi, wi), wi, e._replace(row=np.asarray(row)))
        assert within(got[index], *expected)


def test_vmap_over_the_scales_of_the_weights_equals_the_parts():
    shape = Shape((), 5, 4, 16)
    x, w = operands(shape)
    e = epilogue_of(shape, entries=0)
    scales = jnp.stack([e.w_scale, 2 * e.w_scale])
    got = jax.vmap(lambda s: multiply(x, w, 'W8A8', epilogue=e._replace(w_scale=s)))(scales)
    for index in range(2):
        expected = float64_epilogue(oracle(x, w), w, e._replace(w_scale=scales[index]))
        assert within(got[index], *expected)


def test_rows_sharded_over_devices_equal_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
    rows = jax.sharding.PartitionSpec('data')
    x, w = operands(Shape((), 6, 5, 32))
    split = jax.shard_map(
        lambda x, w: multiply(x, w, 'W8A8'),
        mesh=mesh,
        in_specs=(rows, jax.sharding.PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(split)(x, w), oracle(x, w))


def test_a_gradient_is_an_error_that_says_what_to_do_unless_it_is_stopped():
    shape = SHAPES['ragged']
    x, w = operands(shape)
    e = epilogue_of(shape, entries=0)

    def loss(scale, stop):
        scale = jax.lax.stop_gradient(scale) if stop else scale
        return multiply(x, w, 'W8A8', epilogue=e._replace(w_scale=scale)).sum()

    with pytest.raises(NotImplementedError, match="use implementation='xla'"):
        jax.grad(loss)(e.w_scale, False)
    assert not jax.grad(loss)(e.w_scale, True).any()


def test_beside_a_stopped_product_gradients_pass_under_checkpoint():
    w = jnp.ones((3, 4), jnp.int8)

    @jax.checkpoint
    def layer(x):
        codes = jax.lax.stop_gradient(jnp.round(x)).astype(jnp.int8)
        total = int_matmul(codes, w, implementation='triton')
        return jnp.sum(x**2) + jnp.sum(total.astype(jnp.float32))

    x = jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(jax.jit(jax.grad(layer))(x), 2 * x)


def test_what_vmap_makes_too_large_for_one_launch_is_an_error():
    def run(x, w):
        return int_matmul(x, w, implementation='triton')

    many, one = (jax.ShapeDtypeStruct((*n, 1, 32), jnp.int8) for n in ((2**16,), ()))
    # Shared weights: one product of many rows.
    assert jax.eval_shape(jax.vmap(run, (0, None)), many, one).shape == (2**16, 1, 1)
    with pytest.raises(NotImplementedError, match='under vmap, 65536 products'):
        jax.eval_shape(jax.vmap(run), many, many)


def problem(**changes):
    default = Problem('W4A8', 1, 256, 256, 256, 128, 128, True)
    return default._replace(**changes)


def test_none_prefers_the_kernel_where_it_gains_and_says_why_elsewhere():
    assert choose(None, problem()).implementation == 'triton'
    assert choose(None, problem(mode='W8A8')).implementation == 'triton'
    for changes, reason in [
        ({'mode': 'W8A8', 'has_epilogue': False}, 'XLA uses the same instructions'),
        ({'row_bytes': 130}, 'multiple of 16'),
        ({'M': 3}, 'M=3 < 16'),
        ({'K': 2**17}, 'may exceed int32'),
        ({'M': 2**24}, 'offsets are int32'),
        ({'x_size': 2**31}, 'offsets are int32'),
        ({'batch': 2**16}, 'at most 65535'),
        ({'M': 0}, 'empty'),
    ]:
        choice = choose(None, problem(**changes))
        assert choice.implementation == 'xla' and reason in choice.reason, choice


def test_the_environment_may_name_the_back_end(monkeypatch):
    monkeypatch.setenv('KERNELS_IMPLEMENTATION', 'xla')
    assert choose(None, problem()) == ('xla', 'named by KERNELS_IMPLEMENTATION')
    assert choose('triton', problem()).implementation == 'triton'


def test_a_kernel_that_cannot_run_is_an_error_with_the_reason():
    with pytest.raises(NotImplementedError, match='K=131072.*may exceed int32'):
        choose('triton', problem(K=2**17))
    with gpu.targeting(75), pytest.raises(NotImplementedError, match=r'capability 7\.5 < 8\.0'):
        choose('triton', problem())
