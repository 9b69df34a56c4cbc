import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import dmq_jax
from dmq_jax import api, learning, pipeline, reconstruct, teachers
from dmq_jax import config as config_lib
from dmq_jax.models.dit import DiT
from dmq_jax.quant import tensor
from dmq_jax.runtime import hosts
from tests import tiny

ROOT = Path(__file__).parents[1]
SEED = 5
NUM_ITERATIONS = 4
SAMPLER = {'num_steps': 2}
CALIBRATE = {'num_images': 4, 'batch_size': 4, 'values_per_tensor': 16, 'sampler': SAMPLER}


# One block of a transformer: enough for every method, and no more to be compiled than that.
NETWORK = DiT(
    num_layers=1, num_heads=2, head_dim=4, sample_size=4, num_classes=tiny.NUM_CLASSES,
    in_channels=1, out_channels=1,
)  # fmt: skip
QUANT = {
    'weight_observer': 'minmax', 'activation_observer': 'minmax', 'coverage': 'rules',
    'rules': (
        {'pattern': 'block_0/(modulation|attention/(q|attend/.*)|mlp/dense_0)'},
        {'pattern': '.*', 'weight_bits': 32, 'activation_bits': 32},
    ),
}  # fmt: skip
BRIEF = {
    'reconstruct': {'batch_size': 8, 'num_timesteps': 2, 'num_images': 8, 'sampler': SAMPLER},
    'finetune': {'batch_size': 2, 'sampler': SAMPLER},
    'adapt': {'batch_size': 2},
    'data': {'path': 'teacher', 'num_images': 4},
}
CASES = {name: (name, {}) for name in (*config_lib.LEARNS_BY, *config_lib.RECIPES)}
# Where the timestep enters a transformer.
CASES['tfmq_dm'] = 'tfmq_dm', {'layers': '.*modulation', 'outputs': '.*modulation'}
CASES['efficientdm'] = 'efficientdm', {'lora_rank': 2}
# PEQA is TuneQDM with some of its scales.
CASES['peqa'] = 'tuneqdm', {'scales': 'output', 'num_experts': 1}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
    info = dataclasses.replace(tiny.INFO, image_shape=(4, 4, 1))
    teachers.save_teacher(path, tiny.random_denoiser(NETWORK, info, tiny.like_initial))
    return dmq_jax.load_teacher(path)


@pytest.fixture(scope='module')
def calibrate_once():
    """Calibrates once for all methods: what the teacher does is the same. Gives back what does."""
    run, kept = learning.calibrate.run, []

    def once(*arguments, channels, **options):
        if not kept:
            kept.append(run(*arguments, channels=True, **options))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning.calibrate, 'run', once)
        yield run


@pytest.fixture(scope='module')
def model(teacher, calibrate_once):
    return quantize_briefly(teacher, 'round_to_nearest', weight_bits=5)


def test_a_quantized_network_samples_the_same_after_export_and_load(teacher, model, tmp_path):
    images = dmq_jax.sample(model, 4, **SAMPLER)
    dmq_jax.export(model, tmp_path / 'model')
    again = dmq_jax.sample(dmq_jax.load(tmp_path / 'model'), 4, **SAMPLER)
    np.testing.assert_array_equal(again, images)
    assert images.shape == (4, 4, 4, 1) and images.dtype == np.uint8
    spec = model.plan['block_0/mlp/dense_0']
    assert spec.weight.bits == 5 and spec.inputs.bits == 4
    # Round the classes by default; and the student is close to its teacher, not equal.
    own = dmq_jax.sample(teacher, 4, labels=np.array([0, 1, 2, 0], np.int32), **SAMPLER)
    difference = np.abs(images.astype(int) - own)
    assert 0 < difference.mean() < 64


def stage_of(name):
    return config_lib.LEARNS_BY[config_lib.method_options(name)['name']]


def quantize_briefly(teacher, name, workdir=None, method_options=None, schedule=None, **quant):
    """By the method's own stage, if it has one."""
    stage, given = stage_of(name), {}
    if stage:
        options = BRIEF[stage] | ({'schedule': schedule} if schedule else {})
        given = {f'{stage}_options': options, 'num_iterations': NUM_ITERATIONS}
    if stage == 'adapt':
        given['data_options'] = BRIEF['data']
    return dmq_jax.quantize(
        teacher, name, seed=SEED, workdir=workdir, method_options=method_options,
        calibrate_options=CALIBRATE, **given, **QUANT, **quant,
    )  # fmt: skip


class Made(NamedTuple):
    """A student, the state it started from, what it learnt, and the folder it was made in."""

    model: dmq_jax.Exported
    start: Any
    learnt: learning.Learnt
    folder: Path


@pytest.fixture(scope='module')
def made(teacher, calibrate_once, tmp_path_factory):
    """case -> what it makes, once."""

    @functools.cache
    def make(case):
        seen, learn = {}, learning.learn

        def note(context, name):
            method = learning.make_method(context, name)
            stats = learning.calibration(context).stats
            init = jax.jit(method.init)
            seen['start'] = init(context.teacher.params, stats, context.key('finetune'))
            seen['learnt'] = learn(context, name)
            return seen['learnt']

        name, method_options = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learning, 'learn', note)
            model = quantize_briefly(teacher, name, folder, method_options)
        return Made(model, **seen, folder=folder)

    return make


def assert_same(model, other):
    """Of two students: the same integers, scales and correction."""
    for path, weight in model.weights.items():
        np.testing.assert_array_equal(weight.packed, other.weights[path].packed, err_msg=path)
        np.testing.assert_array_equal(weight.scale, other.weights[path].scale, err_msg=path)
    for mine, others in (model.tables, other.tables), (model.correction, other.correction):
        jax.tree.map(np.testing.assert_array_equal, mine, others)


# Of each stage one, and what only calibrates; tests/methods/test_all.py holds every export.
OF_EACH_STAGE = ('ptqd', 'efficientdm', 'tuneqdm', 'svdquant')


@pytest.mark.parametrize(
    'case', [pytest.param(c, marks=() if c in OF_EACH_STAGE else pytest.mark.slow) for c in CASES]
)
def test_every_method_learns_by_its_own_stage_and_exports_its_integers(case, teacher, made):
    name, _ = CASES[case]
    model, start, (method, state, *_), folder = made(case)
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)
    moved = any(not np.array_equal(a, b) for a, b in pairs)
    stage = stage_of(name)
    assert moved == (stage is not None)
    assert bool(method.phases) == (stage == 'reconstruct')
    folders = {path.name for path in (folder / 'students').glob('*/*')}
    assert folders == ({stage, learning._LEARNT[stage]} if stage else set())
    codes = jax.jit(method.bind)(teacher.params, state).weights
    assert codes.keys() == model.weights.keys() and len(codes) == 3
    for path, weight in model.weights.items():
        np.testing.assert_array_equal(tensor.unpack(weight), codes[path].codes, err_msg=path)
    assert (model.correction is not None) == (name == 'ptqd')


def test_a_call_gives_what_a_run_of_the_same_options_gives(
    teacher, made, calibrate_once, tmp_path, monkeypatch
):
    path = tmp_path / 'teacher.safetensors'
    teachers.save_teacher(path, teacher)  # the same: its weights are those of a file
    options = config_lib.student(
        {'name': 'efficientdm', 'lora_rank': 2}, quant=QUANT,
        finetune=BRIEF['finetune'] | {'num_iterations': NUM_ITERATIONS},
    )  # fmt: skip
    config = config_lib.from_config_dict(
        {'seed': SEED, 'teacher': {'path': str(path)}, 'calibrate': CALIBRATE, 'mesh': {'data': 1},
         'students': {'efficientdm': options}}
    )  # fmt: skip
    called = made('efficientdm').model
    monkeypatch.setattr(learning.calibrate, 'run', calibrate_once)  # the run calibrates by itself
    ran = learning.exported(pipeline.open_run(config, tmp_path / 'run', None), 'efficientdm')
    assert_same(called, ran)


def test_a_call_that_is_told_to_stop_within_a_block_ends_and_the_next_goes_on_there(
    teacher, made, tmp_path, monkeypatch
):
    original, passes = reconstruct._learn_block, []

    def learn_block(task, phase, *arguments, **options):
        passes.append(phase.name)
        return original(task, phase, *arguments, **options)

    monkeypatch.setattr(reconstruct, '_learn_block', learn_block)
    with monkeypatch.context() as patch:
        patch.setattr(hosts, 'stop_requested', lambda: len(passes) == 2)
        with pytest.raises(SystemExit) as stopped:
            quantize_briefly(teacher, 'ptqd', tmp_path)
    assert stopped.value.code == hosts.REQUEUE
    assert passes == ['rounding', 'scales']
    assert not (tmp_path / 'students' / 'ptqd' / 'reconstructed').exists()
    model = quantize_briefly(teacher, 'ptqd', tmp_path)
    assert passes == ['rounding', 'scales', 'scales']
    assert_same(made('ptqd').model, model)


def test_a_folder_of_other_options_is_refused(teacher, made, monkeypatch):
    first, options = made('efficientdm'), CASES['efficientdm'][1]
    # What is learnt is not learnt again.
    monkeypatch.setattr(learning.finetune, 'run', None)
    assert_same(first.model, quantize_briefly(teacher, 'efficientdm', first.folder, options))
    with pytest.raises(ValueError, match="schedule was 'cosine', now 'linear'"):
        quantize_briefly(teacher, 'efficientdm', first.folder, options, schedule='linear')


def described(method, num_iterations=None, method_options=(), **stages):
    """The stages of the student that arguments of `quantize` describe, with their iterations."""
    names = ('reconstruct', 'finetune', 'adapt')
    student = api._student(
        method, num_iterations, dict(method_options), {}, {n: stages.get(n) for n in names}
    )
    numbers = {name: getattr(student, name).num_iterations for name in names}
    return student, {name: number for name, number in numbers.items() if number}


def test_the_default_is_the_stage_of_the_method():
    for name in (*config_lib.LEARNS_BY, *config_lib.RECIPES):
        stage = stage_of(name)
        assert list(described(name)[1]) == ([stage] if stage else []), name
        assert described(name, 0)[1] == {}
        if stage:
            assert described(name, 7)[1] == {stage: 7}


def test_options_of_a_stage_make_the_method_learn_by_it():
    student, numbers = described('qdiffusion', 7, finetune={'batch_size': 3})
    assert numbers == {'reconstruct': 7, 'finetune': 300} and student.finetune.batch_size == 3
    _, numbers = described('qlora', 0, finetune={'num_iterations': 5})
    assert numbers == {'finetune': 5}
    learning = described('qdiffusion', method_options={'learning': {'warm_up': 0.5}})[0].method
    assert (learning.learning.warm_up, learning.learning.rounding_learning_rate) == (0.5, None)


@pytest.mark.parametrize(
    'call, text',
    [
        (lambda t: dmq_jax.quantize(t, 'efficient'), 'expected one of round_to_nearest'),
        (lambda t: dmq_jax.quantize(t, weight_bit=3), "did you mean 'weight_bits'"),
        (lambda t: dmq_jax.quantize(t, weight_bits=9), r'weight_bits=9: expected 2\.\.8'),
        (lambda t: dmq_jax.quantize(t, 'svdquant', num_iterations=5), "'svdquant' learns nothing"),
        (
            lambda t: dmq_jax.quantize(t, 'repq_vit', finetune_options={}),
            "finetune_options={}: the method 'repq_vit' learns nothing; leave them out",
        ),
        (
            lambda t: dmq_jax.quantize(t, 'lsq', reconstruct_options={'batch_size': 4}),
            "reconstruct_options=.*: the method 'lsq' does not learn block by block",
        ),
        (
            lambda t: dmq_jax.quantize(t, 'best', adapt_options={'batch_size': 4}),
            "adapt_options=.*: the method 'best' compares features",
        ),
        (
            lambda t: dmq_jax.quantize(t, 'tuneqdm'),
            "data_options=None: the method 'tuneqdm' learns from images; add 'path'",
        ),
        (
            lambda t: dmq_jax.quantize(t, 'efficientdm', data_options={'path': 'teacher'}),
            "data_options=.*: the method 'efficientdm' learns from no images; leave them out",
        ),
        (
            lambda t: dmq_jax.quantize(t, 'qlora', data_options={'path': 'no_such_folder'}),
            'no_such_folder',
        ),
        (lambda t: dmq_jax.sample(t, 4, num_stps=3), "did you mean 'num_steps'"),
        (lambda t: dmq_jax.sample(t, 4, labels=np.zeros(3, np.int32)), '3 labels for num_images=4'),
        (lambda t: dmq_jax.sample(t, 0), 'num_images=0'),
    ],
)
def test_mistakes_are_named(teacher, call, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        call(teacher)


def test_an_unknown_mode_of_a_quantized_network_is_refused(model):
    with pytest.raises(ValueError, match="expected 'integer' or 'fake'"):
        dmq_jax.sample(model, 1, mode='int8')


def test_importing_the_package_is_light():
    code = (
        'import sys, dmq_jax; heavy = {"jax", "flax", "numpy", "torch", "tensorflow"};'
        'assert not heavy & set(sys.modules), heavy & set(sys.modules);'
        'assert not hasattr(dmq_jax, "nothing"); print(sorted(dmq_jax.__all__)[0])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'Denoiser\n'
