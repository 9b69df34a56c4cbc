"""Laws of command_line.py, with a command that only says how it was called."""

import functools

import pytest

from tests import terminal

DRIVER = """
from dmq_jax import command_line
from dmq_jax.config import Config

def act(config, workdir):
    print('act', config.seed, config.students['w4'].quant.weight_bits, workdir)
    if config.seed == 13:
        open('missing/file')
    if config.seed == 14:
        int('not one of our checks')

command_line.run(Config, act, 'What it does.')
"""


@pytest.fixture
def command(tmp_path):
    """Runs the command in `tmp_path`, where run.py is a config file."""
    (tmp_path / 'run.py').write_text(terminal.CONFIG_FILE)
    return functools.partial(terminal.call, DRIVER, tmp_path)


def test_a_command_gets_its_config_and_a_folder_that_exists(command, tmp_path):
    done = command('--config=run.py:7', '--workdir=a/b', '--config.students.w4.quant.weight_bits=3')
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'act 7 3 a/b\n'
    assert list((tmp_path / 'a' / 'b').iterdir()) == []


def test_a_command_that_needs_no_folder_gets_none(tmp_path):
    (tmp_path / 'run.py').write_text(terminal.CONFIG_FILE)
    script = DRIVER.replace("does.')", "does.', needs_workdir=lambda: False)")
    done = terminal.call(script, tmp_path, '--config=run.py', '--workdir=out')
    assert done.stdout == 'act 0 4 None\n'
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arguments, texts',
    [
        (['--workdir=out'], ['--config is missing']),
        (['--config=nowhere.py', '--workdir=out', '--config.seed=3'], ['nowhere.py']),
        (['--config=run.py'], ['--workdir is missing']),
        (['--config=nowhere.py', '--workdir=out'], ['nowhere.py']),
        (['--config=run.py', '--workdir=out', 'sample'], ["'sample' is not an option"]),
        (['--config=run.py', '--wrkdir=out'], ['workdir']),
        (['--config=run.py', '--workdir=run.py/out'], ['--workdir=run.py/out', 'cannot write']),
        (['--config=run.py', '--workdir=out', '--config.sampler.num_stps=3'], ['num_steps']),
        (['--config=run.py', '--workdir=out', '--config.seed=a'], ['seed']),
        (
            ['--config=run.py', '--workdir=out', '--config.students.w5.quant.weight_bits=3'],
            ["no option 'w5'", 'dmq_jax/config/'],
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
    text = terminal.CONFIG_FILE.replace("student('efficientdm')", "student('eficientdm')")
    (tmp_path / 'run.py').write_text(text)
    done = command('--config=run.py', '--workdir=out')
    assert done.returncode == 2
    assert "did you mean 'efficientdm'" in done.stderr
    assert 'Traceback' not in done.stderr


def test_help_shows_what_the_command_does(command):
    assert 'What it does.' in command('--help').stdout
