"""The artefacts of a run as a report reads them back, and how its students compare."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmq_jax import calibrate, exporting
from dmq_jax.config import FLOAT_BITS, LEARNING_STAGES
from dmq_jax.reporting.charts import Series
from dmq_jax.runtime import log

TEACHER = 'teacher'
NUM_COLORS = 10  # of style.css
IMPLEMENTATIONS = 'implementations.json'  # beside the images that a student drew on integers
METHODS = {
    'round_to_nearest': 'round to nearest', 'efficientdm': 'EfficientDM',
    'qdiffusion': 'Q-Diffusion', 'tcaq_dm': 'TCAQ-DM', 'tuneqdm': 'TuneQDM', 'lsq': 'LSQ',
    'qlora': 'QLoRA', 'full_finetuning': 'full fine-tuning', 'svdquant': 'SVDQuant',
    'ptqd': 'PTQD', 'tfmq_dm': 'TFMQ-DM', 'repq_vit': 'RepQ-ViT',
}  # fmt: skip


class Artefacts(NamedTuple):
    """What is in a workdir; a missing part is empty.

    Attributes:
      config: `config.json`: 'config', 'versions', 'revision', 'device'.
      metrics: `metrics.json`: 'protocol' and 'rows'.
      students: names in the order shown: calibrated before learnt, then the best last.
      images: {network: {'arr_0', 'labels'}}, the teacher first.
      learning: {stage: {student: lines of metrics.jsonl}}, of the stages that left any.
      exports: {student: the packed network}.
      analyses: {student: result of the stage analyse}.
      calibration: statistics of the activations, or None.
      implementations: {student: {layer: (name, reason)}}, of what sampled on integers.
    """

    config: dict[str, Any]
    metrics: dict[str, Any]
    students: list[str]
    images: dict[str, dict[str, np.ndarray]]
    learning: dict[str, dict[str, list[dict[str, Any]]]]
    exports: dict[str, exporting.Exported]
    analyses: dict[str, dict[str, Any]]
    calibration: calibrate.Calibration | None
    implementations: dict[str, dict[str, Sequence[str]]] = {}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of `metrics.json` of each network."""
        return {row['name']: row for row in self.metrics.get('rows', [])}

    def series(self, name: str, **options: Any) -> Series:
        """The series of a network, in its colour."""
        index = 'teacher' if name == TEACHER else self.students.index(name) % NUM_COLORS
        return Series(name, f'c{index}', **options)

    def student_config(self, name: str) -> dict[str, Any]:
        """The options of a student."""
        return self.config.get('config', {}).get('students', {}).get(name, {})


def read(workdir: Path) -> Artefacts:
    """Everything of `workdir` that a report shows."""

    def read_json(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text()) if path.is_file() else {}

    config, metrics = (read_json(workdir / f'{name}.json') for name in ('config', 'metrics'))
    rows = {row['name']: row for row in metrics.get('rows', [])}
    options = config.get('config', {}).get('students', {})

    def order(name: str) -> tuple:
        quant = options[name]['quant']
        learns = bool(stages_of(options[name]))
        distance = rows.get(name, {}).get('fd')
        bits = quant['weight_bits'], quant['activation_bits']
        return learns, -bits[0], -bits[1], -(math.inf if distance is None else distance)

    students = sorted(options, key=order)
    folders = {name: workdir / 'students' / name for name in students}
    images = {}
    for name in (TEACHER, *students):
        if (file := workdir / 'samples' / name / 'images.npz').is_file():
            with np.load(file) as arrays:
                images[name] = {part: arrays[part] for part in ('arr_0', 'labels')}
    statistics = workdir / 'calibration' / 'stats.npz'
    learning = {
        stage: {
            name: log.read_metrics(folder / stage)
            for name, folder in folders.items()
            if (folder / stage / log.METRICS_FILE).is_file()
        }
        for stage in LEARNING_STAGES
    }
    exports = {
        name: exporting.load(folder / 'export')
        for name, folder in folders.items()
        if (folder / 'export' / 'complete.json').is_file()
    }
    implementations = {
        name: read_json(workdir / 'samples' / name / IMPLEMENTATIONS) for name in students
    }
    analyses = {n: read_json(f / 'analysis' / 'analysis.json') for n, f in folders.items()}
    return Artefacts(
        config=config,
        metrics=metrics,
        students=students,
        images=images,
        learning={stage: lines for stage, lines in learning.items() if lines},
        exports=exports,
        analyses={name: analysis for name, analysis in analyses.items() if analysis},
        calibration=calibrate.load(statistics) if statistics.is_file() else None,
        implementations={name: ran for name, ran in implementations.items() if ran},
    )


def stages_of(options: Mapping[str, Any]) -> list[str]:
    """The stages by which a student of these options learns."""
    return [stage for stage in LEARNING_STAGES if options.get(stage, {}).get('num_iterations')]


def describe_student(options: Mapping[str, Any]) -> str:
    """'W4A4, EfficientDM' or 'W4A4, round to nearest, one scale for all timesteps'."""
    if not options:
        return ''
    quant, method = options['quant'], options['method']['name']
    words = [f'W{quant["weight_bits"]}A{quant["activation_bits"]}', METHODS.get(method, method)]
    if not quant['per_timestep'] and quant['activation_bits'] != FLOAT_BITS:
        words.append('one scale for all timesteps')
    if quant['coverage'] != 'paper':
        words.append(f'{quant["coverage"]} coverage')
    return ', '.join(words)


def describe_sampler(options: Mapping[str, Any]) -> str:
    """'ddim with 20 steps', and how much noise and guidance where there is any.

    Args:
      options: of SamplerConfig, as `metrics.json` holds them.
    """
    words = [f'{options["name"]} with {options["num_steps"]} steps']
    if options.get('eta'):
        words.append(f'eta {options["eta"]:g}')
    if options.get('guidance_scale', 1) != 1:
        words.append(f'guidance {options["guidance_scale"]:g}')
    return ', '.join(words)


def find_baseline(rows: Mapping[str, Mapping[str, Any]], like: str | None = None) -> str | None:
    """The student that another must beat: round to nearest, static if there is one.

    Args:
      rows: of `metrics.json` by name.
      like: the student to be judged; a baseline of its bits and coverage is preferred.
    """
    plain = [n for n, row in rows.items() if row.get('method') == 'round_to_nearest']
    if like is not None:
        equals = [n for n in plain if _setting(rows[n]) == _setting(rows[like])]
        plain = equals or plain
    static = [n for n in plain if not rows[n].get('per_timestep')]
    # Among several, the narrowest: it leaves the most to win.
    return min(static or plain, key=lambda n: _bits(rows[n]), default=None)


def find_best(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The student with the least distance, of the baseline's bits if another one has them."""
    students = [n for n, row in rows.items() if n != TEACHER and row.get('fd') is not None]
    baseline = find_baseline(rows)
    others = [n for n in students if n != baseline]
    equals = [n for n in others if baseline and _bits(rows[n]) == _bits(rows[baseline])]
    return min(equals or others or students, key=lambda n: rows[n]['fd'], default=None)


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return *_bits(row), row.get('coverage')


def _bits(row: Mapping[str, Any]) -> tuple[int, int]:
    return row['weight_bits'], row['activation_bits']


def closed_gap(rows: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Share of the distance between the baseline and the teacher that a student takes back.

    1 is as good as the teacher, 0 no better than the baseline; None without a gap to close.
    """
    if TEACHER not in rows or name == TEACHER:
        return None
    baseline = find_baseline(rows, name)
    if baseline is None or name == baseline:
        return None
    gap = rows[baseline]['fd'] - rows[TEACHER]['fd']
    return (rows[baseline]['fd'] - rows[name]['fd']) / gap if gap > 0 else None
