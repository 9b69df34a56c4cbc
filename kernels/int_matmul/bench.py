"""Times integer products against float32: `python -m kernels.int_matmul.bench [name ...]`.

Columns: `int8` and `W4 packed` are the library; `swapped w` passes w as a transpose of the stored
array, as softmax times v does; `unconstrained` is that without the rule on the order in memory.
Where the Triton kernels can run, they follow with the bfloat16 of XLA.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import packing, timing, triton_shim
from kernels.int_matmul import int_matmul
from kernels.int_matmul.shapes import REAL, Shape


def variants(shape: Shape) -> dict[str, tuple]:
    """The functions to compare on one shape, with operands; the float32 baseline first."""
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (*shape.batch, shape.M, shape.K), np.int8)
    w = rng.integers(-8, 8, (*shape.batch, shape.N, shape.K), np.int8)
    w_packed = jnp.asarray(packing.pack(w, 4))
    swapped = jnp.asarray(np.ascontiguousarray(np.swapaxes(w, -1, -2)))
    x, w = jnp.asarray(x), jnp.asarray(w)
    batch = tuple(range(len(shape.batch)))
    dimensions = (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch))

    def unconstrained(x: jax.Array, v: jax.Array) -> jax.Array:
        w = jnp.swapaxes(v, -1, -2)
        return lax.dot_general(x, w, dimensions, preferred_element_type=jnp.int32)

    return {
        'float32': (
            lambda x, w: lax.dot_general(x, w, dimensions),
            (x.astype(jnp.float32), w.astype(jnp.float32)),
        ),
        'int8': (int_matmul, (x, w)),
        'W4 packed': (lambda x, w: int_matmul(x, w, bits=4), (x, w_packed)),
        'swapped w': (lambda x, v: int_matmul(x, jnp.swapaxes(v, -1, -2)), (x, swapped)),
        'unconstrained': (unconstrained, (x, swapped)),
        **_gpu_variants(x, w, w_packed),
    }


def _gpu_variants(x: jax.Array, w: jax.Array, w_packed: jax.Array) -> dict[str, tuple]:
    """bfloat16 and the Triton kernels, where they can run; the baseline to beat is bfloat16."""
    if triton_shim.refusal() is not None:
        return {}
    named = functools.partial(int_matmul, implementation='triton')
    x4 = packing.pack(x >> jnp.int8(4), 4)
    return {
        'bfloat16': (
            lambda x, w: jnp.einsum('...mk,...nk->...mn', x, w),
            (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
        ),
        'triton W8A8': (named, (x, w)),
        'triton W4A8': (functools.partial(named, bits=4), (x, w_packed)),
        'triton W4A4': (functools.partial(named, bits=4, x_bits=4), (x4, w_packed)),
    }


def main() -> None:
    """Prints one table row per shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help=f'of {list(REAL)}; all by default')
    parser.add_argument('--rounds', type=int, default=12, help='timed calls of each variant')
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(REAL):
        parser.error(f'unknown shapes {sorted(unknown)}: expected some of {list(REAL)}')
    names = arguments.names or list(REAL)
    print(timing.report_header(variants(REAL[names[0]]), num_rounds=arguments.rounds))
    for name in names:
        shape = REAL[name]
        timings = timing.measure(
            variants(shape), num_rounds=arguments.rounds, num_calls=timing.default_calls()
        )
        num_products = math.prod(shape.batch) * shape.M * shape.N * shape.K
        print(timing.report_line(name, timings, num_products=num_products), flush=True)


if __name__ == '__main__':
    main()
