"""Laws of dmq_jax/runtime/mesh.py, on eight CPU devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dmq_jax.runtime import mesh as mesh_lib

PARAMS = {'conv': {'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)}, 'scale': jnp.ones(())}


def test_minus_one_takes_every_device():
    assert mesh_lib.make_mesh().shape == {'data': jax.device_count(), 'fsdp': 1, 'tensor': 1}
    assert mesh_lib.make_mesh(2, -1).shape == {'data': 2, 'fsdp': 4, 'tensor': 1}
    assert mesh_lib.make_mesh(-1, 2, 2).shape == {'data': 2, 'fsdp': 2, 'tensor': 2}


def test_a_mesh_can_be_smaller_than_the_machine():
    assert mesh_lib.make_mesh(2).devices.size == 2
    assert mesh_lib.make_mesh(1, 2, 3).devices.shape == (1, 2, 3)


def test_the_compiler_partitions_the_axes():
    assert set(mesh_lib.make_mesh().axis_types) == {AxisType.Auto}


@pytest.mark.parametrize('data', [0, 9, -2])
def test_more_devices_than_there_are_is_an_error(data):
    with pytest.raises(ValueError, match=f'data={data}: expected 1..8'):
        mesh_lib.make_mesh(data)


@pytest.mark.parametrize('sizes', [(-1, -1, 1), (4, 4, 1), (-1, 3, 1)])
def test_axes_that_the_devices_cannot_make_are_refused(sizes):
    with pytest.raises(ValueError, match='a product that 8 devices can make'):
        mesh_lib.make_mesh(*sizes)


@pytest.mark.parametrize(
    'shape, spec',
    [
        ((3, 3, 8, 4), (None, None, 'fsdp', 'tensor')),
        ((3, 3, 3, 6), (None, None, None, 'tensor')),
        ((16, 8, 3), ('fsdp', None, None)),
        ((8, 8), ('fsdp', 'tensor')),
        ((7, 9), (None, None)),
        ((64,), (None,)),
        ((), ()),
    ],
)
def test_a_spread_takes_what_divides_and_leaves_the_rest_whole(shape, spec):
    spread = mesh_lib.Spread(largest='fsdp', last='tensor')
    assert spread.spec(shape, mesh_lib.make_mesh(1, 4, 2)) == spec


def test_weights_fall_with_fsdp_and_batches_are_split_by_it_too():
    mesh = mesh_lib.make_mesh(2, 4)
    placed = mesh_lib.shard_weights(mesh, PARAMS)
    sizes = {s.data.size for s in placed['conv']['kernel'].addressable_shards}
    assert sizes == {PARAMS['conv']['kernel'].size // 4}
    batch = mesh_lib.shard_batch(mesh, np.zeros((16, 3)))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}


def test_functions_of_whole_weights_are_values():
    mesh = mesh_lib.make_mesh(1, 8)
    assert mesh_lib.on_whole(mesh, len) == mesh_lib.on_whole(mesh, len)
    assert hash(mesh_lib.on_whole(mesh, len)) == hash(mesh_lib.on_whole(mesh, len))
    assert mesh_lib.on_whole(mesh_lib.make_mesh(8), len) is len


def test_a_batch_is_split_over_its_first_axis_only():
    batch = {'x': np.arange(64, dtype=np.float32).reshape(16, 4)}
    batch['key'] = jax.random.split(jax.random.key(0), 16)
    placed = mesh_lib.shard_batch(mesh_lib.make_mesh(), batch)
    assert {shard.data.shape for shard in placed['x'].addressable_shards} == {(2, 4)}
    assert {shard.data.shape for shard in placed['key'].addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed['x'], batch['x'])


def test_placing_is_an_explicit_transfer():
    mesh = mesh_lib.make_mesh()
    with jax.transfer_guard('disallow'):
        x = mesh_lib.shard_batch(mesh, np.ones((8, 3), np.float32))
        y = mesh_lib.replicate(mesh, np.ones(3, np.float32))
    np.testing.assert_array_equal(x * y[None], np.ones((8, 3)))


def test_a_replica_is_whole_on_every_device():
    placed = mesh_lib.replicate(mesh_lib.make_mesh(), PARAMS)['conv']['kernel']
    assert len(placed.addressable_shards) == 8
    assert all(shard.data.shape == (8, 4) for shard in placed.addressable_shards)


def test_a_split_axis_can_be_reshaped_under_jit():
    x = mesh_lib.shard_batch(mesh_lib.make_mesh(), np.arange(48, dtype=np.float32).reshape(8, 6))
    np.testing.assert_array_equal(jax.jit(lambda x: x.reshape(-1))(x), np.arange(48))


@pytest.mark.parametrize('batch_size, advice', [(20, 'try 16 or 24'), (3, 'try 8')])
def test_an_indivisible_batch_is_refused_with_sizes_that_work(batch_size, advice):
    text = f'batch_size={batch_size} is not divisible by 8 devices; {advice}'
    with pytest.raises(ValueError, match=text):
        mesh_lib.shard_batch(mesh_lib.make_mesh(), np.zeros((batch_size, 2)))
    with pytest.raises(ValueError, match='sample.' + text):
        mesh_lib.check_batch_size(mesh_lib.make_mesh(), batch_size, name='sample.batch_size')


def test_a_scalar_in_a_batch_is_refused_by_its_path():
    with pytest.raises(ValueError, match='a/b is a scalar'):
        mesh_lib.shard_batch(mesh_lib.make_mesh(), {'a': {'b': np.zeros(())}})


def test_the_first_matching_rule_wins():
    rules = [('conv/kernel', ('data',)), ('.*', ())]
    specs = jax.tree.map(
        lambda sharding: sharding.spec, mesh_lib.shardings(mesh_lib.make_mesh(), PARAMS, rules)
    )
    assert specs == {
        'conv': {'kernel': PartitionSpec('data'), 'bias': PartitionSpec()},
        'scale': PartitionSpec(),
    }


def test_shardings_apply_to_abstract_trees():
    mesh = mesh_lib.make_mesh()
    abstract = jax.eval_shape(lambda: PARAMS)
    assert mesh_lib.shardings(mesh, abstract, [('.*', ())]) == mesh_lib.shardings(
        mesh, PARAMS, [('.*', ())]
    )


@pytest.mark.parametrize(
    'rules, text',
    [
        ([('conv/.*', ())], "No sharding rule matches 'scale'"),
        ([('kernel', ()), ('.*', ())], "match no path first: ['kernel']"),
        ([('.*', ()), ('conv/.*', ())], "match no path first: ['conv/.*']"),
        ([('.*', (None, None))], 'conv/bias has shape (4,)'),
        ([('conv/bias', ('data',)), ('.*', ())], '4 is not divisible by the 8 devices'),
        ([('conv/bias', ('model',)), ('.*', ())], "no mesh axis 'model'; expected data, fsdp"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        mesh_lib.shardings(mesh_lib.make_mesh(), PARAMS, rules)


@pytest.mark.parametrize('sizes', [(1, 2, 2), (2, 4, 1), (4, 1, 2), (1, 8, 1)])
def test_a_weight_joined_of_its_parts_is_the_weight_placed_in_whole(sizes):
    mesh = mesh_lib.make_mesh(*sizes)
    placer = mesh_lib.weight_placer(mesh)
    for shape in ((3, 3, 8, 16), (8, 8), (5, 7), (16,), ()):
        array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        indices = placer.indices('kernel', shape)
        # All devices are this process's: the parts are the whole, each element once.
        parts = [array[index] for index in indices]
        assert sorted(np.concatenate([part.ravel() for part in parts])) == sorted(array.ravel())
        joined, placed = placer.join('kernel', shape, parts), placer('kernel', array)
        assert joined.sharding == placed.sharding
        for mine, theirs in zip(joined.addressable_shards, placed.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, theirs.data)
