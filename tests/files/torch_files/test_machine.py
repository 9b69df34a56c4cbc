"""The machine by itself, on pickles that Python wrote and on bytes."""

import collections
import mmap
import pickle

import pytest

from dmq_jax.files.torch_files.machine import Machine
from dmq_jax.files.torch_files.objects import FileError, Ignored


def no_storage(persistent_id):
    raise FileError(f'a storage {persistent_id!r}')


def run(pickled, *, ignore=(), start=0, resolve=no_storage):
    with mmap.mmap(-1, len(pickled)) as data:
        data.write(pickled)
        return Machine(resolve, ignore).run(data, start)


SHARED = [1, 2]
VALUES = {
    'numbers': [0, -1, 255, 2**40, -(2**70), 0.5, True, None],
    'text': ('', 'ä', b'', b'\xff'),
    'nested': {'a': [{'b': (1, (2, 3))}], ('c', 1): {4, 5}},
    'ordered': collections.OrderedDict(z=1, a=2),
}


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol_are_what_pickle_makes_of_them(protocol):
    result, end = run(pickle.dumps(VALUES, protocol))
    assert result == VALUES and list(result['ordered']) == ['z', 'a']
    assert end == len(pickle.dumps(VALUES, protocol))


def test_what_a_pickle_shares_stays_shared():
    result, _ = run(pickle.dumps([SHARED, SHARED]))
    assert result[0] is result[1]


def test_one_pickle_may_follow_another():
    first, second = pickle.dumps('one'), pickle.dumps('two')
    _, end = run(first + second)
    assert run(first + second, start=end)[0] == 'two'


@pytest.mark.parametrize('name', ['os\nsystem', 'builtins\neval', 'numpy\nload', 'torch\nload'])
def test_any_other_name_is_refused_before_it_is_called(name):
    pickled = f'c{name}\n(S"exit 1"\ntR.'.encode()
    with pytest.raises(FileError, match=name.replace('\n', r'\.')):
        run(pickled)


def test_a_name_may_be_passed_over_with_all_that_is_done_to_it():
    pickled = b'cthere.inner\nThing\n(S"x"\ntR}S"a"\nI1\nsb.'
    result, _ = run(pickled, ignore=('there',))
    assert isinstance(result, Ignored) and result.name == 'there.inner.Thing'


def test_a_storage_is_asked_for_by_the_id_that_the_pickle_has():
    asked = []
    result, _ = run(b'(S"storage"\nI7\ntQ.', resolve=lambda value: asked.append(value) or 'here')
    assert result == 'here' and asked == [('storage', 7)]


@pytest.mark.parametrize(
    'pickled', [b'', b'.', b'K', b'h\x00.', b't.', b'K\x01K\x02s.', b'}K\x01u.', b'\xff.']
)
def test_damage_is_an_error_of_the_file(pickled):
    with pytest.raises(FileError):
        run(pickled or b'\x00')
