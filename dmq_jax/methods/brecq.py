"""Learnt rounding, shared by methods that reconstruct block by block.

AdaRound (Nagel et al., ICML 2020, arXiv:2004.10568) as BRECQ (Li et al., ICLR 2021,
arXiv:2102.05426) uses it: each weight goes to one of the two integers around it, and which one is
learnt, through a variable V of the weight's shape:

    codes = clip(floor(W / scale) + h(V) + zero_point),  h(V) = clip(sigmoid(V) 1.2 - 0.1, 0, 1)

V starts where h(V) is the fraction of W / scale, so that nothing is rounded at first, and a
penalty sum(1 - |2 h(V) - 1|^beta) with a falling beta drives h to 0 or 1. In use, h is rounded:
a network whose V has not learnt is rounded to nearest.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dmq_jax.config import BlockLearningConfig
from dmq_jax.methods import base
from dmq_jax.methods.efficientdm import scale_by_row_adam
from dmq_jax.quant import numerics
from dmq_jax.quant import plan as plan_lib
from dmq_jax.quant.plan import Plan
from dmq_jax.quant.tensor import QuantSpec, expand

Codes = Callable[..., Array]  # (kernel, v, scale, zero_point, spec) -> codes

# The stretched sigmoid's ends (AdaRound, eq. 23): beyond 0 and 1, so that h reaches both.
STRETCH = -0.1, 1.1
# Fractions this close to 0 or 1 would need an infinite V in float32 arithmetic at the far end.
_EPSILON = 1e-6
# What Adam can move a V by in a run whose rate is not given: 20,000 iterations at 1e-3, as BRECQ's.
# A tenth of it leaves a third of all weights undecided, which rounding then moves at random: a last
# layer with a mean error of a tenth, and images that are lost.
_REACH = 20.0
# A scale may shrink to this share of its first value, never to zero or below.
_SMALLEST_SHARE = 0.05


def gate(v: Float[Array, '*shape']) -> Float[Array, '*shape']:
    """h(V), in [0, 1]: the share of a step by which the code lies above the integer below."""
    low, high = STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * (high - low) + low, 0.0, 1.0)


def init(kernel: Float[Array, '*shape'], scale: Float[Array, '...']) -> Float[Array, '*shape']:
    """The V of which `gate` is the fraction of `kernel / scale`: no rounding yet."""
    low, high = STRETCH
    v = kernel / expand(scale, kernel.shape)
    fraction = jnp.clip(v - jnp.floor(v), _EPSILON, 1 - _EPSILON)
    return -jnp.log((high - low) / (fraction - low) - 1)


def soft_codes(
    kernel: Float[Array, '*shape'],
    v: Float[Array, '*shape'],
    scale: Float[Array, '...'],
    zero_point: Float[Array, '...'],
    spec: QuantSpec,
) -> Float[Array, '*shape']:
    """Codes between the two integers around each weight, as V says; on the grid of `spec`."""
    return _codes(kernel, gate(v), scale, zero_point, spec)


def hard_codes(
    kernel: Float[Array, '*shape'],
    v: Float[Array, '*shape'],
    scale: Float[Array, '...'],
    zero_point: Float[Array, '...'],
    spec: QuantSpec,
) -> Float[Array, '*shape']:
    """Integer codes: `soft_codes` with h(V) rounded, and with their gradient."""
    chosen = numerics.straight_through_round(gate(v))
    return _codes(kernel, chosen, scale, zero_point, spec)


def _codes(kernel, above, scale, zero_point, spec):
    below = jnp.floor(kernel / expand(scale, kernel.shape))
    codes = below + above + numerics.straight_through_round(expand(zero_point, kernel.shape))
    ends = (jnp.asarray(end, kernel.dtype) for end in spec.grid)
    return numerics.straight_through_clip(codes, *ends)


def penalty(v: Float[Array, '*shape'], beta: Float[Array, '']) -> Float[Array, '']:
    """sum(1 - |2 h(V) - 1|^beta): 0 where every h is 0 or 1 (AdaRound, eq. 24)."""
    # At h = 1/2 the power has no gradient in its base; a floor keeps it finite.
    distance = jnp.maximum(jnp.abs(2 * gate(v) - 1), 1e-6)
    return jnp.sum(1 - distance**beta)


def beta_at(
    progress: Float[Array, ''], *, warm_up: float, start: float, end: float
) -> Float[Array, '']:
    """The penalty's exponent: `start` until `warm_up`, then linear to `end`.

    Args:
      progress: from 0 to 1.
      warm_up: share of the run, below 1.
      start: large, which leaves all but the nearly decided alone.
      end: small, which decides the rest.
    """
    share = jnp.maximum(0.0, (progress - warm_up) / (1 - warm_up))
    return start + (end - start) * jnp.minimum(share, 1.0)


def init_state(plan: Plan, params: PyTree, inputs: base.Tables) -> base.State:
    """Rounding to nearest, from which `phases` learn.

    Args:
      plan: layers not marked trainable keep their calibration.
      params: whose kernels are rounded.
      inputs: calibrated tables of the activations.
    """
    weights = base.init_weights(plan, params)
    return {
        'rounding': {
            path: init(base.get_kernel(params, path), start['scale'])
            for path, start in weights.items()
            if plan[path].trainable
        },
        # Multiples of the calibrated scales.
        'input': {
            path: {role: jnp.ones_like(table['scale']) for role, table in roles.items()}
            for path, roles in inputs.items()
            if plan[path].trainable
        },
        'calibrated': {
            'weight': weights,
            'input': inputs,
            # What the mean error of a layer's output adds to its bias.
            'offset': {
                path: jnp.zeros(base.get_leaf(params, f'{path}/bias').shape, jnp.float32)
                for path in weights
                if plan[path].trainable and _has_bias(params, path)
            },
        },
    }


def _has_bias(params, path):
    return plan_lib.part_at(path) is None and 'bias' in base.get_leaf(params, path)


def bind(plan: Plan, params: PyTree, state: base.State, codes: Codes) -> base.Bound:
    """The network of a state, or the part of it that a part of the state stands for.

    Args:
      plan: of the method.
      params: whose kernels are rounded.
      state: from `init_state`.
      codes: `hard_codes`, or `soft_codes` while they are learnt.
    """
    calibrated = jax.lax.stop_gradient(state['calibrated'])
    weights = {}
    for path, start in calibrated['weight'].items():
        kernel, spec = jax.lax.stop_gradient(base.get_kernel(params, path)), plan[path]
        if path in state['rounding']:
            learnt = codes(kernel, state['rounding'][path], **start, spec=spec.weight)
            weights[path] = base.WeightCodes(learnt, **start)
        else:
            weights[path] = base.quantize_weight(kernel, **start, spec=spec)
    tables = {
        path: {
            role: _scaled(table, state['input'][path][role]) if path in state['input'] else table
            for role, table in roles.items()
        }
        for path, roles in calibrated['input'].items()
    }
    biases = {
        f'{path}/bias': base.as_float32(base.get_leaf(params, f'{path}/bias')) + offset
        for path, offset in calibrated['offset'].items()
    }
    return base.Bound(weights, tables, biases)


def _scaled(table, factor):
    factor = jnp.maximum(factor, _SMALLEST_SHARE)
    return {n: entry if n == 'zero_point' else entry * factor for n, entry in table.items()}


def phases(
    config: BlockLearningConfig,
    bind_with: Callable[[PyTree, base.State, Codes], base.Bound],
) -> tuple[base.Phase, base.Phase]:
    """The two passes: rounding with activations in float, then the scales of activations.

    Args:
      config: rates, penalty, and how long each pass is.
      bind_with: (params, state, `soft_codes` or `hard_codes`) -> the network.
    """

    def rounding_penalty(state, progress):
        beta = beta_at(
            progress, warm_up=config.warm_up, start=config.beta_start, end=config.beta_end
        )
        total = sum((penalty(v, beta) for v in state['rounding'].values()), jnp.zeros(()))
        return jnp.where(progress < config.warm_up, 0.0, config.penalty_weight * total)

    def correct(state, error):
        calibrated = state['calibrated']
        offset = {path: old + error for path, old in calibrated['offset'].items()}
        return {**state, 'calibrated': {**calibrated, 'offset': offset}}

    correct = correct if config.correct_bias else None
    rounding = base.Phase(
        'rounding',
        rounds_inputs=False,
        bind=lambda params, state, progress: bind_with(params, state, soft_codes),
        penalty=rounding_penalty,
        optimizer=lambda state, decay: base.per_group(
            {**dict.fromkeys(state, optax.set_to_zero()), 'rounding': _rounding_rule(config, decay)}
        ),
        correct=correct,
    )
    scales = base.Phase(
        'scales',
        rounds_inputs=True,
        bind=lambda params, state, progress: bind_with(params, state, hard_codes),
        penalty=lambda state, progress: jnp.zeros(()),
        optimizer=lambda state, decay: base.per_group(
            {**dict.fromkeys(state, optax.set_to_zero()), 'input': _input_rule(config, decay)}
        ),
        norm=config.input_error_norm,
        share=config.input_share,
        correct=correct,
    )
    return rounding, scales


def make_optimizer(
    config: BlockLearningConfig,
) -> Callable[[base.State, optax.Schedule], optax.GradientTransformation]:
    """The optimizer of all groups at once, for whoever distils the network as a whole."""

    def optimizer(state, decay):
        groups = dict.fromkeys(state, optax.set_to_zero())
        learnt = {'rounding': _rounding_rule(config, decay), 'input': _input_rule(config, decay)}
        return base.per_group(groups | learnt)

    return optimizer


def _rounding_rule(config, decay):
    rate = config.rounding_learning_rate
    return optax.adam(_REACH / max(decay.num_iterations, 1) if rate is None else rate)


def _input_rule(config, decay):
    return optax.chain(
        scale_by_row_adam(),
        base.decayed(config.input_scale_learning_rate, decay),
    )
