"""PTQD: what rounding does to a prediction is corrected while sampling.

He et al., NeurIPS 2023, arXiv:2305.10657. On top of block reconstruction (`qdiffusion`): the error
of the student's prediction at a timestep is split into a part that goes with the prediction and the
rest,

    eps_student = (1 + k_t) eps + b_t + d,    k_t >= 0, b_t a mean for each channel, d noise,

fitted by linear regression. Sampling takes (eps_student - b_t) / (1 + k_t), and where the sampler
adds noise of its own, d is taken out of its variance (`diffusion.samplers.absorb_noise`):

    sigma_t'^2 = max(0, sigma_t^2 - g_t^2 Var(d) / (1 + k_t)^2),   g_t = d x_{t-1} / d eps

The paper's mixed precision by step is a matter of `quant.rules`, and is not done here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmq_jax.config import PTQDConfig, QDiffusionConfig
from dmq_jax.methods import base, qdiffusion
from dmq_jax.quant.plan import Plan


def make(config: PTQDConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    reconstructing = QDiffusionConfig(learning=config.learning)
    return qdiffusion.make(reconstructing, plan, num_train_timesteps)._replace(correct=fit)


def fit(student: Float[Array, 'S N H W C'], teacher: Float[Array, 'S N H W C']) -> base.Correction:
    """The correction at each timestep.

    Args:
      student: predictions, of the same inputs as the teacher's.
      teacher: predictions.
    """
    error = student - teacher
    everything = 1, 2, 3, 4
    around = teacher - jnp.mean(teacher, axis=everything, keepdims=True)
    spread = jnp.maximum(jnp.sum(around**2, axis=everything), 1e-12)
    gain = jnp.maximum(jnp.sum(error * around, axis=everything) / spread, 0.0)
    rest = error - gain[:, None, None, None, None] * teacher
    bias = jnp.mean(rest, axis=(1, 2, 3))
    variance = jnp.mean((rest - bias[:, None, None, None]) ** 2, axis=everything)
    return base.Correction(gain, bias, variance / (1 + gain) ** 2)
