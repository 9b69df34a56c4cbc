"""All methods in one table, under the same seeds, calibration and evaluator.

  python -m dmq_jax.compare --config=configs/compare_fashion_mnist.py --workdir=FOLDER

Every student of the config is a cell: its method, its bits, its coverage. Cells are made one after
another and each is kept, so a comparison that is stopped goes on where it was; after each cell
`table.json`, `table.md` and `compare.html` show those there are. Batches are split over all
devices, and over all hosts of a cluster, as in a run.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmq_jax import artefacts, command_line, evaluate, pipeline
from dmq_jax import config as config_lib
from dmq_jax.config import Config
from dmq_jax.reporting import comparison
from dmq_jax.runtime import hosts, log, memory
from dmq_jax.runtime.progress import progress


def run(config: Config, workdir: Path) -> None:
    """Makes what is missing of the table.

    Args:
      config: its students are the cells.
      workdir: receives everything.

    Raises:
      ValueError: no student to compare; another process works in `workdir`, or it holds cells of
        other options.
    """
    if not config.students:
        raise ValueError('students={}: a comparison needs at least one student.')
    reference = evaluate.load_reference(config.evaluate)
    context = pipeline.open_run(config, workdir, reference)
    with artefacts.sole_user(workdir):
        pipeline.record(context)
        teacher, rows = pipeline.samples(context, pipeline.TEACHER), []
        for name in progress((pipeline.TEACHER, *config.students), 'compare'):
            rows.append(make_cell(context, reference, name, teacher))
            table = {'protocol': pipeline.protocol(context, reference), 'rows': rows}
            hosts.by_first(lambda table=table: write(workdir, config, table))
    print(f'table: {workdir / "table.md"}, page: {workdir / "compare.html"}')


def make_cell(
    context: pipeline.Run,
    reference: evaluate.Reference,
    name: str,
    teacher: dict[str, np.ndarray],
) -> dict[str, Any]:
    """The row of one network, made with all that it stands on if it is not there.

    It tells besides what that took, over all attempts that ended with it or with an error:
    `cell_seconds`, and `peak_mb`, the most memory (`runtime.memory`). The calibration is part of
    the first cell that needs it, the teacher's images of none.

    Args:
      context: of the comparison.
      reference: what the images are compared with.
      name: of the network.
      teacher: images of the teacher, from `pipeline.samples`.
    """
    folder = context.workdir / 'cells'
    costs = folder / f'{name}.costs.json'
    is_there = hosts.by_first(lambda: artefacts.is_complete(folder / name))
    if is_there:
        return _row(context, reference, name, teacher) | _read_costs(costs)
    began = time.monotonic()
    # What the cell before has compiled serves no other, and would count as memory of this one.
    jax.clear_caches()
    try:
        with memory.watched() as peak:
            row = _row(context, reference, name, teacher)
    finally:
        spent = _read_costs(costs)
        spent = {
            'cell_seconds': spent.get('cell_seconds', 0) + time.monotonic() - began,
            'peak_mb': max(spent.get('peak_mb', 0), peak.mb),
        }
        log.write_json(costs, spent)
    return row | spent


def _read_costs(file: Path) -> dict[str, float]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _row(context, reference, name, teacher):
    drawn = teacher if name == pipeline.TEACHER else pipeline.samples(context, name)
    folder = context.workdir / 'samples'
    options = {
        'samples': artefacts.fingerprint(folder / name),
        'teacher': artefacts.fingerprint(folder / pipeline.TEACHER),
        'evaluate': config_lib.to_dict(context.config.evaluate),
    }
    return artefacts.artefact(
        context.workdir / 'cells' / name, options,
        make=lambda: pipeline.measure_network(context, reference, name, drawn, teacher),
        save=lambda path, row: log.write_json(path / 'row.json', row),
        load=lambda path: json.loads((path / 'row.json').read_text()),
    )  # fmt: skip


def write(workdir: Path, config: Config, table: dict[str, Any]) -> None:
    """The table in its three forms, each replaced as a whole."""
    log.write_json(workdir / 'table.json', table)
    log.write_text(workdir / 'table.md', comparison.markdown(table))
    page = comparison.page(workdir, table, config.report.grid_size)
    log.write_text(workdir / 'compare.html', page)


def join_and_run(config: Config, workdir: Path) -> None:
    """`run`, as one process of many where the environment says so."""
    # Before anything that touches a device.
    hosts.join(hosts.find_cluster(os.environ))
    with hosts.ending_together():
        run(config, workdir)


def main() -> None:
    """Entry point of `python -m dmq_jax.compare`."""
    command_line.run(Config, join_and_run, __doc__)


if __name__ == '__main__':
    main()
