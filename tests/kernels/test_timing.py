import re
import sys

import jax
import jax.numpy as jnp
import pytest

from kernels import timing
from kernels.int_conv import bench as int_conv_bench
from kernels.int_matmul import bench as int_matmul_bench


def test_every_variant_is_compiled_and_timed():
    x = jnp.ones((4, 4), jnp.float32)
    variants = {'float32': (jnp.matmul, (x, x)), 'sum': (jnp.sum, (x,))}
    timings = timing.measure(variants, num_rounds=3)
    assert list(timings) == ['float32', 'sum']
    assert all(t.compile_s > 0 and t.median_s > 0 for t in timings.values())


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.int8])
def test_calls_within_a_timed_one_are_all_made_by_xla_too(dtype):
    x, w = jnp.ones((64, 64), dtype), jnp.ones((64, 32), dtype)
    sums = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def multiply(x, w):
        # What depends on one operand alone must not leave the loop either.
        w = jnp.cos(w.astype(jnp.float32)).astype(dtype)
        return jnp.matmul(x, w, preferred_element_type=sums)

    text = jax.jit(timing._repeated(multiply, 5)).lower(x, w).compile().as_text()
    assert '"known_trip_count":{"n":"4"}' in text
    for operation in ('cosine', 'dot'):
        # One before the loop, one in its body.
        found = re.findall(rf' {operation}\(.*op_name="([^"]*)"', text)
        assert len(found) == 2 and sum('while/body' in name for name in found) == 1
    timings = timing.measure({'product': (multiply, (x, w))}, num_rounds=1, num_calls=5)
    assert timings['product'].median_s > 0


def test_ratios_are_baseline_over_variant():
    timings = {'float32': timing.Timing(0.5, 0.004), 'int8': timing.Timing(0.7, 0.002)}
    line = timing.report_line('layer', timings, num_products=2_000_000)
    assert line == '| layer | 4.00 | 1 | 2.00x | 0.70 |'


@pytest.mark.parametrize(
    ('bench', 'shape_name'),
    [(int_conv_bench, 'conv_4x4_256_b8'), (int_matmul_bench, 'time_embedding')],
)
def test_a_benchmark_prints_a_row_for_the_shape_asked_for(bench, shape_name, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['bench', shape_name, '--rounds', '1'])
    bench.main()
    printed = capsys.readouterr().out
    assert 'cpu' in printed and f'| {shape_name} |' in printed


@pytest.mark.parametrize(
    ('bench', 'shape_name'),
    [(int_conv_bench, 'down_32x32_128_b8'), (int_matmul_bench, 'attention_heads_16x16')],
)
def test_on_a_gpu_the_kernels_and_bfloat16_are_columns_too(bench, shape_name, interpreted):
    variants = bench.variants(bench.REAL[shape_name])
    shapes = {name: jax.eval_shape(*call[:1], *call[1]).shape for name, call in variants.items()}
    assert {'bfloat16', 'triton W8A8', 'triton W4A8', 'triton W4A4'} <= set(shapes)
    assert len(set(shapes.values())) == 1
