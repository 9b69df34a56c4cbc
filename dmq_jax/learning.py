"""How a student comes to be: calibrated, started, taught by its stages of learning, packed.

The stages of learning meet here, for the pipeline and for a notebook alike. Each leaves its state
as an artefact in the workdir, so whatever was learnt before a kill is not learnt again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dmq_jax import (
    adapt,
    artefacts,
    calibrate,
    correct,
    data,
    denoisers,
    exporting,
    finetune,
    methods,
    networks,
    reconstruct,
    sampling,
    scale_sets,
)
from dmq_jax import config as config_lib
from dmq_jax.config import Config, StudentConfig
from dmq_jax.methods import base
from dmq_jax.quant import plan as plan_lib
from dmq_jax.runtime import memory, mesh, programs

# Of a run; their order decides their random numbers.
STAGES = ('calibrate', 'finetune', 'export', 'sample', 'evaluate', 'analyse', 'report')
# What another adaptation of the same integers takes, within an export.
_SET = 'set.safetensors'
# Where the state lies that a stage of learning leaves.
_LEARNT = {'reconstruct': 'reconstructed', 'finetune': 'state', 'adapt': 'adapted'}


class Run(NamedTuple):
    """What every stage of one run shares."""

    config: Config
    workdir: Path
    teacher: denoisers.Denoiser
    layers: dict[str, plan_lib.QuantizableLayer]
    plans: dict[str, dict[str, plan_lib.LayerSpec]]
    device_mesh: mesh.Mesh
    teacher_id: str
    # What students adapt to, by option of `config.data`; None: the teacher draws them.
    images: dict[str, data.Images | None]
    # What these are or depend on, by the same options; found once, since many artefacts name it.
    image_ids: dict[str, Any]

    def key(self, stage: str) -> jax.Array:
        """The root key of a stage."""
        return jax.random.fold_in(jax.random.key(self.config.seed), STAGES.index(stage))


def make_run(
    config: Config, workdir: Path, teacher: denoisers.Denoiser, *, device_mesh: mesh.Mesh
) -> Run:
    """Resolves the plan of every student, and refuses what could not be learnt.

    Args:
      config: of the run.
      workdir: receives everything.
      teacher: of all students.
      device_mesh: what the work is split over.

    Raises:
      ValueError: layers, batches, samplers or images that do not fit; the text says which.
    """
    layers = denoisers.quantizable(teacher)
    plans = {
        name: denoisers.make_plan(layers, student.quant, teacher.network)
        for name, student in config.students.items()
    }
    samplers = [config.sampler, config.calibrate.sampler]
    for student in config.students.values():
        stages = student.reconstruct, student.finetune
        samplers += [stage.sampler for stage in stages if stage.num_iterations]
        if student.reconstruct.num_iterations:
            reconstruct.check_mesh(device_mesh, student.reconstruct)
    for sampler in samplers:
        denoisers.make_denoiser_sampler(teacher, sampler)
    images = {}
    if any(student.adapt.num_iterations for student in config.students.values()):
        images = {name: data.load(teacher, config.data, name) for name in data.names(config.data)}
    named = teacher_id(teacher, device_mesh)
    image_ids = {name: image_id(found, name, config, named) for name, found in images.items()}
    return Run(config, workdir, teacher, layers, plans, device_mesh, named, images, image_ids)


def teacher_id(teacher: denoisers.Denoiser, device_mesh: mesh.Mesh) -> str:
    """Names a teacher by what it is rather than by its path, behind which files may change."""
    params = traverse_util.flatten_dict(teacher.params, sep='/')
    settings = [denoisers.network_settings(teacher.network), denoisers.info_settings(teacher.info)]
    if teacher.decoder is not None:
        decoder = traverse_util.flatten_dict(teacher.decoder.params, sep='/')
        params |= {f'decoder/{name}': leaf for name, leaf in decoder.items()}
        settings.append(denoisers.network_settings(teacher.decoder.network))
    return artefacts.digest(params, settings, fetch=functools.partial(mesh.fetch, device_mesh))


def image_id(images: data.Images | None, name: str, config: Config, named: str) -> Any:
    """Names images by what they are, since files change; or those that are drawn by all it takes.

    Args:
      images: of an option of `config.data`; None: the teacher draws them.
      name: of that option, 'path' or 'class_path'.
      config: of the run.
      named: the teacher, from `teacher_id`.
    """
    if images is not None:
        return artefacts.digest(*data.described(images))
    text = data.prompt(config.data, name)
    return {'teacher': named, 'sampler': config_lib.to_dict(config.sampler), 'seed': config.seed,
            'num_images': config.data.num_images,
            **({} if text is None else {'prompt': text})}  # fmt: skip


def calibration(context: Run) -> calibrate.Calibration:
    """Statistics of every quantizable input; one for all students."""
    config = context.config.calibrate
    # Parts of layers besides, where a student has any.
    parts = sorted({p for plan in context.plans.values() for p in plan} - context.layers.keys())
    observed = dict.fromkeys(
        [*context.layers, *parts],
        plan_lib.LayerSpec(weight=None, inputs=denoisers.OBSERVED),
    )
    channels = any(make_method(context, name).channel_stats for name in context.config.students)
    # Named where they are asked for: a calibration without them stays what it was.
    extra = ({'parts': parts} if parts else {}) | ({'channels': True} if channels else {})

    def make() -> calibrate.Calibration:
        return calibrate.run(
            context.teacher, observed, config,
            key=context.key('calibrate'), device_mesh=context.device_mesh, channels=channels,
        )  # fmt: skip

    return artefacts.artefact(
        context.workdir / 'calibration',
        {'calibrate': config_lib.to_dict(config), 'teacher': context.teacher_id,
         'seed': context.config.seed, **extra},
        make=make,
        save=lambda path, result: calibrate.save(path / 'stats.npz', result),
        load=lambda path: calibrate.load(path / 'stats.npz'),
    )  # fmt: skip


def prepare(context: Run) -> None:
    """Makes what students share and is not there: the calibration, images they learn from."""
    calibration(context)
    for name in context.images:
        images_of(context, name)


def student_folder(context: Run, name: str) -> Path:
    """Where everything of one student lies."""
    return context.workdir / 'students' / name


def make_method(context: Run, name: str) -> methods.Method:
    """The student's method."""
    return methods.make(
        context.config.students[name].method,
        context.plans[name],
        context.teacher.info.schedule.num_train_timesteps,
    )


def learns(student: StudentConfig) -> bool:
    """Whether anything is learnt beyond calibration."""
    return any(getattr(student, stage).num_iterations for stage in config_lib.LEARNING_STAGES)


class Learnt(NamedTuple):
    """What all stages of learning left.

    Attributes:
      method: of the student.
      state: learnt.
      duration_s: of learning.
      memory_mb: the most it held, see `runtime.memory`; None: nothing was learnt.
      optimizers: that trained it, see `methods.base.num_trained`.
    """

    method: methods.Method
    state: dict[str, Any]
    duration_s: float
    memory_mb: float | None
    optimizers: list[Callable[..., Any]]


def learn(context: Run, name: str) -> Learnt:
    """The student after all its stages of learning."""
    student = context.config.students[name]
    stats = calibration(context)
    method = make_method(context, name)
    # The same key for all: students that differ in one option start from the same numbers.
    key = context.key('finetune')
    params = context.teacher.params
    if context.teacher.encode_prompts is not None:  # what prompts are told as is not to be learnt
        params = {name: leaf for name, leaf in params.items() if name != networks.TABLE}
    inputs = params, stats.stats, key
    state: dict[str, Any] | None = None
    took = []
    folder, options = student_folder(context, name), student_options(context, student)

    def begun() -> dict[str, Any]:
        """What the next stage starts from; nothing is searched for that is learnt already."""
        return programs.call_once(method.init, *inputs) if state is None else state

    def learnt(stage: str, run: Callable[..., Any], number: int) -> dict[str, Any]:
        """The state after a stage that is resumed where it was; `number` is that of its key."""

        def make() -> Any:
            nonlocal state
            state = begun()
            # Checkpoints outlive the artefact they lead to, and so need a mark of their own.
            artefacts.claim(folder / stage, options)
            teacher, given = context.teacher, {}
            if stage == 'adapt':
                images = [images_of(context, name) for name in context.images]
                teacher, given['sets'] = data.examples(teacher, images)
                memory.give_back()  # encoders, which are no part of the stage
            with memory.watched() as peak:
                result = run(
                    teacher, method, state, context.plans[name], stats.timesteps,
                    student.quant.timestep_lookup, getattr(student, stage), **given,
                    key=jax.random.fold_in(key, number), workdir=folder / stage,
                    device_mesh=context.device_mesh, description=f'{stage} {name}',
                )  # fmt: skip
            return result._replace(memory_mb=peak.mb)

        result = artefacts.artefact(
            folder / _LEARNT[stage],
            options,
            make=make,
            save=lambda path, result: finetune.save(path / 'state.safetensors', result),
            load=lambda path: finetune.load(
                path / 'state.safetensors',
                jax.eval_shape(method.init, *inputs) if state is None else state,
            ),
        )
        took.append((result.duration_s, result.memory_mb))
        return result.state

    if student.reconstruct.num_iterations:
        state = learnt('reconstruct', reconstruct.run, 2)
    if student.finetune.num_iterations:
        state = learnt('finetune', finetune.run, 1)
    if student.adapt.num_iterations:
        state = learnt('adapt', adapt.run, 3)
    optimizers = [phase.optimizer for phase in method.phases if student.reconstruct.num_iterations]
    if student.finetune.num_iterations or student.adapt.num_iterations:
        optimizers.append(method.optimizer)
    peaks = [memory_mb for _, memory_mb in took if memory_mb is not None]
    return Learnt(
        method, begun(), sum(duration_s for duration_s, _ in took), max(peaks, default=None),
        optimizers,
    )  # fmt: skip


def images_of(context: Run, name: str) -> data.Images:
    """The images of an option of `config.data`, those of the teacher drawn if they are not there.

    They are others than those that are evaluated.

    Args:
      context: of the run.
      name: 'path' or 'class_path'.
    """
    if context.images[name] is not None:
        return context.images[name]
    config, teacher = context.config, context.teacher
    count, text = config.data.num_images, data.prompt(config.data, name)
    folder = context.workdir / 'adapt_images' / str(count)
    conditions = denoisers.balanced_labels(count, teacher.info.num_classes)
    if text is not None:
        folder = folder.with_name(f'{count}_{artefacts.digest({}, text)}')
        conditions = (text,) * count

    def make() -> np.ndarray:
        drawing, labels = data.labelled(teacher, conditions)
        return sampling.draw(
            drawing, config.sampler, labels=labels, num_images=count,
            key=jax.random.fold_in(context.key('finetune'), 4),
            batch_size=config.sample.batch_size, device_mesh=context.device_mesh,
        )  # fmt: skip

    def load(path: Path) -> np.ndarray:
        with np.load(path / 'images.npz') as arrays:
            return arrays['arr_0']

    pixels = artefacts.artefact(
        folder,
        context.image_ids[name],
        make=make,
        save=lambda path, drawn: np.savez_compressed(path / 'images.npz', arr_0=drawn),
        load=load,
    )
    return data.Images(pixels, conditions)


def student_options(context: Run, student: StudentConfig) -> dict[str, Any]:
    """Everything the student depends on."""
    options = config_lib.to_dict(student)
    for name in ('checkpoint_every', 'log_every', 'max_to_keep'):
        del options['finetune'][name]
    for name in ('checkpoint_every', 'log_every', 'remat'):
        del options['adapt'][name]
    del options['title']
    images = context.image_ids if student.adapt.num_iterations else {}
    if len(images) < 2:
        del options['adapt']['prior_weight']
    return {
        'student': options,
        'calibration': artefacts.fingerprint(context.workdir / 'calibration'),
        'images': images,
    }


def pack(context: Run, name: str) -> tuple[exporting.Exported, dict[str, Any]]:
    """The student as packed integers, and what it took, as the manifest of an export tells it."""
    student = context.config.students[name]
    stats = calibration(context)
    learnt = learn(context, name)
    bound = programs.call_once(learnt.method.bind, context.teacher.params, learnt.state)
    shared = context.plans[name], stats.timesteps, student.quant.timestep_lookup
    bound = correct.run(
        context.teacher, learnt.method, bound, *shared, context.config.calibrate,
        key=jax.random.fold_in(context.key('export'), 0),
    )  # fmt: skip
    plan, *tables_of = shared
    model = exporting.make(context.teacher, plan, bound, *tables_of)
    # What another adaptation of the same integers takes.
    is_switched = learnt.method.beside is not None and (model.channels or model.branches)
    return model, {
        'finetune_seconds': learnt.duration_s,
        'method': student.method.name,
        'trained_parameters': base.num_trained(learnt.state, learnt.optimizers),
        'training_mb': learnt.memory_mb,
        'set_mb': scale_sets.size_bytes(model) / memory.MEGABYTE if is_switched else None,
    }


def exported(context: Run, name: str) -> exporting.Exported:
    """The student as packed integers, kept in the workdir.

    Where these stand still while it learns, what it learnt lies beside them, as a set for the same
    integers (`scale_sets`).
    """
    calibration(context)

    def save(path: Path, made: tuple[exporting.Exported, dict[str, Any]]) -> None:
        model, facts = made
        exporting.save(path, model, facts)
        if facts['set_mb'] is not None:
            scale_sets.save(path / _SET, model)

    return artefacts.artefact(
        student_folder(context, name) / 'export',
        student_options(context, context.config.students[name]),
        make=lambda: pack(context, name),
        save=save,
        load=exporting.load,
    )
