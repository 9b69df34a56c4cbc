"""launch/local.sh: several processes on this machine end where one process ends."""

import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from dmq_jax import pipeline
from dmq_jax.runtime import hosts, log
from dmq_jax.runtime import parts as parts_lib
from tests import test_pipeline as story
from tests.checkpoints import test_memory

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'launch' / 'local.sh'


def start(count, *arguments, cache=None, devices=1, module='dmq_jax.main'):
    # Compiled as here, on other devices.
    flags = os.environ.get('XLA_FLAGS', '').split()
    flags = [flag for flag in flags if 'device_count' not in flag]
    environ = {**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu',
               'XLA_FLAGS': ' '.join(flags), 'CPU_DEVICES': str(devices),
               'MODULE': module}  # fmt: skip
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


# A run without students.
ALONE = 'config.students = {}\n    return config'


@pytest.mark.parametrize('arguments', [(), ('2',), ('two', '--config=a.py'), ('0', '--config=a')])
def test_without_a_number_of_processes_it_says_what_it_expects(arguments):
    done = subprocess.run(['bash', str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'expected a number of processes' in done.stderr


PRETENDING = """
import os, sys, time
given = dict(argument.lstrip('-').split('=', 1) for argument in sys.argv[1:])
kind, number = given['plan'].split(',')[int(given['process_id'])].split(':')
if kind == 'sleep':
    time.sleep(float(number))
elif kind == 'kill':
    os.kill(os.getpid(), int(number))
else:
    sys.exit(int(number))
"""


# Tests in the background of a shell have no interrupts, nor would what they start.
WITH_INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def pretend(tmp_path, plan):
    """local.sh with processes that do as the plan says."""
    (tmp_path / 'pretending.py').write_text(PRETENDING)
    environ = {**os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': str(tmp_path),
               'MODULE': 'pretending', 'JAX_PLATFORMS': 'cpu'}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, '-c', WITH_INTERRUPTS, 'bash', str(SCRIPT), str(plan.count(',') + 1),
         f'--plan={plan}'],
        env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    'plan, status, blamed',
    [
        ('exit:0,exit:0,exit:0,exit:0', 0, None),
        ('exit:75,exit:75,sleep:0.5,exit:75', 75, None),
        ('exit:2,exit:2', 2, None),
        ('exit:1,sleep:60,sleep:60', 1, '0'),
        # Several that a signal ends while the script looks elsewhere, in either order.
        ('kill:9,sleep:60,sleep:60,kill:9', 137, '[03]'),
        # The status of the one that is gone counts, not of those that lost it.
        ('exit:69,kill:9,exit:69,sleep:60', 137, '1'),
        # All of them gone by one look: it is told still.
        ('exit:69,kill:9', 137, '1'),
        ('exit:69,sleep:0.5,exit:0', 69, None),
    ],
)
def test_the_first_process_that_fails_gives_its_status_and_ends_the_others(
    tmp_path, plan, status, blamed
):
    process = pretend(tmp_path, plan)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == status, errors
    if blamed is None:
        assert 'the others are stopped' not in errors
    else:
        count = plan.count(',') + 1
        told = f'process {blamed} of {count} ended with status {status}: the others'
        assert re.search(told, errors), errors


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_before_the_run_listens_it_says_run_me_again(tmp_path, number):
    process = pretend(tmp_path, 'sleep:60,sleep:60')
    began = time.monotonic()
    while len(processes_of(process)) < 2:
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=40)
    assert process.returncode == hosts.REQUEUE


def test_an_error_of_the_user_ends_all_processes_with_its_status(tmp_path):
    process = start(2, f'--config={tmp_path}/nothing.py', f'--workdir={tmp_path}/run')
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert 'nothing.py' in errors and 'Traceback' not in errors


def alone(config_file):
    """The config file of a run without students."""
    file = config_file.with_name('teacher_alone.py')
    file.write_text(config_file.read_text().replace('return config', ALONE))
    return file


@pytest.mark.parametrize('counts', [(2,), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_several_processes_draw_what_one_draws(config_file, tmp_path, counts):
    file = alone(config_file)
    num_devices = max(counts)
    arguments = [f'--config={file}', f'--config.mesh.data={num_devices}']
    arguments += ['--stages=sample,evaluate']
    runs = [
        start(count, *arguments, f'--workdir={tmp_path}/{count}', devices=num_devices // count)
        for count in counts
    ]
    # The command is no more than this, with options from the command line.
    config = story.read_config(file, mesh__data=num_devices)
    pipeline.run(config, tmp_path / 'one', ('sample', 'evaluate'))
    for process in runs:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, *others = (tmp_path / str(name) for name in ('one', *counts))
    for several in others:
        images = [run / 'samples' / 'teacher' / 'images.npz' for run in (one, several)]
        assert images[0].read_bytes() == images[1].read_bytes()
        assert story.metrics_of(one) == story.metrics_of(several)
        assert [p.name for p in (several / 'samples').iterdir()] == ['teacher']


# Devices sum their parts of a batch in another order.
TOLERANCE = 1e-5


def measured(folder, count, devices):
    """What each process of `tests.launch.measured` found."""
    process = start(
        count, f'--out={folder}/found', devices=devices, cache=folder.parent / 'compiled',
        module='tests.launch.measured',
    )  # fmt: skip
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return [dict(np.load(f'{folder}/found.{i}.npz')) for i in range(count)]


@pytest.fixture(scope='module')
def of_one_device(tmp_path_factory):
    (found,) = measured(tmp_path_factory.mktemp('one'), 1, 1)
    return found


# Without 'slow', tests/test_finetune.py compares one device with eight of one process.
@pytest.mark.slow
@pytest.mark.parametrize('count, devices', [(2, 1), (1, 8), (4, 1), (4, 2)])
def test_loss_gradients_ranges_and_samples_do_not_depend_on_processes_and_devices(
    of_one_device, tmp_path, count, devices
):
    parts = measured(tmp_path, count, devices)
    one = of_one_device
    images = np.zeros_like(one['images'])
    for found in parts:
        assert found['loss'] == pytest.approx(one['loss'], rel=TOLERANCE)
        gap = np.linalg.norm(found['gradients'] - one['gradients'])
        assert gap < TOLERANCE * np.linalg.norm(one['gradients']), gap
        for name in 'low', 'high':
            np.testing.assert_allclose(found[name], one[name], rtol=TOLERANCE, atol=TOLERANCE)
        # Each process has those that its devices drew, and zeros.
        images += found['images']
    for found in parts:
        np.testing.assert_array_equal(found['drawn'], images)
    off = np.abs(images.astype(int) - one['images'].astype(int))
    # A value at the edge between two pixel values may fall on its other side.
    assert off.max() <= 1 and (off > 0).mean() < 0.01


# Of its part, as of a whole teacher in tests/checkpoints/test_memory.py: a fourth more, and what
# tracing a network and reading a tensor take. The whole, or its file kept mapped, is beyond.
SHARE, CONSTANT_MB = 1.25, 100


def test_a_process_reads_its_part_of_weights_that_are_spread(tmp_path):
    count = 2
    file = test_memory.write_checkpoint(tmp_path, 'safetensors', num_layers=36)
    process = start(
        count, f'--out={tmp_path}/found', f'--path={file}', module='tests.launch.loaded'
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for i in range(count):
        found = json.loads((tmp_path / f'found.{i}.json').read_text())
        grown_mb, size_mb = found['grown_mb'], found['size_mb']
        limit_mb = SHARE * size_mb / count + CONSTANT_MB
        assert grown_mb < limit_mb < size_mb, f'{grown_mb:.0f} MB for 1/{count} of {size_mb:.0f}'


def test_a_teacher_spread_over_processes_draws_what_it_draws_in_one(config_file, tmp_path):
    file, several = alone(config_file), tmp_path / 'several'
    arguments = [f'--config={file}', '--config.mesh.data=1', '--config.mesh.fsdp=2']
    arguments += ['--stages=sample', f'--workdir={several}']
    process = start(2, *arguments)
    pipeline.run(story.read_config(file, mesh__data=1, mesh__fsdp=2), tmp_path / 'one', ('sample',))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    images = [tmp_path / name / 'samples/teacher/images.npz' for name in ('one', 'several')]
    assert images[0].read_bytes() == images[1].read_bytes()
    # The teacher is the same to whoever goes on, or there would be images of another.
    process = start(1, *arguments, devices=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


# Many images of a small size, drawn in two steps; a batch leaves a part of every process.
MANY = 3000
MANY_BATCH = 100


@pytest.mark.slow
def test_many_images_drawn_by_other_numbers_of_processes_after_a_kill_are_the_same_file(
    config_file, tmp_path
):
    arguments = [
        f'--config={alone(config_file)}', '--config.mesh.data=4', '--stages=sample',
        f'--config.sample.num_images={MANY}', f'--config.sample.batch_size={MANY_BATCH}',
    ]  # fmt: skip
    cache, workdir = tmp_path / 'compiled', tmp_path / 'killed'
    parts = workdir / 'samples' / 'teacher.parts'
    whole = start(1, *arguments, f'--workdir={tmp_path}/whole', devices=4, cache=cache)
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    for count in 4, 2:
        process = start(count, *arguments, f'--workdir={workdir}', devices=4 // count, cache=cache)
        assert wait_for_marks(process, workdir, 6 * count)
        os.kill(processes_of(process)[-1], signal.SIGKILL)
        process.communicate(timeout=STOPPED_WITHIN_S)
        assert process.returncode == 128 + signal.SIGKILL
        assert 0 < len(parts_lib.missing(parts, MANY)) < MANY
    process = start(2, *arguments, f'--workdir={workdir}', devices=2, cache=cache)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    images = [run / 'samples' / 'teacher' / 'images.npz' for run in (tmp_path / 'whole', workdir)]
    assert images[0].read_bytes() == images[1].read_bytes()
    assert not parts.exists()


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
# What a run leaves one after another; with these, moments do not depend on a machine's speed.
MARKS = ('config.json', '**/complete.json', '**/checkpoints/[0-9]*', '**/*.parts/[0-9]*')


def marks(workdir):
    # Not Path.glob, which fails where a folder is renamed while it looks.
    return {f for mark in MARKS for f in glob.glob(mark, root_dir=workdir, recursive=True)}


def processes_of(script):
    return [*map(int, Path(f'/proc/{script.pid}/task/{script.pid}/children').read_text().split())]


def wait_for_marks(script, workdir, count, timeout_s=600):
    """Returns once the run has left so many new marks; False if it came to its end instead."""
    before, seen, began = marks(workdir), set(), time.monotonic()
    while len(seen) < count:
        if script.poll() is not None:
            return False
        assert time.monotonic() - began < timeout_s, sorted(seen)
        time.sleep(0.005)
        seen |= marks(workdir) - before
    return True


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_at_random_moments_ends_with_the_same_metrics(
    config_file, tmp_path
):
    cache = tmp_path / 'compiled'
    arguments = [f'--config={config_file}', '--config.mesh.data=2']
    arguments.append('--stages=calibrate,finetune,export,sample,evaluate')
    whole = start(2, *arguments, f'--workdir={tmp_path}/whole', cache=cache)
    _, errors = whole.communicate(timeout=900)
    assert whole.returncode == 0, errors

    rng = np.random.default_rng(7)
    killed, rounds = tmp_path / 'killed', []
    while len(rounds) < NUM_KILLS:
        process = start(2, *arguments, f'--workdir={killed}', cache=cache)
        if not wait_for_marks(process, killed, rng.integers(1, 6)):
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        time.sleep(rng.uniform(0, 0.3))
        running = processes_of(process)
        if len(running) < 2:
            break
        os.kill(running[rng.integers(2)], signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=STOPPED_WITHIN_S)
        rounds.append(time.monotonic() - began)
        assert process.returncode == 128 + signal.SIGKILL, errors
        assert 'ended with status 137: the others are stopped' in errors
    print(f'killed {len(rounds)} times; the others were gone after {rounds} s')
    assert len(rounds) >= 2, rounds
    process.communicate()
    process = start(2, *arguments, f'--workdir={killed}', cache=cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert story.metrics_of(killed) == story.metrics_of(tmp_path / 'whole')
    images = [tmp_path / name / 'samples' / 'edm' / 'images.npz' for name in ('killed', 'whole')]
    assert images[0].read_bytes() == images[1].read_bytes()


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
    children = processes_of(process)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert 'process 1 of 2 ended with status 137: the others are stopped' in errors
    assert not any(Path(f'/proc/{child}').exists() for child in children)
