"""TFMQ-DM: what the network knows of the time is kept, before anything else is learnt.

Huang et al., CVPR 2024, arXiv:2311.16503. The layers through which the timestep enters form a block
of their own, the temporal information block: the embedding h(t) and the projections g_i of all
residual blocks. They depend on a finite set of inputs only, so

* they are reconstructed first and by themselves, min sum_i |g_i(h(t)) - g^_i(h^(t))|^2 over all
  timesteps (temporal information aware reconstruction), and no residual block changes them after;
* their activations have a scale for each timestep, from its least and largest value, which is not
  learnt (finite set calibration).

All else is block reconstruction as in `qdiffusion`. Where this differs from the authors' code, on
purpose: a scale for each timestep of the calibration, not for each of a few intervals; ranges are
those of all images, not a moving average; which layers stay in float is the plan's business.
"""

import dataclasses
import re

from dmq_jax.config import QDiffusionConfig, TFMQDMConfig
from dmq_jax.methods import base, qdiffusion
from dmq_jax.quant.plan import Plan


def make(config: TFMQDMConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    timed = {
        path for path, spec in plan.items() if re.fullmatch(config.layers, path) and spec.trainable
    }
    plan = {path: _per_timestep(spec) if path in timed else spec for path, spec in plan.items()}
    method = qdiffusion.make(QDiffusionConfig(learning=config.learning), plan, num_train_timesteps)

    def init(params, stats, key):
        state = method.init(params, stats, key)
        learnt = {path: roles for path, roles in state['input'].items() if path not in timed}
        return {**state, 'input': learnt}

    joint = base.JointBlock(config.layers, config.outputs)
    return method._replace(init=init, joint=joint)


def _per_timestep(spec):
    if spec.inputs is None:
        return spec
    inputs = dataclasses.replace(spec.inputs, observer='minmax')
    return dataclasses.replace(spec, inputs=inputs, per_timestep=True)
