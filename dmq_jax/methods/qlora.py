"""QLoRA on the integers of a quantized network: they stand still, a thin float branch learns.

Dettmers et al., NeurIPS 2023, arXiv:2305.14314, as TuneQDM compares with it: the update of low rank
(`low_rank`) is not merged, which would need new integers, but stays a branch beside them,

    y = Q x + (x down) up,    down [..., K, R],  up [R, N], zero at first,

in 16 bits at inference, as SVDQuant's is. Where this differs from the paper, on purpose: the base
is on the plan's integer grid, not in NormalFloat; there is no factor alpha, which the rate of
learning replaces; convolutions have a branch as well.
"""

import jax
import optax

from dmq_jax.config import QLoRAConfig
from dmq_jax.methods import base, low_rank
from dmq_jax.quant.plan import Plan


def make(config: QLoRAConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable have no branch."""
    del num_train_timesteps

    def init(params, stats, key):
        weights = base.init_weights(plan, params)
        learnt = {p: base.get_kernel(params, p) for p in sorted(weights) if plan[p].trainable}
        return {
            'branch': low_rank.init(learnt, config.rank, key),
            'calibrated': {'weight': weights, 'input': base.init_inputs(plan, stats)},
        }

    def bind(params, state):
        weights = base.calibrated_weights(plan, params, state)
        return beside(state)._replace(weights=weights)

    def beside(state):
        tables = jax.lax.stop_gradient(state['calibrated']['input'])
        return base.Bound({}, tables, branches=low_rank.as_stored(state['branch']))

    def optimizer(state, decay):
        del state
        return base.per_group(
            {'branch': base.adam(config.learning_rate, decay), 'calibrated': optax.set_to_zero()}
        )

    return base.Method(init, bind, base.output_loss, optimizer, beside=beside)
