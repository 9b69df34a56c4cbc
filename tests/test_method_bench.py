"""What methods cost, on a network that takes no time: every stage is there and tells all of it."""

import pytest

from dmq_jax import method_bench
from tests import tiny

CONFIG = method_bench.BenchConfig(batch_size=2, num_rounds=1)


def load():
    """Without attention and blocks on the way down: sooner compiled."""
    network = tiny.NETWORK.clone(down_attention=(False,), layers_per_block=0)
    return tiny.random_denoiser(network)


def measure(name):
    return method_bench.measure(load, method_bench.CASES[name], CONFIG)


# One of each stage; `slow` where compiling is all the time and other tests prove what is compiled.
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ('svdquant', 'tfmq_dm', 'efficientdm')
]


@pytest.fixture(scope='module', params=['round_to_nearest', 'tuneqdm', *SLOW])
def measured(request):
    return request.param, measure(request.param)


def test_every_stage_is_timed_and_weighed(measured):
    name, row = measured
    assert row.stage == method_bench.CASES[name].stage
    for value in (row.per_100_s, row.compile_s, row.program_mb, row.running_mb, row.model_mb):
        assert value > 0, name
    assert row.peak_rss_mb > 10
    assert (row.trained > 0) == (row.stage != 'calibrate')
    assert (row.set_mb is None) == (name != 'tuneqdm')


def test_blocks_are_told_one_by_one_and_together(measured):
    _, row = measured
    assert (row.all_blocks_s is None) == (row.block is None) == (row.stage != 'reconstruct')
    if row.all_blocks_s is not None:
        assert row.all_blocks_s > row.per_100_s
        assert row.block.rpartition(' ')[2].isdigit()


def test_the_table_has_a_line_for_each(measured):
    heading, line = method_bench.table(dict([measured]))
    assert measured[0] in line and 'program MB' in heading


def test_every_published_method_is_among_the_cases():
    names = {case.method.name for case in method_bench.CASES.values()}
    assert names == {config().name for config in method_bench.methods.METHODS}
