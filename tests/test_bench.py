"""The benchmark on a network that takes no time: every row is there and its numbers make sense."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dmq_jax import bench, denoisers
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.models.dit import DiT
from tests import tiny


@pytest.fixture(scope='module')
def teacher():
    network = DiT(
        num_layers=1, num_heads=2, head_dim=4, sample_size=4, num_classes=3,
        in_channels=1, out_channels=1,
    )  # fmt: skip
    info = denoisers.DenoiserInfo(
        schedule=Schedule(kind='linear'), prediction='eps', image_shape=(4, 4, 1), num_classes=3
    )
    return tiny.random_denoiser(network, info)


def test_every_row_is_measured_and_reported(teacher):
    config = bench.BenchConfig(batch_size=2, num_steps=2, num_rounds=2)
    programs = bench.make_programs(teacher, config, bench.ROWS)
    rows = bench.measure(programs, config)
    assert tuple(rows) == bench.ROWS
    assert rows['teacher'].ratio == 1
    for name, row in rows.items():
        assert 0 < row.min_s <= row.median_s, name
        assert row.images_per_second == pytest.approx(2 / row.median_s)
        assert row.compile_s > 0 and row.program_mb > 0 and row.ratio > 0, name
    # Of a process of its own; here, of this one.
    rows['teacher'] = rows['teacher']._replace(**bench.measure_memory(programs['teacher']))
    assert 10 < rows['teacher'].running_mb <= rows['teacher'].peak_rss_mb
    lines = bench.table(rows)
    assert len(lines) == 1 + len(rows)
    assert len({len(line) for line in lines}) == 1
    report = bench.report('tiny', config, rows)
    assert report['rows']['finetune']['program_mb'] == rows['finetune'].program_mb
    assert report['versions']['jax'] == jax.__version__


# Other bits are other steps; the loop around them is the same.
@pytest.mark.parametrize(
    ('weight_bits', 'rows'),
    [(8, {'teacher', 'step_integer', 'sample_integer'}), (4, {'teacher', 'step_integer'})],
    ids=['W8A8', 'W4A8'],
)
def test_integer_rows_have_the_bits_and_the_dtype_asked_for(teacher, weight_bits, rows):
    config = bench.BenchConfig(
        batch_size=2, num_steps=1, num_rounds=1, dtype='bfloat16', coverage='full',
        weight_bits=weight_bits, activation_bits=8,
    )  # fmt: skip
    half = denoisers.float_denoiser(
        teacher.network.clone(dtype=jnp.bfloat16), teacher.params, teacher.info
    )
    programs = bench.make_programs(half, config, rows)
    assert programs.keys() == rows
    for name, program in programs.items():
        assert bench.call(program)[1] > 0, name
    params = programs['step_integer'].arguments[0]
    widths = {entry['codes'].dtype.name for entry in params['weights'].values()}
    assert widths == {'uint8' if weight_bits == 4 else 'int8'}
    kernels = [leaf for leaf in jax.tree.leaves(programs['teacher'].arguments[0]) if leaf.ndim > 1]
    assert kernels and {leaf.dtype.name for leaf in kernels} == {'bfloat16'}


def test_rows_not_asked_for_are_not_compiled(teacher):
    config = bench.BenchConfig(batch_size=2, num_steps=2, num_rounds=2)
    assert list(bench.make_programs(teacher, config, ['teacher'])) == ['teacher']


def test_the_memory_of_a_row_is_that_of_a_process_of_its_own():
    command = [sys.executable, '-m', 'dmq_jax.bench', '--model=bundled', '--batch_size=1']
    command += ['--num_steps=1', '--rows=teacher', '--alone']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    # Importing JAX alone takes 100 MB.
    assert 100 < found['running_mb'] <= found['peak_rss_mb']


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="model='cifar': expected one of cifar10, bundled"):
        bench.load_model('cifar')
