import pytest

from dmq_jax.reporting import results
from tests.reporting import finished_run


def test_calibrated_students_come_before_learnt_ones(tmp_path):
    finished_run.write(tmp_path)
    assert results.read(tmp_path).students == ['plain', 'tuned']


def test_the_gap_is_measured_from_the_baseline_to_the_teacher():
    assert results.closed_gap(finished_run.rows(), 'tuned') == pytest.approx(0.8)
    assert results.closed_gap(finished_run.rows(tuned=1.0), 'tuned') == 1
    assert results.closed_gap(finished_run.rows(tuned=11.0), 'tuned') == 0
    assert results.closed_gap(finished_run.rows(plain=1.0), 'tuned') is None
    assert results.closed_gap(finished_run.rows(), 'plain') is None


def test_the_baseline_is_the_static_one():
    table = finished_run.rows()
    table['timed'] = finished_run.row('timed', 2.0, 'round_to_nearest', per_timestep=True)
    assert results.find_baseline(table) == 'plain'
    assert results.find_best(table) == 'timed'


def test_students_with_more_bits_are_not_compared_with_the_baseline():
    table = finished_run.rows()
    table['wide'] = finished_run.row(
        'wide', 1.1, 'round_to_nearest', weight_bits=8, activation_bits=8
    )
    assert results.find_baseline(table) == 'plain'
    assert results.find_best(table) == 'tuned'


def test_noise_and_guidance_are_told_where_there_are_any():
    options = {'name': 'ddim', 'num_steps': 20, 'eta': 0.0, 'guidance_scale': 1.0}
    assert results.describe_sampler(options) == 'ddim with 20 steps'
    options |= {'eta': 1.0, 'guidance_scale': 7.5}
    assert results.describe_sampler(options) == 'ddim with 20 steps, eta 1, guidance 7.5'
