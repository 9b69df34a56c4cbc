"""launch/local.sh: several processes on this machine end where one process ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dmq_jax.runtime import hosts, log
from tests import test_pipeline as story

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'launch' / 'local.sh'


def start(count, *arguments, cache=None, devices=1):
    environ = {**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
               'CPU_DEVICES': str(devices)}  # fmt: skip
    if cache is not None:
        environ |= {'JAX_COMPILATION_CACHE_DIR': str(cache),
                    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}  # fmt: skip
    return subprocess.Popen(
        ['bash', str(SCRIPT), str(count), *arguments], env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    return story.make_files(tmp_path_factory.mktemp('files'))


def read_images(workdir, name):
    with np.load(workdir / 'samples' / name / 'images.npz') as arrays:
        return arrays['arr_0'], arrays['labels']


@pytest.mark.parametrize('arguments', [(), ('2',), ('two', '--config=a.py'), ('0', '--config=a')])
def test_without_a_number_of_processes_it_says_what_it_expects(arguments):
    done = subprocess.run(['bash', str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'expected a number of processes' in done.stderr


def test_an_error_of_the_user_ends_all_processes_with_its_status(tmp_path):
    process = start(2, f'--config={tmp_path}/nothing.py', f'--workdir={tmp_path}/run')
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert 'nothing.py' in errors and 'Traceback' not in errors


def test_two_processes_draw_what_one_draws(config_file, tmp_path):
    file = config_file.with_name('teacher_alone.py')
    alone = 'config.students = {}\n    return config'
    file.write_text(config_file.read_text().replace('return config', alone))
    arguments = [f'--config={file}', '--config.mesh.data=2', '--stages=sample,evaluate']
    runs = [
        start(count, *arguments, f'--workdir={tmp_path}/{count}', devices=2 // count)
        for count in (1, 2)
    ]
    for process in runs:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for one, two in zip(*(read_images(tmp_path / n, 'teacher') for n in '12'), strict=True):
        np.testing.assert_array_equal(one, two)
    assert story.metrics_of(tmp_path / '1') == story.metrics_of(tmp_path / '2')
    assert [p.name for p in (tmp_path / '2' / 'samples').iterdir()] == ['teacher']


@pytest.mark.slow
def test_a_whole_run_stopped_and_continued_by_other_numbers_of_processes_ends_the_same(
    config_file, tmp_path
):
    cache = tmp_path / 'compiled'
    arguments = [f'--config={config_file}', '--config.mesh.data=2']
    arguments.append('--stages=calibrate,finetune,export,sample,evaluate')
    whole = start(1, *arguments, f'--workdir={tmp_path}/whole', cache=cache, devices=2)
    _, errors = whole.communicate(timeout=900)
    assert whole.returncode == 0, errors

    moved = tmp_path / 'moved'
    process = start(2, *arguments, f'--workdir={moved}', cache=cache)
    story.wait_for_checkpoint(process, moved / 'students' / 'edm' / 'finetune' / 'checkpoints', 600)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == hosts.REQUEUE, (errors, time.monotonic() - began)
    assert 'the same command goes on from here' in errors
    shutil.copytree(moved, tmp_path / 'again')

    # Of the same mesh the same bits; of one device the same up to rounding.
    for workdir, count, devices in (moved, 2, 1), (tmp_path / 'again', 1, 1):
        options = [f'--config.mesh.data={count * devices}', f'--workdir={workdir}']
        process = start(count, *arguments, *options, cache=cache, devices=devices)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    assert story.metrics_of(moved) == story.metrics_of(tmp_path / 'whole')
    runs = [sums_of_losses(tmp_path / name) for name in ('whole', 'again')]
    steps = sorted(runs[0].keys() & runs[1].keys())
    assert story.NUM_ITERATIONS in steps
    # Adam turns the rounding of a tiny gradient into a step of the size of the learning rate.
    np.testing.assert_allclose(*[[run[step] for step in steps] for run in runs], rtol=1e-3)


BLOCKS = """config.students = {{}}
    config.students.blocks = student(
        dict(name='qdiffusion'), quant=quant,
        reconstruct=dict(num_iterations=10, batch_size=4, num_timesteps=2, num_images=4,
                         sampler=dict(num_steps=2)),
    )
    return config"""


@pytest.mark.slow
def test_blocks_are_reconstructed_by_two_processes_as_by_one_stopped_or_not(config_file, tmp_path):
    file = config_file.with_name('blocks.py')
    file.write_text(config_file.read_text().replace('return config', BLOCKS.format()))
    arguments = [f'--config={file}', '--config.mesh.data=2', '--stages=calibrate,finetune']
    cache, moved = tmp_path / 'compiled', tmp_path / 'moved'
    whole = start(1, *arguments, f'--workdir={tmp_path}/whole', cache=cache, devices=2)
    _, errors = whole.communicate(timeout=900)
    assert whole.returncode == 0, errors
    process = start(2, *arguments, f'--workdir={moved}', cache=cache)
    folder = Path('students') / 'blocks'
    story.wait_for_checkpoint(process, moved / folder / 'reconstruct' / 'checkpoints', 600)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == hosts.REQUEUE, errors
    process = start(2, *arguments, f'--workdir={moved}', cache=cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    name = folder / 'reconstructed' / 'state.safetensors'
    one, two = (safetensors.numpy.load_file(root / name) for root in (tmp_path / 'whole', moved))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


NUM_KILLS = 4
# The script kills the others as soon as it has seen one end; the rest is a busy machine.
STOPPED_WITHIN_S = 30


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_at_random_moments_ends_with_the_same_metrics(
    config_file, tmp_path
):
    cache = tmp_path / 'compiled'
    arguments = [f'--config={config_file}', '--config.mesh.data=2']
    arguments.append('--stages=calibrate,finetune,export,sample,evaluate')
    for name in ('first', 'whole'):  # the first one compiles, the second says how long a run takes
        began = time.monotonic()
        process = start(2, *arguments, f'--workdir={tmp_path / name}', cache=cache)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    duration_s = time.monotonic() - began

    rng = np.random.default_rng(7)
    killed, rounds = tmp_path / 'killed', []
    while len(rounds) < NUM_KILLS:
        process = start(2, *arguments, f'--workdir={killed}', cache=cache)
        time.sleep(rng.uniform(0.2, 0.9) * duration_s)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        if process.poll() is not None or len(children) < 2:
            process.communicate()
            break  # it got to its end: less was left than the first time
        os.kill(int(children[rng.integers(2)]), signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=STOPPED_WITHIN_S)
        rounds.append(time.monotonic() - began)
        assert process.returncode == 128 + signal.SIGKILL, errors
        assert 'ended with status 137; stopping the others' in errors
    assert len(rounds) >= 2, rounds
    process = start(2, *arguments, f'--workdir={killed}', cache=cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert story.metrics_of(killed) == story.metrics_of(tmp_path / 'whole')
    images = [read_images(tmp_path / name, 'edm')[0] for name in ('killed', 'whole')]
    np.testing.assert_array_equal(*images)


def sums_of_losses(workdir):
    """By step, the sum of the losses until there: a stop splits the mean that a line holds."""
    lines = log.read_metrics(workdir / 'students' / 'edm' / 'finetune')
    steps = np.array([line['step'] for line in lines])
    losses = np.array([line['loss'] for line in lines])
    return dict(zip(steps.tolist(), np.cumsum(losses * np.diff(steps, prepend=0)), strict=True))


def test_a_process_that_is_killed_does_not_leave_the_other_behind(config_file, tmp_path):
    process = start(2, f'--config={config_file}', f'--workdir={tmp_path}', '--config.mesh.data=2')
    began = time.monotonic()
    while not (tmp_path / 'config.json').is_file():
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert 'process 1 of 2 ended with status 137; stopping the others' in errors
    assert not any(Path(f'/proc/{child}').exists() for child in children)
