"""Products of attention on integers against float64 products of what the integers stand for."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.quant.activation_products import integer_product
from dmq_jax.quant.rows import fake_quantize_input
from dmq_jax.quant.tensor import QuantSpec

RNG = np.random.default_rng(0)
SHAPES = (2, 3, 4, 5), (2, 3, 6, 5)  # images, heads, rows of each side, channels
# Scale times exact sum, a few float32 roundings.
TOLERANCE = 1e-6


def rounded(x, rows, spec):
    return np.asarray(fake_quantize_input(jnp.asarray(x), rows, spec), np.float64)


def check(lhs, rhs, lhs_rows, rhs_rows, lhs_spec, rhs_spec):
    got = integer_product(
        jnp.asarray(lhs), jnp.asarray(rhs), lhs_rows, rhs_rows, lhs_spec=lhs_spec, rhs_spec=rhs_spec
    )
    want = rounded(lhs, lhs_rows, lhs_spec) @ rounded(rhs, rhs_rows, rhs_spec).swapaxes(-1, -2)
    assert got.dtype == lhs.dtype and np.linalg.norm(want) > 0
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def row(scale, zero_point, **more):
    rows = {'scale': scale, 'zero_point': zero_point, **more}
    return {name: jnp.asarray(value, jnp.float32) for name, value in rows.items()}


def operands():
    return (RNG.standard_normal(shape).astype(np.float32) for shape in SHAPES)


@pytest.mark.parametrize('lhs_bits, rhs_bits', [(4, 4), (8, 8), (4, 8), (6, 3)])
@pytest.mark.parametrize('lhs_symmetric, rhs_symmetric', [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_zero_points_are_taken_out_exactly(lhs_bits, rhs_bits, lhs_symmetric, rhs_symmetric):
    lhs, rhs = operands()
    specs, rows = [], []
    for bits, symmetric in ((lhs_bits, lhs_symmetric), (rhs_bits, rhs_symmetric)):
        specs.append(QuantSpec(bits=bits, symmetric=bool(symmetric)))
        # One scale and zero point for each image.
        zeros = [0, 0] if symmetric else [2 ** (bits - 1) - 1, 2 ** (bits - 2)]
        rows.append(row([4 / 2**bits, 6 / 2**bits], zeros))
    check(lhs, rhs, *rows, *specs)


@pytest.mark.parametrize('zero_point', [0, 300])
@pytest.mark.parametrize('symmetric', [True, False])
def test_a_softmax_of_16_bits_is_two_products_of_bytes(zero_point, symmetric):
    _, rhs = operands()
    lhs = RNG.dirichlet(np.ones(5), SHAPES[0][:-1]).astype(np.float32)
    zeros = 0 if symmetric else 7
    check(
        lhs, rhs, row(1 / 60_000, zero_point), row(0.3, zeros),
        QuantSpec(bits=16, symmetric=False), QuantSpec(bits=4, symmetric=symmetric),
    )  # fmt: skip


@pytest.mark.parametrize('bits', [3, 4, 8])
def test_each_image_may_lie_on_powers_of_two_or_on_an_even_grid(bits):
    _, rhs = operands()
    lhs = RNG.dirichlet(0.3 * np.ones(5), SHAPES[0][:-1]).astype(np.float32)
    rows = row([1 / (2**bits - 1)] * 2, [0, 0], powers=[0.9, 0])
    check(lhs, rhs, rows, row(0.1, 9), QuantSpec(bits=bits, symmetric=False),
          QuantSpec(bits=5, symmetric=False))  # fmt: skip


@pytest.mark.parametrize('bits', [3, 4, 8])
def test_a_softmax_on_powers_of_the_root_of_two(bits):
    _, rhs = operands()
    lhs = RNG.dirichlet(0.3 * np.ones(5), SHAPES[0][:-1]).astype(np.float32)
    rows = row(1.0, 0, roots=0.8)
    check(lhs, rhs, rows, row([0.1, 0.2], [9, 12]), QuantSpec(bits=bits, symmetric=False),
          QuantSpec(bits=5, symmetric=False))  # fmt: skip
