"""The story of a run: teacher -> calibrate, finetune, export, sample, evaluate, analyse -> report.

One short function per stage, in order. Stages meet only here, through artefacts: folders in the
workdir that are complete or absent, so a run killed at any moment goes on where it was.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dmq_jax import (
    adapt,
    analysis,
    artefacts,
    calibrate,
    correct,
    denoisers,
    evaluate,
    exporting,
    finetune,
    methods,
    networks,
    reconstruct,
    report,
    sampling,
    scale_sets,
    teachers,
)
from dmq_jax import config as config_lib
from dmq_jax.config import AdaptConfig, Config, StudentConfig
from dmq_jax.files import images as images_lib
from dmq_jax.methods import base
from dmq_jax.quant import plan as plan_lib
from dmq_jax.reporting import charts, tables
from dmq_jax.reporting.results import IMPLEMENTATIONS
from dmq_jax.runtime import hosts, log, memory, mesh, parts
from dmq_jax.runtime.progress import progress

STAGES = ('calibrate', 'finetune', 'export', 'sample', 'evaluate', 'analyse', 'report')
# Besides them, on demand: what the teacher is.
DESCRIBE = 'teacher'
TEACHER = 'teacher'
# What the folder of a network's images holds.
_IMAGES, _SPEED, _RATE = 'images.npz', 'speed.json', 'images_per_second'
# Network file systems may show a file to one host half a minute after another has written it.
_PATIENCE_S = 60
# What learning took, as the manifest of an export tells it.
_COSTS = ('finetune_seconds', 'trained_parameters', 'training_mb', 'set_mb')
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

    def key(self, stage: str) -> jax.Array:
        """The root key of a stage."""
        return jax.random.fold_in(jax.random.key(self.config.seed), STAGES.index(stage))


def run(config: Config, workdir: Path, stages: Sequence[str] = STAGES) -> None:
    """Runs the stages asked for, resuming what exists.

    Args:
      config: of the run.
      workdir: receives everything.
      stages: some of `STAGES`; one whose input is not there makes that first. Or `DESCRIBE`.

    Raises:
      ValueError: another process works in `workdir`, or it holds a run of other options.
    """
    # First: fails in a second, not in a day. Who evaluates nothing needs no reference.
    reference = evaluate.load_reference(config.evaluate) if 'evaluate' in stages else None
    context = open_run(config, workdir, reference)
    with artefacts.sole_user(workdir):
        _run_stages(context, reference, stages)


def _run_stages(context: Run, reference: evaluate.Reference | None, stages: Sequence[str]) -> None:
    config, workdir = context.config, context.workdir
    # A run refused for its options must not replace the record of the one before it.
    if not (workdir / 'config.json').is_file():
        record(context)
    if DESCRIBE in stages:
        for line in describe(context):
            print(line)
    if 'calibrate' in stages and config.students:
        calibration(context)
    for name in config.students:
        if 'finetune' in stages and learns(config.students[name]):
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
            if context.plans[name]:  # a float student has no layer to be looked at
                analyse(context, name)
    record(context)
    if 'report' in stages:
        hosts.by_first(lambda: report.run(workdir, config.report))
        print(f'report: {workdir / "report.html"}')


def record(context: Run) -> None:
    """Writes `config.json`: the options, versions and device of the run."""
    log.write_json(
        context.workdir / 'config.json',
        {'config': config_lib.to_dict(context.config), 'versions': log.versions(),
         'revision': log.git_revision(), 'device': jax.devices()[0].device_kind},
    )  # fmt: skip


def describe(context: Run) -> list[str]:
    """What the teacher is: network, parameters, process, condition."""
    network, info = context.teacher.network, context.teacher.info
    leaves = jax.tree.leaves(context.teacher.params)
    size, memory = (sum(getattr(leaf, name) for leaf in leaves) for name in ('size', 'nbytes'))
    schedule = info.schedule
    return [
        f'teacher: {context.config.teacher.path}',
        f'  network: {networks.family(network)}, {size / 1e6:.2f} M parameters '
        f'({memory / 1e6:.0f} MB), {len(context.layers)} layers that could be quantized',
        f'  draws: {"latents" if info.is_latent else "images"} of {info.image_shape}'
        + (', with their decoder' if context.teacher.decoder is not None else ''),
        f'  condition: {"none" if info.num_classes is None else f"{info.num_classes} classes"}',
        f'  process: {schedule.kind}, {schedule.num_train_timesteps} timesteps, predicts '
        f'{info.prediction}' + (' and its variance' if info.learned_variance else ''),
    ]


def load_teacher(config: Config, device_mesh: mesh.Mesh | None = None) -> denoisers.Denoiser:
    """The teacher of a run, and the prompts that a text-conditional one is asked for.

    Args:
      config: of the run.
      device_mesh: over which every weight is spread as soon as it is read, if weights are spread;
        None: all stay on the default device.

    Raises:
      FileNotFoundError: no file of prompts; see also `teachers.load_teacher`.
      ValueError: a file without a prompt; see also `teachers.load_teacher`.
    """
    options = dataclasses.asdict(config.teacher)
    prompts = None
    if config.sample.prompts is not None:
        file = Path(config.sample.prompts)
        if not file.is_file():
            raise FileNotFoundError(
                f'sample.prompts={config.sample.prompts!r}: no such file; expected a text file, '
                f'one prompt a line.'
            )
        lines = file.read_text(encoding='utf-8').splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f'sample.prompts={config.sample.prompts!r}: no prompt in this file.')
    # What students are made of is packed on the host: then every process has all weights at first.
    if device_mesh is not None and (jax.process_count() == 1 or not config.students):
        options['put'] = mesh.weight_placer(device_mesh)
    return teachers.load_teacher(options.pop('path'), prompts=prompts, **options)


def open_run(config: Config, workdir: Path, reference: evaluate.Reference | None) -> Run:
    """Loads the teacher and resolves every plan; all that can fail cheaply fails here."""
    device_mesh = mesh.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    for name, student in config.students.items():
        for stage in ('finetune', 'adapt'):
            options = getattr(student, stage)
            if options.num_iterations:
                mesh.check_batch_size(
                    device_mesh, options.batch_size, name=f'students.{name}.{stage}.batch_size'
                )
    mesh.check_batch_size(device_mesh, config.sample.batch_size, name='sample.batch_size')
    if reference is not None and reference.batch_size is not None:
        mesh.check_batch_size(device_mesh, reference.batch_size, name='evaluate.batch_size')
    if config.students:
        mesh.check_batch_size(
            device_mesh, min(config.calibrate.batch_size, config.calibrate.num_images),
            name='calibrate.batch_size',
        )  # fmt: skip
    teacher = load_teacher(config, device_mesh)
    if reference is not None:
        evaluate.check(reference, teacher.info, config.sample.num_images)
    layers = denoisers.quantizable(teacher)
    plans = {
        name: denoisers.make_plan(layers, student.quant, teacher.network)
        for name, student in config.students.items()
    }
    learning = [
        stage
        for student in config.students.values()
        for stage in (student.reconstruct, student.finetune)
        if stage.num_iterations
    ]
    for name, student in config.students.items():
        if student.reconstruct.num_iterations:
            reconstruct.check(methods.make(student.method, plans[name]))
            reconstruct.check_mesh(device_mesh, student.reconstruct)
        if student.adapt.num_iterations:
            check_images(teacher.info, student.adapt)
    for sampler in (config.sampler, config.calibrate.sampler, *(s.sampler for s in learning)):
        denoisers.make_denoiser_sampler(teacher, sampler)
    return Run(config, workdir, teacher, layers, plans, device_mesh,
               teacher_id(teacher, device_mesh))  # fmt: skip


def teacher_id(teacher: denoisers.Denoiser, device_mesh: mesh.Mesh) -> str:
    """Names a teacher by what it is rather than by its path, behind which files may change."""
    params = traverse_util.flatten_dict(teacher.params, sep='/')
    settings = [denoisers.network_settings(teacher.network), denoisers.info_settings(teacher.info)]
    if teacher.decoder is not None:
        decoder = traverse_util.flatten_dict(teacher.decoder.params, sep='/')
        params |= {f'decoder/{name}': leaf for name, leaf in decoder.items()}
        settings.append(denoisers.network_settings(teacher.decoder.network))
    return artefacts.digest(params, settings, fetch=functools.partial(mesh.fetch, device_mesh))


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
    stages = student.reconstruct, student.finetune, student.adapt
    return any(stage.num_iterations for stage in stages)


class Learnt(NamedTuple):
    """What all stages of learning left.

    Attributes:
      method: of the student.
      state: learnt.
      duration_s: of learning.
      memory_mb: the most it held, see `runtime.memory`; None: nothing was learnt.
      num_trained: numbers that were trained.
    """

    method: methods.Method
    state: dict[str, Any]
    duration_s: float
    memory_mb: float | None
    num_trained: int


def learn(context: Run, name: str) -> Learnt:
    """The student after all its stages of learning."""
    student = context.config.students[name]
    stats = calibration(context)
    method = make_method(context, name)
    # The same key for all: students that differ in one option start from the same numbers.
    key = context.key('finetune')
    inputs = context.teacher.params, stats.stats, key
    state = jax.jit(method.init)(*inputs)
    took = []
    folder, options = student_folder(context, name), student_options(context, student)
    shared = context.plans[name], stats.timesteps, student.quant.timestep_lookup

    def learnt(stage: str, run: Callable[[], Any]) -> dict[str, Any]:
        """The state after a stage that is resumed where it was."""

        def make() -> Any:
            # Checkpoints outlive the artefact they lead to, and so need a mark of their own.
            artefacts.claim(folder / stage, options)
            with memory.watched() as peak:
                result = run()
            return result._replace(memory_mb=peak.mb)

        result = artefacts.artefact(
            folder / _LEARNT[stage],
            options,
            make=make,
            save=lambda path, result: finetune.save(path / 'state.safetensors', result),
            load=lambda path: finetune.load(
                path / 'state.safetensors', jax.eval_shape(method.init, *inputs)
            ),
        )
        took.append((result.duration_s, result.memory_mb))
        return result.state

    if student.reconstruct.num_iterations:
        state = learnt('reconstruct', lambda: reconstruct.run(
            context.teacher, method, state, *shared, student.reconstruct,
            key=jax.random.fold_in(key, 2), workdir=folder / 'reconstruct',
            device_mesh=context.device_mesh, description=f'reconstruct {name}',
        ))  # fmt: skip
    if student.finetune.num_iterations:
        state = learnt('finetune', lambda: finetune.run(
            context.teacher, method, state, *shared, student.finetune,
            key=jax.random.fold_in(key, 1), workdir=folder / 'finetune',
            device_mesh=context.device_mesh, description=f'finetune {name}',
        ))  # fmt: skip
    if student.adapt.num_iterations:
        state = learnt('adapt', lambda: adapt.run(
            context.teacher, method, state, *shared, student.adapt,
            **adapt_images(context, student.adapt),
            key=jax.random.fold_in(key, 3), workdir=folder / 'adapt',
            device_mesh=context.device_mesh, description=f'adapt {name}',
        ))  # fmt: skip
    optimizers = [phase.optimizer for phase in method.phases if student.reconstruct.num_iterations]
    if student.finetune.num_iterations or student.adapt.num_iterations:
        optimizers.append(method.optimizer)
    peaks = [memory_mb for _, memory_mb in took if memory_mb is not None]
    return Learnt(
        method, state, sum(duration_s for duration_s, _ in took), max(peaks, default=None),
        base.num_trained(state, optimizers),
    )  # fmt: skip


def check_images(info: denoisers.DenoiserInfo, config: AdaptConfig) -> images_lib.ImageSet | None:
    """The user's images, if the teacher could have drawn them; None where it is to draw them.

    Raises:
      ValueError: images or classes that the teacher cannot have, or a teacher of latents.
    """
    height, width, channels = info.image_shape
    found = None if config.images == TEACHER else images_lib.load_images(config.images)
    depth = channels if found is None else found.images.shape[-1]
    if info.is_latent or depth != channels or height != width:
        raise ValueError(
            f'adapt.images={config.images!r}: images of {depth} channels; expected {channels}, for '
            f'a teacher that draws square images and no latents.'
        )
    labels = None if found is None else found.labels
    if info.num_classes is None or labels is None:
        labels = np.asarray([config.label])
    if info.num_classes is not None and not 0 <= labels.min() <= labels.max() < info.num_classes:
        raise ValueError(
            f'adapt: classes {labels.min()} to {labels.max()}; expected 0 to '
            f'{info.num_classes - 1}, those of the teacher.'
        )
    return found


def adapt_images(context: Run, config: AdaptConfig) -> dict[str, Any]:
    """What a student is adapted to: `images` in [-1, 1], as large as the teacher's, and `labels`.

    Raises:
      ValueError: see `check_images`.
    """
    info = context.teacher.info
    found = check_images(info, config)
    if found is None:
        found = drawn_images(context, config.num_images)
    labels = found.labels
    if info.num_classes is not None and labels is None:
        labels = np.full(len(found.images), config.label, np.int32)
    padded = images_lib.pad_images(found.images, info.image_shape[0])
    return {
        'images': np.asarray(sampling.to_float(padded)),
        'labels': None if info.num_classes is None else labels,
    }


def drawn_images(context: Run, num_images: int) -> images_lib.ImageSet:
    """Images of the teacher for its students to adapt to; others than those that are evaluated."""
    config = context.config
    labels = denoisers.balanced_labels(num_images, context.teacher.info.num_classes)

    def make() -> np.ndarray:
        return sampling.draw(
            context.teacher, config.sampler, labels=labels, num_images=num_images,
            key=jax.random.fold_in(context.key('finetune'), 4),
            batch_size=min(config.sample.batch_size, num_images),
        )  # fmt: skip

    images = artefacts.artefact(
        context.workdir / 'adapt_images' / str(num_images),
        drawn_options(context, num_images),
        make=make,
        save=lambda path, drawn: np.savez_compressed(path / 'images.npz', arr_0=drawn),
        load=lambda path: read_arrays(path / 'images.npz')['arr_0'],
    )
    return images_lib.ImageSet(images, labels)


def drawn_options(context: Run, num_images: int) -> dict[str, Any]:
    """What the images of `drawn_images` depend on."""
    sampler = config_lib.to_dict(context.config.sampler)
    return {'teacher': context.teacher_id, 'sampler': sampler, 'seed': context.config.seed,
            'num_images': num_images}  # fmt: skip


def student_options(context: Run, student: StudentConfig) -> dict[str, Any]:
    """Everything the student depends on."""
    options = config_lib.to_dict(student)
    for name in ('checkpoint_every', 'log_every', 'max_to_keep'):
        del options['finetune'][name]
    for name in ('checkpoint_every', 'log_every', 'remat'):
        del options['adapt'][name]
    del options['title']
    # Named where it is asked for: what is made without it stays what it was.
    if student.adapt.images != TEACHER:
        del options['adapt']['num_images']
    images = None
    if student.adapt.num_iterations and student.adapt.images == TEACHER:
        images = drawn_options(context, student.adapt.num_images)
    elif student.adapt.num_iterations:
        # By what they are: files behind a path may change.
        found = images_lib.load_images(student.adapt.images)._asdict()
        images = artefacts.digest({n: array for n, array in found.items() if array is not None})
    return {
        'student': options,
        'calibration': artefacts.fingerprint(context.workdir / 'calibration'),
        'images': images,
    }


def exported(context: Run, name: str) -> exporting.Exported:
    """The student as packed integers."""
    student = context.config.students[name]
    calibration(context)

    def make() -> tuple[exporting.Exported, dict[str, Any]]:
        stats = calibration(context)
        learnt = learn(context, name)
        bound = jax.jit(learnt.method.bind)(context.teacher.params, learnt.state)
        shared = context.plans[name], stats.timesteps, student.quant.timestep_lookup
        bound = correct.run(
            context.teacher, learnt.method, bound, *shared, context.config.calibrate,
            key=jax.random.fold_in(context.key('export'), 0),
        )  # fmt: skip
        plan, *tables_of = shared
        model = exporting.make(context.teacher, plan, bound, *tables_of)
        # What another adaptation of the same integers takes.
        is_switched = learnt.method.beside is not None
        return model, {
            'finetune_seconds': learnt.duration_s,
            'method': student.method.name,
            'trained_parameters': learnt.num_trained,
            'training_mb': learnt.memory_mb,
            'set_mb': scale_sets.size_bytes(model) / memory.MEGABYTE if is_switched else None,
        }

    def save(path: Path, made: tuple[exporting.Exported, dict[str, Any]]) -> None:
        exporting.save(path, *made)

    return artefacts.artefact(
        student_folder(context, name) / 'export', student_options(context, student), make=make,
        save=save, load=exporting.load,
    )  # fmt: skip


def samples(context: Run, name: str) -> dict[str, Any]:
    """The images of the teacher or of a student, see `read_samples`."""
    config = context.config
    options = {'sampler': config_lib.to_dict(config.sampler), 'seed': config.seed,
               'num_images': config.sample.num_images}  # fmt: skip
    if name == TEACHER:
        options['teacher'] = context.teacher_id
    else:
        exported(context, name)
        options |= {'mode': config.sample.mode}
        options['export'] = artefacts.fingerprint(student_folder(context, name) / 'export')

    folder = context.workdir / 'samples' / name
    growing = folder.with_name(f'{name}.parts')

    def make() -> dict[str, Any]:
        if name == TEACHER:
            denoiser = context.teacher
        else:
            denoiser = exporting.denoiser(exported(context, name), config.sample.mode)
        artefacts.claim(growing, options)
        return draw(context, denoiser, f'sample {name}', growing)

    def save(path: Path, drawn: dict[str, Any]) -> None:
        patience_s = _PATIENCE_S if jax.process_count() > 1 else 0
        images = parts.merge(growing, config.sample.num_images, patience_s=patience_s)
        labels = drawn['labels']
        # ADM's layout: the images, and beside them the labels of a class-conditional network. The
        # same bytes whoever drew them, and so without anything measured.
        of_adm = {'arr_1': labels.astype(np.int64)} if labels.size else {}
        np.savez_compressed(path / _IMAGES, arr_0=images, labels=labels, **of_adm)
        log.write_json(path / _SPEED, {_RATE: drawn[_RATE]})
        if options.get('mode') == 'integer':
            # Read as it is: `exported` is for all processes together, and this one saves alone.
            model = exporting.load(student_folder(context, name) / 'export')
            ran = exporting.implementations(model, config.sample.batch_size)
            log.write_json(path / IMPLEMENTATIONS, ran)
        count = min(config.report.grid_size**2, config.sample.num_images)
        grid = sampling.image_grid(images[:count], columns=config.report.grid_size)
        (path / 'grid.png').write_bytes(charts.encode_png(grid))
        with log.make_writer(path) as writer:
            writer.write_images(0, {f'{name}/samples': grid})

    drawn = artefacts.artefact(
        folder, options, make=make, save=save, load=read_samples,
    )  # fmt: skip
    hosts.by_first(lambda: shutil.rmtree(growing, ignore_errors=True))
    return drawn


def read_samples(folder: Path) -> dict[str, Any]:
    """What `samples` left: the arrays of its `.npz`, and `images_per_second`, None if unknown."""
    speed = folder / _SPEED
    rate = json.loads(speed.read_text())[_RATE] if speed.is_file() else None
    return read_arrays(folder / _IMAGES) | {_RATE: rate}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in an `.npz`."""
    with np.load(path) as arrays:
        return dict(arrays)


def draw(
    context: Run, denoiser: denoisers.Denoiser, description: str, folder: Path
) -> dict[str, Any]:
    """Draws what is missing in `folder`, every process its share, see `runtime.parts`.

    Args:
      context: of the run.
      denoiser: teacher or student.
      description: shown beside the progress.
      folder: receives the images.

    Returns:
      `labels` of all images; `images_per_second` after the first, compiling batch, None if that
      was all.

    Raises:
      Interrupted: the run was asked to stop.
    """
    config = context.config
    num_images, batch_size = config.sample.num_images, config.sample.batch_size
    labels = denoisers.balanced_labels(num_images, denoiser.info.num_classes)
    # Whole batches, whatever is there of them: processes draw each at their own pace.
    begins = hosts.by_first(
        lambda: np.unique(parts.missing(folder, num_images) // batch_size * batch_size).tolist()
    )
    batches = sampling.batches(
        denoiser, config.sampler, labels=labels, num_images=num_images,
        key=context.key('sample'), batch_size=batch_size, begins=begins,
        device_mesh=context.device_mesh,
    )  # fmt: skip
    done = -(-num_images // batch_size) - len(begins)
    rates, last = [], time.monotonic()
    for begin, batch in zip(
        begins, progress(batches, description, total=done + len(begins), start=done), strict=True
    ):
        now = time.monotonic()
        rates.append(min(batch_size, num_images - begin) / (now - last))
        last = now
        parts.write(folder, batch.indices, batch.images)
        if hosts.stop_requested():
            raise hosts.interrupted()
    hosts.wait_for_all()
    rates = rates[1:]  # one batch alone cannot tell compiling from sampling
    return {
        'labels': np.zeros(0, np.int32) if labels is None else labels,
        _RATE: float(np.median(rates)) if rates else None,
    }


def measure(context: Run, reference: evaluate.Reference) -> None:
    """Writes `metrics.json`: the protocol, and one row per network."""
    teacher, rows = samples(context, TEACHER), []
    for name in progress((TEACHER, *context.config.students), 'evaluate'):
        drawn = teacher if name == TEACHER else samples(context, name)
        rows.append(measure_network(context, reference, name, drawn, teacher))
    facts = protocol(context, reference)
    log.write_json(context.workdir / 'metrics.json', {'protocol': facts, 'rows': rows})
    for line in tables.metrics_table(facts, rows):
        print(line)


def measure_network(
    context: Run,
    reference: evaluate.Reference,
    name: str,
    drawn: dict[str, Any],
    teacher: dict[str, Any],
) -> dict[str, Any]:
    """The row of the teacher or of a student: what it is, and every metric of its images.

    Args:
      context: of the run.
      reference: what the images are compared with.
      name: of the network.
      drawn: its images, from `samples`.
      teacher: the teacher's, from the same noise.
    """
    labels = drawn['labels'] if drawn['labels'].size else None
    metrics = evaluate.run(
        drawn['arr_0'], labels, reference, None if name == TEACHER else teacher['arr_0'],
        device_mesh=context.device_mesh,
    )  # fmt: skip
    return {
        'name': name, **describe_network(context, name), **metrics, _RATE: drawn[_RATE]
    }  # fmt: skip


def protocol(context: Run, reference: evaluate.Reference) -> dict[str, Any]:
    """What the metrics of a run depend on besides its networks."""
    config = context.config
    return {
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


def analyse(context: Run, name: str) -> dict[str, Any]:
    """Where the error of a student sits: see `analysis.run`."""
    model = exported(context, name)

    def make() -> dict[str, Any]:
        return analysis.run(
            context.teacher, exporting.denoiser(model, 'fake'), context.config.sampler,
            key=context.key('analyse'), description=f'analyse {name}',
        )  # fmt: skip

    return artefacts.artefact(
        student_folder(context, name) / 'analysis',
        {'export': artefacts.fingerprint(student_folder(context, name) / 'export'),
         'sampler': config_lib.to_dict(context.config.sampler), 'seed': context.config.seed},
        make=make,
        save=lambda path, result: log.write_json(path / 'analysis.json', result),
        load=lambda path: json.loads((path / 'analysis.json').read_text()),
    )  # fmt: skip


def describe_network(context: Run, name: str) -> dict[str, Any]:
    """Bits, coverage, size and cost of the teacher or of a student."""
    if name == TEACHER:
        leaves = jax.tree.leaves(context.teacher.params)
        size = sum(leaf.size * 4 for leaf in leaves)
        return {'method': None, 'weight_bits': 32, 'activation_bits': 32, 'coverage': None,
                'per_timestep': None, 'size_mb': size / 1e6,
                **dict.fromkeys(_COSTS)}  # fmt: skip
    student = context.config.students[name]
    folder = student_folder(context, name) / 'export'
    facts = exporting.read_manifest(folder)['facts']
    return {
        'method': student.method.name,
        'title': student.title,
        'weight_bits': student.quant.weight_bits,
        'activation_bits': student.quant.activation_bits,
        'coverage': student.quant.coverage,
        'per_timestep': student.quant.per_timestep,
        'size_mb': (folder / 'model.safetensors').stat().st_size / 1e6,
        # An export of an earlier release has not all of them.
        **{cost: facts.get(cost) for cost in _COSTS},
    }
