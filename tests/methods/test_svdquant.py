import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, exporting, methods
from dmq_jax.config import ChannelFactorsConfig, RoundToNearestConfig, SVDQuantConfig
from dmq_jax.methods import base, low_rank, svdquant
from dmq_jax.quant import observers
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests import tiny

WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
SPEC = LayerSpec(weight=WEIGHT, inputs=QuantSpec(bits=8, symmetric=False, observer='minmax'))
PLAN = {'layer': SPEC}
OFF = ChannelFactorsConfig(strength=0.0)


def kernel_of_few_directions(shape, seed=0):
    """Two large directions and a little of everything else, as in the paper's figure 4."""
    rng = np.random.default_rng(seed)
    rows = int(np.prod(shape[:-1]))
    large = 5 * rng.standard_normal((rows, 2)) @ rng.standard_normal((2, shape[-1]))
    return jnp.asarray((large + rng.standard_normal((rows, shape[-1]))).reshape(shape), jnp.float32)


# For the same specs and ranks, one program.
split = jax.jit(svdquant.split, static_argnums=(1, 2, 3))


@jax.jit
def weight_error(kernel, branch):
    rest = kernel - low_rank.delta(branch)
    scale, zero_point = observers.calibrate_weight(rest, WEIGHT)
    rounded = base.dequantize_weight(base.quantize_weight(rest, scale, zero_point, SPEC))
    return jnp.mean((rest - rounded) ** 2)


@pytest.mark.parametrize('shape', [(32, 16), (3, 3, 8, 16)], ids=['dense', 'conv'])
def test_the_branch_takes_what_four_bits_cannot_hold(shape):
    kernel = kernel_of_few_directions(shape)
    nothing = jax.tree.map(jnp.zeros_like, split(kernel, WEIGHT, 2, 4))
    errors = [weight_error(kernel, nothing)]
    for rank in (2, 8):
        errors.append(weight_error(kernel, split(kernel, WEIGHT, rank, 4)))
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1], errors


def test_without_refits_it_is_the_best_approximation_of_its_rank():
    kernel = kernel_of_few_directions((32, 16))
    branch = split(kernel, WEIGHT, 3, 0)
    rest = np.asarray(kernel - low_rank.delta(branch), np.float64)
    spectrum = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    # Eckart and Young; the halves are rounded to float16 (eps 2^-10).
    assert np.sum(rest**2) == pytest.approx(np.sum(spectrum[3:] ** 2), rel=2e-2)


def test_refits_never_make_it_worse():
    kernel = kernel_of_few_directions((32, 16), seed=3)
    errors = [weight_error(kernel, split(kernel, WEIGHT, 4, n)) for n in (0, 1, 8)]
    assert errors[0] >= errors[1] >= errors[2] and errors[2] < errors[0], errors


def test_the_branch_fits_in_sixteen_bits():
    branch = split(kernel_of_few_directions((32, 16)), WEIGHT, 4, 4)
    for half in branch.values():
        np.testing.assert_array_equal(half, np.asarray(half, np.float16).astype(np.float32))


class Single(nn.Module):
    """One layer at the path 'layer'."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, use_bias=False, name='layer')(x)


def test_a_layer_with_its_branch_beats_rounding_to_nearest_at_four_bits():
    kernel = kernel_of_few_directions((32, 16))
    params = {'layer': {'kernel': kernel}}
    x = np.random.default_rng(4).standard_normal((64, 32)).astype(np.float32)
    x = jnp.asarray(x * np.geomspace(1, 10, 32).astype(np.float32))
    seen = observers.observe(x, 512, channels=True)
    stats = {'layer': {'input': jax.tree.map(lambda leaf: leaf[None], seen)}}

    def error(config):
        method = methods.make(config, PLAN)

        @jax.jit
        def run(params, stats, x):
            bound = method.bind(params, method.init(params, stats, jax.random.key(0)))
            rows = denoisers.rows_at(denoisers.time_tables(bound, np.array([0])), 0, 'nearest')
            weighed = base.with_weights(params, bound.weights)
            got = base.apply_fake(Single().apply, PLAN, weighed, rows, x)
            return jnp.mean((got - x @ kernel) ** 2)

        return float(run(params, stats, x))

    nearest, branched = error(RoundToNearestConfig()), error(SVDQuantConfig(rank=4))
    plain = error(SVDQuantConfig(rank=4, channels=OFF))
    assert max(branched, plain) < nearest / 4, (nearest, branched, plain)


def test_the_branch_is_kept_by_an_export_and_counted(tmp_path):
    teacher = tiny.teacher()
    # Of the dense layers and of the convolutions, one each.
    plan = dict.fromkeys(('time_embed/dense_0', 'conv_in'), SPEC)
    method = methods.make(SVDQuantConfig(rank=2, channels=OFF), plan)
    state = jax.jit(method.init)(teacher.params, tiny.calibration().stats, jax.random.key(0))
    bound = jax.jit(method.bind)(teacher.params, state)
    timesteps = tiny.calibration().timesteps
    made = exporting.make(teacher, plan, bound, timesteps, 'nearest')
    exporting.save(tmp_path, made)
    loaded = exporting.load(tmp_path)
    assert loaded.branches.keys() == loaded.weights.keys()
    for path, branch in loaded.branches.items():
        for name, half in branch.items():
            assert half.dtype == np.float16
            np.testing.assert_array_equal(half, bound.branches[path][name])
    without = exporting.size_bytes(made._replace(branches={}))
    halves = jax.tree.leaves(loaded.branches)
    assert exporting.size_bytes(made) == without + 2 * sum(half.size for half in halves)
