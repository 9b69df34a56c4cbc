"""The pipeline's functions, one line each in a notebook.

For example:

    import dmq_jax
    teacher = dmq_jax.load_teacher('fashion_mnist')
    model = dmq_jax.quantize(teacher, 'efficientdm', weight_bits=4, activation_bits=4)
    images = dmq_jax.sample(model, num_images=16)
    dmq_jax.export(model, 'my_model')
    images = dmq_jax.sample(dmq_jax.load('my_model'), num_images=16)
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Int, UInt8

from dmq_jax import artefacts, calibrate, correct, denoisers, exporting, finetune, methods, sampling
from dmq_jax import config as config_lib
from dmq_jax.denoisers import Denoiser
from dmq_jax.exporting import Exported, load
from dmq_jax.runtime import mesh
from dmq_jax.teachers import load_teacher

__all__ = ['Denoiser', 'Exported', 'export', 'load', 'load_teacher', 'quantize', 'sample']


def quantize(
    teacher: Denoiser,
    method: str = 'efficientdm',
    *,
    num_iterations: int | None = None,
    seed: int = 0,
    workdir: str | os.PathLike | None = None,
    method_options: dict[str, Any] | None = None,
    calibrate_options: dict[str, Any] | None = None,
    finetune_options: dict[str, Any] | None = None,
    **quant_options: Any,
) -> Exported:
    """Calibrates, fine-tunes and packs a teacher.

    Args:
      teacher: the float network.
      method: 'round_to_nearest', 'efficientdm', any other of `dmq_jax.methods`, or 'best'.
      num_iterations: optimizer steps; None is 0 for round to nearest, 300 for a method that learns.
      seed: root of every random number.
      workdir: keeps the checkpoints of the fine-tuning, from which an interrupted call goes on;
        a folder for this call alone. None uses a temporary one.
      method_options: fields of the method's config, such as `lora_rank`.
      calibrate_options: fields of `config.CalibrateConfig`.
      finetune_options: fields of `config.FinetuneConfig`.
      **quant_options: fields of `config.QuantConfig`: `weight_bits`, `activation_bits`,
        `coverage`, ...

    Returns:
      The quantized network; `sample`, `export` and `exporting.denoiser` take it.

    Raises:
      ValueError: an unknown option or an impossible value, or a `workdir` of other options or
        in use; the text says which.
    """
    if num_iterations is None:
        num_iterations = 0 if method == 'round_to_nearest' else 300
    student = config_lib.from_config_dict(
        {
            'method': config_lib.method_options(method) | (method_options or {}),
            'quant': quant_options,
            'finetune': {'num_iterations': num_iterations} | (finetune_options or {}),
        },
        config_lib.StudentConfig,
    )
    calibration_config = config_lib.from_config_dict(
        calibrate_options or {}, config_lib.CalibrateConfig
    )
    plan = denoisers.make_plan(denoisers.quantizable(teacher), student.quant, teacher.network)
    device_mesh = mesh.make_mesh(1)
    calibrate_key, init_key, finetune_key = jax.random.split(jax.random.key(seed), 3)
    learner = methods.make(student.method, plan, teacher.info.schedule.num_train_timesteps)
    calibration = calibrate.run(
        teacher, plan, calibration_config, key=calibrate_key, device_mesh=device_mesh,
        channels=learner.channel_stats,
    )  # fmt: skip
    state = jax.jit(learner.init)(teacher.params, calibration.stats, init_key)
    lookup = student.quant.timestep_lookup
    if num_iterations:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(workdir or temporary)
            with artefacts.sole_user(folder):
                _claim(folder, student, state, seed)
                state = finetune.run(
                    teacher, learner, state, plan, calibration.timesteps, lookup,
                    student.finetune, key=finetune_key, workdir=folder,
                    device_mesh=device_mesh, description=method,
                ).state  # fmt: skip
    bound = jax.jit(learner.bind)(teacher.params, state)
    bound = correct.run(
        teacher, learner, bound, plan, calibration.timesteps, lookup, calibration_config,
        key=jax.random.fold_in(calibrate_key, 1),
    )  # fmt: skip
    return exporting.make(teacher, plan, bound, calibration.timesteps, lookup)


def _claim(folder: Path, student: config_lib.StudentConfig, state: Any, seed: int) -> None:
    """Ties the folder of a fine-tuning to its options."""
    # The start stands for the teacher and the calibration as well.
    start = traverse_util.flatten_dict(jax.device_get(state), sep='/')
    artefacts.claim(
        folder,
        {'student': config_lib.to_dict(student), 'start': artefacts.digest(start), 'seed': seed},
    )


def sample(
    model: Denoiser | Exported,
    num_images: int = 16,
    *,
    labels: Int[np.ndarray, 'N'] | None = None,
    seed: int = 0,
    batch_size: int = 100,
    mode: str = 'integer',
    **sampler_options: Any,
) -> UInt8[np.ndarray, 'N H W C']:
    """Images of a teacher or of a quantized network; image i depends on the seed and on i alone.

    Args:
      model: from `load_teacher`, `quantize` or `load`.
      num_images: how many.
      labels: class of each image; None goes round the classes.
      seed: root of the noise.
      batch_size: images per network call; does not change the images.
      mode: of a quantized network: 'integer' multiplies integers, 'fake' simulates in float.
      **sampler_options: fields of `config.SamplerConfig`: `name`, `num_steps`,
        `guidance_scale`, ...

    Raises:
      ValueError: an unknown option, or labels that are not one per image.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f'num_images={num_images}, batch_size={batch_size}: expected at least 1.')
    denoiser = exporting.denoiser(model, mode) if isinstance(model, Exported) else model
    config = config_lib.from_config_dict(sampler_options, config_lib.SamplerConfig)
    if labels is None:
        labels = denoisers.balanced_labels(num_images, denoiser.info.num_classes)
    elif len(labels) != num_images:
        raise ValueError(f'{len(labels)} labels for num_images={num_images}: expected one each.')
    return sampling.draw(
        denoiser, config, labels=labels, num_images=num_images, key=jax.random.key(seed),
        batch_size=min(batch_size, num_images),
    )  # fmt: skip


def export(model: Exported, path: str | os.PathLike) -> None:
    """Writes a quantized network into the folder `path`: packed integers and a manifest."""
    exporting.save(path, model)
