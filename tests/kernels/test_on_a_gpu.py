"""The compiled kernels on the GPU here: `python -m pytest -m gpu tests/kernels`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import packing, triton_shim
from kernels.epilogue import Epilogue
from kernels.int_conv import int_conv
from kernels.int_conv import shapes as convolutions
from kernels.int_matmul import int_matmul
from kernels.int_matmul import shapes as products

pytestmark = pytest.mark.gpu

MODES = ('W8A8', 'W4A8', 'W4A4')
# Three float32 roundings, relative to the largest result.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def runnable():
    if reason := triton_shim.refusal():
        pytest.skip(reason)


def operands(x_shape, w_shape, mode):
    """Codes at both ends of the ranges and between, packed as `mode` says, and its options."""
    rng = np.random.default_rng(0)
    ends = {'8': (-128, 128), '4': (-8, 8)}
    x = rng.integers(*ends[mode[3]], x_shape).astype(np.int8)
    w = rng.integers(*ends[mode[1]], w_shape).astype(np.int8)
    options = {}
    if mode != 'W8A8':
        w, options['bits'] = packing.pack(w, 4), 4
    if mode == 'W4A4':
        x, options['x_bits'] = packing.pack(x, 4), 4
    return jnp.asarray(x), jnp.asarray(w), options


def epilogue(num_outputs):
    rng = np.random.default_rng(1)
    return Epilogue(
        jnp.asarray(rng.uniform(0.001, 0.02, num_outputs), jnp.float32),
        jnp.asarray(rng.uniform(0.001, 0.02, 10), jnp.float32),
        jnp.int32(7),
        jnp.asarray(rng.integers(-128, 128, 10), jnp.int32),
        jnp.asarray(rng.standard_normal(num_outputs), jnp.float32),
    )


def check(op, x, w, options, num_outputs):
    """Sums equal XLA's, their epilogue within rounding."""
    kernel, xla = (
        jax.jit(lambda x, w, e, name=name: op(x, w, epilogue=e, implementation=name, **options))
        for name in ('triton', 'xla')
    )
    np.testing.assert_array_equal(kernel(x, w, None), xla(x, w, None))
    got, want = (np.asarray(run(x, w, epilogue(num_outputs))) for run in (kernel, xla))
    assert abs(got - want).max() <= TOLERANCE * abs(want).max()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', [*products.SMALL, *products.REAL])
def test_products_equal_those_of_xla(name, mode):
    shape = (products.SMALL | products.REAL)[name]
    x, w, options = operands(
        (*shape.batch, shape.M, shape.K), (*shape.batch, shape.N, shape.K), mode
    )
    check(int_matmul, x, w, options, shape.N)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', [*convolutions.SMALL, *convolutions.REAL])
def test_convolutions_equal_those_of_xla(name, mode):
    shape = (convolutions.SMALL | convolutions.REAL)[name]
    taps = (shape.kernel, shape.kernel) if mode == 'W8A8' else (shape.kernel**2,)
    x, w, options = operands((shape.B, shape.H, shape.W, shape.C), (shape.O, *taps, shape.C), mode)
    options |= {'strides': (shape.stride,) * 2, 'padding': (shape.padding,) * 2}
    check(int_conv, x, w, options, shape.O)
