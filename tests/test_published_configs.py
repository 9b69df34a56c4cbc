from pathlib import Path

import numpy as np
import pytest

from dmq_jax import denoisers, exporting, pipeline
from dmq_jax.config import from_config_dict
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.teachers import load_teacher
from tests import tiny
from tests import tiny_checkpoints as checkpoints
from tests.checkpoints import test_small_images, test_text
from tests.checkpoints.journey import (
    compiled_quickly,
    losses_of_the_first_batch,
    recorded_finetuning,
)
from tests.test_configs import load

FILES = [
    Path(__file__).parents[1] / f'configs/{name}.py'
    for name in (
        'ddim_cifar10', 'adm_imagenet64', 'adm_upsampler256', 'ldm_imagenet256', 'ldm_bedrooms',
        'ldm_churches',
        'dit_imagenet256', 'sd15', 'sdxl', 'pixart',
    )
]  # fmt: skip


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_published_protocol_is_a_run_whose_samplers_exist(file):
    module = load(file)
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
    config = from_config_dict(load(FILES[0]).get_config())
    with pytest.raises(FileNotFoundError, match='teacher.path=.*ddim_cifar10.ckpt'):
        load_teacher(config.teacher.path)


def saved(tensors, **settings):
    """Writes a file of torch.save; says where it is, and the settings it does not tell."""

    def write(folder):
        content = tensors()
        file = checkpoints.save_torch(folder / 'model.ckpt', content)
        return {'path': str(file), 'settings': checkpoints.settings_file(folder, **settings)}

    return write


def dit(folder):
    file = saved(checkpoints.dit_tensors, network={'head_dim': 16})
    return {**file(folder), 'components': str(checkpoints.kl_folder(folder))}


def upsampler(folder):
    small, _ = test_small_images.small_images(folder)
    flags = test_small_images.UPSAMPLER
    file = saved(lambda: checkpoints.adm_tensors(flags), network=flags)
    return {**file(folder), 'low_res': str(small)}


def in_folder(write):
    """Writes a folder of diffusers."""

    def into(folder):
        write(folder)
        return {'path': str(folder)}

    return into


def lsun(config):
    return saved(lambda: checkpoints.lsun_checkpoint(config), network=config)


# What the teacher of each run is in small: options of TeacherConfig.
TEACHERS = {
    'ddim_cifar10': saved(checkpoints.ddim_tensors, process={'image_size': 8}),
    'adm_imagenet64': saved(checkpoints.adm_tensors, network=checkpoints.ADM),
    'adm_upsampler256': upsampler,
    'ldm_imagenet256': saved(checkpoints.cin256_tensors, network=checkpoints.LDM),
    'ldm_bedrooms': lsun(checkpoints.BEDROOMS),
    'ldm_churches': lsun(checkpoints.CHURCHES),
    'dit_imagenet256': dit,
    'sd15': in_folder(checkpoints.sd_folder),
    'sdxl': in_folder(test_text.sdxl_folder),
    'pixart': in_folder(test_text.pixart_folder),
}


def small_run(file, folder):
    """The run of a config file at W4A8, its teacher and every number of it tiny."""
    teacher = folder / 'teacher'
    teacher.mkdir()
    config = load(file).get_config('w4a8')
    config.teacher.update(TEACHERS[file.stem](teacher))
    config.mesh.data = 1
    student = config.students['w4a8']
    for sampler in (config.sampler, config.calibrate.sampler, student['finetune']['sampler']):
        sampler.update({'num_steps': 2})
    config.calibrate.update({'num_images': 2, 'batch_size': 2, 'values_per_tensor': 16})
    config.sample.update({'num_images': 2, 'batch_size': 2})
    config.report.grid_size = 1
    if file.stem in ('sd15', 'sdxl', 'pixart'):
        prompts = folder / 'prompts.txt'
        prompts.write_text('a cat\na\n')
        config.sample.prompts = str(prompts)
    student['finetune'].update({'num_iterations': 3, 'batch_size': 2, 'log_every': 1})
    student['quant'].update({'weight_observer': 'minmax', 'activation_observer': 'minmax'})
    if file.stem == 'pixart':
        # So small, it loses no more at 4 bits than one other rounding of an activation is worth.
        student['quant']['weight_bits'] = 2
    student['method']['lora_rank'] = 2
    return config


def images_of(workdir, name):
    with np.load(workdir / 'samples' / name / 'images.npz') as arrays:
        return arrays['arr_0']


def test_every_published_run_has_a_teacher_in_small():
    assert {file.stem for file in FILES} == TEACHERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_published_run_in_small_goes_all_the_way(file, tmp_path):
    if file.stem in ('sd15', 'sdxl', 'pixart'):
        pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    else:
        pytest.importorskip('torch', reason='writes the file that is read without it')
    config = from_config_dict(small_run(file, tmp_path))
    workdir = tmp_path / 'run'
    with compiled_quickly(), recorded_finetuning() as finetuning:
        pipeline.run(config, workdir, ('teacher', 'calibrate', 'finetune', 'export', 'sample'))
        before, after = losses_of_the_first_batch(*finetuning)
    assert after < before, f'three steps took the loss from {before:.4g} to {after:.4g}'
    exported = exporting.load(workdir / 'students/w4a8/export')
    assert exported.weights
    floating, integer = (images_of(workdir, name) for name in ('teacher', 'w4a8'))
    assert floating.shape == integer.shape and floating.dtype == integer.dtype == np.uint8
    assert (floating != integer).any() and (floating[0] != floating[1]).any()
