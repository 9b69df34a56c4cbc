"""Laws of dmq_jax/runtime/parts.py."""

import threading

import numpy as np
import pytest

from dmq_jax.runtime import parts

ROWS = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)


def write(folder, *indices):
    parts.write(folder, np.asarray(indices, int), ROWS[list(indices)])


def test_rows_come_back_in_order_whoever_wrote_them(tmp_path):
    for indices in (3, 5, 7), (0, 1, 2), (4, 6), (8, 9), ():
        write(tmp_path, *indices)
    merged = parts.merge(tmp_path, 10)
    assert merged.dtype == np.uint8
    np.testing.assert_array_equal(merged, ROWS)


def test_rows_written_twice_or_beyond_the_end_do_no_harm(tmp_path):
    for indices in (0, 1, 2), (2, 3), (0, 1, 2, 3), (4, 5):
        write(tmp_path, *indices)
    np.testing.assert_array_equal(parts.merge(tmp_path, 5), ROWS[:5])


def test_a_restart_learns_which_rows_are_missing(tmp_path):
    assert parts.missing(tmp_path, 3).tolist() == [0, 1, 2]
    write(tmp_path, 0, 1, 2)
    write(tmp_path, 4, 5)
    assert parts.missing(tmp_path, 10).tolist() == [3, 6, 7, 8, 9]
    assert parts.missing(tmp_path, 2).tolist() == []
    with pytest.raises(ValueError, match='row 3 of 10 is missing'):
        parts.merge(tmp_path, 10)


def test_rows_that_a_shared_disk_shows_late_are_waited_for(tmp_path):
    write(tmp_path, *range(8))
    late = threading.Timer(0.3, write, (tmp_path, 8, 9))
    late.start()
    np.testing.assert_array_equal(parts.merge(tmp_path, 10, patience_s=30), ROWS)
    late.join()


def test_what_a_killed_writer_left_is_not_read(tmp_path):
    write(tmp_path, 0, 1)
    (tmp_path / '.half').write_bytes(b'PK')
    assert parts.missing(tmp_path, 3).tolist() == [2]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.') and p.name != '.half']
