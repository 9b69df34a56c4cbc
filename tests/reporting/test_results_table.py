"""The HTML table of results."""

import re

from dmq_jax.reporting.results_table import Line, results_table
from dmq_jax.reporting.tables import columns

_ROWS = {
    'teacher': {'name': 'teacher', 'fd': 1.0, 'size_mb': 8.0},
    'plain': {'name': 'plain', 'fd': 3.0, 'size_mb': 2.0},
    'tuned': {'name': 'tuned', 'fd': 2.0, 'size_mb': 4.0},
}


def _table(*groups):
    shown = [column for column in columns('FD') if column.key in ('fd', 'size_mb')]
    lines = [[Line(_ROWS[name], f'<i>{name}</i>') for name in group] for group in groups]
    html = results_table(shown, lines)
    rows = re.findall(r'<th scope="row"><i>(\w+)</i></th>(.*?)</tr>', html)
    return {name: re.findall(r'<td.*?</td>', cells) for name, cells in rows}


def test_students_of_one_group_compete_and_the_teacher_does_not():
    cells = _table(['teacher', 'plain', 'tuned'])
    bold = {name: ['<b>' in cell for cell in row] for name, row in cells.items()}
    assert bold == {'teacher': [False, False], 'plain': [False, True], 'tuned': [True, False]}


def test_a_student_alone_in_its_group_is_not_the_best_of_anything():
    cells = _table(['teacher'], ['plain'], ['tuned'])
    assert not any('<b>' in cell for row in cells.values() for cell in row)


def test_ratios_refer_to_the_teacher_of_another_group():
    cells = _table(['teacher'], ['plain', 'tuned'])
    assert cells['plain'][1].endswith('<small>4.00×</small></td>')
    assert cells['tuned'][1].endswith('<small>2.00×</small></td>')
    assert '×' not in cells['teacher'][1]


def test_a_number_that_is_not_known_is_a_dash():
    shown = [column for column in columns('FD') if column.key == 'recall']
    assert '<td class="none">–</td>' in results_table(shown, [[Line(_ROWS['tuned'], 'x')]])
