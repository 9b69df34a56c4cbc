import json

import numpy as np
import pytest

from dmq_jax.reporting import outcome_sections, results
from tests.reporting import finished_run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    finished_run.write(folder)
    return folder


@pytest.mark.parametrize(
    'distances, text',
    [
        ({}, 'closes <strong>80&nbsp;%</strong> of the FD-FMNIST gap'),
        ({'tuned': 12.0}, 'does not improve on <b>plain</b>'),
        ({'plain': 0.5}, 'reaches a FD-FMNIST of 3'),
    ],
)
def test_the_verdict_says_what_the_numbers_say(workdir, distances, text):
    table = list(finished_run.rows(**distances).values())
    found = results.read(workdir)._replace(
        metrics={'protocol': finished_run.PROTOCOL, 'rows': table}
    )
    sentence = outcome_sections.verdict(found)
    assert text in sentence
    assert '<strong>4.0 times</strong> smaller' in sentence


def test_images_of_a_row_share_their_class():
    labels = np.array([2, 0, 1, 2, 0, 0, 1])
    names, picked = outcome_sections.pick_images(labels, 8, 8, ('a', 'b', 'c'))
    assert names == ['a', 'b', 'c']
    assert picked.shape == (3, 2)
    np.testing.assert_array_equal(labels[picked], [[0, 0], [1, 1], [2, 2]])


def test_unlabelled_images_fill_a_square():
    names, picked = outcome_sections.pick_images(np.zeros(0, np.int32), 4, 8, None)
    assert names == []
    np.testing.assert_array_equal(picked, np.arange(16).reshape(4, 4))


def learning(workdir, iterations, lines):
    """The section of a run in which one student has these iterations and lines, by stage."""
    found = results.read(workdir)
    options = {stage: {'num_iterations': count} for stage, count in iterations.items()}
    config = {'config': {'students': {'tuned': options, 'plain': {}}}}
    kept = {stage: {'tuned': rows} for stage, rows in lines.items()}
    return outcome_sections.learning_section(found._replace(config=config, learning=kept))


def test_every_stage_of_learning_has_a_chart_of_its_own(workdir):
    losses = [{'step': step, 'loss': 1 / step} for step in (1, 2)]
    blocks = [
        {'step': 1, 'rounding/before': 8.0, 'rounding/after': 2.0},
        {'step': 2, 'steps/before': 2.0, 'steps/after': 3.0},
    ]
    lines = {'reconstruct': blocks, 'finetune': losses, 'adapt': losses}
    titles = ('block by block', 'towards the teacher', 'Adaptation to images')
    for stage, title in zip(lines, titles, strict=True):
        section = learning(workdir, {stage: 2}, {stage: lines[stage]})
        assert [title in section for title in titles] == [other == title for other in titles]
    section = learning(workdir, dict.fromkeys(lines, 2), lines)
    assert all(title in section for title in titles)
    assert outcome_sections._shares(blocks) == [(1, 0.25), (2, 1.5)]


def test_without_lines_it_says_whether_any_are_to_come(workdir):
    assert 'learns anything' in learning(workdir, {}, {})
    assert 'No losses yet' in learning(workdir, {'adapt': 3}, {})


def test_students_that_learn_by_any_stage_come_after_those_that_do_not(tmp_path):
    finished_run.write(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    students = config['config']['students']
    for stage in ('reconstruct', 'adapt'):
        # Otherwise the one of the larger distance comes first.
        students['plain'][stage]['num_iterations'] = 5
        students['tuned']['finetune']['num_iterations'] = 0
        (tmp_path / 'config.json').write_text(json.dumps(config))
        assert results.read(tmp_path).students == ['tuned', 'plain']
        students['plain'][stage]['num_iterations'] = 0
