"""How one step scales over devices and processes: `bash launch/bench_scaling.sh`.

  python -m dmq_jax.scaling --step=finetuning --mesh=data=4 --batch-size=16 [--path=fashion_mnist]

prints one row of a Markdown table: what each device of the mesh computes, holds and sends, as XLA
reports it of the compiled program. Emulated devices share the cores of one machine, so their times
say nothing; where the devices are real, or with --time, the row also has the median duration.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dmq_jax import costs, teachers
from dmq_jax.runtime import hosts, mesh

STEPS = {'sampling': costs.sampling_step, 'finetuning': costs.finetuning_step}
HEADER = (
    '| step | mesh | devices | processes | batch | images a device | GFLOP a device | '
    'held a device, MB | sent a device, MB | in | ms |'
)
_NUM_CALLS = 7


def row(
    step: str, path: str, shape: costs.Shape, batch_size: int, *, is_timed: bool
) -> list[str | float]:
    """The cells of one row.

    Raises:
      ValueError: fewer devices than the mesh has, or a batch that does not divide over it.
    """
    device_mesh = mesh.make_mesh(*shape)
    mesh.check_batch_size(device_mesh, batch_size)
    teacher = teachers.load_teacher(path, shapes_only=not is_timed)
    program = STEPS[step](teacher, batch_size, device_mesh)
    cost = costs.compiled(program, device_mesh)
    kinds = sorted({each.kind for each in cost.collectives})
    sizes = ', '.join(f'{name} {size}' for name, size in shape._asdict().items() if size > 1)
    return [
        step, sizes or 'one device', shape.num_devices, jax.process_count(), batch_size,
        batch_size // shape.parts, f'{cost.flops / 1e9:.3f}',
        f'{(cost.kept + cost.temporary) / 1e6:.1f}', f'{cost.sent / 1e6:.3f}',
        ', '.join(kinds) or '–',
        f'{1e3 * duration_s(program, device_mesh):.2f}' if is_timed else '–',
    ]  # fmt: skip


def duration_s(program: costs.Program, device_mesh: mesh.Mesh) -> float:
    """The median of several calls with arrays of zeros, in seconds."""
    executable = costs.compile_program(program, device_mesh)
    placement = executable.input_shardings[0]
    kept, weights, rest = _zeros(executable.in_avals[0], placement)
    spent = []
    for _ in range(_NUM_CALLS + 2):
        began = time.perf_counter()
        results = jax.block_until_ready(executable(kept, weights, rest))
        spent.append(time.perf_counter() - began)
        if kept is not None:  # donated
            kept = results[0]
    return statistics.median(spent[2:])


def _zeros(avals: PyTree, placement: PyTree) -> PyTree:
    def make(aval):
        if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), aval.shape)
        return jnp.zeros(aval.shape, aval.dtype)

    # All by one program, not by one for every shape.
    return jax.jit(lambda: jax.tree.map(make, avals), out_shardings=placement)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m dmq_jax.scaling`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m dmq_jax.scaling', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--step', choices=STEPS, default='finetuning')
    parser.add_argument('--path', default='fashion_mnist', help='as load_teacher takes it')
    parser.add_argument('--mesh', default='data=1', help='e.g. data=2,fsdp=4')
    parser.add_argument('--batch-size', type=int, default=8, help='images of all devices')
    parser.add_argument('--time', action='store_true', help='also on emulated devices')
    parser.add_argument('--header', action='store_true', help='prints the head of the table alone')
    parser.add_argument('--coordinator', help='HOST:PORT of process 0')
    parser.add_argument('--num_processes', type=int)
    parser.add_argument('--process_id', type=int)
    given = parser.parse_args(arguments)
    if given.header:
        print(f'{HEADER}\n|{"---|" * (HEADER.count("|") - 1)}')
        return 0
    try:
        hosts.join(hosts.find_cluster(
            os.environ, coordinator=given.coordinator, num_processes=given.num_processes,
            process_id=given.process_id,
        ))  # fmt: skip
        cells = row(
            given.step, given.path, costs.parse_mesh(given.mesh), given.batch_size,
            is_timed=given.time or jax.default_backend() != 'cpu',
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
