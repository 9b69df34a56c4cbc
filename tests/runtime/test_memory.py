import jax
import numpy as np
import pytest

from dmq_jax.runtime import memory


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a device never forgets its mark')
def test_the_most_that_was_held_within_is_found_even_if_it_is_let_go():
    with memory.watched() as outer:
        with memory.watched() as large:
            held = np.ones(25_000_000)  # 200 MB, touched
            del held
        with memory.watched() as small:
            pass
    assert large.mb > small.mb + 150
    assert outer.mb >= large.mb


def test_it_is_found_after_an_error():
    with pytest.raises(KeyError), memory.watched() as peak:
        raise KeyError
    assert peak.mb > 10


def test_the_whole_process_is_larger_than_its_parts():
    with memory.watched() as peak:
        pass
    assert memory.peak_rss_mb() >= 0.9 * peak.mb > 0


@pytest.mark.skipif(not memory._STATUS.is_file(), reason='/proc is of Linux')
def test_what_is_held_now_is_less_once_it_is_let_go():
    held = np.ones(25_000_000)  # 200 MB, touched
    full = memory.rss_mb()
    del held
    memory.give_back()
    assert full - memory.rss_mb() > 150
    # The kernel counts in strides of pages.
    assert memory.peak_rss_mb() >= 0.95 * full
