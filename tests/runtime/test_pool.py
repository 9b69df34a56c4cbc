"""Commands beside one another: how many, where, how they end, and how they are ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmq_jax.runtime import hosts, pool

CORES = sorted(os.sched_getaffinity(0))


def command(name, code, folder):
    return pool.Command(name, [sys.executable, '-S', '-c', code], folder / f'{name}.log')


def half():
    return pool.split(1, {'JAX_PLATFORMS': 'cpu'}) * 2


@pytest.mark.parametrize('count', range(1, len(CORES) + 1))
def test_every_core_belongs_to_one_part_and_parts_are_of_one_size(count):
    shares = pool.split(count, {'JAX_PLATFORMS': 'cpu'})
    assert sorted(core for share in shares for core in share.cores) == CORES
    sizes = {len(share.cores) for share in shares}
    assert len(shares) == count and max(sizes) - min(sizes) <= 1
    assert all(share.gpus is None for share in shares)


def test_gpus_are_split_as_the_environment_names_them(monkeypatch):
    monkeypatch.setattr(pool, '_cores', lambda: set(range(8)))
    shares = pool.split(2, {'CUDA_VISIBLE_DEVICES': '3,GPU-abc,1,0'})
    assert [share.gpus for share in shares] == ['3,GPU-abc', '1,0']
    assert [share.cores for share in shares] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


@pytest.mark.parametrize('count', [0, len(CORES) + 1])
def test_more_parts_than_cores_are_refused(count):
    with pytest.raises(ValueError, match=f'expected 1 to {len(CORES)}, the cores'):
        pool.split(count, {'JAX_PLATFORMS': 'cpu'})


def test_more_parts_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(pool, '_cores', lambda: set(range(8)))
    with pytest.raises(ValueError, match='3 workers: expected 2 at most, a GPU for each'):
        pool.split(3, {'CUDA_VISIBLE_DEVICES': '0,1'})


def test_a_command_sees_its_share_and_its_words_go_to_its_log(tmp_path):
    say = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"], os.sched_getaffinity(0))'
    share = pool.Share(frozenset(CORES[-1:]), 'GPU-abc')
    # The share is set once the process is there: what asks at once could be before it.
    commands = [command('a', f'import time; time.sleep(0.5); {say}', tmp_path)]
    assert list(pool.run(commands, [share])) == [('a', 0)]
    assert (tmp_path / 'a.log').read_text() == f'GPU-abc {{{CORES[-1]}}}\n'


def test_as_many_run_at_a_time_as_there_are_shares(tmp_path):
    note = 'import time; a = time.time(); time.sleep(0.3); print(a, time.time())'
    commands = [command(str(i), note, tmp_path) for i in range(5)]
    assert dict(pool.run(commands, half())) == dict.fromkeys('01234', 0)
    spans = [tuple(map(float, c.log.read_text().split())) for c in commands]
    beside = [sum(a <= begin < b for a, b in spans) for begin, _ in spans]
    assert max(beside) == 2


def test_each_status_is_told_and_the_others_go_on(tmp_path):
    commands = [
        command('fails', 'raise SystemExit(3)', tmp_path),
        command('killed', 'import os; os.kill(os.getpid(), 9)', tmp_path),
        command('fine', 'import time; time.sleep(0.5)', tmp_path),
        command('after', '', tmp_path),
    ]
    expected = {'fails': 3, 'killed': 128 + signal.SIGKILL, 'fine': 0, 'after': 0}
    assert dict(pool.run(commands, half())) == expected


def test_a_request_to_stop_is_handed_on_and_nothing_begins_after_it(tmp_path, monkeypatch):
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('ready', flush=True)
time.sleep(60)
"""
    commands = [command(name, code, tmp_path) for name in 'abc']

    def requested():
        logs = [c.log for c in commands[:2]]
        return all(log.is_file() and log.read_text() for log in logs)

    monkeypatch.setattr(hosts, 'stop_requested', requested)
    assert dict(pool.run(commands, half())) == {'a': 75, 'b': 75}
    assert not commands[2].log.exists()


def test_leaving_the_loop_ends_those_that_run(tmp_path):
    commands = [
        command('short', '', tmp_path),
        command(
            'long', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)', tmp_path
        ),
    ]
    ends = pool.run(commands, half())
    log = commands[1].log
    assert next(ends) == ('short', 0)
    while not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    ends.close()
    assert not Path(f'/proc/{log.read_text().strip()}').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='the signal of a lost parent is of Linux')
def test_a_command_hears_of_the_end_of_the_one_that_started_it(tmp_path):
    """The one that started it is killed, and has no chance to say anything."""
    child = """
import os, signal, sys, time
from dmq_jax.runtime import pool
def leave(*_):
    print('heard', flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
pool.end_with_parent()
print(os.getppid(), flush=True)
time.sleep(60)
"""
    log = tmp_path / 'child.log'
    parent = f"""
from pathlib import Path
from dmq_jax.runtime import pool
import sys
child = pool.Command('child', [sys.executable, '-c', {child!r}], Path({str(log)!r}))
list(pool.run([child], pool.split(1, {{'JAX_PLATFORMS': 'cpu'}})))
"""
    process = subprocess.Popen([sys.executable, '-c', parent], cwd=Path(__file__).parents[2])
    began = time.monotonic()
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.05)
    assert log.read_text() == f'{process.pid}\n'
    process.kill()
    process.wait()
    while 'heard' not in log.read_text():
        assert time.monotonic() - began < 90
        time.sleep(0.05)
