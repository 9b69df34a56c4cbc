"""Counts against what a few functions do, worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from dmq_jax import operations

A = jax.ShapeDtypeStruct((8, 16), jnp.float32)
B = jax.ShapeDtypeStruct((16, 32), jnp.float32)


def count(function, *shapes):
    return operations.count(jax.make_jaxpr(function)(*shapes))


def test_a_matrix_product_reads_its_operands_and_writes_its_result():
    counts = count(jnp.matmul, A, B)
    assert counts.product_flops == 2 * 8 * 16 * 32
    assert counts.bytes_moved == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    assert counts.live == counts.products == 4 * 8 * 32


def test_holes_of_a_transposed_convolution_are_not_counted():
    def widen(x, kernel):
        return jax.lax.conv_transpose(x, kernel, (2, 2), 'SAME')

    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    # Two taps and stride 2: every one of the 8 x 8 places meets one value.
    assert count(widen, x, kernel).product_flops == 2 * 8 * 8 * 3 * 5


@pytest.mark.parametrize('groups', [1, 2])
def test_a_convolution_counts_the_taps_that_meet_a_value_not_padding(groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )  # fmt: skip

    x = jax.ShapeDtypeStruct((2, 5, 5, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4 // groups, 6), jnp.float32)
    taps = 2 * 2 + 3 * 3  # along one axis: the two ends see two values, the others three
    assert count(convolve, x, kernel).product_flops == 2 * 2 * 6 * (4 // groups) * taps**2


def test_what_is_elementwise_lies_in_memory_only_where_a_product_reads_it():
    counts = count(lambda a, b: jnp.tanh(jnp.exp(a) + 1.0) @ b, A, B)
    # The sum and the exponential never do; tanh is written, and read by the product.
    assert counts.bytes_moved == 4 * (2 * 8 * 16 + (8 * 16 + 16 * 32 + 8 * 32))
    assert counts.live == 4 * (8 * 16 + 8 * 32)
    assert counts.other_flops == 3 * 8 * 16


def test_a_reduction_reads_through_what_is_elementwise():
    counts = count(lambda a: jnp.sum(a * a), A)
    assert counts.bytes_moved == 4 * (8 * 16 + 1)
    assert counts.live == 4


def test_a_loop_counts_every_round_and_its_memory_once():
    def repeat(rounds):
        def visit(a, _):
            return a @ jnp.ones((16, 16)), None

        return lambda a: jax.lax.scan(visit, a, None, length=rounds)[0]

    three, six = count(repeat(3), A), count(repeat(6), A)
    assert three.product_flops == 3 * 2 * 8 * 16 * 16
    assert six.product_flops == 2 * three.product_flops
    assert six.live == three.live


def test_what_a_backward_pass_needs_stays_alive():
    def loss(a, b):
        for _ in range(4):
            a = jnp.tanh(a @ b)
        return jnp.sum(a)

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    forward = count(loss, square, square)
    both = count(jax.value_and_grad(loss, (0, 1)), square, square)
    assert both.product_flops == 3 * forward.product_flops
    assert both.live > 3 * forward.live / 2
    # Repeated in the backward pass instead, one layer at a time.
    again = count(jax.value_and_grad(jax.checkpoint(loss), (0, 1)), square, square)
    assert again.product_flops > both.product_flops
    # Without the value, the first time is for nothing.
    unread = count(jax.grad(jax.checkpoint(loss), (0, 1)), square, square)
    assert unread.product_flops < again.product_flops
