"""Round to nearest: calibrated scales, nothing learnt. The baseline every method must beat.

Uniform affine post-training quantization (Krishnamoorthi 2018, arXiv:1806.08342) with the scales
of the plan's observers, one per timestep or one for all.
"""

from dmq_jax.config import RoundToNearestConfig
from dmq_jax.methods import base
from dmq_jax.quant.plan import Plan


def make(config: RoundToNearestConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`."""
    del config, num_train_timesteps

    def init(params, stats, key):
        del key
        return {
            'weight': base.init_weights(plan, params),
            'input': base.init_inputs(plan, stats),
        }

    def bind(params, state):
        weights = {
            path: base.quantize_weight(base.get_kernel(params, path), **scale, spec=plan[path])
            for path, scale in state['weight'].items()
        }
        return base.Bound(weights, state['input'])

    return base.Method(init, bind, base.output_loss, base.frozen)
