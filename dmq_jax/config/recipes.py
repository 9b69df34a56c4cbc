"""What config files are written with: students, recipes, and what protocols share."""

import re
import types
from collections.abc import Mapping
from typing import Any

from dmq_jax.config.checks import check
from dmq_jax.config.conversion import convert, to_config_dict, to_entries
from dmq_jax.config.drawing import SamplerConfig
from dmq_jax.config.methods import LEARNS_BY
from dmq_jax.config.run import Config, StudentConfig

# Methods with options that were measured to be good together, by name; see README, "Results".
RECIPES: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        # What EfficientDM's integers cannot hold at low widths goes through SVDQuant's thin branch.
        'best': {'name': 'efficientdm', 'branch_rank': 8},
    }
)


def method_options(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """The options that stand for a method.

    Args:
      method: the name of a method or of one of `RECIPES`, or a dict of options that includes
        `name`.
    """
    return dict(RECIPES.get(method, {'name': method}) if isinstance(method, str) else method)


# What a stage needs to be worth its minutes on the bundled teacher; papers take up to fifty times
# as many iterations.
_QUICK: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        'reconstruct': {'num_iterations': 500, 'num_timesteps': 10, 'num_images': 64},
        'finetune': {'num_iterations': 300},
        'adapt': {'num_iterations': 400},
    }
)
# What a paper asks of a stage besides.
_ASKED = {('tcaq_dm', 'reconstruct'): {'num_rounds': 2}}


def quick(method: str) -> dict[str, dict[str, Any]]:
    """Options with which a method learns in minutes: `student(**quick('qdiffusion'))`.

    Those of the method, and of the stage by which it learns (`LEARNS_BY`), if it does. A stage that
    learns from images needs `Config.data` besides.

    Args:
      method: the name of a method, or of one of `RECIPES`.
    """
    options = method_options(method)
    name = options['name']
    stage = LEARNS_BY.get(name)
    return {'method': options} | ({stage: quick_stage(stage, name)} if stage else {})


def quick_stage(stage: str, method: str) -> dict[str, Any]:
    """The options of one stage in `quick`, for the method of this name."""
    return {**_QUICK[stage], **_ASKED.get((method, stage), {})}


def base(schema: type = Config):
    """The defaults as an `ml_collections.ConfigDict`: what `get_config()` starts from.

    Every field is present, so that every `--config.a.b=value` works; a field that may be None is
    a placeholder of its type.

    Args:
      schema: the dataclass whose defaults are wanted.
    """
    return to_config_dict(schema())


def student(method: str | Mapping[str, Any] = 'round_to_nearest', **overrides: Any):
    """A complete `config.students[...]` subtree, as an `ml_collections.ConfigDict`.

    Args:
      method: as of `method_options`.
      **overrides: options of StudentConfig, nested: `quant={'weight_bits': 8}`.

    Raises:
      ValueError: as `from_config_dict`.
    """
    options = {'method': method_options(method), **overrides}
    return to_config_dict(convert(options, StudentConfig, 'config.students.*'))


def compared(*, num_iterations: int, **quant: Any) -> dict[str, Any]:
    """Students that tell what learning brings: rounding, static and per timestep, and EfficientDM.

    Args:
      num_iterations: optimizer steps of EfficientDM.
      **quant: options of QuantConfig that all of them share.

    Raises:
      ValueError: as `from_config_dict`.
    """
    return {
        'rtn_static': student(quant=quant | {'per_timestep': False}),
        'rtn': student(quant=quant),
        'efficientdm': student(
            'efficientdm', quant=quant, finetune={'num_iterations': num_iterations}
        ),
    }


def at_widths(widths: str, *, num_iterations: int, **options: Any) -> dict[str, Any]:
    """EfficientDM at widths such as 'w4a8', by that name; no student at all for ''.

    Args:
      widths: bits of weights and activations; the argument of a config file.
      num_iterations: optimizer steps.
      **options: more of FinetuneConfig.

    Raises:
      ValueError: other widths; see also `from_config_dict`.
    """
    if not widths:
        return {}
    match = re.fullmatch(r'w(\d+)a(\d+)', widths)
    check(match is not None, f"argument {widths!r} of the config file: expected e.g. 'w4a8'.")
    bits = {'weight_bits': int(match[1]), 'activation_bits': int(match[2])}
    finetune = {'num_iterations': num_iterations, **options}
    return {widths: student('efficientdm', quant=bits, finetune=finetune)}


def with_sampler(config: Any, **options: Any) -> Any:
    """Sets options of every sampler of a run: of its images, its calibration, and all learning.

    Samplers are separate options, because training steps may differ from sampling steps; most runs
    want them alike.

    Args:
      config: from `base()`, its students complete.
      **options: fields of SamplerConfig.

    Returns:
      The same `config`.

    Raises:
      ValueError: as `from_config_dict`.
    """
    samplers = [config.sampler, config.calibrate.sampler]
    for student_config in config.students.values():
        samplers += [student_config.finetune.sampler, student_config.reconstruct.sampler]
    for sampler in samplers:
        convert(to_entries(sampler, 'sampler', 'a dict') | options, SamplerConfig, 'sampler')
        sampler.update(options)
    return config


def published(
    widths: str,
    *,
    path: str,
    sampler: Mapping[str, Any],
    student_sampler: Mapping[str, Any],
    num_iterations: int,
    batch_size: int,
    calibrate_batch_size: int = 16,
    num_images: int = 50_000,
    **teacher: Any,
):
    """What the protocols of published networks share, as an `ml_collections.ConfigDict`.

    Calibration and fine-tuning draw alike; images are judged by Inception's features.

    Args:
      widths: of a student, or ''; see `at_widths`.
      path: of the teacher.
      sampler: options of SamplerConfig for the images.
      student_sampler: those for calibration and fine-tuning.
      num_iterations: of fine-tuning.
      batch_size: images drawn at once.
      calibrate_batch_size: images observed at once.
      num_images: how many are drawn.
      **teacher: more of TeacherConfig.

    Raises:
      ValueError: as `at_widths`.
    """
    config = base()
    config.teacher.update({'path': path, **teacher})
    config.sampler.update(sampler)
    config.calibrate.sampler.update(student_sampler)
    config.calibrate.batch_size = calibrate_batch_size
    config.sample.update({'num_images': num_images, 'batch_size': batch_size})
    config.evaluate.features = 'inception'
    config.students = at_widths(widths, num_iterations=num_iterations, sampler=student_sampler)
    return config
