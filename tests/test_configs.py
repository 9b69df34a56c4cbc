"""Every file of configs/ is a run that the command it names can read and plan."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from dmq_jax import pipeline
from dmq_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    TeacherConfig,
    TrainTeacherConfig,
    from_config_dict,
)

FOLDER = Path(__file__).parents[1] / 'configs'
# Not a config, but the program that writes the .npz which one of them reads.
PROGRAMS = {'prepare_fashion_mnist.py'}
SCHEMAS = {'main': Config, 'compare': Config, 'train_teacher': TrainTeacherConfig}


def load(file):
    """The module that a config file is."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(file, *arguments):
    """What the command that the text of `file` tells to call makes of it."""
    module = load(file)
    commands = set(re.findall(r'python -m dmq_jax\.(\w+)', module.__doc__))
    assert f'configs/{file.name}' in module.__doc__ and len(commands) == 1, commands
    return from_config_dict(module.get_config(*arguments), SCHEMAS[commands.pop()])


FILES = sorted(file for file in FOLDER.glob('*.py') if file.name not in PROGRAMS)
# What a file takes after its name, beside nothing.
ARGUMENTS = {'compare_fashion_mnist': ['full']}
OF_OTHERS = ('tuneqdm_sd15',)  # tests/test_data.py
# Nothing of a user's is needed to read a config.
DRAWN = DataConfig(path='teacher')


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_config_is_read_by_the_command_that_its_text_names(file):
    config = read(file)
    for argument in ARGUMENTS.get(file.stem, ()):
        assert read(file, argument) != config


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_layer_finds_its_widths(file):
    config = read(file, *ARGUMENTS.get(file.stem, ()))
    if isinstance(config, Config) and config.teacher == TeacherConfig():
        pipeline.dry_run(dataclasses.replace(config, mesh=MeshConfig(data=1), data=DRAWN))
    else:  # of another network, which is not at hand; tests of their own run these students
        assert not getattr(config, 'students', {}) or file.stem in OF_OTHERS
