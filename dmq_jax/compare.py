"""All methods in one table, under the same seeds, calibration and evaluator.

  python -m dmq_jax.compare --config=configs/compare_fashion_mnist.py --workdir=FOLDER

Every student of the config is a cell: its method, its bits, its coverage. Each is kept, so a
comparison that is stopped goes on where it was; after each cell `table.json`, `table.md` and
`compare.html` show those there are. Cells are made one after another, their batches split over all
devices and over all hosts of a cluster, as in a run. With --workers=N, N cells at a time are each
a process of its own on its part of the cores and GPUs, which makes more of small networks.
"""

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from dmq_jax import artefacts, command_line, evaluate, learning, pipeline
from dmq_jax import config as config_lib
from dmq_jax.config import Config
from dmq_jax.pipeline import TEACHER
from dmq_jax.reporting import comparison
from dmq_jax.runtime import hosts, log, memory, pool
from dmq_jax.runtime.progress import progress

# What a cell's folder holds, and beside the folder: what making it took.
_ROW, _COSTS = 'row.json', '.costs.json'

_WORKERS = flags.DEFINE_integer('workers', 1, 'Cells made at a time.', lower_bound=1)
_CELLS = flags.DEFINE_list(
    'cells', None, 'Only these: students, or teacher. Others may be made beside them.'
)


def run(config: Config, workdir: Path, names: Sequence[str] | None = None) -> None:
    """Makes what is missing of the table, cell by cell.

    Args:
      config: its students are the cells, besides the teacher.
      workdir: receives everything.
      names: of the cells; None: all. Other processes may make others at the same time.

    Raises:
      ValueError: no student to compare, or a name that is none; another process works in `workdir`
        or at that cell, or it holds cells of other options.
    """
    cells = check_cells(config, names)
    reference = evaluate.load_reference(config.evaluate)
    context = pipeline.open_run(config, workdir, reference)
    with artefacts.sole_user(workdir) if names is None else contextlib.nullcontext():
        pipeline.record(context)
        # What all cells stand on, and so is part of none; of several processes the first makes it.
        with artefacts.turn(workdir / 'cells' / '.teacher.lock'):
            learning.prepare(context)
            teacher = pipeline.samples(context, TEACHER)
            make_cell(context, reference, TEACHER, teacher)
        facts = pipeline.protocol(context, reference)
        for name in progress(cells, 'compare'):
            with artefacts.sole_user(workdir / 'cells' / f'{name}.lock'):
                make_cell(context, reference, name, teacher)
            with artefacts.turn(workdir / 'cells' / '.table.lock'):
                hosts.by_first(lambda: write(workdir, config, facts))
    if names is None:
        _tell(workdir)


def spread(config: Config, workdir: Path, workers: int, arguments: Sequence[str]) -> None:
    """`run`, with every cell a process of its own.

    Args:
      config: its students are the cells, besides the teacher.
      workdir: receives everything; what a cell prints is in `cells/NAME.log`.
      workers: processes at a time, each on its part of this machine.
      arguments: a command line that makes the cells that `--cells` names after it.

    Raises:
      ValueError: cells that could not be made, all others being there; see also `run` and
        `pool.split`.
      Interrupted: the comparison was asked to stop.
    """
    cells = check_cells(config, None)
    shares = pool.split(workers, os.environ)
    # The devices are for the cells.
    jax.config.update('jax_platforms', 'cpu')
    folder = workdir / 'cells'
    done = [name for name in cells if artefacts.is_complete(folder / name)]
    missing = [name for name in cells if name != TEACHER and name not in done]

    def command(name: str, *others: str) -> pool.Command:
        names = ','.join((name, *others))
        return pool.Command(name, [*arguments, f'--cells={names}'], folder / f'{name}.log')

    failed = []

    def note(ends: Iterable[tuple[str, int]]) -> Iterator[str]:
        for name, status in ends:
            if status and not hosts.stop_requested():
                failed.append(name)
                print(f'{name} ended with status {status}, see {folder / name}.log', flush=True)
            yield name

    with artefacts.sole_user(workdir):
        # First, by all of the machine: what every cell stands on; and are those there of this run?
        first = command(TEACHER, *(name for name in done if name != TEACHER))
        collections.deque(note(pool.run([first], pool.split(1, os.environ))), maxlen=0)
        if not failed:
            ends = note(pool.run([command(name) for name in missing], shares))
            for _ in progress(ends, 'compare', total=len(cells), start=len(cells) - len(missing)):
                pass
    hosts.stop_if_asked()
    if failed:
        said = ''.join(f'\n  {name}: {_last_line(folder / f"{name}.log")}' for name in failed)
        raise ValueError(f'not made, the same command tries again: {", ".join(failed)}.{said}')
    _tell(workdir)


def _last_line(log_file: Path) -> str:
    lines = [line for line in log_file.read_text(errors='replace').splitlines() if line.strip()]
    return lines[-1] if lines else 'it said nothing.'


def _tell(workdir: Path) -> None:
    print(f'table: {workdir / "table.md"}, page: {workdir / "compare.html"}')


def check_cells(config: Config, names: Sequence[str] | None) -> Sequence[str]:
    """The names of the cells that are asked for, of all if that is None.

    Raises:
      ValueError: no student to compare, or a name that is none.
    """
    if not config.students:
        raise ValueError('students={}: a comparison needs at least one student.')
    known = (TEACHER, *config.students)
    for name in names or ():
        if name not in known:
            raise ValueError(f'--cells has no {name!r}: expected some of {", ".join(known)}.')
    return known if names is None else names


def make_cell(
    context: pipeline.Run,
    reference: evaluate.Reference,
    name: str,
    teacher: dict[str, np.ndarray],
) -> None:
    """The row of one network, made with all that it stands on if it is not there.

    Beside it is kept what that took, over all attempts that ended with it or with an error:
    `cell_seconds`, and `peak_mb`, the most memory (`runtime.memory`).

    Args:
      context: of the comparison.
      reference: what the images are compared with.
      name: of the network.
      teacher: images of the teacher, from `pipeline.samples`.

    Raises:
      ValueError: the cell was made with other options.
    """
    folder = context.workdir / 'cells'
    if hosts.by_first(lambda: artefacts.is_complete(folder / name)):
        _make_row(context, reference, name, teacher)
        return
    began = time.monotonic()
    # What the cell before has compiled serves no other, and would count as memory of this one.
    jax.clear_caches()
    try:
        with memory.watched() as peak:
            _make_row(context, reference, name, teacher)
    finally:
        spent = _read_costs(folder, name)
        spent = {
            'cell_seconds': spent.get('cell_seconds', 0) + time.monotonic() - began,
            'peak_mb': max(spent.get('peak_mb', 0), peak.mb),
        }
        log.write_json(folder / f'{name}{_COSTS}', spent)


def _make_row(context, reference, name, teacher):
    drawn = teacher if name == TEACHER else pipeline.samples(context, name)
    folder = context.workdir / 'samples'
    options = {
        'samples': artefacts.fingerprint(folder / name),
        'teacher': artefacts.fingerprint(folder / TEACHER),
        'evaluate': config_lib.to_dict(context.config.evaluate),
    }
    artefacts.artefact(
        context.workdir / 'cells' / name, options,
        make=lambda: pipeline.measure_network(context, reference, name, drawn, teacher),
        save=lambda path, row: log.write_json(path / _ROW, row),
        load=lambda path: None,
    )  # fmt: skip


def _read_costs(folder: Path, name: str) -> dict[str, float]:
    file = folder / f'{name}{_COSTS}'
    return json.loads(file.read_text()) if file.is_file() else {}


def write(workdir: Path, config: Config, facts: Mapping[str, Any]) -> None:
    """The table of the cells there are, in its three forms, each replaced as a whole.

    Args:
      workdir: of the comparison.
      config: names the cells, in their order.
      facts: the protocol.
    """
    folder = workdir / 'cells'
    rows = [
        json.loads((folder / name / _ROW).read_text()) | _read_costs(folder, name)
        for name in (TEACHER, *config.students)
        if artefacts.is_complete(folder / name)
    ]
    table = {'protocol': facts, 'rows': rows}
    log.write_json(workdir / 'table.json', table)
    log.write_text(workdir / 'table.md', comparison.markdown(table))
    page = comparison.page(workdir, table, config.report.grid_size)
    log.write_text(workdir / 'compare.html', page)


def join_and_run(config: Config, workdir: Path) -> None:
    """`run` or `spread`, as the command line asks.

    Raises:
      ValueError: options that exclude one another.
    """
    cluster = hosts.find_cluster(os.environ)
    if _WORKERS.value > 1 and (cluster is not None or _CELLS.value is not None):
        other = '--cells' if cluster is None else 'a run of several processes'
        raise ValueError(f'--workers={_WORKERS.value} beside {other}: use one of them.')
    # Before anything that touches a device.
    hosts.join(cluster)
    pool.end_with_parent()
    if _WORKERS.value > 1:
        again = [sys.executable, '-m', 'dmq_jax.compare', *sys.argv[1:], '--workers=1']
        spread(config, workdir, _WORKERS.value, again)
        return
    with hosts.ending_together():
        run(config, workdir, _CELLS.value)


def main() -> None:
    """Entry point of `python -m dmq_jax.compare`."""
    command_line.run(Config, join_and_run, __doc__)


if __name__ == '__main__':
    main()
