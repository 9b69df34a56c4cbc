"""The results of many networks as one HTML table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dmq_jax.reporting.markup import escape
from dmq_jax.reporting.results import TEACHER
from dmq_jax.reporting.tables import Column, best_values, is_known

_ARROWS = {min: ' ↓', max: ' ↑', None: ''}


class Line(NamedTuple):
    """A line of the table.

    Attributes:
      row: of `metrics.json`.
      heading: HTML of its first cell.
    """

    row: Mapping[str, Any]
    heading: str


def results_table(columns: Sequence[Column], groups: Sequence[Sequence[Line]]) -> str:
    """Every known number of every network, the best student of each group and column in bold.

    Args:
      columns: those shown.
      groups: lines that compete with one another; one of them has the teacher, which ratios refer
        to.
    """
    teacher = next((line.row for g in groups for line in g if line.row['name'] == TEACHER), {})
    heading = ''.join(
        f'<th scope="col" title="{escape(c.about)}">{escape(c.title)}{_ARROWS[c.best]}</th>'
        for c in columns
    )
    body = ''
    for group in groups:
        best = best_values(columns, [line.row for line in group])
        for row, title in group:
            cells = ''.join(_cell(row, column, best, teacher) for column in columns)
            body += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col">network</th>'
        f'{heading}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(
    row: Mapping[str, Any], column: Column, best: Mapping[str, float], teacher: Mapping[str, Any]
) -> str:
    if not is_known(row, column.key):
        return '<td class="none">–</td>'
    value, is_student = row[column.key], row['name'] != TEACHER
    text = column.show(value)
    is_best = is_student and value == best.get(column.key)
    if is_best:
        text = f'<b>{text}</b>'
    if column.ratio and is_student and is_known(teacher, column.key):
        text += f'<small>{column.ratio(teacher[column.key], value):.2f}×</small>'
    return f'<td{" class=best" * is_best}>{text}</td>'
