"""A comparison of methods: one table as Markdown, and one page with charts and images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmq_jax.config import ReportConfig
from dmq_jax.reporting import charts
from dmq_jax.reporting.charts import Axis, Series
from dmq_jax.reporting.markup import document, escape, figure
from dmq_jax.reporting.outcome_sections import images_section
from dmq_jax.reporting.results import METHODS, NUM_COLORS, TEACHER, Artefacts, describe_sampler
from dmq_jax.reporting.results_table import Line, results_table
from dmq_jax.reporting.tables import is_known, known_columns

Row = Mapping[str, Any]


def setting(row: Row) -> str:
    """What the methods of one line have in common: 'W4A8 full'."""
    return f'W{row["weight_bits"]}A{row["activation_bits"]} {row["coverage"]}'


def method_name(row: Row) -> str:
    """A method as its paper or its config calls it; one scale for all timesteps is said."""
    name = row.get('title') or METHODS.get(row['method'], row['method'])
    return name if row['per_timestep'] else f'{name}, static'


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The students of each setting, in the order of the table."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row['name'] != TEACHER:
            found.setdefault(setting(row), []).append(row)
    return found


def markdown(table: Mapping[str, Any]) -> str:
    """Distances of all methods by setting, then every number of every cell.

    Args:
      table: 'protocol' and 'rows', as `table.json` holds them.
    """
    protocol, rows = table['protocol'], table['rows']
    distance = protocol['distance']
    settings = by_setting(rows)
    teacher = next(row for row in rows if row['name'] == TEACHER)
    names = dict.fromkeys(method_name(r) for group in settings.values() for r in group)
    lines = [
        f'{distance} of {protocol["num_images"]} images, '
        f'{describe_sampler(protocol["sampler"])}, {protocol["mode"]} arithmetic; teacher '
        f'{teacher["fd"]:.3f}. Revision {protocol["revision"]}.',
        '',
        *_table(
            ['method', *settings],
            [[name, *(_cell(group, name) for group in settings.values())] for name in names],
        ),
        '',
    ]
    shown = known_columns(distance, rows)
    body = []
    for row in [teacher, *(r for group in settings.values() for r in group)]:
        is_teacher = row['name'] == TEACHER
        numbers = [c.show(row[c.key]) if is_known(row, c.key) else '–' for c in shown]
        body.append(
            ['teacher' if is_teacher else method_name(row),
             'float' if is_teacher else setting(row), *numbers]
        )  # fmt: skip
    lines += _table(['network', 'setting', *(c.title for c in shown)], body)
    return '\n'.join(lines) + '\n'


def _cell(group: Sequence[Row], name: str) -> str:
    """The distance of one method in one setting, the best of the setting in bold."""
    values = {method_name(r): r['fd'] for r in group if is_known(r, 'fd')}
    if name not in values:
        return '–'
    text = f'{values[name]:.3f}'
    return f'**{text}**' if values[name] == min(values.values()) else text


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return '| ' + ' | '.join(cells) + ' |'

    return [line(heading), line(['---'] * len(heading)), *map(line, rows)]


def page(workdir: Path, table: Mapping[str, Any], grid_size: int) -> str:
    """The whole page: quality against bits, megabytes and minutes, then images of equal seeds.

    Args:
      workdir: holds the images.
      table: 'protocol' and 'rows', as `table.json` holds them.
      grid_size: columns of a grid of images.
    """
    rows, distance = table['rows'], table['protocol']['distance']
    settings = by_setting(rows)
    sections = {
        'Quality against bits': _bits_chart(settings, rows, distance),
        'Quality against megabytes and minutes': _cost_charts(settings, rows, distance),
        'The table': _results(settings, rows, distance),
        'Images': _grids(workdir, settings, table['protocol'], grid_size),
    }
    body = (
        f'<header><p class="overline">dmq_jax comparison</p><h1>Methods side by side</h1>'
        f'<p class="verdict">{escape(_verdict(settings, rows, distance))}</p></header>'
    )
    body += ''.join(f'<section><h2>{t}</h2>{c}</section>' for t, c in sections.items() if c)
    return document('Methods side by side', body)


def _verdict(settings: Mapping[str, Sequence[Row]], rows: Sequence[Row], distance: str) -> str:
    teacher = next(row for row in rows if row['name'] == TEACHER)
    words = []
    for name, group in settings.items():
        known = [row for row in group if is_known(row, 'fd')]
        if known:
            best = min(known, key=lambda row: row['fd'])
            words.append(f'{name}: {method_name(best)} {best["fd"]:.2f}')
    if not words:
        return 'No cell is complete yet.'
    return f'Least {distance} (teacher {teacher["fd"]:.2f}). ' + '; '.join(words) + '.'


def _series(rows: Sequence[Row]) -> list[Series]:
    """One per method, in a colour that it keeps on the whole page."""
    names = dict.fromkeys(method_name(row) for row in rows if row['name'] != TEACHER)
    return [Series(name, f'c{index % NUM_COLORS}') for index, name in enumerate(names)]


def _bits_chart(settings, rows, distance) -> str:
    if not settings:
        return ''
    teacher = Series(TEACHER, 'cteacher')
    floor = next(row['fd'] for row in rows if row['name'] == TEACHER)
    values = {
        name: {TEACHER: floor} | {method_name(r): r['fd'] for r in group if is_known(r, 'fd')}
        for name, group in settings.items()
    }
    series = [*_series(rows), teacher]
    chart = charts.dot_chart(values, series, Axis(distance, log=True))
    return figure(
        f'<div>{charts.legend(series)}{chart}</div>',
        'One row per width and coverage, one dot per method; the grey dot is the teacher. '
        'Hover for numbers.',
        'beside',
    )


def _cost_charts(settings, rows, distance) -> str:
    """Distances over what the file takes, and over what learning took."""
    if not settings:
        return ''
    drawn = []
    for key, share, label in (
        ('size_mb', 1.0, 'megabytes of the file'),
        ('finetune_seconds', 60.0, 'minutes of learning'),
    ):
        series = []
        for one in _series(rows):
            points = sorted(
                (row[key] / share, row['fd'])
                for group in settings.values()
                for row in group
                if method_name(row) == one.name and is_known(row, key) and is_known(row, 'fd')
            )
            # A method that learns nothing has no place on an axis of minutes.
            points = [(x, y) for x, y in points if x > 0]
            if points:
                series.append(one._replace(points=points, dotted=True))
        if series:
            chart = charts.line_chart(series, Axis(label), Axis(distance, log=True), title=label)
            drawn.append(f'<div>{charts.legend(series)}{chart}</div>')
    return figure(
        ''.join(drawn),
        'Each line joins the settings of one method; lower left is better.',
        'beside',
    )


def _results(settings, rows, distance) -> str:
    """Every number of every cell, the best of each setting in bold."""
    table = known_columns(distance, rows)
    teacher = [row for row in rows if row['name'] == TEACHER]
    groups = []
    for name, group in {'float': teacher, **settings}.items():
        titles = [TEACHER if row['name'] == TEACHER else method_name(row) for row in group]
        headings = [f'{escape(title)}<small>{escape(name)}</small>' for title in titles]
        groups.append([Line(row, heading) for row, heading in zip(group, headings, strict=True)])
    return figure(
        results_table(table, groups),
        'Bold: the best of its width and coverage. × is against the teacher.',
    )


def _grids(workdir: Path, settings, protocol: Mapping[str, Any], grid_size: int) -> str:
    """Per setting, the same seeds drawn by the teacher and by every method."""
    # All methods in every grid's list: a method keeps its colour.
    methods = list(dict.fromkeys(method_name(r) for group in settings.values() for r in group))
    result = ''
    for name, group in settings.items():
        images, titles = {}, {TEACHER: TEACHER} | {r['name']: method_name(r) for r in group}
        for network, title in titles.items():
            with np.load(workdir / 'samples' / network / 'images.npz') as arrays:
                images[title] = {part: arrays[part] for part in ('arr_0', 'labels')}
        shown = Artefacts(
            config={'config': {'evaluate': protocol}}, metrics={},
            students=methods, images=images,
            learning={}, exports={}, analyses={}, calibration=None,
        )  # fmt: skip
        columns_shown = max(2, math.ceil(grid_size / 2))
        grid = images_section(shown, ReportConfig(grid_size=columns_shown))
        result += f'<h3>{escape(name)}</h3>{grid}'
    return result
