"""launch/slurm.sbatch under a real Slurm of one node, started here for the test alone.

Needs the daemons: apt-get install slurmctld slurmd slurm-client (Debian, Ubuntu), and root, since
only root's slurmd may start jobs.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmq_jax.runtime import hosts
from tests import test_pipeline as story

ROOT = Path(__file__).parents[2]
DAEMONS = ('slurmctld', 'slurmd', 'slurmstepd', 'sbatch', 'scancel', 'scontrol', 'srun')

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def find(name):
    """A daemon, which Debian installs beside what ordinary users may call."""
    return shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/usr/local/sbin')


def free_ports(count):
    listeners = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class Cluster:
    def __init__(self, folder):
        found = Path(os.path.realpath(find('slurmd')))
        plugins = next(found.parents[1].glob('lib/*/slurm*/auth_none.so'), None)
        if plugins is None:
            pytest.skip(f'no plugin auth_none.so of Slurm beside {found}')
        host = socket.gethostname().partition('.')[0]
        text = CONFIG.format(
            host=host, ports=free_ports(2), plugins=plugins.parent, folder=folder,
            cpus=os.cpu_count(),
        )  # fmt: skip
        for name in ('state', 'spool'):
            (folder / name).mkdir()
        (folder / 'slurm.conf').write_text(text)
        # The script asks for a GPU per task; any two files will do for them.
        (folder / 'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
        self.folder, self.environ = folder, {**os.environ, 'SLURM_CONF': f'{folder}/slurm.conf'}
        stepd = ['-d', find('slurmstepd')]
        self.daemons = [
            subprocess.Popen([find(name), '-D', *options], env=self.environ)
            for name, options in (('slurmctld', []), ('slurmd', ['-N', host, *stepd]))
        ]

    def call(self, *command):
        done = subprocess.run(command, env=self.environ, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr, self.logs())
        return done.stdout

    def logs(self):
        files = [*self.folder.glob('*.log'), *self.folder.glob('slurm-*.out')]
        return '\n'.join(f'{file.name}:\n{file.read_text()[-3000:]}' for file in files)

    def wait_for(self, condition, timeout_s):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, self.logs()
            assert all(daemon.poll() is None for daemon in self.daemons), self.logs()
            time.sleep(0.5)

    def state(self, job):
        return re.search(r'JobState=(\w+)', self.call('scontrol', 'show', 'job', job))[1]

    def stop(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@pytest.fixture
def cluster(tmp_path):
    missing = [name for name in DAEMONS if find(name) is None]
    if missing:
        pytest.skip(f'Slurm is not installed: no {", ".join(missing)}')
    if os.geteuid() != 0:
        pytest.skip('slurmd must be started by root')
    (tmp_path / 'slurm').mkdir()
    cluster = Cluster(tmp_path / 'slurm')
    try:
        cluster.wait_for(lambda: 'idle' in subprocess.run(
            ['sinfo', '-h', '-o', '%t'], env=cluster.environ, capture_output=True, text=True
        ).stdout, 60)  # fmt: skip
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_a_preempted_job_saves_goes_back_into_the_queue_and_ends_as_if_it_had_not_been(
    cluster, tmp_path
):
    (tmp_path / 'files').mkdir()
    config_file = story.make_files(tmp_path / 'files')
    cluster.environ |= {
        'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }  # fmt: skip
    arguments = [f'--config={config_file}', '--config.mesh.data=2']
    arguments.append('--stages=calibrate,finetune,export,sample,evaluate')

    def submit(name):
        text = cluster.call(
            'sbatch', '--ntasks-per-node=2', f'--output={cluster.folder}/slurm-{name}.out',
            'launch/slurm.sbatch', *arguments, f'--workdir={tmp_path / name}',
        )  # fmt: skip
        return re.search(r'\d+', text)[0]

    def output(name):
        return (cluster.folder / f'slurm-{name}.out').read_text()

    job = submit('stopped')
    checkpoints = tmp_path / 'stopped' / 'students' / 'edm' / 'finetune' / 'checkpoints'
    cluster.wait_for(lambda: checkpoints.is_dir() and any(
        path.name.isdecimal() for path in checkpoints.iterdir()
    ), 600)  # fmt: skip
    # What Slurm does before the time limit or at a preemption: the signal goes to the script alone.
    cluster.call('scancel', '--signal=TERM', '--batch', job)
    cluster.wait_for(lambda: 'back into the queue' in output('stopped'), 120)
    assert f'exit {hosts.REQUEUE}' in output('stopped')
    # Slurm lets a requeued job wait for two minutes.
    cluster.wait_for(lambda: cluster.state(job) == 'PENDING', 120)
    cluster.call('scontrol', 'update', f'JobId={job}', 'StartTime=now')
    cluster.wait_for(lambda: cluster.state(job) == 'COMPLETED', 600)
    assert 'Restarts=1' in cluster.call('scontrol', 'show', 'job', job)

    undisturbed = submit('whole')
    cluster.wait_for(lambda: cluster.state(undisturbed) == 'COMPLETED', 600)
    assert story.metrics_of(tmp_path / 'stopped') == story.metrics_of(tmp_path / 'whole')
