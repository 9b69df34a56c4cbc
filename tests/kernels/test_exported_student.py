import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, exporting
from dmq_jax.config import QuantConfig
from dmq_jax.methods.base import Bound, WeightCodes
from dmq_jax.quant import layers as quant_layers
from dmq_jax.quant.codes import integer_weight
from dmq_jax.quant.plan import INPUT_ROLES, LayerSpec
from dmq_jax.quant.tensor import QuantSpec, pack, scale_shape
from tests import tiny

# The integers are equal; XLA fuses the float operations between them differently once a callback
# stands in for a product, so a code at a rounding edge may move by one.
TOLERANCE = 1e-4
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time
NUM_ROWS = 4


def random_bound(layers, plan):
    """Codes, scales and zero points of any network, without a calibration."""
    rng = np.random.default_rng(0)
    weights, tables = {}, {}
    for path, spec in plan.items():
        shape = layers[path].weight_shape
        if spec.weight is not None:
            low, high = spec.weight.grid
            scale = rng.uniform(0.01, 0.05, scale_shape(shape, spec.weight)).astype(np.float32)
            codes = rng.integers(low, high + 1, shape, dtype=np.int8)
            weights[path] = WeightCodes(codes, scale, np.zeros_like(scale))
        tables[path] = {
            role: {
                'scale': rng.uniform(0.01, 0.03, NUM_ROWS).astype(np.float32),
                'zero_point': rng.integers(90, 160, NUM_ROWS).astype(np.float32),
            }
            for role in INPUT_ROLES[layers[path].kind]
        }
    return Bound(weights, tables)


def predict(model):
    """Of the integer network: a new denoiser, so that nothing compiled is used twice."""
    denoiser = exporting.denoiser(model, 'integer')
    x = np.random.default_rng(3).standard_normal((1, *tiny.INFO.image_shape))
    run = jax.jit(denoiser.predict, compiler_options=FAST_COMPILE)
    x = jnp.asarray(x, jnp.float32)
    return np.asarray(run(denoiser.params, x, jnp.asarray([30]), jnp.asarray([1])))


def test_the_kernels_give_the_exported_student_the_predictions_of_xla(interpreted, monkeypatch):
    layers = denoisers.quantizable(tiny.teacher())
    plan = denoisers.make_plan(
        layers, QuantConfig(weight_bits=4, activation_bits=8, coverage='full')
    )
    timesteps = np.linspace(49, 0, NUM_ROWS).round().astype(np.int32)
    bound = random_bound(layers, plan)
    model = exporting.make(tiny.teacher(), plan, bound, timesteps, 'nearest')
    monkeypatch.setenv('KERNELS_IMPLEMENTATION', 'xla')
    expected = predict(model)
    assert not interpreted.calls
    monkeypatch.setenv('KERNELS_IMPLEMENTATION', 'triton')
    got = predict(model)
    assert {name for name, _ in interpreted.calls} == {'_gemm', '_conv'}
    assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)
    assert np.isfinite(expected).all() and expected.std() > 0


class Single(nn.Module):
    """One layer at the path 'layer'."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


# C = 32: a tap of 16 bytes, the least that the kernel is chosen for.
LAYERS = {
    'conv': (nn.Conv(8, (3, 3), padding=1), (3, 3, 32, 8), (2, 5, 4, 32)),
    'strided': (nn.Conv(8, (3, 3), strides=2, padding=((0, 1), (0, 1))), (3, 3, 32, 8),
                (2, 6, 6, 32)),
    'dense': (nn.Dense(8), (32, 8), (2, 9, 32)),
}  # fmt: skip


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('name', LAYERS)
def test_4_bit_layers_reach_the_kernel_with_two_codes_to_a_byte(
    interpreted, monkeypatch, name, symmetric
):
    module, weight_shape, x_shape = LAYERS[name]
    rng = np.random.default_rng(1)
    inputs = QuantSpec(bits=4, symmetric=symmetric)
    spec = LayerSpec(weight=QuantSpec(bits=4, symmetric=True, per_channel=True), inputs=inputs)
    size = scale_shape(weight_shape, spec.weight)
    codes = rng.integers(-8, 8, weight_shape)
    tensor = pack(codes, rng.uniform(0.01, 0.05, size), np.zeros(size), spec=spec.weight)
    rows = {'scale': jnp.asarray([0.2, 0.3]), 'zero_point': jnp.asarray([0.0, 0.0])}
    if not symmetric:
        rows['zero_point'] = jnp.asarray([3.0, 11.0])
    entry = {'input': rows, 'weight': integer_weight(tensor, inputs)}
    variables = {
        'params': {'layer': {'bias': jnp.asarray(rng.standard_normal(8), jnp.float32)}},
        'quant': {'layer': entry},
    }
    x = jnp.asarray(rng.standard_normal(x_shape), jnp.float32)

    def run(name):
        monkeypatch.setenv('KERNELS_IMPLEMENTATION', name)
        with quant_layers.integer({'layer': spec}):
            return np.asarray(Single(module).apply(variables, x))

    expected = run('xla')
    assert not interpreted.calls
    got = run('triton')
    ((_, constants),) = interpreted.calls
    assert constants['W4'] and constants['X4']
    # Equal sums; the kernel's epilogue may fuse a multiplication with the addition of the bias.
    assert np.max(np.abs(got - expected)) <= 4 * np.finfo(np.float32).eps * np.max(abs(expected))
