import importlib.util
from pathlib import Path

import pytest

from dmq_jax import denoisers
from dmq_jax.config import from_config_dict
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.teachers import load_teacher
from tests import tiny

FILES = [
    Path(__file__).parents[1] / f'configs/{name}.py'
    for name in (
        'ddim_cifar10', 'adm_imagenet64', 'adm_upsampler256', 'ldm_imagenet256', 'ldm_bedrooms',
        'ldm_churches',
        'dit_imagenet256', 'sd15', 'sdxl', 'pixart',
    )
]  # fmt: skip


def read(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_published_protocol_is_a_run_whose_samplers_exist(file):
    module = read(file)
    assert f'--config=configs/{file.name}' in module.__doc__
    assert 'Protocol' in module.__doc__ and 'loat' in module.__doc__
    config = from_config_dict(module.get_config())
    assert config.students == {}
    with_student = from_config_dict(module.get_config('w4a8'))
    (student,) = with_student.students.values()
    assert (student.quant.weight_bits, student.quant.activation_bits) == (4, 8)
    teacher = tiny.teacher()
    info = denoisers.DenoiserInfo(
        schedule=Schedule(), prediction='eps', image_shape=(8, 8, 1), num_classes=3,
        learned_variance=True,
    )  # fmt: skip
    teacher = teacher._replace(info=info)
    for sampler in (config.sampler, config.calibrate.sampler, student.finetune.sampler):
        made = denoisers.make_denoiser_sampler(teacher, sampler)
        # Of quadratic steps several fall on one timestep, which is visited once.
        least = 96 if sampler.spacing == 'quadratic' else sampler.num_steps
        assert len(made.timesteps) >= least


def test_a_checkpoint_that_is_not_there_is_named_by_its_option():
    config = from_config_dict(read(FILES[0]).get_config())
    with pytest.raises(FileNotFoundError, match='teacher.path=.*ddim_cifar10.ckpt'):
        load_teacher(config.teacher.path)
