"""The whole story on a tiny teacher: what every stage leaves, and that it survives being killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dmq_jax import artefacts, calibrate, command_line, exporting, finetune, pipeline, teachers
from dmq_jax import config as config_lib
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.runtime import hosts, log
from tests import tiny
from tests.test_configs import load

ROOT = Path(__file__).parents[1]
NUM_IMAGES = 12
NUM_ITERATIONS = 16
CHECKPOINT_EVERY = 4

CONFIG_FILE = """
from dmq_jax.config import base, student


def get_config(arg=None):
    config = base()
    config.seed = 3
    config.mesh.data = 1
    config.teacher.path = {teacher!r}
    config.evaluate.features, config.evaluate.reference = {evaluation!r}
    config.sampler.num_steps = config.calibrate.sampler.num_steps = 2
    config.calibrate.num_images, config.calibrate.batch_size = 8, 8
    config.calibrate.values_per_tensor = 32
    config.sample.num_images, config.sample.batch_size = {num_images}, 4
    config.report.grid_size = 2
    # Few layers are quantized, the others stay float: there is less to compile.
    few = dict(pattern='(?!conv_in|mid/block_0/|up_0/block_0/conv1).*', weight_bits=32,
               activation_bits=32)
    quant = dict(weight_observer='minmax', activation_observer='minmax', rules=[few])
    config.students.rtn = student(quant=dict(coverage='full', weight_bits=3, **quant))
    config.students.edm = student(
        dict(name='efficientdm', lora_rank=2, channels=dict(strength=1.0)),
        quant=dict(split_shortcuts=True, **quant),
        finetune=dict(num_iterations={num_iterations}, batch_size=2, log_every=4,
                      positions='trajectory', schedule='linear',
                      checkpoint_every={checkpoint_every},
                      sampler=dict(num_steps=2, eta=1.0)),
    )
    return config
"""
# What depends on the machine's speed.
TIMINGS = ('images_per_second', 'finetune_seconds', 'training_mb')


def make_files(folder):
    """Teacher, classifier, reference and config file."""
    network = DDPMUNet(
        channels=(8,), in_channels=1, layers_per_block=1, num_groups=4, down_attention=(False,),
        mid_attention=False, num_class_embeds=tiny.NUM_CLASSES + 1,
    )  # fmt: skip
    teacher = folder / 'teacher.safetensors'
    teachers.save_teacher(teacher, tiny.random_denoiser(network))
    evaluation = tuple(map(str, tiny.write_evaluation(folder)))
    text = CONFIG_FILE.format(
        teacher=str(teacher), evaluation=evaluation, num_images=NUM_IMAGES,
        num_iterations=NUM_ITERATIONS, checkpoint_every=CHECKPOINT_EVERY,
    )  # fmt: skip
    (folder / 'run.py').write_text(text)
    return folder / 'run.py'


def read_config(file, **changes):
    """The run that a config file describes, with options like `sampler__eta` changed."""
    config = load(file).get_config()
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace('__', '.'): value})
    return config_lib.from_config_dict(config)


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp('files'))


@pytest.fixture(scope='module')
def whole(config_file, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp('whole')
    pipeline.run(read_config(config_file), workdir)
    return workdir


def start(config_file, workdir, *arguments):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, '-m', 'dmq_jax.main', f'--config={config_file}', f'--workdir={workdir}',
         *arguments],
        cwd=config_file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip


def metrics_of(workdir):
    """`metrics.json` without what depends on the machine's speed."""
    metrics = json.loads((workdir / 'metrics.json').read_text())
    del metrics['protocol']['revision']  # somebody may commit in between
    for row in metrics['rows']:
        for name in TIMINGS:
            del row[name]
    return metrics


def contents(workdir):
    """Bytes of every file but the report, which is drawn anew by every call."""
    files = [f for f in sorted(workdir.rglob('*')) if f.is_file() and f.name != 'report.html']
    return {f: f.read_bytes() for f in files}


def test_the_calibration_holds_what_any_student_asks_for(config_file, whole):
    found = calibrate.load(whole / 'calibration' / 'stats.npz').stats
    part = 'up_0/block_0/conv1/inputs_0_8'
    assert part in exporting.load(whole / 'students' / 'edm' / 'export').weights
    assert found[part]['input'].channel_low.shape == (2, 8)
    assert found['up_0/block_0/conv1']['input'].channel_low.shape == (2, 16)


def test_every_artefact_is_there_and_complete(whole):
    folders = ['calibration', *(f'samples/{n}' for n in ('teacher', 'rtn', 'edm'))]
    folders += [f'students/{n}/{kind}' for n in ('rtn', 'edm') for kind in ('export', 'analysis')]
    for folder in (*folders, 'students/edm/state'):
        assert artefacts.is_complete(whole / folder), folder
    assert not list(whole.rglob('*.partial'))
    # Nothing is learnt, so there is no learnt state.
    assert not (whole / 'students/rtn/state').exists()
    stats = calibrate.load(whole / 'calibration' / 'stats.npz')
    assert len(stats.timesteps) == 2 and 'conv_in' in stats.stats
    saved = json.loads((whole / 'config.json').read_text())
    assert saved['config']['students']['edm']['method']['lora_rank'] == 2
    assert saved['versions']['jax'] == jax.__version__
    assert (whole / 'report.html').stat().st_size > 1000


def test_samples_are_paired_images_with_balanced_labels(whole):
    arrays = {n: pipeline.read_samples(whole / 'samples' / n) for n in ('teacher', 'rtn', 'edm')}
    for name, drawn in arrays.items():
        assert drawn['arr_0'].shape == (NUM_IMAGES, 8, 8, 1), name
        assert drawn['arr_0'].dtype == np.uint8
        assert np.bincount(drawn['labels']).tolist() == [4, 4, 4]
        assert drawn['images_per_second'] > 0
        if name != 'teacher':
            ran = json.loads((whole / 'samples' / name / 'implementations.json').read_text())
            assert ran['conv_in'][0] == 'xla'
            assert (drawn['arr_0'] != arrays['teacher']['arr_0']).any()


def test_the_export_holds_what_was_learnt(whole):
    model = exporting.load(whole / 'students' / 'edm' / 'export')
    assert model.plan['conv_in'].weight.bits == 8  # coverage 'paper'
    assert model.plan['mid/block_0/conv1'].weight.bits == 4
    facts = exporting.read_manifest(whole / 'students' / 'edm' / 'export')['facts']
    assert facts['method'] == 'efficientdm' and facts['finetune_seconds'] > 0
    steps = [line['step'] for line in log.read_metrics(whole / 'students' / 'edm' / 'finetune')]
    assert steps == list(range(4, NUM_ITERATIONS + 1, 4))


def test_metrics_have_a_protocol_and_a_row_per_network(whole):
    metrics = json.loads((whole / 'metrics.json').read_text())
    protocol = metrics['protocol']
    assert protocol['distance'] == 'FD'
    assert protocol['num_images'] == NUM_IMAGES and protocol['reference_images'] == 60
    assert protocol['sampler']['num_steps'] == 2 and protocol['mode'] == 'integer'
    rows = {row['name']: row for row in metrics['rows']}
    assert list(rows) == ['teacher', 'edm', 'rtn']  # a ConfigDict sorts its names
    for row in rows.values():
        for name in ('fd', 'precision', 'recall', 'class_accuracy', 'images_per_second'):
            assert row[name] >= 0, name
    bits = {n: (r['weight_bits'], r['activation_bits'], r['coverage']) for n, r in rows.items()}
    assert bits == {'teacher': (32, 32, None), 'rtn': (3, 4, 'full'), 'edm': (4, 4, 'paper')}
    assert rows['rtn']['size_mb'] < rows['edm']['size_mb'] < rows['teacher']['size_mb']
    assert rows['teacher']['psnr_to_teacher'] is rows['teacher']['finetune_seconds'] is None
    assert 0 < rows['edm']['psnr_to_teacher'] < 100
    assert rows['edm']['finetune_seconds'] > 0 and rows['rtn']['finetune_seconds'] == 0


@pytest.mark.slow
def test_weights_that_are_spread_as_they_are_read_go_all_the_way(whole, config_file, tmp_path):
    config = read_config(config_file, mesh__fsdp=2)
    context = pipeline.open_run(config, tmp_path, None)
    kernel = context.teacher.params['mid']['block_0']['conv1']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    pipeline.run(config, tmp_path)
    # Sums over the batch are taken in another order: nearly the same numbers.
    mine, theirs = metrics_of(tmp_path), metrics_of(whole)
    assert mine.keys() == theirs.keys()


def test_a_second_call_changes_nothing(whole, config_file, monkeypatch):
    for stage in (calibrate, finetune, pipeline.analysis):
        monkeypatch.setattr(stage, 'run', None)
    monkeypatch.setattr(pipeline.exporting, 'make', None)
    monkeypatch.setattr(pipeline.sampling, 'batches', None)
    before = contents(whole)
    pipeline.run(read_config(config_file), whole)
    assert contents(whole) == before


@pytest.mark.parametrize(
    'changes, text',
    [
        (
            {'calibrate__num_images': 16},
            r'calibration was made.*calibrate.num_images was 8, now 16',
        ),
        ({'seed': 4}, 'seed was 3, now 4'),
        ({'students__edm__method__lora_rank': 3}, 'student.method.lora_rank was 2, now 3'),
        ({'students__rtn__quant__weight_bits': 4}, 'student.quant.weight_bits was 3, now 4'),
        ({'sample__num_images': 8}, 'samples/teacher was made.*num_images was 12, now 8'),
        ({'sampler__eta': 0.5}, 'sampler.eta was 0.0, now 0.5'),
    ],
)
def test_other_options_in_the_same_workdir_are_refused(whole, config_file, changes, text):
    before = contents(whole)
    with pytest.raises(ValueError, match=text) as caught:
        pipeline.run(read_config(config_file, **changes), whole)
    assert 'another --workdir' in str(caught.value)
    assert command_line._is_users(caught.value)
    assert contents(whole) == before


def test_another_teacher_behind_the_same_path_is_refused(whole, config_file, tmp_path):
    folder = shutil.copytree(config_file.parent, tmp_path / 'files')
    teacher = teachers.load_teacher(folder / 'teacher.safetensors')
    changed = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, teacher.params)
    teachers.save_teacher(folder / 'teacher.safetensors', teacher._replace(params=changed))
    config = read_config(config_file, teacher__path=str(folder / 'teacher.safetensors'))
    with pytest.raises(ValueError, match='calibration was made with other options: teacher was'):
        pipeline.run(config, whole)


def test_checkpoints_of_other_options_are_not_taken_for_ours(whole, config_file, tmp_path):
    # As after a change of options in the middle of a fine-tuning: no state yet, but checkpoints.
    shutil.copytree(whole / 'calibration', tmp_path / 'calibration')
    folder = Path('students', 'edm', 'finetune')
    shutil.copytree(whole / folder, tmp_path / folder)
    config = read_config(config_file, students__edm__finetune__schedule='cosine')
    with pytest.raises(ValueError, match="edm/finetune was made.*schedule was 'linear', now"):
        pipeline.run(config, tmp_path, ['finetune'])


def test_a_dry_run_shows_the_plan_and_writes_nothing(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline.dry_run(read_config(config_file))
    shown = capsys.readouterr().out
    assert 'edm: efficientdm, coverage paper' in shown and 'mid/block_0/conv1' in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'sample__batch_size': 6}, r'sample.batch_size=6 is not divisible by 8 devices'),
        (
            {'students__edm__finetune__batch_size': 9},
            r'students.edm.finetune.batch_size=9 is not divisible by 8 devices; try 8 or 16',
        ),
        ({'calibrate__batch_size': 4}, 'calibrate.batch_size=4 is not divisible by 8'),
        ({'sampler__num_steps': 51}, 'num_steps'),
        ({'students__edm__finetune__sampler__num_steps': 51}, 'num_steps'),
        ({'sample__num_images': 3}, 'num_images=3'),
        ({'teacher__path': 'nowhere'}, 'nowhere'),
        ({'evaluate__reference': 'nowhere'}, 'nowhere'),
    ],
)
def test_what_can_fail_cheaply_fails_before_anything_is_made(config_file, tmp_path, changes, text):
    good = {'mesh__data': 8, 'sample__batch_size': 8, 'students__edm__finetune__batch_size': 8}
    with pytest.raises((ValueError, FileNotFoundError), match=text) as caught:
        pipeline.run(read_config(config_file, **good | changes), tmp_path)
    assert command_line._is_users(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    whole, config_file, tmp_path, monkeypatch
):
    shutil.copytree(whole / 'calibration', tmp_path / 'calibration')

    def broken(step, *arguments):
        return lambda train, *others: (train._replace(step=train.step + 1), np.float32(np.nan))

    monkeypatch.setattr(finetune.TrainStep, 'compiled', broken)
    config = read_config(config_file)
    with pytest.raises(FloatingPointError, match=r'finetune edm: loss is .* at step 4') as caught:
        pipeline.run(config, tmp_path, ['finetune'])
    assert command_line._is_users(caught.value)
    assert not (tmp_path / 'students' / 'edm' / 'state').exists()


def test_sampling_that_is_asked_to_stop_goes_on_where_it_was(
    whole, config_file, tmp_path, monkeypatch
):
    config = dataclasses.replace(read_config(config_file), students={})
    answers = iter([False, False, True])  # before the first batch, and after each
    with monkeypatch.context() as patch:
        patch.setattr(hosts, 'stop_requested', lambda: next(answers))
        with pytest.raises(SystemExit) as stopped:
            pipeline.run(config, tmp_path, ['sample'])
    assert stopped.value.code == hosts.REQUEUE
    assert not artefacts.is_complete(tmp_path / 'samples' / 'teacher')
    drawn_again, batches = [], pipeline.sampling.batches

    def note(*arguments, begins, **options):
        drawn_again.extend(begins)
        return batches(*arguments, begins=begins, **options)

    monkeypatch.setattr(pipeline.sampling, 'batches', note)
    pipeline.run(config, tmp_path, ['sample'])
    assert drawn_again == [8]
    folder = Path('samples', 'teacher', 'images.npz')
    drawn, expected = (pipeline.read_arrays(w / folder) for w in (tmp_path, whole))
    np.testing.assert_array_equal(drawn['arr_0'], expected['arr_0'])
    assert [p.name for p in (tmp_path / 'samples').iterdir()] == ['teacher']


def wait_for_checkpoint(process, folder, timeout_s=240):
    """Returns once a checkpoint is complete, with the process still at work."""
    begin = time.monotonic()
    while not (folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < timeout_s
        time.sleep(0.002)


def test_a_run_killed_while_fine_tuning_ends_with_the_same_metrics(whole, config_file, tmp_path):
    # What fine-tuning stands on, and what does not stand on it.
    for made in ('calibration', 'students/rtn', 'samples/teacher', 'samples/rtn'):
        shutil.copytree(whole / made, tmp_path / made)
    process = start(config_file, tmp_path, '--stages=finetune')
    folder = tmp_path / 'students' / 'edm' / 'finetune'
    wait_for_checkpoint(process, folder / 'checkpoints')
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / 'students' / 'edm' / 'state').exists()
    restored = []
    restore = finetune.Checkpoints.restore

    def note(self, step, like):
        restored.append(step)
        return restore(self, step, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.Checkpoints, 'restore', note)
        stages = [s for s in pipeline.STAGES if s not in ('analyse', 'report')]
        pipeline.run(read_config(config_file), tmp_path, stages)
    assert restored and CHECKPOINT_EVERY <= restored[0]
    assert metrics_of(tmp_path) == metrics_of(whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_metrics(whole, config_file, tmp_path):
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(20):
        process = start(config_file, tmp_path)
        try:
            # Later attempts live longer, so that the last of them arrives.
            _, errors = process.communicate(timeout=rng.uniform(3, 12) * (1 + attempt / 4))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    assert process.returncode == 0 and kills >= 2, kills
    assert metrics_of(tmp_path) == metrics_of(whole)


@pytest.mark.slow  # test_what_can_fail_cheaply has the mistake, test_command_line.py the message
def test_a_mistake_on_the_command_line_is_one_message_and_status_2(config_file, tmp_path):
    process = start(
        config_file, tmp_path, '--config.mesh.data=8', '--config.sample.batch_size=12',
        '--config.students.edm.finetune.batch_size=8',
    )  # fmt: skip
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith('Error: sample.batch_size=12 is not')
    assert 'Traceback' not in errors
