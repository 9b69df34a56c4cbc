"""One row of the table of scaling, and the script that makes the table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmq_jax import costs, scaling

ROOT = Path(__file__).parents[1]


def cells(line):
    return [cell.strip() for cell in line.strip('| \n').split('|')]


def test_a_row_has_the_cells_of_the_header_and_a_time_when_asked(capsys):
    options = ['--step=sampling', '--mesh=data=2', '--batch-size=4', '--time']
    assert scaling.main(['--header']) == scaling.main(options) == 0
    header, rule, row = capsys.readouterr().out.splitlines()
    assert len(cells(header)) == len(cells(rule)) == len(cells(row))
    by_name = dict(zip(cells(header), cells(row), strict=True))
    assert by_name['mesh'] == 'data 2' and by_name['images a device'] == '2'
    assert float(by_name['GFLOP a device']) > 0.2 and float(by_name['ms']) > 0
    assert float(by_name['sent a device, MB']) == 0


def test_what_cannot_be_spread_is_refused(capsys):
    assert scaling.main(['--mesh=data=3', '--batch-size=4']) == 2
    assert 'batch_size=4 is not divisible by 3' in capsys.readouterr().err
    with pytest.raises(ValueError, match='data=9: expected 1..8'):
        scaling.row('sampling', 'fashion_mnist', costs.Shape(9), 9, is_timed=False)


@pytest.mark.slow
def test_the_script_makes_a_table_in_which_only_divided_work_falls():
    environ = {**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
               'DEVICES': '1 2', 'BATCH': '2'}  # fmt: skip
    done = subprocess.run(
        ['bash', str(ROOT / 'launch' / 'bench_scaling.sh'), 'sampling'], env=environ, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, _, *rows = map(cells, done.stdout.splitlines())
    table = [dict(zip(header, row, strict=True)) for row in rows]
    meshes = [(row['mesh'], row['processes'], row['batch']) for row in table]
    assert meshes == [
        ('one device', '1', '2'), ('data 2', '1', '4'), ('data 2', '1', '2'), ('fsdp 2', '1', '4'),
        ('data 2', '2', '4'),
    ]  # fmt: skip
    one, weak, strong, fsdp, processes = (float(row['GFLOP a device']) for row in table)
    assert one == weak == fsdp == processes
    assert strong == pytest.approx(one / 2, rel=0.01)
    sent = [float(row['sent a device, MB']) for row in table]
    assert sent[3] > 0 and sum(sent) == sent[3]
