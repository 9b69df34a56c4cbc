"""Laws of dmq_jax/runtime/progress.py."""

import sys

import pytest

from dmq_jax.runtime import progress as progress_lib
from dmq_jax.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told to."""
    now = [100.0]
    monkeypatch.setattr(progress_lib.time, 'monotonic', lambda: now[0])

    def advance(duration_s):
        now[0] += duration_s

    return advance


def test_every_item_is_yielded_in_order(capsys):
    assert list(progress('abc', 'letters')) == ['a', 'b', 'c']


def test_a_number_is_a_range_that_can_start_late(capsys):
    assert list(progress(5, 'steps', start=3)) == [3, 4]


def test_a_log_file_gets_a_line_about_every_ten_seconds(clock, capsys):
    for _ in progress(40, 'sample'):
        clock(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'sample: 10/40 (25%), 1/s, 0:00:30 left'
    assert lines[-1] == 'sample: 40/40 (100%), 1/s, took 0:00:40'
    assert len(lines) == 4
    assert not any('\x1b' in line or '\r' in line for line in lines)


def test_items_of_an_earlier_process_count_as_done_but_not_in_the_rate(clock, capsys):
    for _ in progress(100, 'finetune', start=90):
        clock(5)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == 'finetune: 92/100 (92%), 5 s each, 0:00:40 left'


def test_an_unknown_length_reports_the_count_alone(clock, capsys):
    for _ in progress((n for n in range(2)), 'read'):
        clock(20)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['read: 1, 20 s each', 'read: 2, 20 s each']


def test_an_empty_loop_says_so(clock, capsys):
    assert list(progress([], 'read')) == []
    assert capsys.readouterr().out == 'read: 0/0, 0/s, took 0:00:00\n'


def test_a_generator_may_be_told_its_length(clock, capsys):
    for _ in progress((n for n in range(2)), 'read', total=2):
        clock(20)
    assert 'read: 1/2 (50%)' in capsys.readouterr().out


def test_a_note_appears_in_the_next_line(clock, capsys):
    bar = progress(2, 'finetune')
    for _ in bar:
        clock(10)
        bar.note('loss 0.5')
    assert capsys.readouterr().out.splitlines()[0].endswith(', loss 0.5')


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setenv('FORCE_COLOR', '1')
    bar = progress(3, 'sample')
    for _ in bar:
        bar.note('nearly')
    out = capsys.readouterr().out
    assert 'sample' in out and '3/3' in out and 'nearly' in out


def test_other_processes_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress_lib.jax, 'process_index', lambda: 1)
    assert list(progress(3, 'sample')) == [0, 1, 2]
    assert capsys.readouterr().out == ''
