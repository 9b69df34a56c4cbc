import dataclasses

import numpy as np

from dmq_jax import denoisers
from dmq_jax.quant.plan import QuantizableLayer
from dmq_jax.reporting import tables
from tests import tiny
from tests.reporting import finished_run


def test_the_metrics_table_is_aligned_and_marks_the_best_student():
    lines = tables.metrics_table(finished_run.PROTOCOL, list(finished_run.rows().values()))
    table = [line for line in lines if 'teacher' in line or 'plain' in line or 'tuned' in line]
    ends = {line.index(number) + len(number) for line, number in zip(
        table, ('1.000', '11.000', '3.000'), strict=True)}  # fmt: skip
    assert len(ends) == 1
    assert '3.000*' in table[2] and '*' not in table[0] + table[1]


def test_the_plan_table_counts_the_bytes_that_are_stored():
    layers = denoisers.quantizable(tiny.teacher())
    rng = np.random.default_rng(0)
    for student in finished_run.CONFIG.students.values():
        for symmetric in (True, False):
            quant = dataclasses.replace(student.quant, weight_symmetric=symmetric, weight_bits=8)
            exported = finished_run.make_export(
                layers, dataclasses.replace(student, quant=quant), rng
            )
            for path, weight in exported.weights.items():
                _, after = tables.kernel_bytes(layers[path], exported.plan[path])
                assert after == weight.nbytes
            lines = tables.plan_table(layers, exported.plan)
            assert len(lines) == len(layers) + 3
            total = sum(
                tables.kernel_bytes(layer, exported.plan.get(path))[1]
                for path, layer in layers.items()
            )
            assert lines[-1].split()[-1] == f'{total / 1e6:.4f}'


def test_a_layer_left_alone_is_shown_as_float():
    layers = {'a': QuantizableLayer(kind='dense', weight_shape=(4, 5))}
    assert tables.plan_table(layers, {})[2].split() == [
        'a', 'dense', 'float', 'float', '-', '0.0001', '0.0001'
    ]  # fmt: skip


def test_a_column_without_any_number_is_not_shown():
    rows = [{'name': 'teacher', 'fd': 1.0, 'set_mb': None}, {'name': 'tuned', 'fd': 2.0}]
    assert [column.key for column in tables.known_columns('FD', rows)] == ['fd']
    rows[1]['set_mb'] = 0.5
    assert [column.key for column in tables.known_columns('FD', rows)] == ['fd', 'set_mb']
