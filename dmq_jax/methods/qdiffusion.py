"""Q-Diffusion: learnt rounding, block by block, on inputs from all timesteps.

Li et al., ICCV 2023, arXiv:2302.04304, on BRECQ (arXiv:2102.05426). Two passes of block
reconstruction over inputs drawn evenly from the teacher's trajectories: the first learns the
rounding of the weights (`methods/brecq.py`) while activations stay in float, the second the scales
of the activations (LSQ, arXiv:1902.08153; zero points stay). The inputs of a block come from the
network quantized so far, the targets from the float one.

Where this differs from the authors' code, on purpose:

* activations start from the calibration's ranges, those of the teacher, not from 64 inputs of the
  network with rounded weights;
* scales are learnt as multiples of their start, so the rate is relative to it; the code's 4e-4 is
  in the units of the activations;
* one scale for all timesteps is `quant.per_timestep=False`; with a table, each row learns alone.
"""

from dmq_jax.config import QDiffusionConfig
from dmq_jax.methods import base, brecq
from dmq_jax.quant.plan import Plan


def make(config: QDiffusionConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    del num_train_timesteps

    def init(params, stats, key):
        del key
        return brecq.init_state(plan, params, base.init_inputs(plan, stats))

    def bind_with(params, state, codes):
        return brecq.bind(plan, params, state, codes)

    return base.Method(
        init=init,
        bind=lambda params, state: bind_with(params, state, brecq.hard_codes),
        loss=base.output_loss,
        optimizer=brecq.make_optimizer(config.learning),
        phases=brecq.phases(config.learning, bind_with),
    )
