"""What must wait does, on one CPU, and is otherwise what it was."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax.quant.order import not_before


def test_what_waits_is_what_it_was_and_integers_pass():
    first = [jnp.ones((2, 3)), jnp.zeros((0,)), jnp.ones((4,), jnp.int32)]
    then = [jnp.arange(6.0).reshape(2, 3), jnp.arange(5)]
    for found, given in zip(jax.jit(not_before)(first, then), then, strict=True):
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found, given)


# Each factor's gradient is a sum over as many numbers as the chain carries, which nobody asks for
# before the end.
CHAIN = """
import jax, jax.numpy as jnp
from dmq_jax.quant import order

@jax.custom_vjp
def scaled(x, factor):
    return jnp.cos(x * factor)

def forward(x, factor):
    return scaled(x, factor), (x, factor)

def backward(kept, g):
    x, factor = kept
    g = -g * jnp.sin(x * factor)
    slope = jnp.sum(jnp.sort(g * x, axis=-1))
    g = jnp.sort(g * factor, axis=-1)
    (g,) = order.not_before([slope], [g]) if {waits} else [g]
    return g, slope

scaled.defvjp(forward, backward)

def loss(factors, x):
    for factor in factors:
        x = scaled(x, factor)
    return jnp.sum(x)

def step(factors, x):
    slopes = jax.grad(loss)(factors, x)
    return jax.tree.map(lambda f, s: f - 0.1 * s, factors, slopes)

compiled = jax.jit(step).lower([jnp.ones(())] * 12, jnp.ones((64, 1024))).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""


def temporaries(*, waits):
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
        [sys.executable, '-c', CHAIN.replace('{waits}', str(waits))],
        env=environment | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_sums_that_come_first_let_go_of_what_they_add_up():
    assert temporaries(waits=True) < temporaries(waits=False)
