"""LSQ: every weight is trained, and every step with it. The costly upper bound.

Learned step size quantization (Esser et al., ICLR 2020, arXiv:1902.08153) with LSQ+'s zero points
(Bhalgat et al., arXiv:2004.09576), trained to match the teacher as `efficientdm` is, or on images
(`adapt`): what EfficientDM's low-rank update saves, and what it gives up, shows beside it.

Where this differs from the papers, on purpose:

* the gradient of a step is not divided by sqrt(values * qmax), which Adam would undo;
* rates of weights and steps are relative to the first value of the step, so that one fits all
  layers;
* biases and parameters of normalizations are trained as well, as in `efficientdm`.
"""

import jax
import jax.numpy as jnp
import optax

from dmq_jax.config import LSQConfig
from dmq_jax.methods import base, efficientdm
from dmq_jax.quant.plan import Plan


def make(config: LSQConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    del num_train_timesteps
    trainable = {path for path, spec in plan.items() if spec.trainable}

    def init(params, stats, key):
        del key
        weights = base.init_weights(plan, params)
        inputs = base.init_inputs(plan, stats)
        learnt = sorted(weights.keys() & trainable)
        return {
            # What is learnt of a kernel is how far it moves.
            'kernel': {path: jnp.zeros_like(base.get_kernel(params, path)) for path in learnt},
            'weight': {path: jnp.ones_like(weights[path]['scale']) for path in learnt},
            'input': {
                path: {role: efficientdm.unit_table(table) for role, table in roles.items()}
                for path, roles in inputs.items()
                if path in trainable
            },
            'affine': efficientdm.zero_offsets(params) if config.affine_learning_rate else {},
            'calibrated': {'weight': weights, 'input': inputs},
        }

    def bind(params, state):
        calibrated = jax.lax.stop_gradient(state['calibrated'])
        weights = {}
        for path, start in calibrated['weight'].items():
            kernel, scale = jax.lax.stop_gradient(base.get_kernel(params, path)), start['scale']
            if path in state['kernel']:
                kernel = kernel + state['kernel'][path]
                scale = scale * jnp.maximum(state['weight'][path], efficientdm.SMALLEST_SHARE)
            weights[path] = base.quantize_weight(kernel, scale, start['zero_point'], plan[path])
        tables = {
            path: {
                role: efficientdm.learnt_table(
                    table, state['input'][path][role], plan[path].activation(role).grid
                )
                if path in state['input']
                else table
                for role, table in roles.items()
            }
            for path, roles in calibrated['input'].items()
        }
        affine = {
            name: jax.lax.stop_gradient(base.as_float32(base.get_leaf(params, name))) + offset
            for name, offset in state['affine'].items()
        }
        return base.Bound(weights, tables, affine)

    def optimizer(state, decay):
        rates = efficientdm.rates_by_scale(state, 'kernel', config.rate_per_scale)
        return base.per_group(
            {
                'kernel': optax.chain(
                    optax.scale_by_adam(),
                    efficientdm.scale_by_layer(rates),
                    base.decayed(1.0, decay),
                ),
                'weight': base.adam(config.weight_scale_learning_rate, decay),
                'input': efficientdm.table_rule(
                    decay, config.input_scale_learning_rate, config.zero_point_learning_rate
                ),
                'affine': base.adam(config.affine_learning_rate, decay),
                'calibrated': optax.set_to_zero(),
            }
        )

    return base.Method(init, bind, base.output_loss, optimizer)
