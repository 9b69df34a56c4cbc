import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dmq_jax
from dmq_jax import api, teachers
from tests import tiny

ROOT = Path(__file__).parents[1]
SAMPLER = {'num_steps': 2}
CALIBRATE = {'num_images': 4, 'batch_size': 4, 'values_per_tensor': 16, 'sampler': SAMPLER}
# One layer: what is tested does not need more to be compiled.
RULES = ({'pattern': 'conv_in'}, {'pattern': '.*', 'weight_bits': 32, 'activation_bits': 32})
QUANT = {'weight_observer': 'minmax', 'activation_observer': 'minmax', 'coverage': 'full'}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'tiny.safetensors'
    teachers.save_teacher(path, tiny.teacher())
    return dmq_jax.load_teacher(path)


@pytest.fixture(scope='module')
def model(teacher):
    return dmq_jax.quantize(
        teacher, 'round_to_nearest', weight_bits=5, calibrate_options=CALIBRATE, **QUANT
    )


def test_a_quantized_network_samples_the_same_after_export_and_load(teacher, model, tmp_path):
    images = dmq_jax.sample(model, 4, **SAMPLER)
    dmq_jax.export(model, tmp_path / 'model')
    again = dmq_jax.sample(dmq_jax.load(tmp_path / 'model'), 4, **SAMPLER)
    np.testing.assert_array_equal(again, images)
    assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
    assert model.plan['conv_in'].weight.bits == 5 and model.plan['conv_in'].inputs.bits == 4
    # Round the classes by default; and the student is close to its teacher, not equal.
    own = dmq_jax.sample(teacher, 4, labels=np.array([0, 1, 2, 0], np.int32), **SAMPLER)
    difference = np.abs(images.astype(int) - own)
    assert 0 < difference.mean() < 64


def test_fine_tuning_goes_on_only_with_the_options_it_began_with(teacher, tmp_path, monkeypatch):
    calls = []

    def finetune(teacher, method, state, plan, timesteps, lookup, config, **options):
        calls.append((config.num_iterations, options['workdir']))
        return api.finetune.Finetuned(state, 0.0)

    calibration = tiny.calibration()
    monkeypatch.setattr(api.calibrate, 'run', lambda *_, **__: calibration)
    monkeypatch.setattr(api.finetune, 'run', finetune)

    def quantize(schedule='linear'):
        return dmq_jax.quantize(
            teacher, 'efficientdm', num_iterations=2, workdir=tmp_path,
            method_options={'lora_rank': 2}, finetune_options={'schedule': schedule},
            **QUANT | {'coverage': 'rules', 'rules': RULES},
        )  # fmt: skip

    assert quantize().weights.keys() == quantize().weights.keys() == {'conv_in'}
    assert calls == [(2, tmp_path)] * 2
    with pytest.raises(ValueError, match="schedule was 'linear', now 'cosine'"):
        quantize(schedule='cosine')


@pytest.mark.parametrize(
    'call, text',
    [
        (lambda t: dmq_jax.quantize(t, 'efficient'), 'expected one of round_to_nearest'),
        (lambda t: dmq_jax.quantize(t, weight_bit=3), "did you mean 'weight_bits'"),
        (lambda t: dmq_jax.quantize(t, weight_bits=9), r'weight_bits=9: expected 2\.\.8'),
        (lambda t: dmq_jax.sample(t, 4, num_stps=3), "did you mean 'num_steps'"),
        (lambda t: dmq_jax.sample(t, 4, labels=np.zeros(3, np.int32)), '3 labels for num_images=4'),
        (lambda t: dmq_jax.sample(t, 0), 'num_images=0'),
    ],
)
def test_mistakes_are_named(teacher, call, text):
    with pytest.raises(ValueError, match=text):
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
