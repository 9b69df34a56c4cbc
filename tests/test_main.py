"""Laws of main.py, with a pipeline that only says how it was called."""

import functools
import subprocess
import sys

import pytest

from tests import terminal
from tests.terminal import ROOT

# Of the processes of a run, whose module loads JAX, tests/launch knows more.
DRIVER = """
import contextlib, sys, types
import dmq_jax
from dmq_jax import runtime

def run(config, workdir, stages):
    student = config.students['w4']
    print('run', workdir, stages, config.seed, student.finetune.num_iterations,
          student.quant.weight_group_size, config.report.layers)

def dry_run(config):
    print('plan', sorted(config.students))

pipeline = types.ModuleType('dmq_jax.pipeline')
pipeline.STAGES = ('calibrate', 'finetune', 'sample')
pipeline.run, pipeline.dry_run = run, dry_run
dmq_jax.pipeline = sys.modules['dmq_jax.pipeline'] = pipeline

hosts = types.ModuleType('dmq_jax.runtime.hosts')
hosts.find_cluster, hosts.join = (lambda environ, **given: None), (lambda cluster: None)
hosts.ending_together = contextlib.nullcontext
runtime.hosts = sys.modules['dmq_jax.runtime.hosts'] = hosts

from dmq_jax import main
main.main()
"""


@pytest.fixture
def command(tmp_path):
    """Runs the command line in `tmp_path`, where run.py is a config file."""
    (tmp_path / 'run.py').write_text(terminal.CONFIG_FILE)
    return functools.partial(terminal.call, DRIVER, tmp_path)


def test_the_pipeline_receives_config_workdir_and_all_stages(command, tmp_path):
    done = command('--config=run.py:7', '--workdir=out')
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run out ('calibrate', 'finetune', 'sample') 7 0 None ()\n"
    assert (tmp_path / 'out').is_dir()


def test_options_the_file_never_set_can_be_overridden(command):
    done = command(
        '--config=run.py',
        '--workdir=out',
        '--stages=sample,calibrate',
        '--config.students.w4.finetune.num_iterations=10',
        '--config.students.w4.quant.weight_group_size=64',
        "--config.report.layers=('mid',)",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run out ('sample', 'calibrate') 0 10 64 ('mid',)\n"


def test_a_dry_run_shows_options_and_plan_and_needs_no_workdir(command):
    done = command('--config=run.py', '--dry-run')
    assert done.returncode == 0, done.stderr
    assert '"lora_rank": 32' in done.stdout
    assert done.stdout.endswith("plan ['w4']\n")


@pytest.mark.parametrize(
    'stages, texts',
    [('calibrat', ["no 'calibrat'", "did you mean 'calibrate'?"]), ('', ['--stages is empty'])],
)
def test_stages_that_do_not_exist_are_refused(command, stages, texts):
    done = command('--config=run.py', '--workdir=out', f'--stages={stages}')
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    assert all(text in done.stderr for text in texts), done.stderr


def test_a_dry_run_still_needs_a_config(command):
    assert '--config is missing' in command('--dry-run').stderr


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, '-m', 'dmq_jax.main', '--help'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    options = 'config', 'workdir', 'stages', 'dry-run', 'debug'
    assert all(option in done.stdout for option in options)


def test_the_command_line_itself_loads_no_jax():
    script = 'import sys; from dmq_jax import main; assert "jax" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, timeout=60)
    assert done.returncode == 0
