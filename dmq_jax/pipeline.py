"""The story of a run: teacher -> calibrate, finetune, export, sample, evaluate, analyse -> report.

One short function per stage, in order. Stages meet only here, through artefacts: folders in the
workdir that are complete or absent, so a run killed at any moment goes on where it was.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dmq_jax import (
    analysis,
    artefacts,
    calibrate,
    denoisers,
    evaluate,
    exporting,
    finetune,
    methods,
    report,
    sampling,
    teachers,
)
from dmq_jax import config as config_lib
from dmq_jax.config import Config, StudentConfig
from dmq_jax.quant import plan as plan_lib
from dmq_jax.reporting import tables
from dmq_jax.runtime import log, mesh
from dmq_jax.runtime.progress import progress

STAGES = ('calibrate', 'finetune', 'export', 'sample', 'evaluate', 'analyse', 'report')
TEACHER = 'teacher'


class Run(NamedTuple):
    """What every stage of one run shares."""

    config: Config
    workdir: Path
    teacher: denoisers.Denoiser
    layers: dict[str, plan_lib.QuantizableLayer]
    plans: dict[str, dict[str, plan_lib.LayerSpec]]
    device_mesh: mesh.Mesh
    teacher_id: str

    def key(self, stage: str) -> jax.Array:
        """The root key of a stage."""
        return jax.random.fold_in(jax.random.key(self.config.seed), STAGES.index(stage))


def run(config: Config, workdir: Path, stages: Sequence[str] = STAGES) -> None:
    """Runs the stages asked for, resuming what exists.

    Args:
      config: of the run.
      workdir: receives everything.
      stages: some of `STAGES`; one whose input is not there makes that first.

    Raises:
      ValueError: another process works in `workdir`, or it holds a run of other options.
    """
    reference = evaluate.load_reference(config.evaluate)  # first: fails in a second, not in a day
    context = open_run(config, workdir, reference)
    with artefacts.sole_user(workdir):
        _run_stages(context, reference, stages)


def _run_stages(context: Run, reference: evaluate.Reference, stages: Sequence[str]) -> None:
    config, workdir = context.config, context.workdir
    # A run refused for its options must not replace the record of the one before it.
    if not (workdir / 'config.json').is_file():
        record(context)
    if 'calibrate' in stages and config.students:
        calibration(context)
    for name in config.students:
        if 'finetune' in stages and config.students[name].finetune.num_iterations:
            learn(context, name)
        if 'export' in stages:
            exported(context, name)
    if 'sample' in stages:
        for name in (TEACHER, *config.students):
            samples(context, name)
    if 'evaluate' in stages:
        measure(context, reference)
    if 'analyse' in stages:
        for name in config.students:
            analyse(context, name)
    record(context)
    if 'report' in stages:
        report.run(workdir, config.report)
        print(f'report: {workdir / "report.html"}')


def record(context: Run) -> None:
    """Writes `config.json`: the options, versions and device of the run."""
    log.write_json(
        context.workdir / 'config.json',
        {'config': config_lib.to_dict(context.config), 'versions': log.versions(),
         'revision': log.git_revision(), 'device': jax.devices()[0].device_kind},
    )  # fmt: skip


def open_run(config: Config, workdir: Path, reference: evaluate.Reference) -> Run:
    """Loads the teacher and resolves every plan; all that can fail cheaply fails here."""
    device_mesh = mesh.make_mesh(config.mesh.data)
    for name, student in config.students.items():
        if student.finetune.num_iterations:
            mesh.check_batch_size(
                device_mesh, student.finetune.batch_size,
                name=f'students.{name}.finetune.batch_size',
            )  # fmt: skip
    mesh.check_batch_size(device_mesh, config.sample.batch_size, name='sample.batch_size')
    if config.students:
        mesh.check_batch_size(
            device_mesh, min(config.calibrate.batch_size, config.calibrate.num_images),
            name='calibrate.batch_size',
        )  # fmt: skip
    teacher = teachers.load_teacher(config.teacher.path, config.teacher.num_classes)
    evaluate.check(reference, teacher.info, config.sample.num_images)
    layers = denoisers.quantizable(teacher)
    plans = {n: denoisers.make_plan(layers, s.quant) for n, s in config.students.items()}
    finetunes = [s.finetune for s in config.students.values() if s.finetune.num_iterations]
    for sampler in (config.sampler, config.calibrate.sampler, *(f.sampler for f in finetunes)):
        denoisers.make_denoiser_sampler(teacher, sampler)
    return Run(config, workdir, teacher, layers, plans, device_mesh, teacher_id(teacher))


def teacher_id(teacher: denoisers.Denoiser) -> str:
    """Names a teacher by what it is rather than by its path, behind which files may change."""
    return artefacts.digest(
        traverse_util.flatten_dict(jax.device_get(teacher.params), sep='/'),
        [denoisers.network_settings(teacher.network), dataclasses.asdict(teacher.info)],
    )


def dry_run(config: Config) -> None:
    """Prints what every student would quantize, and stops."""
    context = open_run(config, Path('.'), evaluate.load_reference(config.evaluate))
    for name, plan in context.plans.items():
        print(f'\n{name}: {config.students[name].method.name}, '
              f'coverage {config.students[name].quant.coverage}')  # fmt: skip
        for line in tables.plan_table(context.layers, plan):
            print(line)


def calibration(context: Run) -> calibrate.Calibration:
    """Statistics of every quantizable input; one for all students."""
    config = context.config.calibrate
    observed = {
        path: plan_lib.LayerSpec(weight=None, inputs=denoisers.OBSERVED) for path in context.layers
    }

    def make(path: Path) -> None:
        result = calibrate.run(
            context.teacher, observed, config,
            key=context.key('calibrate'), device_mesh=context.device_mesh,
        )  # fmt: skip
        calibrate.save(path / 'stats.npz', result)

    return artefacts.artefact(
        context.workdir / 'calibration',
        {'calibrate': config_lib.to_dict(config), 'teacher': context.teacher_id,
         'seed': context.config.seed},
        make,
        lambda path: calibrate.load(path / 'stats.npz'),
    )  # fmt: skip


def student_folder(context: Run, name: str) -> Path:
    """Where everything of one student lies."""
    return context.workdir / 'students' / name


def learn(context: Run, name: str) -> tuple[methods.Method, dict[str, Any], float]:
    """The student's method, its learnt state, and the seconds of fine-tuning."""
    student = context.config.students[name]
    stats = calibration(context)
    method = methods.make(student.method, context.plans[name])
    # The same key for all: students that differ in one option start from the same numbers.
    key = context.key('finetune')
    inputs = context.teacher.params, stats.stats, key
    if student.finetune.num_iterations == 0:
        return method, jax.jit(method.init)(*inputs), 0.0
    folder, options = student_folder(context, name), student_options(context, student)

    def make(path: Path) -> None:
        # Checkpoints outlive the artefact they lead to, and so need a mark of their own.
        artefacts.claim(folder / 'finetune', options)
        result = finetune.run(
            context.teacher, method, jax.jit(method.init)(*inputs), context.plans[name],
            stats.timesteps, student.quant.timestep_lookup, student.finetune,
            key=jax.random.fold_in(key, 1), workdir=folder / 'finetune',
            device_mesh=context.device_mesh, description=f'finetune {name}',
        )  # fmt: skip
        finetune.save(path / 'state.safetensors', result)

    result = artefacts.artefact(
        folder / 'state', options, make,
        lambda path: finetune.load(
            path / 'state.safetensors', jax.eval_shape(method.init, *inputs)
        ),
    )  # fmt: skip
    return method, result.state, result.duration_s


def student_options(context: Run, student: StudentConfig) -> dict[str, Any]:
    """Everything the student depends on."""
    options = config_lib.to_dict(student)
    for name in ('checkpoint_every', 'log_every', 'max_to_keep'):
        del options['finetune'][name]
    return {
        'student': options,
        'calibration': artefacts.fingerprint(context.workdir / 'calibration'),
    }


def exported(context: Run, name: str) -> exporting.Exported:
    """The student as packed integers."""
    student = context.config.students[name]
    calibration(context)

    def make(path: Path) -> None:
        stats = calibration(context)
        method, state, duration_s = learn(context, name)
        bound = jax.jit(method.bind)(context.teacher.params, state)
        model = exporting.make(
            context.teacher, context.plans[name], bound, stats.timesteps,
            student.quant.timestep_lookup,
        )  # fmt: skip
        exporting.save(path, model, {'finetune_seconds': duration_s, 'method': student.method.name})

    return artefacts.artefact(
        student_folder(context, name) / 'export', student_options(context, student), make,
        exporting.load,
    )  # fmt: skip


def samples(context: Run, name: str) -> dict[str, np.ndarray]:
    """The images of the teacher or of a student, as `draw` returns them."""
    config = context.config
    options = {'sampler': config_lib.to_dict(config.sampler), 'seed': config.seed,
               'num_images': config.sample.num_images}  # fmt: skip
    if name == TEACHER:
        options['teacher'] = context.teacher_id
    else:
        exported(context, name)
        options |= {'mode': config.sample.mode}
        options['export'] = artefacts.fingerprint(student_folder(context, name) / 'export')

    def make(path: Path) -> None:
        if name == TEACHER:
            denoiser = context.teacher
        else:
            denoiser = exporting.denoiser(exported(context, name), config.sample.mode)
        drawn = draw(context, denoiser, f'sample {name}')
        np.savez_compressed(path / 'images.npz', **drawn)
        count = min(config.report.grid_size**2, config.sample.num_images)
        grid = sampling.image_grid(drawn['arr_0'][:count], columns=config.report.grid_size)
        with log.make_writer(path) as writer:
            writer.write_images(0, {f'{name}/samples': grid})

    return artefacts.artefact(
        context.workdir / 'samples' / name, options, make,
        lambda path: read_arrays(path / 'images.npz'),
    )  # fmt: skip


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in an `.npz`."""
    with np.load(path) as arrays:
        return dict(arrays)


def draw(context: Run, denoiser: denoisers.Denoiser, description: str) -> dict[str, np.ndarray]:
    """`arr_0`, all images; their `labels`; `images_per_second` after the first, compiling batch."""
    config = context.config
    labels = denoisers.balanced_labels(config.sample.num_images, denoiser.info.num_classes)
    batches = sampling.batches(
        denoiser, config.sampler, labels=labels, num_images=config.sample.num_images,
        key=context.key('sample'), batch_size=config.sample.batch_size,
        device_mesh=context.device_mesh,
    )  # fmt: skip
    count = -(-config.sample.num_images // config.sample.batch_size)
    images, times = [], [time.monotonic()]
    for batch in progress(batches, description, total=count):
        images.append(batch.images)
        times.append(time.monotonic())
    # One batch alone cannot tell compiling from sampling.
    rates = [len(i) / s for i, s in zip(images, np.diff(times), strict=True)][1:]
    return {
        'arr_0': np.concatenate(images),
        'labels': np.zeros(0, np.int32) if labels is None else labels,
        'images_per_second': np.asarray(np.median(rates) if rates else np.nan),
    }


def measure(context: Run, reference: evaluate.Reference) -> None:
    """Writes `metrics.json`: the protocol, and one row per network."""
    config = context.config
    teacher = samples(context, TEACHER)
    rows = []
    for name in progress((TEACHER, *config.students), 'evaluate'):
        drawn = samples(context, name)
        labels = drawn['labels'] if drawn['labels'].size else None
        metrics = evaluate.run(
            drawn['arr_0'], labels, reference, None if name == TEACHER else teacher['arr_0']
        )
        rate = float(drawn['images_per_second'])
        rows.append(
            {'name': name, **describe_network(context, name), **metrics,
             'images_per_second': None if np.isnan(rate) else rate}
        )  # fmt: skip
    protocol = {
        'distance': reference.name,
        'features': config.evaluate.features,
        'reference': config.evaluate.reference,
        'reference_images': reference.num_images,
        'num_images': config.sample.num_images,
        'sampler': config_lib.to_dict(config.sampler),
        'mode': config.sample.mode,
        'seed': config.seed,
        'device': jax.devices()[0].device_kind,
        'versions': log.versions(),
        'revision': log.git_revision(),
        **reference.protocol,
    }
    log.write_json(context.workdir / 'metrics.json', {'protocol': protocol, 'rows': rows})
    for line in tables.metrics_table(protocol, rows):
        print(line)


def analyse(context: Run, name: str) -> dict[str, Any]:
    """Where the error of a student sits: see `analysis.run`."""
    model = exported(context, name)

    def make(path: Path) -> None:
        result = analysis.run(
            context.teacher, exporting.denoiser(model, 'fake'), context.config.sampler,
            key=context.key('analyse'), description=f'analyse {name}',
        )  # fmt: skip
        log.write_json(path / 'analysis.json', result)

    return artefacts.artefact(
        student_folder(context, name) / 'analysis',
        {'export': artefacts.fingerprint(student_folder(context, name) / 'export'),
         'sampler': config_lib.to_dict(context.config.sampler), 'seed': context.config.seed},
        make,
        lambda path: json.loads((path / 'analysis.json').read_text()),
    )  # fmt: skip


def describe_network(context: Run, name: str) -> dict[str, Any]:
    """Bits, coverage, size and cost of the teacher or of a student."""
    if name == TEACHER:
        leaves = jax.tree.leaves(context.teacher.params)
        size = sum(leaf.size * 4 for leaf in leaves)
        return {'method': None, 'weight_bits': 32, 'activation_bits': 32, 'coverage': None,
                'per_timestep': None, 'size_mb': size / 1e6,
                'finetune_seconds': None}  # fmt: skip
    student = context.config.students[name]
    folder = student_folder(context, name) / 'export'
    return {
        'method': student.method.name,
        'weight_bits': student.quant.weight_bits,
        'activation_bits': student.quant.activation_bits,
        'coverage': student.quant.coverage,
        'per_timestep': student.quant.per_timestep,
        'size_mb': (folder / 'model.safetensors').stat().st_size / 1e6,
        'finetune_seconds': exporting.read_manifest(folder)['facts']['finetune_seconds'],
    }
