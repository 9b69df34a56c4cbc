"""Laws of dmq_jax/runtime/hosts.py: where a process belongs, and that processes act as one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dmq_jax.runtime import hosts

ROOT = Path(__file__).parents[2]
SLURM = {
    'SLURM_STEP_NUM_TASKS': '4', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '2', 'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'n[1-4]', 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '4',
}  # fmt: skip
OPEN_MPI = {
    'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_MCA_orte_hnp_uri': '1;tcp://10.0.0.1:1',
}  # fmt: skip
TPU = {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}
JAX = {
    'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1',
}  # fmt: skip
BY_JAX = hosts.Cluster()


@pytest.mark.parametrize(
    'environ, given, cluster',
    [
        ({}, {}, None),
        ({'JAX_NUM_PROCESSES': '1'}, {}, None),
        # A batch script that starts its program without srun.
        ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, {}, None),
        ({'OMPI_COMM_WORLD_SIZE': '1'}, {}, None),
        ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, {}, None),
        (SLURM, {}, BY_JAX),
        (OPEN_MPI, {}, BY_JAX),
        (TPU, {}, BY_JAX),
        ({}, {'coordinator': 'auto'}, BY_JAX),
        (JAX, {}, hosts.Cluster('h:1', 2, 1)),
        (JAX, {'process_id': 0}, hosts.Cluster('h:1', 2, 0)),
        (
            {},
            {'coordinator': '[::1]:9', 'num_processes': 3, 'process_id': 2},
            hosts.Cluster('[::1]:9', 3, 2),
        ),
        (SLURM, {'coordinator': 'h:1'}, hosts.Cluster('h:1', 4, 2)),
        # Open MPI 5 does not say where its first process runs.
        (
            {k: v for k, v in OPEN_MPI.items() if 'MCA' not in k},
            {'coordinator': 'h:1'},
            hosts.Cluster('h:1', 2, 1),
        ),
    ],
)
def test_a_process_finds_its_place(environ, given, cluster):
    assert hosts.find_cluster(environ, **given) == cluster


@pytest.mark.parametrize(
    'environ, given, text',
    [
        ({}, {'num_processes': 2}, '--coordinator is missing: give it, or set JAX_COORDINATOR_ADD'),
        ({}, {'coordinator': 'h:1'}, '--num_processes is missing.*JAX_NUM_PROCESSES'),
        (
            {'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '2'},
            {},
            '--process_id is missing.*JAX_PROCESS_ID',
        ),
        (JAX, {'process_id': 2}, 'process_id=2: expected 0..1'),
        (JAX, {'coordinator': 'h'}, "coordinator='h': expected HOST:PORT"),
        (JAX | {'JAX_PROCESS_ID': 'x'}, {}, "JAX_PROCESS_ID='x': expected a number"),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, {}, 'TPU_WORKER_ID is not set'),
        *(
            ({k: v for k, v in SLURM.items() if k != name}, {}, f'did not set {name}')
            for name in ('SLURM_STEP_NODELIST', 'SLURM_LOCALID', 'SLURM_PROCID')
        ),
        (
            {k: v for k, v in OPEN_MPI.items() if 'MCA' not in k},
            {},
            'Open MPI started 2 processes but did not set OMPI_MCA.*JAX_COORDINATOR_ADDRESS',
        ),
    ],
)
def test_what_is_missing_is_named(environ, given, text):
    with pytest.raises(ValueError, match=text):
        hosts.find_cluster(environ, **given)


def test_alone_the_first_process_is_this_one():
    assert hosts.is_first() and hosts.by_first(lambda: 3) == 3
    hosts.wait_for_all()
    assert not hosts.stop_requested()


ASKED = """
import os, signal
from dmq_jax.runtime import hosts
hosts.join(hosts.find_cluster({}))
hosts.stop_if_asked()
os.kill(os.getpid(), signal.SIGTERM)
print('still here', hosts.stop_requested(), flush=True)
hosts.stop_if_asked()
"""


def test_one_process_stops_where_it_is_safe_and_asks_to_be_run_again():
    environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [sys.executable, '-c', ASKED], env=environ, capture_output=True, text=True
    )
    assert done.returncode == hosts.REQUEUE == 75, done.stderr
    assert done.stdout == 'still here True\n'
    assert 'the same command goes on from here (exit 75)' in done.stderr


TOGETHER = """
import os, pathlib, signal, sys, time
from dmq_jax import artefacts, features
from dmq_jax.metrics import frechet
from dmq_jax.runtime import hosts, mesh, parts

hosts.join(hosts.find_cluster(os.environ))
import jax
import jax.numpy as jnp
import numpy as np

me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
log = open(folder / f'log{me}', 'w')
say = lambda *words: print(*words, file=log, flush=True)
print('only the first prints')

# Process 0 decides, and its errors are everybody's.
say(hosts.by_first(lambda: {'of': me}))
def fail():
    raise ValueError('no space left')
try:
    hosts.by_first(fail)
except ValueError as error:
    say(error)

# One lock for all, one writer, every process loads.
calls = []
with artefacts.sole_user(folder / 'run'):
    for _ in range(2):
        value = artefacts.artefact(
            folder / 'run' / 'made', {'a': 1},
            make=lambda: calls.append(me) or time.sleep(0.3 * me) or me,
            save=lambda path, value: (path / 'value').write_text(str(value)),
            load=lambda path: (path / 'value').read_text(),
        )
        say('value', value, 'made', len(calls))
    try:
        artefacts.artefact(folder / 'run' / 'made', {'a': 2}, make=None, save=None, load=None)
    except ValueError as error:
        say(error)

# Whole arrays and typed keys go in, whole arrays come out; rows have one owner.
m = mesh.make_mesh()
x = np.arange(24, dtype=np.float32).reshape(8, 3)
keys = jax.random.split(jax.random.key(0), 8)
placed, placed_keys = mesh.shard_batch(m, (x, keys))
drawn = jax.jit(jax.vmap(lambda k, row: row + jax.random.normal(k, (3,))))(placed_keys, placed)
expected = jax.vmap(lambda k, row: row + jax.random.normal(k, (3,)))(keys, jnp.asarray(x))
fetched = mesh.fetch(m, drawn)
np.testing.assert_allclose(fetched, expected, rtol=1e-6)  # compiled whole, and op by op
(folder / 'run' / 'rows').mkdir(exist_ok=True)
for array in drawn, mesh.replicate(m, drawn):
    rows, values = mesh.local_rows(array)
    parts.write(folder / 'run' / 'rows', rows, values)
    hosts.wait_for_all()
    np.testing.assert_array_equal(parts.merge(folder / 'run' / 'rows', 8), fetched)
say('rows', len(mesh.local_rows(drawn)[0]))

# What each has, whatever its dtype, in all.
mine = np.arange(5) / 3 + me, np.asarray(me == 1), np.asarray(2**40 + me)
for process, theirs in enumerate(hosts.gather(mine)):
    np.testing.assert_array_equal(theirs[0], np.arange(5) / 3 + process)
    assert theirs[0].dtype == np.float64 and theirs[1].dtype == bool and theirs[1].shape == ()
    assert theirs[1] == (process == 1) and theirs[2] == 2**40 + process
rows = np.random.default_rng(3).normal(size=(3000, 4))
found = frechet.gaussian_statistics(rows, features.all_processes())
np.testing.assert_allclose(found.cov, np.cov(rows.T), rtol=1e-12)
say('gathered')

# A signal to one stops all at the same step.
for step in range(1000):
    if step == 3 and me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    if hosts.stop_requested():
        say('stopped', step)
        raise hosts.interrupted()
    hosts.wait_for_all()
    time.sleep(0.02)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def start(script, folder, count=2):
    port = free_port()
    environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    return [
        subprocess.Popen(
            [sys.executable, '-c', script, folder],
            env=environ | {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
                           'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def test_two_processes_act_as_one(tmp_path):
    processes = start(TOGETHER, tmp_path)
    ended = [process.communicate(timeout=120) for process in processes]
    logs = [(tmp_path / f'log{i}').read_text().splitlines() for i in (0, 1)]
    assert [p.returncode for p in processes] == [hosts.REQUEUE] * 2, ended
    assert ['only the first prints' in out for out, _ in ended] == [True, False]
    assert [f'exit {hosts.REQUEUE}' in errors for _, errors in ended] == [True, False]
    first, second = logs
    assert first[0] == second[0] == "{'of': 0}"
    assert first[1] == 'no space left' and second[1] == 'no space left (said by process 0)'
    # Made by both, of which only the value of the first was written.
    assert first[2:4] == second[2:4] == ['value 0 made 1', 'value 0 made 1']
    assert 'a was 1, now 2' in first[4] and first[4] == second[4]
    assert first[5] == second[5] == 'rows 4'
    assert first[6] == second[6] == 'gathered'
    assert first[7] == second[7] and first[7].startswith('stopped ')


TALKING = """
import os, sys
from dmq_jax.runtime import hosts
hosts.join(hosts.find_cluster(os.environ))
with hosts.ending_together():
    hosts.wait_for_all()
    print('in', file=sys.stderr, flush=True)
    while True:
        hosts.wait_for_all()
"""
# A word to a back end that is gone fails at once; the rest is a busy machine.
ENDED_WITHIN_S = 20


@pytest.mark.parametrize(
    'victim, number',
    [
        (0, signal.SIGKILL),
        (1, signal.SIGKILL),
        # Frozen, it closes no connection: only its heartbeat is missed.
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_the_others_say_so_and_end_when_one_is_gone(tmp_path, victim, number):
    processes = start(TALKING, tmp_path)
    try:
        for process in processes:
            while (line := process.stderr.readline()) != 'in\n':
                assert line and process.poll() is None
        began = time.monotonic()
        processes[victim].send_signal(number)
        other = processes[1 - victim]
        is_killed = number == signal.SIGKILL
        limit_s = ENDED_WITHIN_S + (0 if is_killed else 2 * hosts.HEARTBEAT_TIMEOUT_S)
        _, errors = other.communicate(timeout=limit_s)
        print(f'{number.name} of process {victim}: the other ended in '
              f'{time.monotonic() - began:.1f} s with {other.returncode}')  # fmt: skip
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    # Whoever notices first speaks: this code or jax, which aborts.
    if other.returncode == hosts.LOST:
        assert f'process {1 - victim} of 2: another process of this run has ended' in errors
        assert 'the same command goes on from there (exit 69)' in errors
        assert 'Traceback' not in errors
    else:
        assert other.returncode == -signal.SIGABRT
        assert 'another task died' in errors


def test_an_error_of_ones_own_is_not_taken_for_the_loss_of_another(monkeypatch):
    monkeypatch.setattr(hosts.jax, 'process_count', lambda: 2)
    for error in ValueError('no space left'), OSError('Connection reset by peer'):
        assert not hosts.is_loss(error)
        with pytest.raises(type(error)), hosts.ending_together():
            raise error
    assert hosts.is_loss(jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed: Read error'))
    monkeypatch.setattr(hosts.jax, 'process_count', lambda: 1)
    assert not hosts.is_loss(ValueError('Gloo all-reduce failed'))


DAMAGED = """
import os, pathlib, sys
from dmq_jax.runtime import hosts, mesh
from dmq_jax.runtime.checkpoint import Checkpoints
hosts.join(hosts.find_cluster(os.environ))
import jax
import numpy as np

folder = pathlib.Path(sys.argv[1])
device_mesh = mesh.make_mesh()

def state(step):
    # Random, since orbax packs what is alike into its index.
    tree = {'x': np.random.default_rng(step).standard_normal((4, 9999)), 'step': np.ones(1) * step}
    tree = jax.tree.map(np.float32, tree)
    rules = (('x', (mesh.BATCH,)), ('.*', ()))
    return mesh.place(tree, mesh.shardings(device_mesh, tree, rules))

with Checkpoints(folder / 'run') as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step))
# The part of the second process alone.
for file in (folder / 'run' / '2').rglob('ocdbt.process_1/d/*'):
    if jax.process_index() == 1:
        os.truncate(file, 20000)
hosts.wait_for_all()
with Checkpoints(folder / 'run') as checkpoints:
    restored = checkpoints.restore_latest(state(0))
step = float(mesh.fetch(device_mesh, restored)['step'][0])
(folder / f'log{jax.process_index()}').write_text(str(step))
"""


def test_a_checkpoint_that_one_process_cannot_read_gives_way_in_all(tmp_path):
    processes = start(DAMAGED, tmp_path)
    ended = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], ended
    assert [(tmp_path / f'log{i}').read_text() for i in (0, 1)] == ['1.0', '1.0']
    assert ['is damaged and is deleted' in errors for _, errors in ended] == [True, False]
    assert not (tmp_path / 'run' / '2').exists()
