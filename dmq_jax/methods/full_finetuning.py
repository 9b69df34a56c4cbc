"""Every parameter of the network is trained: what tuning costs when nothing of it is spared.

What text encoders said of prompts is no parameter of it, though it stands among the teacher's.

With `quant.weight_bits=32` and `activation_bits=32` nothing is rounded, and this is fine-tuning of
the float teacher itself (as DreamBooth's, arXiv:2208.12242), the costly upper bound that TuneQDM,
PEQA and QLoRA are measured against. Of a plan with integers the trained kernels are rounded on
their calibrated grids, straight through; `lsq` learns those grids as well.
"""

import jax
import optax
from flax import traverse_util

from dmq_jax.config import FullFinetuningConfig
from dmq_jax.methods import base
from dmq_jax.quant.plan import Plan, layer_at


def make(config: FullFinetuningConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for any plan; kernels of its layers that are not trainable stay as they are."""
    del num_train_timesteps
    rounded = {path for path, spec in plan.items() if spec.weight is not None}
    kernels = {f'{layer_at(path)}/kernel' for path in rounded}
    fixed = {f'{layer_at(path)}/kernel' for path in rounded if not plan[path].trainable}

    def init(params, stats, key):
        del key
        flat = traverse_util.flatten_dict(params, sep='/')
        return {
            'params': {
                name: base.as_float32(leaf) for name, leaf in flat.items() if name not in fixed
            },
            'calibrated': {
                'weight': base.init_weights(plan, params), 'input': base.init_inputs(plan, stats)
            },
        }  # fmt: skip

    def bind(params, state):
        calibrated = jax.lax.stop_gradient(state['calibrated'])
        params = base.with_leaves(jax.lax.stop_gradient(params), state['params'])
        weights = {
            path: base.quantize_weight(base.get_kernel(params, path), **start, spec=plan[path])
            for path, start in calibrated['weight'].items()
        }
        floats = {name: leaf for name, leaf in state['params'].items() if name not in kernels}
        return base.Bound(weights, calibrated['input'], floats)

    def optimizer(state, decay):
        del state
        return base.per_group(
            {'params': base.adam(config.learning_rate, decay), 'calibrated': optax.set_to_zero()}
        )

    return base.Method(init, bind, base.output_loss, optimizer)
