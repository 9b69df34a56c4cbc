"""Laws of dmq_jax/runtime/checkpoint.py."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.runtime import mesh as mesh_lib
from dmq_jax.runtime.checkpoint import Checkpoints, load_tree, save_tree

ROOT = Path(__file__).parents[2]


def training_state(value: float = 0.0):
    """The kinds of leaves a training loop keeps."""
    return {
        'lora': {'down_0/conv1': jnp.full((8, 4), value, jnp.float32)},
        'moments': (jnp.full(3, value, jnp.bfloat16), jnp.zeros((), jnp.int32)),
        'key': jax.random.fold_in(jax.random.key(0), int(value)),
        'host': np.full(2, value),
        'images_seen': int(value),
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if hasattr(a, 'dtype'):
            assert a.dtype == b.dtype
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_state_with_typed_keys_survives_the_round_trip(tmp_path):
    with Checkpoints(tmp_path / 'run') as checkpoints:
        checkpoints.save(5, training_state(5.0))
        checkpoints.wait()
        assert checkpoints.latest() == 5
        assert_same(checkpoints.restore(5, training_state()), training_state(5.0))


def test_another_generator_of_keys_survives_too(tmp_path):
    state = {'keys': jax.random.split(jax.random.key(1, impl='rbg'), 3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(1, jax.eval_shape(lambda: state))
    assert_same(restored, state)


def test_a_restored_key_draws_the_same_numbers(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, training_state(1.0))
        checkpoints.wait()
        key = checkpoints.restore(1, training_state())['key']
    np.testing.assert_array_equal(
        jax.random.normal(key, (4,)), jax.random.normal(training_state(1.0)['key'], (4,))
    )


def test_a_new_process_finds_the_latest_and_old_ones_are_deleted(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, training_state(float(step)))
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        assert_same(checkpoints.restore(2, training_state()), training_state(2.0))
        with pytest.raises(FileNotFoundError, match='No checkpoint 1'):
            checkpoints.restore(1, training_state())


def test_an_empty_folder_has_no_latest(tmp_path):
    with Checkpoints(tmp_path / 'new') as checkpoints:
        assert checkpoints.latest() is None


def test_saved_values_are_those_at_the_call_even_if_the_buffer_is_donated(tmp_path):
    state = {'x': jnp.zeros(1000)}
    add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1.0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state = add_one(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, state)
    np.testing.assert_array_equal(restored['x'], np.zeros(1000))


def test_a_checkpoint_can_be_restored_onto_other_devices(tmp_path):
    state = {'x': np.arange(16.0, dtype=np.float32), 'key': jax.random.key(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, mesh_lib.shard_batch(mesh_lib.make_mesh(8), {'x': state['x']}))
        checkpoints.wait()
        placed = mesh_lib.shardings(mesh_lib.make_mesh(2), {'x': state['x']}, [('x', ('data',))])
        like = {'x': jax.ShapeDtypeStruct((16,), jnp.float32, sharding=placed['x'])}
        restored = checkpoints.restore(1, like)
    assert restored['x'].sharding == placed['x']
    np.testing.assert_array_equal(restored['x'], state['x'])


def test_a_step_cannot_be_saved_twice(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, training_state())
        checkpoints.wait()
        with pytest.raises(ValueError, match='step=2: checkpoint 2 exists'):
            checkpoints.save(2, training_state())


@pytest.mark.parametrize(
    'like', [{'x': jnp.zeros(3)}, {'x': jnp.zeros(2), 'y': jnp.zeros(1)}, {'z': jnp.zeros(2)}]
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, like):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {'x': jnp.zeros(2)})
        checkpoints.wait()
        with pytest.raises(ValueError, match='use another --workdir'):
            checkpoints.restore(1, like)


def test_a_half_written_checkpoint_is_skipped_with_a_warning(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(100, training_state(1.0))
    # What a kill leaves: orbax writes into a folder of this name and renames it at the end.
    unfinished = tmp_path / '200.orbax-checkpoint-tmp'
    shutil.copytree(tmp_path / '100', unfinished)
    next(unfinished.rglob('manifest.ocdbt')).unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 100
        assert_same(checkpoints.restore(100, training_state()), training_state(1.0))
        checkpoints.save(200, training_state(2.0))
        checkpoints.wait()
        assert checkpoints.latest() == 200
    assert 'checkpoint 200' in caplog.text and 'half written' in caplog.text


DAMAGED = """
import os, pathlib, sys
import jax.numpy as jnp
from dmq_jax.runtime.checkpoint import Checkpoints

folder = pathlib.Path(sys.argv[1])
state = {'x': (jnp.arange(1000.0), {}), 'step': jnp.zeros((), jnp.int32)}

def damage(step):
    for file in (f for f in (folder / step).rglob('d/*') if f.is_file()):
        os.truncate(file, file.stat().st_size // 2)

def attempt(like):
    with Checkpoints(folder) as checkpoints:
        try:
            restored = checkpoints.restore_latest(like)
            return restored and int(restored['step'])
        except ValueError as error:
            return str(error)

print(attempt(state))
with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state | {'step': jnp.asarray(step)})
damage('2')
print(attempt(state))
damage('1')
print(attempt(state))
print((folder / '1').is_dir(), (folder / '2').is_dir())
os._exit(0)  # orbax leaves failed reads behind, of which Python would tell at the end
"""


def test_a_damaged_checkpoint_gives_way_to_the_one_before_but_the_last_is_kept(tmp_path):
    done = subprocess.run(
        [sys.executable, '-u', '-c', DAMAGED, tmp_path / 'run'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    nothing, before, refused, *rest = done.stdout.splitlines()
    assert (nothing, before) == ('None', '1'), done.stderr
    assert refused.startswith(f'Checkpoint 1 in {tmp_path}/run is damaged, and there is no other')
    assert rest[-1] == 'True False'
    assert f'checkpoint 2 in {tmp_path}/run is damaged and is deleted' in done.stderr


def test_the_latest_checkpoint_of_another_configuration_is_refused_not_deleted(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest({'x': jnp.zeros(2)}) is None
        for step in (1, 2):
            checkpoints.save(step, {'x': jnp.zeros(2)})
        checkpoints.wait()
        for like in (
            {'x': jnp.zeros(3)},
            {'y': jnp.zeros(2)},
            {'x': jnp.zeros(2), 'y': jnp.zeros(1)},
        ):
            with pytest.raises(ValueError, match='use another --workdir'):
                checkpoints.restore_latest(like)
        assert checkpoints.latest() == 2


WRITER = """
import sys
import jax.numpy as jnp
from dmq_jax.runtime.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.latest() or 0
while True:
    step += 1
    checkpoints.save(step, {'x': jnp.full((1 << 20,), float(step))})
    print(step, flush=True)
"""


def test_a_process_killed_while_saving_leaves_a_restorable_checkpoint(tmp_path):
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, '-c', WRITER, tmp_path / 'run'],
            stdout=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )
        for _ in range(4):
            assert process.stdout.readline()
        time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Checkpoints(tmp_path / 'run') as checkpoints:
            step = checkpoints.latest()
            restored = checkpoints.restore(step, {'x': jnp.zeros(1 << 20)})
        assert step >= 3
        np.testing.assert_array_equal(restored['x'], np.full(1 << 20, float(step), np.float32))


def test_orbax_says_nothing_below_an_error(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='absl'):
        with Checkpoints(tmp_path / 'run') as checkpoints:
            checkpoints.save(1, training_state())
        save_tree(tmp_path / 'tree', {'x': np.zeros(2)})
        load_tree(tmp_path / 'tree')
    assert [record.getMessage() for record in caplog.records] == []


def test_a_tree_survives_the_round_trip_as_numpy(tmp_path):
    tree = {
        'a': {'b/c': jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)},
        'n': np.float64(0.5) * np.ones(()),
        'h': jnp.ones(2, jnp.bfloat16),
    }
    save_tree(tmp_path / 'tree', tree)
    loaded = load_tree(tmp_path / 'tree')
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert_same(loaded, jax.tree.map(np.asarray, tree))


def test_a_tree_replaces_the_earlier_one(tmp_path):
    save_tree(tmp_path / 'tree', {'x': np.zeros(2)})
    save_tree(tmp_path / 'tree', {'y': np.ones(3)})
    assert list(load_tree(tmp_path / 'tree')) == ['y']


@pytest.mark.parametrize(
    'tree, where',
    [
        ({'a': [np.zeros(1)]}, "tree['a'][0]"),
        ({'k': jax.random.key(0)}, "tree['k']"),
        (np.zeros(2), 'tree: expected'),
        ({3: np.zeros(1)}, 'tree[3]'),
    ],
)
def test_a_tree_that_would_come_back_different_is_refused(tmp_path, tree, where):
    with pytest.raises(ValueError, match=re.escape(where)):
        save_tree(tmp_path / 'tree', tree)


def test_a_missing_tree_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing'):
        load_tree(tmp_path / 'nothing')
