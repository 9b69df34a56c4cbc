"""The story of a run: teacher -> calibrate, finetune, export, sample, evaluate, analyse -> report.

One short function per stage, in order. Stages meet only here, through artefacts: folders in the
workdir that are complete or absent, so a run killed at any moment goes on where it was.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmq_jax import (
    analysis,
    artefacts,
    denoisers,
    evaluate,
    exporting,
    learning,
    networks,
    report,
    sampling,
    teachers,
)
from dmq_jax import config as config_lib
from dmq_jax.config import Config
from dmq_jax.learning import STAGES, Run
from dmq_jax.reporting import charts, tables
from dmq_jax.reporting.results import IMPLEMENTATIONS
from dmq_jax.runtime import hosts, log, mesh, parts
from dmq_jax.runtime.progress import progress

# Besides them, on demand: what the teacher is.
DESCRIBE = 'teacher'
TEACHER = 'teacher'
# What the folder of a network's images holds.
_IMAGES, _SPEED, _RATE = 'images.npz', 'speed.json', 'images_per_second'
# Network file systems may show a file to one host half a minute after another has written it.
_PATIENCE_S = 60
# What learning took, as the manifest of an export tells it.
_COSTS = ('finetune_seconds', 'trained_parameters', 'training_mb', 'set_mb')


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
        learning.calibration(context)
    for name in config.students:
        if 'finetune' in stages and learning.learns(config.students[name]):
            learning.learn(context, name)
        if 'export' in stages:
            learning.exported(context, name)
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
    prompts = None if config.data.prompt is None else [config.data.prompt]
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
    return learning.make_run(config, workdir, teacher, device_mesh=device_mesh)


def dry_run(config: Config) -> None:
    """Prints what every student would quantize, and stops."""
    context = open_run(config, Path('.'), evaluate.load_reference(config.evaluate))
    for name, plan in context.plans.items():
        print(f'\n{name}: {config.students[name].method.name}, '
              f'coverage {config.students[name].quant.coverage}')  # fmt: skip
        for line in tables.plan_table(context.layers, plan):
            print(line)


def samples(context: Run, name: str) -> dict[str, Any]:
    """The images of the teacher or of a student, see `read_samples`."""
    config = context.config
    options = {'sampler': config_lib.to_dict(config.sampler), 'seed': config.seed,
               'num_images': config.sample.num_images}  # fmt: skip
    if name == TEACHER:
        options['teacher'] = context.teacher_id
    else:
        learning.exported(context, name)
        options |= {'mode': config.sample.mode}
        options['export'] = artefacts.fingerprint(learning.student_folder(context, name) / 'export')

    folder = context.workdir / 'samples' / name
    growing = folder.with_name(f'{name}.parts')

    def make() -> dict[str, Any]:
        if name == TEACHER:
            denoiser = context.teacher
        else:
            denoiser = exporting.denoiser(learning.exported(context, name), config.sample.mode)
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
            model = exporting.load(learning.student_folder(context, name) / 'export')
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
    model = learning.exported(context, name)

    def make() -> dict[str, Any]:
        return analysis.run(
            context.teacher, exporting.denoiser(model, 'fake'), context.config.sampler,
            key=context.key('analyse'), description=f'analyse {name}',
        )  # fmt: skip

    return artefacts.artefact(
        learning.student_folder(context, name) / 'analysis',
        {'export': artefacts.fingerprint(learning.student_folder(context, name) / 'export'),
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
    folder = learning.student_folder(context, name) / 'export'
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
