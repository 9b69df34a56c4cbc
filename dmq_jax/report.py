"""The artefacts of a run -> one self-contained `report.html`, and tables for the terminal.

Reads what the other stages wrote and nothing else; what is not there yet is left out, and the page
says which stage makes it.
"""

import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dmq_jax import calibrate, charts, denoisers, exporting
from dmq_jax.charts import Axis, Series, format_number
from dmq_jax.config import FLOAT_BITS, ReportConfig
from dmq_jax.methods.base import init_inputs
from dmq_jax.quant import layers as layers_lib
from dmq_jax.quant.plan import LayerSpec, Plan, QuantizableLayer
from dmq_jax.quant.tensor import QuantSpec, scale_shape
from dmq_jax.runtime import log
from kernels.packing import packed_length

TEACHER = 'teacher'
CLASSES = {
    'fashion_mnist': (
        'T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Boot',
    ),
}  # fmt: skip
TITLES = {'fashion_mnist': 'Fashion-MNIST'}
METHODS = {'round_to_nearest': 'round to nearest', 'efficientdm': 'EfficientDM'}
NUM_SCALE_PANELS = 6  # layers whose scales are plotted, where the config names none
NUM_SENSITIVE_LAYERS = 15
_PANEL = {'width': 340, 'height': 230}  # of a chart among several
_PAGE_WIDTH = 950  # CSS pixels, less what the names of the classes take
_IMAGE_WIDTH = 26  # CSS pixels, the least
_TIME = Axis('timestep t, from noise to image', reverse=True)


class Artefacts(NamedTuple):
    """What is in a workdir; a missing part is empty.

    Attributes:
      config: `config.json`: 'config', 'versions', 'revision', 'device'.
      metrics: `metrics.json`: 'protocol' and 'rows'.
      students: names in the order shown: calibrated before learnt, then the best last.
      images: {network: {'arr_0', 'labels'}}, the teacher first.
      losses: {student: lines of metrics.jsonl}.
      exports: {student: the packed network}.
      analyses: {student: result of the stage analyse}.
      calibration: statistics of the activations, or None.
    """

    config: dict[str, Any]
    metrics: dict[str, Any]
    students: list[str]
    images: dict[str, dict[str, np.ndarray]]
    losses: dict[str, list[dict[str, Any]]]
    exports: dict[str, exporting.Exported]
    analyses: dict[str, dict[str, Any]]
    calibration: calibrate.Calibration | None

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of `metrics.json` of each network."""
        return {row['name']: row for row in self.metrics.get('rows', [])}

    def series(self, name: str, **options: Any) -> Series:
        """The series of a network, in its colour."""
        index = 'teacher' if name == TEACHER else self.students.index(name) % 8
        return Series(name, f'c{index}', **options)

    def student_config(self, name: str) -> dict[str, Any]:
        """The options of a student."""
        return self.config.get('config', {}).get('students', {}).get(name, {})


def run(workdir: Path, config: ReportConfig) -> None:
    """Writes `report.html` into `workdir` from what the other stages left there; process 0 alone.

    Args:
      workdir: of the run.
      config: size of the grids, layers whose scales are shown.

    Raises:
      ValueError: `config.layers` names a layer without quantized inputs.
    """
    if jax.process_index() != 0:
        return
    found = read(workdir)
    sections = [
        ('Images', images_section(found, config)),
        ('Results', results_section(found)),
        ('Learning', loss_section(found)),
        ('Scales over time', scales_section(found, config)),
        ('Error over time', error_section(found)),
        ('Sensitive layers', sensitivity_section(found)),
        ('Error of the kernels', kernel_section(found)),
        ('What is quantized', plan_section(found)),
        ('How this was made', provenance_section(found)),
    ]
    body = header(found) + ''.join(
        f'<section><h2>{title}</h2>{content}</section>' for title, content in sections
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{_text(_title(found))}</title><style>{STYLE}{charts.STYLE}</style></head>'
        f'<body><main>{body}</main></body></html>\n'
    )
    # Renamed when complete: whoever has the page open never reloads half of it.
    partial = workdir / 'report.html.partial'
    partial.write_text(page, encoding='utf-8')
    os.replace(partial, workdir / 'report.html')


def read(workdir: Path) -> Artefacts:
    """Everything of `workdir` that a report shows."""

    def read_json(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text()) if path.is_file() else {}

    config, metrics = (read_json(workdir / f'{name}.json') for name in ('config', 'metrics'))
    rows = {row['name']: row for row in metrics.get('rows', [])}
    options = config.get('config', {}).get('students', {})

    def order(name: str) -> tuple:
        quant = options[name]['quant']
        learns = options[name]['finetune']['num_iterations'] > 0
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
    losses = {
        name: log.read_metrics(folder / 'finetune')
        for name, folder in folders.items()
        if (folder / 'finetune' / log.METRICS_FILE).is_file()
    }
    exports = {
        name: exporting.load(folder / 'export')
        for name, folder in folders.items()
        if (folder / 'export' / 'complete.json').is_file()
    }
    analyses = {n: read_json(f / 'analysis' / 'analysis.json') for n, f in folders.items()}
    return Artefacts(
        config=config,
        metrics=metrics,
        students=students,
        images=images,
        losses=losses,
        exports=exports,
        analyses={name: analysis for name, analysis in analyses.items() if analysis},
        calibration=calibrate.load(statistics) if statistics.is_file() else None,
    )


# Words


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


def verdict(found: Artefacts) -> str:
    """The run in one sentence of HTML: what the best student wins back, and what it costs."""
    rows = found.rows
    best = find_best(rows)
    if best is None or TEACHER not in rows:
        return 'There are no metrics yet: the stage <code>evaluate</code> makes them.'
    row, teacher, baseline = rows[best], rows[TEACHER], find_baseline(rows, best)
    distance = _text(found.metrics['protocol']['distance'])
    share = closed_gap(rows, best)
    numbers = f'{format_number(row["fd"])}, teacher {format_number(teacher["fd"])}'
    if share is None:
        text = f'reaches a {distance} of {format_number(row["fd"])} '
        text += f'(teacher {format_number(teacher["fd"])})'
    elif share <= 0:
        text = (
            f'does not improve on <b>{_text(baseline)}</b>: its {distance} is {numbers}, '
            f'that baseline {format_number(rows[baseline]["fd"])}'
        )
    else:
        text = (
            f'closes <strong>{100 * share:.0f} %</strong> of the {distance} gap that '
            f'<b>{_text(baseline)}</b> leaves ({format_number(rows[baseline]["fd"])} → {numbers})'
        )
    clauses = [text]
    if row.get('class_accuracy') is not None and teacher.get('class_accuracy') is not None:
        clauses.append(
            f'draws the class it is asked for in {_percent(row["class_accuracy"])} of its images '
            f'(teacher {_percent(teacher["class_accuracy"])})'
        )
    ratio = teacher['size_mb'] / row['size_mb']
    clauses.append(f'is <strong>{ratio:.1f} times</strong> smaller')
    sentence = f'<b>{_text(best)}</b> {", ".join(clauses[:-1])}, and {clauses[-1]}.'
    return sentence.replace(' %', '&nbsp;%')


# Tables of text, for the terminal


class Column(NamedTuple):
    """A column of the results.

    Attributes:
      key: of the row in `metrics.json`.
      title: its heading.
      show: number -> text.
      best: min, max, or None where nothing is better.
      ratio: teacher and student -> how many times better, where that is shown.
      about: what it means.
    """

    key: str
    title: str
    show: Callable[[float], str]
    best: Callable[..., Any] | None = None
    ratio: Callable[[float, float], float] | None = None
    about: str = ''


def _percent(value: float) -> str:
    return f'{100 * value:.1f} %'.replace('100.0 %', '100 %')


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f'{value:.{digits}f}'


def columns(distance: str) -> list[Column]:
    """The columns of the results, for the distance named."""
    return [
        Column('fd', distance, _fixed(2), min, None, 'distance to the real images, features'),
        Column('precision', 'precision', _fixed(3), max, None, 'share that looks real'),
        Column('recall', 'recall', _fixed(3), max, None, 'share of the real images covered'),
        Column('class_accuracy', 'class', _percent, max, None, 'recognised as their class'),
        Column('psnr_to_teacher', 'PSNR dB', _fixed(1), max, None, 'same seeds as the teacher'),
        Column('ssim_to_teacher', 'SSIM', _fixed(3), max, None, 'same seeds as the teacher'),
        Column('size_mb', 'MB', _fixed(2), min, lambda t, s: t / s, 'of the file'),
        Column('images_per_second', 'images/s', _fixed(1), max, lambda t, s: s / t, 'sampled'),
        Column('finetune_seconds', 'tuning s', _fixed(0), None, None, 'time of fine-tuning'),
    ]


def best_values(table: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best value among the students in each column where they differ."""
    result = {}
    for column in table:
        values = [r[column.key] for r in rows if r['name'] != TEACHER and _known(r, column.key)]
        if column.best is not None and len(set(values)) > 1:
            result[column.key] = column.best(values)
    return result


def _known(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) is not None and math.isfinite(row[key])


def metrics_table(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as aligned lines of text; `*` marks the best student of a column.

    Args:
      protocol: of `metrics.json`.
      rows: one per network.
    """
    table = columns(protocol['distance'])
    best = best_values(table, rows)
    cells = [['network', 'bits', *(column.title for column in table)]]
    for row in rows:
        line = [row['name'], f'W{row["weight_bits"]}A{row["activation_bits"]}']
        for column in table:
            if not _known(row, column.key):
                line.append('-')
                continue
            text = column.show(row[column.key])
            is_best = row['name'] != TEACHER and row[column.key] == best.get(column.key)
            line.append(text + ('*' if is_best else ' '))
        cells.append(line)
    sampler = protocol['sampler']
    return [
        f'{protocol["num_images"]} images per network, {sampler["name"]} with '
        f'{sampler["num_steps"]} steps, seed {protocol["seed"]}, {protocol["device"]}',
        *_aligned(cells, left=2),
    ]


def plan_table(layers: Mapping[str, QuantizableLayer], plan: Plan) -> list[str]:
    """How every layer is quantized, with the megabytes of its kernel, as aligned lines of text.

    Args:
      layers: every quantizable layer, by path.
      plan: of a student.
    """
    cells = [['layer', 'kind', 'weights', 'inputs', 'per timestep', 'MB float', 'MB']]
    total_before = total_after = 0.0
    for path, layer in layers.items():
        spec = plan.get(path)
        before, after = kernel_bytes(layer, spec)
        total_before, total_after = total_before + before, total_after + after
        weight, inputs = (None, None) if spec is None else (spec.weight, spec.inputs)
        timed = '-' if inputs is None else ('yes' if spec.per_timestep else 'no')
        kernel = ['-', '-', '-']
        if layer.weight_shape is not None:
            kernel = [_describe_spec(weight), f'{before / 1e6:.4f}', f'{after / 1e6:.4f}']
        cells.append([path, layer.kind, kernel[0], _describe_spec(inputs), timed, *kernel[1:]])
    quantized = sum(path in plan for path in layers)
    cells.append(
        [f'{quantized} of {len(layers)} layers quantized', '', '', '', '',
         f'{total_before / 1e6:.4f}', f'{total_after / 1e6:.4f}']
    )  # fmt: skip
    return _aligned(cells, left=5)


def kernel_bytes(layer: QuantizableLayer, spec: LayerSpec | None) -> tuple[int, int]:
    """Bytes of a layer's kernel in float32, and as `spec` stores it."""
    if layer.weight_shape is None:
        return 0, 0
    shape = layer.weight_shape
    before = 4 * math.prod(shape)
    if spec is None or spec.weight is None:
        return before, before
    num_rows = math.prod(shape) // shape[-2]
    num_scales = math.prod(scale_shape(shape, spec.weight))
    scales = num_scales * (4 if spec.weight.symmetric else 5)
    return before, num_rows * packed_length(shape[-2], spec.weight.bits) + scales


def _describe_spec(spec: QuantSpec | None) -> str:
    return 'float' if spec is None else f'{spec.bits} bits {spec.granularity}'


def _aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns two spaces apart, the first `left` flush left, a rule below the heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '  '.join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return [lines[0], '-' * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


# Sections of the page


def _text(value: Any) -> str:
    return html.escape(str(value))


def _absent(what: str, stage: str) -> str:
    return f'<p class="absent">{what}: the stage <code>{stage}</code> makes them.</p>'


def _figure(content: str, caption: str, css: str = '') -> str:
    return f'<figure class="{css}">{content}<figcaption>{caption}</figcaption></figure>'


def _title(found: Artefacts) -> str:
    path = found.config.get('config', {}).get('teacher', {}).get('path', 'Diffusion')
    name = Path(str(path)).name.removesuffix('.safetensors')
    return f'{TITLES.get(name, name.replace("_", " ").capitalize())}, quantized'


def header(found: Artefacts) -> str:
    """Title, verdict, and the numbers of the best student."""
    cards = ''
    rows = found.rows
    if (best := find_best(rows)) is not None and TEACHER in rows:
        table = {column.key: column for column in columns(found.metrics['protocol']['distance'])}
        names = {'class_accuracy': 'class accuracy', 'size_mb': 'megabytes',
                 'images_per_second': 'images per second'}  # fmt: skip
        for key in ('fd', 'class_accuracy', 'size_mb', 'images_per_second'):
            if _known(rows[best], key) and _known(rows[TEACHER], key):
                show = table[key].show
                title = names.get(key, table[key].title)
                cards += (
                    f'<div class="card"><span>{_text(title)}</span>'
                    f'<b>{show(rows[best][key])}</b>'
                    f'<i>teacher {show(rows[TEACHER][key])}</i></div>'
                )
    return (
        f'<header><p class="overline">dmq_jax report</p><h1>{_text(_title(found))}</h1>'
        f'<p class="verdict">{verdict(found)}</p>'
        + (f'<div class="cards">{cards}</div>' if cards else '')
        + '</header>'
    )


def images_section(found: Artefacts, config: ReportConfig) -> str:
    """The same seeds drawn by every network, a row per class."""
    if not found.images:
        return _absent('No images yet', 'sample')
    labels = next(iter(found.images.values()))['labels']
    # Fewer columns rather than networks that can only be seen by scrolling.
    most = max(3, _PAGE_WIDTH // (len(found.images) * _IMAGE_WIDTH))
    names, picked = pick_images(labels, config.grid_size, most, _class_names(found))
    count = min(len(one['arr_0']) for one in found.images.values())
    rows = ''.join(f'<span>{_text(name)}</span>' for name in names)
    cells = f'<i></i><div class="classes">{rows}</div>'
    for name, one in found.images.items():
        shown = one['arr_0'][np.minimum(picked, count - 1)]
        uri = charts.data_uri(charts.image_grid(shown))
        label = _text(name).replace('_', '_<wbr>')
        cells += (
            f'<b class="{found.series(name).color}">{label}</b>'
            f'<img src="{uri}" alt="images of {_text(name)}">'
        )
    widths = f'auto repeat({len(found.images)}, minmax({picked.shape[1] * _IMAGE_WIDTH}px, 1fr))'
    return _figure(
        f'<div class="scroll"><div class="grids" style="grid-template-columns:{widths}">'
        f'{cells}</div></div>',
        'Every network starts from the same noise, so images at the same place should match: '
        'compare outlines and textures with the teacher’s.',
    )


def pick_images(
    labels: np.ndarray, grid_size: int, most: int, class_names: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """Names of the rows (none without labels), and the index of each image [rows, columns].

    Args:
      labels: class of each image; empty if unconditional.
      grid_size: columns, and rows of unlabelled images; of labelled ones, at least 10 rows.
      most: columns.
      class_names: by label; None shows numbers.
    """
    if not labels.size:
        side = min(grid_size, most)
        return [], np.arange(grid_size * side).reshape(grid_size, side)
    classes = np.unique(labels)[: max(grid_size, 10)]
    found = [np.flatnonzero(labels == label) for label in classes]
    num_columns = max(1, min(grid_size, most, *(len(indices) for indices in found)))
    names = [str(label) if class_names is None else class_names[label] for label in classes]
    return names, np.stack([indices[:num_columns] for indices in found])


def _class_names(found: Artefacts) -> Sequence[str] | None:
    path = found.config.get('config', {}).get('evaluate', {}).get('reference')
    return CLASSES.get(str(path))


def results_section(found: Artefacts) -> str:
    """All metrics of all networks."""
    if not found.rows:
        return _absent('No metrics yet', 'evaluate')
    protocol = found.metrics['protocol']
    rows = [found.rows[n] for n in (TEACHER, *found.students) if n in found.rows]
    table = columns(protocol['distance'])
    best = best_values(table, rows)
    arrows = {min: ' ↓', max: ' ↑', None: ''}
    heading = '<th scope="col">network</th>' + ''.join(
        f'<th scope="col" title="{_text(c.about)}">{_text(c.title)}{arrows[c.best]}</th>'
        for c in table
    )
    body = ''
    for row in rows:
        about = 'float' if row['name'] == TEACHER else describe_student(
            found.student_config(row['name'])
        )  # fmt: skip
        color = found.series(row['name']).color
        body += (
            f'<tr><th scope="row"><span class="name {color}">{_text(row["name"])}</span>'
            f'<small>{_text(about)}</small></th>'
        )
        for column in table:
            if not _known(row, column.key):
                body += '<td class="none">–</td>'
                continue
            value, ratio = row[column.key], ''
            teacher = found.rows.get(TEACHER, {})
            if column.ratio and row['name'] != TEACHER and _known(teacher, column.key):
                ratio = f'<small>{column.ratio(teacher[column.key], value):.2f}×</small>'
            is_best = row['name'] != TEACHER and value == best.get(column.key)
            text = column.show(value)
            shown = f'<b>{text}</b>' if is_best else text
            body += f'<td{" class=best" * is_best}>{shown}{ratio}</td>'
        body += '</tr>'
    sampler = protocol['sampler']
    return _figure(
        f'<div class="scroll"><table class="results"><thead><tr>{heading}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>',
        f'The best student of each column is bold; × is against the teacher. '
        f'{protocol["num_images"]} images per network, {_text(sampler["name"])} with '
        f'{sampler["num_steps"]} steps, {protocol["reference_images"]} real images, students in '
        f'{_text(protocol["mode"])} arithmetic on {_text(protocol["device"])}. '
        + _gap_sentence(found.rows, found.students),
    )


def _gap_sentence(rows: Mapping[str, Mapping[str, Any]], students: Sequence[str]) -> str:
    shares = {n: closed_gap(rows, n) for n in students if n in rows}
    parts = [f'{_text(n)} {100 * share:.0f} %' for n, share in shares.items() if share is not None]
    if not parts:
        return ''
    return (
        f'Share of the distance to the teacher that is closed, counted from round to nearest of '
        f'the same bits and coverage (static where there is one): {", ".join(parts)}.'
    )


def loss_section(found: Artefacts) -> str:
    """The loss of every fine-tuned student."""
    learnt = {name: lines for name, lines in found.losses.items() if lines}
    if not learnt:
        if any(found.student_config(n)['finetune']['num_iterations'] for n in found.students):
            return _absent('No losses yet', 'finetune')
        return '<p class="absent">No student of this run is fine-tuned.</p>'
    series = [
        found.series(n, points=[(line['step'], line['loss']) for line in lines if 'loss' in line])
        for n, lines in learnt.items()
    ]
    chart = charts.line_chart(series, Axis('optimizer step'), Axis('loss', log=True))
    return _figure(
        f'<div>{charts.legend(series)}{chart}</div>',
        'Squared distance between the predictions of student and teacher, per image. A curve that '
        'still falls at the end asks for more steps; one that jumps, for lower learning rates.',
        'beside',
    )


def scales_section(found: Artefacts, config: ReportConfig) -> str:
    """Scales of the activations over time, calibrated and learnt."""
    timed = [n for n in found.students if n in found.exports and _has_rows(found.exports[n])]
    if not found.exports:
        return _absent('No scales yet', 'export')
    if not timed and not config.layers:
        return '<p class="absent">No student of this run has scales that change over time.</p>'
    names = [n for n in found.students if n in found.exports]
    paths = list(config.layers) or varying_layers(found.exports[timed[-1]], NUM_SCALE_PANELS)
    used: list[Series] = []
    panels = ''
    for path in paths:
        known = [n for n in names if path in found.exports[n].tables]
        if not known:
            raise ValueError(
                f'report.layers has {path!r}: expected layers with quantized inputs, such as '
                f'{list(found.exports[names[-1]].tables)[:3]}.'
            )
        for role in found.exports[known[-1]].tables[path]:
            series = _scale_series(found, known, path, role)
            used += series
            title = path if role == 'input' else f'{path}, {role}'
            y_axis = Axis('scale (units per integer step)', from_zero=True)
            panels += charts.line_chart(series, _TIME, y_axis, title=title, **_PANEL)
    return _figure(
        f'{charts.legend(used)}<div class="panels">{panels}</div>',
        'The size of one integer step of a layer’s inputs. Where it changes over time, one scale '
        'for all timesteps must either clip or waste resolution; dotted lines are the calibrated '
        'scales that learning started from.',
    )


def _has_rows(exported: exporting.Exported) -> bool:
    return any(
        table['scale'].size > 1 for roles in exported.tables.values() for table in roles.values()
    )


def _scale_series(found: Artefacts, names: Sequence[str], path: str, role: str) -> list[Series]:
    series = []
    for name in names:
        exported = found.exports[name]
        spec = {path: exported.plan[path]}
        method = found.student_config(name).get('method', {}).get('name')
        if found.calibration is not None and method != 'round_to_nearest':
            start = init_inputs(spec, found.calibration.stats)[path][role]['scale']
            label = f'{name}, calibrated'
            points = _over_time(found.calibration.timesteps, np.asarray(start))
            series.append(found.series(name, points=points, dashed=True)._replace(name=label))
        scale = exported.tables[path][role]['scale']
        series.append(found.series(name, points=_over_time(exported.timesteps, scale)))
    return series


def _over_time(timesteps: np.ndarray, scale: np.ndarray) -> list[tuple[float, float]]:
    values = np.broadcast_to(scale.reshape(-1), np.shape(timesteps))
    return [(float(t), float(v)) for t, v in zip(timesteps, values, strict=True)]


def varying_layers(exported: exporting.Exported, count: int) -> list[str]:
    """The layers whose scales change most over time, at most one of each name, such as 'conv2'."""
    changes = {
        path: max(float(np.std(t['scale']) / np.mean(t['scale'])) for t in roles.values())
        for path, roles in exported.tables.items()
    }
    chosen: dict[str, str] = {}
    for path in sorted(changes, key=changes.get, reverse=True):
        if changes[path] > 0:
            chosen.setdefault(path.rpartition('/')[2], path)
    return list(chosen.values())[:count]


def error_section(found: Artefacts) -> str:
    """The error of the prediction over time: in all, and of weights and activations alone."""
    if not found.analyses:
        return _absent('No error analysis yet', 'analyse')
    titles = {
        'student': 'The whole student',
        'weights': 'Its weights alone',
        'activations': 'Its activations alone',
    }
    values = [v for a in found.analyses.values() for part in a['error'].values() for v in part]
    y_axis = Axis('relative squared error', log=True)
    y_axis = y_axis._replace(range=charts.data_range(values, y_axis))
    panels = ''
    for part, title in titles.items():
        series = [
            found.series(n, points=list(zip(a['timesteps'], a['error'][part], strict=True)))
            for n, a in found.analyses.items()
        ]
        panels += charts.line_chart(series, _TIME, y_axis, title=title, **_PANEL)
    return _figure(
        f'{charts.legend(series)}<div class="panels">{panels}</div>',
        '|student − teacher|² / |teacher|² of the predicted noise, on the teacher’s own '
        'trajectory. Whichever is higher, weights alone or activations alone, deserves more bits.',
    )


def sensitivity_section(found: Artefacts) -> str:
    """The layers that cost most when they alone are quantized."""
    if not found.analyses:
        return _absent('No error analysis yet', 'analyse')
    values, series = _layer_values(found, 'sensitivity')
    last = series[-1].name
    most = sorted(values, key=lambda p: values[p].get(last, 0.0), reverse=True)
    rows = {path: values[path] for path in most[:NUM_SENSITIVE_LAYERS]}
    analysis = found.analyses[last]
    times = ', '.join(map(str, analysis['sensitivity_timesteps']))
    chart = charts.dot_chart(rows, series, Axis('relative squared error', log=True))
    return _figure(
        f'<div>{charts.legend(series)}{chart}</div>',
        f'Error of the prediction when this layer alone, its kernel and its inputs, is quantized '
        f'(mean over t = {times}); the {len(rows)} largest of {_text(last)}. The first rows are '
        f'where a rule with more bits helps most.',
        'beside',
    )


def kernel_section(found: Artefacts) -> str:
    """How far every quantized kernel is from the teacher's."""
    if not found.analyses:
        return _absent('No error analysis yet', 'analyse')
    values, series = _layer_values(found, 'weight_error')
    if not values:
        return '<p class="absent">No student of this run quantizes weights.</p>'
    axis = Axis('|W − Ŵ|² / |W|²', log=True)
    return _figure(
        f'{charts.legend(series)}<div class="scroll"><div class="strip">'
        f'{charts.strip_chart(values, series, axis)}</div></div>',
        'One column per layer in the order of execution. Rounding alone sets the level of a bit '
        'width; a learnt student may move further from the teacher’s weights and still predict '
        'better. Dots of students with equal kernels cover each other.',
    )


def _layer_values(found: Artefacts, key: str) -> tuple[dict[str, dict[str, float]], list[Series]]:
    values: dict[str, dict[str, float]] = {}
    for name, analysis in found.analyses.items():
        for path, layer in analysis['layers'].items():
            if layer[key] is not None:
                values.setdefault(path, {})[name] = layer[key]
    return values, [found.series(name) for name in found.analyses]


def plan_section(found: Artefacts) -> str:
    """Bits, megabytes and exempt layers of every student."""
    if not found.exports:
        return _absent('No exports yet', 'export')
    heading = ''.join(
        f'<th scope="col">{title}</th>'
        for title in ('student', 'layers', 'kernels MB', 'activation scales', 'left in float')
    )
    body = details = ''
    known = quantizable_layers(next(iter(found.exports.values())))
    for name in (n for n in found.students if n in found.exports):
        plan = found.exports[name].plan
        counts: dict[str, int] = {}
        for path in known:
            spec = plan.get(path)
            width = 'float' if spec is None else _describe_bits(spec)
            counts[width] = counts.get(width, 0) + 1
        sizes = np.sum([kernel_bytes(layer, plan.get(p)) for p, layer in known.items()], axis=0)
        scales = sum(
            table['scale'].size for t in found.exports[name].tables.values() for table in t.values()
        )
        kinds = [path.rpartition('/')[2] for path in known if path not in plan]
        exempt = ', '.join(f'{kinds.count(kind)} × {kind}' for kind in dict.fromkeys(kinds))
        bits = '<br>'.join(f'{count} × {_text(width)}' for width, count in counts.items())
        body += (
            f'<tr><th scope="row"><span class="name {found.series(name).color}">{_text(name)}'
            f'</span><small>{_text(describe_student(found.student_config(name)))}</small></th>'
            f'<td>{bits}</td><td>{sizes[1] / 1e6:.2f}<small>of {sizes[0] / 1e6:.2f}</small></td>'
            f'<td>{scales}</td><td class="paths">{_text(exempt) or "–"}</td></tr>'
        )
        lines = '\n'.join(plan_table(known, plan))
        details += (
            f'<details><summary>Every layer of {_text(name)}</summary>'
            f'<pre>{_text(lines)}</pre></details>'
        )
    return (
        _figure(
            f'<div class="scroll"><table class="plan"><thead><tr>{heading}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>',
            'W is the width of a layer’s weights, A of its inputs; the remaining parameters '
            '(biases, norms, embeddings) stay in float and are part of the file’s size only.',
        )
        + details
    )


def _describe_bits(spec: LayerSpec) -> str:
    weight, inputs = (
        f'{s.bits}' if s is not None else ' float' for s in (spec.weight, spec.inputs)
    )
    return f'A{inputs}' if spec.weight is None else f'W{weight}A{inputs}'


def quantizable_layers(exported: exporting.Exported) -> dict[str, QuantizableLayer]:
    """Every layer of the float network that could be quantized, in the order of execution."""
    network, info = exported.network, exported.info
    params = jax.eval_shape(
        lambda key: denoisers.init_params(network, info, key), jax.random.key(0)
    )
    inputs = denoisers.example_inputs(info, batch_size=1)
    return layers_lib.quantizable_layers(network.apply, params, *inputs)


def provenance_section(found: Artefacts) -> str:
    """Protocol, versions, device, revision and the whole config."""
    protocol = found.metrics.get('protocol', {})
    versions = found.config.get('versions') or protocol.get('versions', {})
    facts = {
        'revision': found.config.get('revision') or protocol.get('revision'),
        'device': found.config.get('device') or protocol.get('device'),
        'versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
        'features': protocol.get('features'),
        'reference': protocol.get('reference'),
        'sampler': ', '.join(f'{k} {v}' for k, v in protocol.get('sampler', {}).items()),
        'seed': protocol.get('seed'),
    }
    items = ''.join(
        f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>'
        for name, value in facts.items()
        if value not in (None, '')
    )
    config = json.dumps(found.config.get('config', {}), indent=2)
    return (
        f'<dl>{items}</dl><details><summary>All options of the run</summary>'
        f'<pre>{_text(config)}</pre></details>'
    )


STYLE = """
:root {
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --paper: #fcfcfb; --card: #fff; --ink: #1b1c1e; --muted: #6a6e75; --rule: #e6e6e3;
  --band: #f3f3f0; --accent: #22242a;
  --teacher: #85888f; --c0: #d9822b; --c1: #2a6fdb; --c2: #12876b; --c3: #b0399b; --c4: #c9413a;
  --c5: #6f58d8; --c6: #0b8aa0; --c7: #8a6d1c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141518; --card: #1b1d21; --ink: #e9e9e6; --muted: #9a9ea6; --rule: #2c2e34;
    --band: #1a1c20; --accent: #f4f4f1;
    --teacher: #9b9fa8; --c0: #f0a04b; --c1: #6ea3ff; --c2: #3cc29c; --c3: #e078cc; --c4: #f07a72;
    --c5: #a795ff; --c6: #43c2d6; --c7: #cdae52;
  }
}
.cteacher { --c: var(--teacher); } .c0 { --c: var(--c0); } .c1 { --c: var(--c1); }
.c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 4.5rem 2rem 6rem; }
header { margin-bottom: 4.5rem; }
.overline { margin: 0; font-size: .8rem; letter-spacing: .08em; color: var(--muted); }
h1 { margin: .3rem 0 1.4rem; font-size: clamp(2rem, 5vw, 3rem); line-height: 1.1;
  letter-spacing: -.025em; font-weight: 680; }
h2 { margin: 0 0 1.2rem; font-size: 1.3rem; letter-spacing: -.012em; font-weight: 640; }
section { margin: 0 0 4.5rem; padding-top: 1.6rem; border-top: 1px solid var(--rule); }
.verdict { max-width: 46rem; margin: 0 0 2.2rem; font-size: clamp(1.1rem, 2.4vw, 1.32rem);
  line-height: 1.5; color: var(--muted); }
.verdict b, .verdict strong { color: var(--ink); font-weight: 620; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1rem; }
.card { padding: 1rem 1.2rem 1.1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; }
.card span, .card i { display: block; font-size: .82rem; font-style: normal; color: var(--muted); }
.card b { display: block; font-size: 1.75rem; line-height: 1.3; letter-spacing: -.02em;
  font-weight: 640; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { max-width: 46rem; margin-top: 1.1rem; font-size: .9rem; color: var(--muted); }
.absent { color: var(--muted); }
code, pre { font-family: var(--mono); font-size: .86em; }
.scroll { overflow-x: auto; margin: 0 -2rem; padding: 0 2rem; }
.grids { display: grid; grid-template-rows: auto auto; grid-auto-flow: column; gap: .5rem 1rem; }
.grids b { align-self: end; padding-bottom: .35rem; border-bottom: 3px solid var(--c);
  font-size: .86rem; font-weight: 600; line-height: 1.3; }
.grids img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
.classes { display: flex; flex-direction: column; position: sticky; left: -2rem; z-index: 1;
  background: var(--paper); }
.classes span { flex: 1; display: flex; align-items: center; justify-content: flex-end;
  font-size: .78rem; color: var(--muted); }
table { width: 100%; border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .65rem .55rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { font-size: .78rem; font-weight: 500; color: var(--muted); }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; white-space: normal; min-width: 8.5rem; }
td small, th small { display: block; font-size: .76rem; font-weight: 400; color: var(--muted); }
td.none { color: var(--muted); }
td.best b { font-weight: 680; }
.name::before { content: ""; display: inline-block; width: .6em; height: .6em; margin-right: .5em;
  border-radius: 50%; background: var(--c); }
.plan td { text-align: left; } .plan thead th { text-align: left; }
.plan td.paths { white-space: normal; font: .78rem/1.5 var(--mono); color: var(--muted);
  min-width: 12rem; overflow-wrap: anywhere; }
.panels { display: grid; gap: 2.2rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.beside { display: grid; gap: 0 3rem; grid-template-columns: minmax(0, 540px) minmax(0, 1fr); }
.beside figcaption { margin-top: 3.2rem; }
.strip { min-width: 720px; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--muted); font-size: .92rem; }
summary:hover { color: var(--ink); }
pre { overflow-x: auto; margin: .8rem 0 0; padding: 1.1rem 1.2rem; line-height: 1.5;
  font-size: .74rem; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.4rem; margin: 0 0 1rem;
  font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 2.2rem 1.1rem 4rem; }
  header, section { margin-bottom: 3rem; }
  .scroll { margin: 0 -1.1rem; padding: 0 1.1rem; } .classes { left: -1.1rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .7rem; }
  .card { padding: .8rem .95rem; } .card b { font-size: 1.45rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
}
@media (max-width: 860px) {
  .beside { display: block; } .beside figcaption { margin-top: 1.1rem; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #111; --muted: #555; --rule: #ddd; --band: #f4f4f4; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section, header { margin-bottom: 1.6rem; } figure, .card { break-inside: avoid; }
  .scroll { overflow: visible; margin: 0; padding: 0; } details { display: none; }
  .strip { min-width: 0; }
}
"""
