"""Sections about what came out: images, metrics, the course of learning, how it was made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmq_jax.config import ReportConfig
from dmq_jax.reporting import charts
from dmq_jax.reporting.charts import Axis, format_number
from dmq_jax.reporting.markup import absent, escape, figure
from dmq_jax.reporting.results import (
    TEACHER,
    Artefacts,
    closed_gap,
    describe_sampler,
    describe_student,
    find_baseline,
    find_best,
    stages_of,
)
from dmq_jax.reporting.results_table import Line, results_table
from dmq_jax.reporting.tables import columns, is_known, known_columns, percent

CLASSES = {
    'fashion_mnist': (
        'T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
        'Boot',
    ),
}  # fmt: skip
TITLES = {'fashion_mnist': 'Fashion-MNIST'}
_PAGE_WIDTH = 950  # CSS pixels, less what the names of the classes take
_IMAGE_WIDTH = 26  # CSS pixels, the least
_GAP = 16  # CSS pixels between networks


def page_title(found: Artefacts) -> str:
    """What the run is about, e.g. 'Fashion-MNIST, quantized'."""
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
            if is_known(rows[best], key) and is_known(rows[TEACHER], key):
                show = table[key].show
                title = names.get(key, table[key].title)
                cards += (
                    f'<div class="card"><span>{escape(title)}</span>'
                    f'<b>{show(rows[best][key])}</b>'
                    f'<i>teacher {show(rows[TEACHER][key])}</i></div>'
                )
    return (
        f'<header><p class="overline">dmq_jax report</p><h1>{escape(page_title(found))}</h1>'
        f'<p class="verdict">{verdict(found)}</p>'
        + (f'<div class="cards">{cards}</div>' if cards else '')
        + '</header>'
    )


def verdict(found: Artefacts) -> str:
    """The run in one sentence of HTML: what the best student wins back, and what it costs."""
    rows = found.rows
    best = find_best(rows)
    if best is None or TEACHER not in rows:
        return 'There are no metrics yet: the stage <code>evaluate</code> makes them.'
    row, teacher, baseline = rows[best], rows[TEACHER], find_baseline(rows, best)
    distance = escape(found.metrics['protocol']['distance'])
    share = closed_gap(rows, best)
    numbers = f'{format_number(row["fd"])}, teacher {format_number(teacher["fd"])}'
    if share is None:
        text = f'reaches a {distance} of {format_number(row["fd"])} '
        text += f'(teacher {format_number(teacher["fd"])})'
    elif share <= 0:
        text = (
            f'does not improve on <b>{escape(baseline)}</b>: its {distance} is {numbers}, '
            f'that baseline {format_number(rows[baseline]["fd"])}'
        )
    else:
        text = (
            f'closes <strong>{100 * share:.0f} %</strong> of the {distance} gap that '
            f'<b>{escape(baseline)}</b> leaves ({format_number(rows[baseline]["fd"])} → {numbers})'
        )
    clauses = [text]
    if row.get('class_accuracy') is not None and teacher.get('class_accuracy') is not None:
        clauses.append(
            f'draws the class it is asked for in {percent(row["class_accuracy"])} of its images '
            f'(teacher {percent(teacher["class_accuracy"])})'
        )
    ratio = teacher['size_mb'] / row['size_mb']
    clauses.append(f'is <strong>{ratio:.1f} times</strong> smaller')
    sentence = f'<b>{escape(best)}</b> {", ".join(clauses[:-1])}, and {clauses[-1]}.'
    return sentence.replace(' %', '&nbsp;%')


def images_section(found: Artefacts, config: ReportConfig) -> str:
    """The same seeds drawn by every network, a row per class."""
    if not found.images:
        return absent('No images yet', 'sample')
    labels = next(iter(found.images.values()))['labels']
    # Fewer columns rather than networks that can only be seen by scrolling.
    most = max(3, (_PAGE_WIDTH // len(found.images) - _GAP) // _IMAGE_WIDTH)
    names, picked = pick_images(labels, config.grid_size, most, _class_names(found))
    count = min(len(one['arr_0']) for one in found.images.values())
    rows = ''.join(f'<span>{escape(name)}</span>' for name in names)
    cells = f'<i></i><div class="classes">{rows}</div>'
    for name, one in found.images.items():
        shown = one['arr_0'][np.minimum(picked, count - 1)]
        uri = charts.data_uri(charts.image_grid(shown))
        label = escape(name).replace('_', '_<wbr>')
        cells += (
            f'<b class="{found.series(name).color}">{label}</b>'
            f'<img src="{uri}" alt="images of {escape(name)}">'
        )
    widths = f'auto repeat({len(found.images)}, minmax({picked.shape[1] * _IMAGE_WIDTH}px, 1fr))'
    return figure(
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
        return absent('No metrics yet', 'evaluate')
    protocol = found.metrics['protocol']
    rows = [found.rows[n] for n in (TEACHER, *found.students) if n in found.rows]
    table = known_columns(protocol['distance'], rows)
    lines = []
    for row in rows:
        about = 'float' if row['name'] == TEACHER else describe_student(
            found.student_config(row['name'])
        )  # fmt: skip
        color = found.series(row['name']).color
        name = f'<span class="name {color}">{escape(row["name"])}</span>'
        lines.append(Line(row, f'{name}<small>{escape(about)}</small>'))
    real = protocol['reference_images'] or 'stored statistics of'
    return figure(
        results_table(table, [lines]),
        f'The best student of each column is bold; × is against the teacher. '
        f'{protocol["num_images"]} images per network, '
        f'{escape(describe_sampler(protocol["sampler"]))}, {real} real images, students in '
        f'{escape(protocol["mode"])} arithmetic on {escape(protocol["device"])}. '
        + _gap_sentence(found.rows, found.students),
    )


def _gap_sentence(rows: Mapping[str, Mapping[str, Any]], students: Sequence[str]) -> str:
    shares = {n: closed_gap(rows, n) for n in students if n in rows}
    parts = [f'{escape(n)} {100 * share:.0f} %' for n, share in shares.items() if share is not None]
    if not parts:
        return ''
    return (
        f'Share of the distance to the teacher that is closed, counted from round to nearest of '
        f'the same bits and coverage (static where there is one): {", ".join(parts)}.'
    )


# What a chart of each stage shows.
_LEARNING = {
    'reconstruct': (
        'Reconstruction, block by block',
        'Error of a block’s output after it has learnt, as a share of that before, in the order in '
        'which blocks learn, one pass after another. Above 1 a block was made worse: lower the '
        'learning rates.',
    ),
    'finetune': (
        'Fine-tuning towards the teacher',
        'Squared distance between the predictions of student and teacher, per image. A curve that '
        'still falls at the end asks for more steps; one that jumps, for lower learning rates.',
    ),
    'adapt': (
        'Adaptation to images',
        'Squared distance between the predicted noise and that which was added to the images, per '
        'image. It falls less than other losses do: some of the noise no network can tell.',
    ),
}


def learning_section(found: Artefacts) -> str:
    """What every stage of learning did, student by student."""
    stages = {stage for name in found.students for stage in stages_of(found.student_config(name))}
    if not stages:
        return '<p class="absent">No student of this run learns anything.</p>'
    result = ''
    for stage, (title, text) in _LEARNING.items():
        lines = {name: rows for name, rows in found.learning.get(stage, {}).items() if rows}
        if not lines:
            continue
        axes = Axis('optimizer step'), Axis('loss', log=True)
        points = _losses
        if stage == 'reconstruct':
            axes = Axis('block'), Axis('error after / before', log=True)
            points = _shares
        series = [found.series(name, points=points(rows)) for name, rows in lines.items()]
        chart = charts.line_chart(series, *axes, title=title)
        result += figure(f'<div>{charts.legend(series)}{chart}</div>', text, 'beside')
    return result or absent('No losses yet', 'finetune')


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(row['step'], row['loss']) for row in rows if 'loss' in row]


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The number of each block, and the share of its error that is left."""
    points = []
    for row in rows:
        errors = {name.rpartition('/')[2]: value for name, value in row.items() if '/' in name}
        if errors.get('before'):
            points.append((row['step'], errors['after'] / errors['before']))
    return points


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
        f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        for name, value in facts.items()
        if value not in (None, '')
    )
    config = json.dumps(found.config.get('config', {}), indent=2)
    return (
        f'<dl>{items}</dl><details><summary>All options of the run</summary>'
        f'<pre>{escape(config)}</pre></details>'
    )
