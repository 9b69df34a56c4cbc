"""Times integer convolutions against float32: `python -m kernels.int_conv.bench [name ...]`.

Columns: `int8`, `W4 packed` and `W4A4` (whose x has 4-bit codes) are the library, the next ones
its algorithms, whichever it chooses, `winograd` on 4-bit codes; `float32 codes` carries the
integers in float32, exact only below 2^24. Where the Triton kernels can run, they follow with the
bfloat16 of XLA.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import packing, timing, triton_shim
from kernels.int_conv import choose, int_conv, winograd, xla
from kernels.int_conv.shapes import REAL, Shape


def variants(shape: Shape) -> dict[str, tuple]:
    """The functions to compare on one shape, with operands; the float32 baseline first."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, (shape.B, shape.H, shape.W, shape.C), np.int8))
    w = rng.integers(-8, 8, (shape.O, shape.kernel, shape.kernel, shape.C), np.int8)
    w_packed = jnp.asarray(packing.pack(w.reshape(shape.O, -1, shape.C), 4))
    hwio = jnp.asarray(np.ascontiguousarray(w.transpose(1, 2, 3, 0)), jnp.float32)
    w = jnp.asarray(w)
    geometry = {'strides': (shape.stride,) * 2, 'padding': (shape.padding,) * 2}

    x4 = x >> jnp.int8(4)
    algorithms = dict(xla.ALGORITHMS)
    if winograd.refusal(w.shape, geometry['strides'], 8, 8) is not None:
        del algorithms['winograd']

    def algorithm(name: str) -> tuple:
        run = algorithms[name]
        return (
            lambda x, w: run(x, w, **geometry, pad_value=0),
            (x4 if name == 'winograd' else x, w),
        )

    def float32_conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            geometry['strides'],
            geometry['padding'],
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )

    def float32_codes(x: jax.Array, w: jax.Array) -> jax.Array:
        w = w.transpose(1, 2, 3, 0).astype(jnp.float32)
        return float32_conv(x.astype(jnp.float32), w).astype(jnp.int32)

    return {
        'float32': (float32_conv, (x.astype(jnp.float32), hwio)),
        'int8': (lambda x, w: int_conv(x, w, **geometry), (x, w)),
        'W4 packed': (lambda x, w: int_conv(x, w, bits=4, **geometry), (x, w_packed)),
        'W4A4': (lambda x, w: int_conv(x, w, bits=4, x_max=8, **geometry), (x4, w_packed)),
        **{name: algorithm(name) for name in algorithms},
        'float32 codes': (float32_codes, (x, w)),
        **_gpu_variants(float32_conv, x, w, w_packed, hwio, geometry),
    }


def _gpu_variants(conv, x, w, w_packed, hwio, geometry) -> dict[str, tuple]:
    """bfloat16 and the Triton kernels, where they can run; the baseline to beat is bfloat16."""
    if triton_shim.refusal() is not None:
        return {}
    named = functools.partial(int_conv, implementation='triton', **geometry)
    x4 = packing.pack(x >> jnp.int8(4), 4)
    return {
        'bfloat16': (conv, (x.astype(jnp.bfloat16), hwio.astype(jnp.bfloat16))),
        'triton W8A8': (named, (x, w)),
        'triton W4A8': (functools.partial(named, bits=4), (x, w_packed)),
        'triton W4A4': (functools.partial(named, bits=4, x_bits=4), (x4, w_packed)),
    }


def main() -> None:
    """Prints one table row per shape, then the choice for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help=f'of {list(REAL)}; all by default')
    parser.add_argument('--rounds', type=int, default=12, help='timed calls of each variant')
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(REAL):
        parser.error(f'unknown shapes {sorted(unknown)}: expected some of {list(REAL)}')
    names = arguments.names or list(REAL)
    columns = max((variants(REAL[name]) for name in names), key=len)
    print(timing.report_header(columns, num_rounds=arguments.rounds))
    for name in names:
        shape = REAL[name]
        timings = timing.measure(
            variants(shape), num_rounds=arguments.rounds, num_calls=timing.default_calls()
        )
        height, width = (
            (size + sum(shape.padding) - shape.kernel) // shape.stride + 1
            for size in (shape.H, shape.W)
        )
        num_products = shape.B * height * width * shape.O * shape.C * shape.kernel**2
        line = timing.report_line(name, timings, num_products=num_products, columns=columns)
        print(line, flush=True)
    for name in names:
        shape = REAL[name]
        print(f'{name}: {choose((shape.O, shape.kernel, shape.kernel, shape.C)).reason}')


if __name__ == '__main__':
    main()
