import errno
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from dmq_jax import artefacts

OPTIONS = {'bits': 4, 'sampler': {'num_steps': 20, 'eta': 0.0}, 'layers': ('a', 'b')}


def write(path, value):
    (path / 'value.txt').write_text(value)


def read(path):
    return (path / 'value.txt').read_text()


def refuse():
    raise AssertionError('made again')


def make(path, options, compute=lambda: 'made', save=write):
    return artefacts.artefact(path, options, make=compute, save=save, load=read)


def test_what_is_made_is_loaded_and_marked_complete(tmp_path):
    path = tmp_path / 'deep' / 'result'
    assert not artefacts.is_complete(path)
    assert make(path, OPTIONS) == 'made'
    assert artefacts.is_complete(path)
    assert [p.name for p in path.parent.iterdir()] == ['result']
    assert json.loads((path / 'complete.json').read_text())['bits'] == 4


def test_what_is_complete_is_not_made_again(tmp_path):
    make(tmp_path / 'result', OPTIONS)
    # Tuples become lists in JSON: that is no difference.
    assert make(tmp_path / 'result', OPTIONS | {'layers': ['a', 'b']}, refuse)


def test_a_maker_that_dies_leaves_nothing_to_load(tmp_path):
    def die(*arguments):
        if arguments:
            write(*arguments)
        raise KeyboardInterrupt

    path = tmp_path / 'result'
    for how in {'compute': die}, {'save': die}:
        with pytest.raises(KeyboardInterrupt):
            make(path, OPTIONS, **how)
        assert not path.exists() and not artefacts.is_complete(path)


def test_what_a_dead_maker_left_does_not_leak_into_the_next(tmp_path):
    path = tmp_path / 'result'
    partial = tmp_path / 'result.partial'
    partial.mkdir()
    (partial / 'half.txt').write_text('')
    # A folder without the mark is as good as none.
    path.mkdir()
    (path / 'old.txt').write_text('')
    make(path, OPTIONS)
    assert sorted(p.name for p in path.iterdir()) == ['complete.json', 'value.txt']
    assert not partial.exists()


@pytest.mark.parametrize(
    'options, text',
    [
        (OPTIONS | {'bits': 8}, 'bits was 4, now 8'),
        (
            OPTIONS | {'sampler': {'num_steps': 50, 'eta': 0.0}},
            'sampler.num_steps was 20, now 50',
        ),
        (OPTIONS | {'new': None}, "new was 'absent', now None"),
        ({'bits': 4, 'layers': ('a', 'b')}, "now 'absent'"),
    ],
)
def test_other_options_are_refused_and_the_difference_named(tmp_path, options, text):
    path = tmp_path / 'result'
    make(path, OPTIONS)
    artefacts.claim(tmp_path / 'growing', OPTIONS)
    for attempt in (
        lambda: make(path, options, refuse),
        lambda: artefacts.claim(tmp_path / 'growing', options),
    ):
        with pytest.raises(ValueError, match='was made with other options') as caught:
            attempt()
        assert text in str(caught.value)
        assert '--workdir' in str(caught.value)
    assert read(path) == 'made'


def test_a_claimed_folder_may_be_claimed_again_with_the_same_options(tmp_path):
    artefacts.claim(tmp_path / 'growing', OPTIONS)
    (tmp_path / 'growing' / 'checkpoint').write_text('')
    artefacts.claim(tmp_path / 'growing', OPTIONS)
    assert (tmp_path / 'growing' / 'checkpoint').exists()


def test_fingerprints_differ_exactly_when_options_do(tmp_path):
    for name, options in (('a', OPTIONS), ('b', OPTIONS), ('c', OPTIONS | {'bits': 8})):
        make(tmp_path / name, options)
    a, b, c = (artefacts.fingerprint(tmp_path / name) for name in 'abc')
    assert a == b != c


def test_a_digest_sees_values_names_shapes_dtypes_and_settings():
    arrays = {'a': np.zeros((2, 3), np.float32), 'b': np.ones(2, np.int32)}
    changed = [
        {'a': arrays['a'] + 1, 'b': arrays['b']},
        {'c': arrays['a'], 'b': arrays['b']},
        {'a': arrays['a'].T, 'b': arrays['b']},
        {'a': arrays['a'].view(np.int32), 'b': arrays['b']},
    ]
    digests = [artefacts.digest(tree) for tree in (arrays, *changed)]
    digests += [artefacts.digest(arrays, {'bits': 4}), artefacts.digest(arrays, {'bits': 8})]
    assert len(set(digests)) == len(digests)
    assert artefacts.digest(dict(reversed(arrays.items()))) == digests[0]


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(artefacts.fcntl, 'flock', without)
    with artefacts.sole_user(tmp_path / 'run'):
        assert (tmp_path / 'run').is_dir()
    assert 'cannot be locked (Function not implemented)' in caplog.text


HOLDER = """
import pathlib, sys
from dmq_jax import artefacts

with artefacts.sole_user(pathlib.Path(sys.argv[1])):
    print('in', flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_refused_while_another_process_works_there_and_free_once_it_is_killed(tmp_path):
    folder = tmp_path / 'run'
    root = pathlib.Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, '-c', HOLDER, folder], cwd=root, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == 'in\n'
        with pytest.raises(
            ValueError, match=f'run is in use by process {other.pid} on .*--workdir'
        ):
            with artefacts.sole_user(folder):
                pass
        other.kill()
        other.wait()
        with artefacts.sole_user(folder):
            pass


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), artefacts.sole_user(tmp_path):
        raise RuntimeError
    with artefacts.sole_user(tmp_path):
        pass


def test_a_turn_waits_for_the_one_before(tmp_path):
    began, order = threading.Event(), []

    def second():
        began.set()
        with artefacts.turn(tmp_path / 'a' / '.lock'):
            order.append('second')

    with artefacts.turn(tmp_path / 'a' / '.lock'):
        waiting = threading.Thread(target=second)
        waiting.start()
        began.wait()
        waiting.join(timeout=0.2)
        order.append('first')
    waiting.join(timeout=30)
    assert order == ['first', 'second']
