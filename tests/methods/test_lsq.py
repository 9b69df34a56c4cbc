import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import methods
from dmq_jax.config import LSQConfig, RoundToNearestConfig
from dmq_jax.methods import base
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec

EPS = float(np.finfo(np.float32).eps)
WEIGHT = QuantSpec(bits=4, symmetric=True, per_channel=True, observer='minmax')
INPUT = QuantSpec(bits=4, symmetric=False, observer='minmax')
PLAN = {
    'small': LayerSpec(weight=WEIGHT, inputs=INPUT),
    'large': LayerSpec(weight=WEIGHT, inputs=INPUT),
    'edge': LayerSpec(weight=WEIGHT, inputs=INPUT, trainable=False),
}
RNG = np.random.default_rng(0)
SIZES = {'small': 0.1, 'large': 10.0, 'edge': 1.0}
PARAMS = {
    path: {
        'kernel': jnp.asarray((size * RNG.standard_normal((6, 5))).astype(np.float32)),
        'bias': jnp.zeros(5),
    }
    for path, size in SIZES.items()
}


def stats():
    values = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    tensor = TensorStats(values.min(-1), values.max(-1), values)
    return {path: {'input': tensor} for path in PLAN}


def start(**options):
    method = methods.make(LSQConfig(**options), PLAN)
    return method, method.init(PARAMS, stats(), jax.random.key(0))


def test_it_starts_as_round_to_nearest():
    method, state = start()
    nearest = methods.make(RoundToNearestConfig(), PLAN)
    want = nearest.bind(PARAMS, nearest.init(PARAMS, stats(), jax.random.key(0)))
    got = method.bind(PARAMS, state)
    for path, weight in want.weights.items():
        for a, b in zip(got.weights[path], weight, strict=True):
            np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, got.tables, want.tables)


def test_every_weight_of_a_tuned_layer_is_trained_and_no_other():
    _, state = start()
    shapes = {path: kernel.shape for path, kernel in state['kernel'].items()}
    assert shapes == {'small': (6, 5), 'large': (6, 5)}


def test_the_gradients_of_kernel_and_step_are_those_of_lsq():
    method, state = start(affine_learning_rate=0.0)
    weights = np.random.default_rng(2).standard_normal((6, 5)).astype(np.float32)

    def total(state):
        bound = method.bind(PARAMS, state)
        return jnp.sum(base.dequantize_weight(bound.weights['large']) * weights)

    gradient = jax.grad(total)(state)
    scale = np.asarray(state['calibrated']['weight']['large']['scale'], np.float64)
    u = np.asarray(PARAMS['large']['kernel'], np.float64) / scale
    inside = np.abs(np.rint(u) + 0.5) <= 8  # on the grid -8..7
    # A division by the scale and a product with it.
    np.testing.assert_allclose(gradient['kernel']['large'], weights * inside, rtol=4 * EPS)
    # arXiv:1902.08153, eq. 3, per output channel; the factor's unit is the scale's first value.
    entry = np.where(inside, np.rint(u) - u, np.where(u > 0, 7, -8))
    want = np.sum(weights * entry, axis=0) * scale[0]
    error = np.abs(np.asarray(gradient['weight']['large'])[0] - want).max() / np.abs(want).max()
    assert error < 1e-5, error  # sums of six float32 terms, some of which cancel


def test_weights_move_in_proportion_to_the_step_of_their_layer():
    method, state = start(rate_per_scale=0.25)
    optimizer = method.optimizer(state, lambda step: 1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, state), optimizer.init(state), state)
    for path, update in updates['kernel'].items():
        mean = float(jnp.mean(state['calibrated']['weight'][path]['scale']))
        # Adam's first step is its rate, but for its epsilon.
        np.testing.assert_allclose(update, -0.25 * mean, rtol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates['calibrated']))
