import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import denoisers, exporting
from dmq_jax.config import QuantConfig
from dmq_jax.methods.base import Bound, WeightCodes
from dmq_jax.quant.plan import INPUT_ROLES
from dmq_jax.quant.tensor import scale_shape
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
