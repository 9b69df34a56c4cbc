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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from dmq_jax import artefacts, denoisers, exporting, learning, sampling
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
    reconstruct_options: dict[str, Any] | None = None,
    finetune_options: dict[str, Any] | None = None,
    adapt_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    **quant_options: Any,
) -> Exported:
    """Calibrates a teacher, lets the student learn as its method does, and packs it.

    By default it learns by the stage of its paper (`config.LEARNS_BY`), for some minutes on a small
    network (`config.quick`): block by block, as a whole, or on images; or not at all, where the
    method only calibrates. Options of another stage make it learn by that one too.

    Args:
      teacher: the float network.
      method: 'round_to_nearest', 'efficientdm', any other of `dmq_jax.methods`, or 'best'.
      num_iterations: optimizer steps of the method's own stage, per block where there are blocks;
        0: it is left out; None: those of `config.quick`.
      seed: root of every random number.
      workdir: keeps what is learnt, from which an interrupted call goes on; calls with other
        methods may share it. None uses a temporary one.
      method_options: fields of the method's config, such as `lora_rank`.
      calibrate_options: fields of `config.CalibrateConfig`.
      reconstruct_options: fields of `config.ReconstructConfig`.
      finetune_options: fields of `config.FinetuneConfig`.
      adapt_options: fields of `config.AdaptConfig`.
      data_options: fields of `config.DataConfig`, for methods that learn from images: `path` is a
        file, a folder, 'tfds:NAME', or 'teacher': drawn by the teacher with the sampler of the
        calibration; `prompt` says what they show to a teacher of texts.
      **quant_options: fields of `config.QuantConfig`: `weight_bits`, `activation_bits`,
        `coverage`, ...

    Returns:
      The quantized network; `sample`, `export` and `exporting.denoiser` take it.

    Raises:
      ValueError: an unknown option or an impossible value, a stage that the method does not have,
        one that lacks its images, or a `workdir` of other options or in use; the text says which.
      FileNotFoundError: no such images.
    """
    student = _student(
        method, num_iterations, method_options or {}, quant_options,
        {'reconstruct': reconstruct_options, 'finetune': finetune_options, 'adapt': adapt_options},
    )  # fmt: skip
    calibrate = config_lib.from_config_dict(calibrate_options or {}, config_lib.CalibrateConfig)
    data = _data(method, student, num_iterations, data_options)
    config = config_lib.Config(
        seed=seed, sampler=calibrate.sampler, calibrate=calibrate, data=data,
        students={method: student},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(workdir or temporary)
        context = learning.make_run(config, folder, teacher, device_mesh=mesh.make_mesh(1))
        with artefacts.sole_user(folder):
            return learning.pack(context, method)[0]


def _data(
    method: str,
    student: config_lib.StudentConfig,
    num_iterations: int | None,
    given: Mapping[str, Any] | None,
) -> config_lib.DataConfig:
    """The images that the arguments of `quantize` describe, for a student that needs them."""
    adapts = student.adapt.num_iterations > 0
    if given is not None and not (adapts or num_iterations == 0):
        raise ValueError(
            f'data_options={given}: the method {method!r} learns from no images; leave them out.'
        )
    data = config_lib.from_config_dict(given or {}, config_lib.DataConfig)
    if adapts and not data.path:
        raise ValueError(
            f'data_options={given}: the method {method!r} learns from images; add '
            f"'path': a file, a folder, 'tfds:NAME', or 'teacher' for images that the teacher "
            f'draws. num_iterations=0 leaves the stage out.'
        )
    return data


def _student(
    method: str,
    num_iterations: int | None,
    method_options: Mapping[str, Any],
    quant_options: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any] | None],
) -> config_lib.StudentConfig:
    """The student that the arguments of `quantize` describe."""
    options = config_lib.quick(method)
    name = options['method']['name']
    options['method'] = _merged(options['method'], method_options)
    # Alone at first: what is said of stages needs to know the method.
    student = config_lib.from_config_dict(
        {'method': options['method'], 'quant': quant_options}, config_lib.StudentConfig
    )
    own = config_lib.LEARNS_BY[name]
    if own is None and num_iterations:
        raise ValueError(
            f'num_iterations={num_iterations}: the method {method!r} learns nothing; set it to 0 '
            f'or choose another method.'
        )
    for stage, given in stages.items():
        lack = config_lib.why_not(stage, student.method)
        if given is not None and lack is not None:
            raise ValueError(
                f'{stage}_options={given}: the method {method!r} {lack}; leave them out.'
            )
        if given is None and stage != own:
            continue
        defaults = config_lib.quick_stage(stage, name)
        if stage == own and num_iterations is not None:
            defaults['num_iterations'] = num_iterations
        options[stage] = _merged(defaults, given or {})
    return config_lib.from_config_dict(
        options | {'quant': quant_options}, config_lib.StudentConfig
    )  # fmt: skip


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options where those `given` win, in every dict among them."""
    merged = {**defaults, **given}
    for name in defaults.keys() & given.keys():
        if isinstance(defaults[name], Mapping) and isinstance(given[name], Mapping):
            merged[name] = _merged(defaults[name], given[name])
    return merged


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
