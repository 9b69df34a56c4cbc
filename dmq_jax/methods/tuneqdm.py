"""TuneQDM: a quantized model is adapted through its scales, the integers stand still.

Ryu et al., ECCV 2024, arXiv:2401.04339. Besides the scale of its output channels, each layer has a
scale of its input channels, so that their product rescales the integers separably,

    W = s_out (codes - zero_point) s_in,    evaluated as    y = s_out * (Q (s_in * x)),

and each interval of timesteps has a set of both, an expert: expert e(t) = floor(t n / T) of n.
`scales='output'` with one expert is PEQA (arXiv:2305.14152). Several sets, learnt from different
images, run on the same integers: see `scale_sets`.

The paper's text was not at hand; formulas are from a reading note and the authors' code. Where this
differs from that code, on purpose:

* each image of a batch takes the expert of its own timestep, not that of the first image's;
* no weight is dequantized: scales are factors of the channels of input and product;
* scales are learnt as multiples of the calibrated ones, so that one rate fits all layers;
* where activations are quantized, which the paper leaves in float, it is s_in * x that is rounded.
"""

import jax
import jax.numpy as jnp
import optax

from dmq_jax.config import TuneQDMConfig
from dmq_jax.methods import base
from dmq_jax.quant.plan import Plan


def make(config: TuneQDMConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    # Descending, so that a timestep on the border of two intervals belongs to the upper one.
    width = num_train_timesteps / config.num_experts
    centres = (jnp.arange(config.num_experts, dtype=jnp.float32)[::-1] + 0.5) * width

    def init(params, stats, key):
        weights = base.init_weights(plan, params)
        learnt = [path for path in sorted(weights) if plan[path].trainable]
        kernels = {path: base.get_kernel(params, path) for path in learnt}

        def first_inputs(i, path):
            shape = config.num_experts, kernels[path].shape[-2]
            # All experts start equal.
            noise = jax.random.normal(jax.random.fold_in(key, i), shape[1:])[None]
            return jnp.broadcast_to(1 + config.input_spread * noise, shape)

        state = {
            'output': {
                path: jnp.ones((config.num_experts, kernel.shape[-1]))
                for path, kernel in kernels.items()
            },
            'calibrated': {'weight': weights, 'input': base.init_inputs(plan, stats)},
        }
        if config.scales == 'both':
            state['input'] = {path: first_inputs(i, path) for i, path in enumerate(learnt)}
        return state

    def bind(params, state):
        weights = base.calibrated_weights(plan, params, state)
        return beside(state)._replace(weights=weights)

    def beside(state):
        tables = jax.lax.stop_gradient(state['calibrated']['input'])
        ends = [end for end in ('input', 'output') if end in state]
        channels = {path: {end: state[end][path][::-1] for end in ends} for path in state['output']}
        return base.Bound({}, tables, channels=channels, channel_timesteps=centres)

    def optimizer(state, decay):
        groups = dict.fromkeys(state, base.adam(config.learning_rate, decay))
        return base.per_group(groups | {'calibrated': optax.set_to_zero()})

    return base.Method(init, bind, base.output_loss, optimizer, beside=beside)
