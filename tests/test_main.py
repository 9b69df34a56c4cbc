"""Laws of main.py and command_line.py, with a pipeline that only says how it was called."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CONFIG_FILE = """
from dmq_jax.config import base, student


def get_config(arg=None):
    config = base()
    config.students.w4 = student('efficientdm')
    config.seed = int(arg or 0)
    return config
"""

# Flags are global to a process, so each command gets a process of its own.
DRIVER = """
import sys, types
import dmq_jax

def run(config, workdir, stages):
    student = config.students['w4']
    print('run', workdir, stages, config.seed, student.finetune.num_iterations,
          student.quant.weight_group_size, config.report.layers)
    if config.seed == 13:
        open('missing/file')
    if config.seed == 14:
        int('not one of our checks')

def dry_run(config):
    print('plan', sorted(config.students))

pipeline = types.ModuleType('dmq_jax.pipeline')
pipeline.STAGES = ('calibrate', 'finetune', 'sample')
pipeline.run, pipeline.dry_run = run, dry_run
dmq_jax.pipeline = sys.modules['dmq_jax.pipeline'] = pipeline

from dmq_jax import main
main.main()
"""


@pytest.fixture
def command(tmp_path):
    """Runs the command line in `tmp_path`, where run.py is a config file."""
    (tmp_path / 'run.py').write_text(CONFIG_FILE)

    def call(*arguments):
        return subprocess.run(
            [sys.executable, '-c', DRIVER, *arguments],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


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
    'arguments, texts',
    [
        (['--workdir=out'], ['--config is missing']),
        (['--config=nowhere.py', '--workdir=out', '--config.seed=3'], ['nowhere.py']),
        (['--config=run.py'], ['--workdir is missing']),
        (['--config=nowhere.py', '--workdir=out'], ['nowhere.py']),
        (['--config=run.py', '--workdir=out', 'sample'], ["'sample' is not an option"]),
        (['--config=run.py', '--wrkdir=out'], ['workdir']),
        (
            ['--config=run.py', '--workdir=out', '--stages=calibrat'],
            ["no 'calibrat'", "did you mean 'calibrate'?"],
        ),
        (['--config=run.py', '--workdir=out', '--stages='], ['--stages is empty']),
        (['--config=run.py', '--workdir=run.py/out'], ['--workdir=run.py/out', 'cannot write']),
        (['--config=run.py', '--workdir=out', '--config.sampler.num_stps=3'], ['num_steps']),
        (['--config=run.py', '--workdir=out', '--config.seed=a'], ['seed']),
        (
            ['--config=run.py', '--workdir=out', '--config.students.w5.quant.weight_bits=3'],
            ["no option 'w5'", 'config.py'],
        ),
        (
            ['--config=run.py', '--workdir=out', '--config.students.w4.quant.weight_bits=9'],
            ['config.students.w4.quant.weight_bits=9: expected 2..8'],
        ),
        (['--config=run.py:13', '--workdir=out'], ['missing/file']),
    ],
)
def test_a_mistake_ends_with_one_message_and_status_2(command, arguments, texts):
    done = command(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    assert all(text in done.stderr for text in texts), done.stderr


def test_debug_shows_the_traceback_of_a_mistake(command):
    done = command('--config=run.py:13', '--workdir=out', '--debug')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr and 'missing/file' in done.stderr


def test_an_error_that_is_not_from_our_checks_keeps_its_traceback(command):
    done = command('--config=run.py:14', '--workdir=out')
    assert done.returncode == 1
    assert 'Traceback' in done.stderr


def test_a_mistake_inside_the_config_file_is_reported_like_any_other(command, tmp_path):
    text = CONFIG_FILE.replace("student('efficientdm')", "student('eficientdm')")
    (tmp_path / 'run.py').write_text(text)
    done = command('--config=run.py', '--workdir=out')
    assert done.returncode == 2
    assert "did you mean 'efficientdm'" in done.stderr
    assert 'Traceback' not in done.stderr


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
