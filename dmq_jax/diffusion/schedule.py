"""Noise schedules, and which timesteps a sampler visits.

Everything here is NumPy, float64 and done once, before anything is compiled. A timestep `t` counts
from 0 (almost no noise) to T - 1, so `alphas_cumprod[t]` is the share of the image's variance left
at `t` (written with a bar over alpha in DDPM, Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int32

KINDS = ('linear', 'scaled_linear', 'cosine')
SPACINGS = ('uniform', 'quadratic', 'leading', 'trailing', 'linspace')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much noise each of the training timesteps adds.

    Attributes:
      kind: 'linear' (DDPM, arXiv:2006.11239 section 4), 'scaled_linear' (linear in sqrt(beta);
        what latent diffusion, arXiv:2112.10752, calls "linear"), or 'cosine' (Nichol & Dhariwal,
        arXiv:2102.09672, eq. 17, beta at most 0.999).
      num_train_timesteps: T, at least 1.
      beta_start: variance added by the first timestep, in (0, 1); not used by 'cosine'.
      beta_end: variance added by the last, in [beta_start, 1); not used by 'cosine'.

    Raises:
      ValueError: if a value is outside the range above.
    """

    kind: str = 'linear'
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'kind={self.kind!r}: expected one of {", ".join(KINDS)}.')
        if self.num_train_timesteps < 1:
            raise ValueError(
                f'num_train_timesteps={self.num_train_timesteps}: expected at least 1.'
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f'beta_start={self.beta_start}, beta_end={self.beta_end}: '
                'expected 0 < beta_start <= beta_end < 1.'
            )


def betas(schedule: Schedule) -> Float64[np.ndarray, 'T']:
    """The variance of the noise added by each timestep, in (0, 1)."""
    steps = schedule.num_train_timesteps
    low, high = schedule.beta_start, schedule.beta_end
    match schedule.kind:
        case 'linear':
            return np.linspace(low, high, steps, dtype=np.float64)
        case 'scaled_linear':
            return np.linspace(low**0.5, high**0.5, steps, dtype=np.float64) ** 2
        case 'cosine':
            # arXiv:2102.09672, eq. 17, with s = 0.008; the cap keeps the last step finite.
            edges = np.arange(steps + 1) / steps
            alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise AssertionError(f'{schedule.kind} is validated by Schedule')


def alphas_cumprod(schedule: Schedule) -> Float64[np.ndarray, 'T']:
    """The share of the image's variance left at each timestep: falls from almost 1 towards 0."""
    return np.cumprod(1 - betas(schedule))


def sampling_timesteps(
    schedule: Schedule, num_steps: int, spacing: str, *, steps_offset: int = 0
) -> Int32[np.ndarray, 'S']:
    """The timesteps a sampler visits, in order of visiting: strictly descending.

    With T = schedule.num_train_timesteps, S = num_steps and i = 0..S-1, the set visited is
    (before it is turned round)

    * 'uniform': i * (T // S) + 1, latent diffusion's and so EfficientDM's. Where S does not divide
      T the reference code goes on past S steps; this stops at S.
    * 'quadratic': floor(linspace(0, sqrt(0.8 T), S)^2), DDIM (arXiv:2010.02502, section D.2).
    * 'leading', 'linspace', 'trailing': table 2 of arXiv:2305.08891, rounded as in `diffusers`.
      'linspace' and 'trailing' visit T - 1; 'leading' is i * (T // S) + steps_offset.

    Args:
      schedule: gives T.
      num_steps: S, in 1..T.
      spacing: one of `SPACINGS`.
      steps_offset: at least 0; added to every timestep of 'leading' (Stable Diffusion uses 1).

    Raises:
      ValueError: if a value is outside its range, or the spacing visits a timestep twice or one
        beyond T - 1.
    """
    last = schedule.num_train_timesteps
    if spacing not in SPACINGS:
        raise ValueError(f'spacing={spacing!r}: expected one of {", ".join(SPACINGS)}.')
    if not 1 <= num_steps <= last:
        raise ValueError(f'num_steps={num_steps}: expected 1..{last} (num_train_timesteps).')
    if steps_offset < 0 or (steps_offset and spacing != 'leading'):
        raise ValueError(
            f'steps_offset={steps_offset} with spacing={spacing!r}: expected 0, or '
            "spacing='leading' and an offset of at least 0."
        )
    index = np.arange(num_steps)
    match spacing:
        case 'uniform':
            ascending = index * (last // num_steps) + 1
        case 'quadratic':
            ascending = np.linspace(0, np.sqrt(0.8 * last), num_steps) ** 2
        case 'leading':
            ascending = index * (last // num_steps) + steps_offset
        case 'linspace':
            ascending = np.linspace(0, last - 1, num_steps).round()
        case 'trailing':
            # np.arange, not index arithmetic: it decides which way exact halves round. It may
            # also give one element too many, for which `diffusers` visits t = -1.
            ascending = np.arange(last, 0, -last / num_steps)[:num_steps].round()[::-1] - 1
    ascending = ascending.astype(np.int32)
    if ascending[-1] >= last:
        raise ValueError(
            f'spacing={spacing!r} with num_steps={num_steps} visits t={ascending[-1]}, beyond the '
            f"last timestep {last - 1}; use fewer steps or spacing='leading' without an offset."
        )
    if np.any(np.diff(ascending) <= 0):
        raise ValueError(
            f'spacing={spacing!r} with num_steps={num_steps} visits a timestep twice; use fewer '
            "steps or spacing='leading'."
        )
    return ascending[::-1].copy()
