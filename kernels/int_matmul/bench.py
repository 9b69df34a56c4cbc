"""Times integer products against float32: `python -m kernels.int_matmul.bench [name ...]`.

Columns: `int8` and `W4 packed` are the library; `swapped w` passes w as a transpose of the stored
array, as softmax times v does; `unconstrained` is that without the rule on the order in memory.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import packing, timing
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
        timings = timing.measure(variants(shape), num_rounds=arguments.rounds)
        num_products = math.prod(shape.batch) * shape.M * shape.N * shape.K
        print(timing.report_line(name, timings, num_products=num_products), flush=True)


if __name__ == '__main__':
    main()
