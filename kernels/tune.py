"""Times the candidate tiles of this GPU and writes the best: `python -m kernels.tune --out DIR`.

For every op, mode and size class that the real shapes of the benchmarks fall into, the tile with
the least total time. The file goes where `KERNELS_TILES` points to, or into kernels/tiles/.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels import gpu, packing, timing, triton_shim, triton_tiles
from kernels.int_conv import int_conv
from kernels.int_conv.shapes import REAL as CONVOLUTIONS
from kernels.int_matmul import int_matmul
from kernels.int_matmul.shapes import REAL as PRODUCTS

MODES = ('W8A8', 'W4A8', 'W4A4')


def problems() -> dict[str, list[tuple]]:
    """'op/mode/size class' → [(function to time, its operands)] over the real shapes."""
    rng = np.random.default_rng(0)
    found = defaultdict(list)

    def operand(shape, packed):
        codes = rng.integers(-8, 8, shape).astype(np.int8)
        return jnp.asarray(packing.pack(codes, 4) if packed else codes)

    for mode in MODES:
        options = {'implementation': 'triton'}
        options |= {'bits': 4} if mode != 'W8A8' else {}
        options |= {'x_bits': 4} if mode == 'W4A4' else {}
        for shape in PRODUCTS.values():
            name = triton_tiles.size_class(shape.M, shape.N)
            x = operand((*shape.batch, shape.M, shape.K), mode == 'W4A4')
            w = operand((*shape.batch, shape.N, shape.K), mode != 'W8A8')

            def multiply(x, w, options=options):
                return int_matmul(x, w, **options)

            found[f'int_matmul/{mode}/{name}'].append((multiply, (x, w)))
        for shape in CONVOLUTIONS.values():
            if shape.C % 32:
                continue
            sizes = [
                (size + sum(shape.padding) - shape.kernel) // shape.stride + 1
                for size in (shape.H, shape.W)
            ]
            name = triton_tiles.size_class(shape.B * math.prod(sizes), shape.O)
            x = operand((shape.B, shape.H, shape.W, shape.C), mode == 'W4A4')
            taps = (shape.kernel, shape.kernel) if mode == 'W8A8' else (shape.kernel**2,)
            w = operand((shape.O, *taps, shape.C), mode != 'W8A8')
            geometry = {'strides': (shape.stride,) * 2, 'padding': (shape.padding,) * 2}

            def convolve(x, w, options=options, geometry=geometry):
                return int_conv(x, w, **options, **geometry)

            found[f'int_conv/{mode}/{name}'].append((convolve, (x, w)))
    return dict(found)


def best_tile(calls: list[tuple], *, num_rounds: int) -> triton_tiles.Tile:
    """The candidate with the least total time over some calls."""
    totals = {}
    for tile in triton_tiles.CANDIDATES:
        try:
            with triton_tiles.using(tile):
                timed = [
                    timing.measure(
                        {'call': call}, num_rounds=num_rounds, num_calls=timing.MANY_CALLS
                    )['call']
                    for call in calls
                ]
        except jax.errors.JaxRuntimeError as error:  # more shared memory than this GPU has
            print(f'{tile}: {str(error).splitlines()[0]}')
            continue
        totals[tile] = sum(each.median_s for each in timed)
    return min(totals, key=totals.get)


def main() -> None:
    """Writes one file of tiles for the GPU here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=triton_tiles.FILES, help='folder to write to')
    parser.add_argument('--rounds', type=int, default=20, help='timed calls of each tile')
    parser.add_argument('--only', default='', help='keys that contain this, e.g. int_conv/W4A8')
    arguments = parser.parse_args()
    if refusal := triton_shim.refusal():
        parser.error(refusal)
    tiles = {}
    for key, calls in problems().items():
        if arguments.only in key:
            tiles[key] = best_tile(calls, num_rounds=arguments.rounds)
            print(key, tiles[key], flush=True)
    kind = gpu.current().kind
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f'{kind.replace(" ", "_")}.json'
    path.write_text(json.dumps({'device_kind': kind, 'tiles': tiles}, indent=2) + '\n')
    print(path)


if __name__ == '__main__':
    main()
