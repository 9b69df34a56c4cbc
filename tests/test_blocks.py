"""Which parts of a network learn as one, on a network of two blocks."""

import pytest

from dmq_jax import blocks, denoisers
from dmq_jax.config import QuantConfig, ReconstructConfig
from dmq_jax.methods.base import JointBlock
from tests import tiny_blocks

PATTERN = ReconstructConfig().blocks


@pytest.fixture(scope='module')
def plan():
    layers = denoisers.quantizable(tiny_blocks.teacher())
    return denoisers.make_plan(layers, QuantConfig(coverage='full'))


def test_blocks_are_modules_or_single_layers_in_order_of_execution(plan):
    found = blocks.find_blocks(tiny_blocks.teacher(), plan, PATTERN)
    embedding = ['time_embed/dense_0', 'time_embed/dense_1']
    assert [block.path for block in found] == [
        *embedding, 'conv_in', 'block_0', 'block_1', 'conv_out'
    ]  # fmt: skip
    assert found[3].layers == ('block_0/time_proj', 'block_0/conv1')
    assert sorted(path for block in found for path in block.layers) == sorted(plan)


def test_layers_of_a_joint_block_learn_first_and_stand_still_after(plan):
    joint = JointBlock('.*/time_proj', '.*/time_proj')
    first, *rest = blocks.find_blocks(tiny_blocks.teacher(), plan, PATTERN, joint)
    assert first.layers == first.outputs == ('block_0/time_proj', 'block_1/time_proj')
    inside = {block.path: (block.layers, block.fixed) for block in rest}
    assert inside['block_1'] == (('block_1/conv1',), ('block_1/time_proj',))


def test_a_pattern_that_matches_nothing_is_refused(plan):
    with pytest.raises(ValueError, match="reconstruct.blocks='stage' matches no module"):
        blocks.find_blocks(tiny_blocks.teacher(), plan, 'stage')


def test_a_part_of_a_state_goes_back_where_it_was_taken(plan):
    state = {'a': {path: {'x': i} for i, path in enumerate(plan)}, 'b': {'c': {'conv_in': 7}}}
    part = blocks.select(state, ('conv_in', 'block_0/conv1'), plan)
    assert part['b'] == {'c': {'conv_in': 7}} and len(part['a']) == 2
    assert blocks.merge(state, part) == state
    changed = {'a': {'conv_in': {'x': 9}}}
    merged = blocks.merge(state, changed)
    assert merged['a']['conv_in'] == {'x': 9} and merged['b'] == state['b']
    assert merged['a']['conv_out'] == state['a']['conv_out']
