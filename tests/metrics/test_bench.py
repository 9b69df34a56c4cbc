"""The benchmark on small features: every row is there and its numbers make sense."""

import functools
import json

import numpy as np
import pytest

from dmq_jax.metrics import bench

METRICS = tuple(row for row in bench.ROWS if row != 'features')


def test_every_metric_is_measured_and_reported(monkeypatch):
    quick = functools.partial(bench.kernel_distance.kernel_distance, num_subsets=1)
    monkeypatch.setattr(bench.kernel_distance, 'kernel_distance', quick)
    rows = dict(bench.measure(METRICS, 1000, width=8))
    assert tuple(rows) == ('statistics', 'frechet', 'inception_score', 'neighbours',
                           'kernel_distance', 'neighbours_adm_fp16')  # fmt: skip
    for name, row in rows.items():
        assert row.duration_s > 0 and row.peak_rss_gb > 0.01, name
        assert row.images_per_second * row.duration_s == pytest.approx(1000)
        assert row.result, name
        line = bench.table_line(name, row)
        assert line.count('|') == bench.TABLE_HEAD.partition('\n')[0].count('|')
    report = json.loads(json.dumps(bench.report(rows, 1000)))
    assert report['rows']['frechet']['duration_s'] == rows['frechet'].duration_s


def test_rows_not_asked_for_are_not_measured():
    assert [name for name, _ in bench.measure(('frechet',), 1000, width=4)] == ['frechet']


def test_made_up_features_are_repeatable_and_differ_by_seed():
    one, again, other = (bench.made_up_features(1500, seed, 16) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert one.dtype == np.float32 and one.shape == (1500, 16) and (one >= 0).all()
    assert not np.array_equal(one, other)
