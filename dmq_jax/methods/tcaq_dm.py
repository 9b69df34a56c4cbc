"""TCAQ-DM: activations are made easy to round, channel by channel and timestep by timestep.

Huang et al., AAAI 2025, arXiv:2412.16700. Three parts:

* timestep-channel reparameterization: one factor per input channel, from the ranges at all
  timesteps, leaves the input and enters the weight (`channel_factors`);
* a dynamically adaptive quantizer: at each timestep the output of a softmax lies on powers of two
  or on an even grid (`adaptive_softmax`);
* progressively aligned reconstruction: block reconstruction as Q-Diffusion's, then again on inputs
  from trajectories of the network quantized so far, which are those of inference. That is
  `reconstruct.num_rounds`; the paper has 20,000 iterations of batch 16 in the first round and
  10,000 in the others (`later_share=0.5`).

The paper has no code and its text was not at hand: formulas are from reading notes and, for the
factors, from a third party's code; what is open says so where it is defined. Where this differs on
purpose: see `qdiffusion`.
"""

from dmq_jax.config import TCAQDMConfig
from dmq_jax.methods import adaptive_softmax, base, brecq, channel_factors
from dmq_jax.quant.plan import Plan


def make(config: TCAQDMConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    del num_train_timesteps

    def init(params, stats, key):
        del key
        factors = channel_factors.init(plan, params, stats, config.channels)
        params = channel_factors.fold(params, factors)
        stats = channel_factors.scale_stats(stats, factors)
        inputs = adaptive_softmax.init(
            plan, stats, base.init_inputs(plan, stats), config.softmax
        )  # fmt: skip
        state = brecq.init_state(plan, params, inputs)
        state['calibrated']['channels'] = factors
        return state

    def bind_with(params, state, codes):
        factors = state['calibrated']['channels']
        params = channel_factors.fold(params, factors)
        bound = brecq.bind(plan, params, state, codes)
        return bound._replace(channels=channel_factors.channels(factors))

    return base.Method(
        init=init,
        bind=lambda params, state: bind_with(params, state, brecq.hard_codes),
        loss=base.output_loss,
        optimizer=brecq.make_optimizer(config.learning),
        phases=brecq.phases(config.learning, bind_with),
        channel_stats=channel_factors.is_on(config.channels),
    )
