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
