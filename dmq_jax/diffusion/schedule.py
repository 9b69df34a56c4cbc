"""Noise schedules, and which timesteps a sampler visits.

Everything here is NumPy, float64 and done once, before anything is compiled. A timestep `t` counts
from 0 (almost no noise) to T - 1, so `alphas_cumprod[t]` is the share of the image's variance left
at `t` (written with a bar over alpha in DDPM, Ho et al. 2020, arXiv:2006.11239, eq. 4).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int32, Shaped

KINDS = ('linear', 'scaled_linear', 'cosine', 'trained')
SPACINGS = (
    'uniform', 'quadratic', 'leading', 'trailing', 'linspace', 'compvis_uniform', 'compvis_quad',
    'dpm_leading', 'dpm_linspace', 'adm', 'adm_ddim',
)  # fmt: skip
OFFSET_SPACINGS = ('leading', 'dpm_leading')

# Timesteps of networks that are told t as a share of the schedule (ADM's `rescale_timesteps`).
_RESCALED_TIMESTEPS = 1000
# What `diffusers` puts for alphas_cumprod = 0 where a solver divides by it: float16's smallest.
_SMALLEST_ALPHA_CUMPROD = 2.0**-24
_KARRAS_RHO = 7.0  # arXiv:2206.00364, eq. 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How much noise each of the training timesteps adds.

    Attributes:
      kind: 'linear' (DDPM, arXiv:2006.11239 section 4), 'scaled_linear' (linear in sqrt(beta);
        what latent diffusion, arXiv:2112.10752, calls "linear"), 'cosine' (Nichol & Dhariwal,
        arXiv:2102.09672, eq. 17, beta at most 0.999; `squaredcos_cap_v2` in `diffusers`), or
        'trained': those of `trained_betas`.
      num_train_timesteps: T, at least 1.
      beta_start: variance added by the first timestep, in (0, 1); 'linear' and 'scaled_linear'.
      beta_end: variance added by the last, in [beta_start, 1); 'linear' and 'scaled_linear'.
      trained_betas: the T variances of 'trained', in (0, 1), kept as a tuple; else empty.
      rescale_betas_zero_snr: no signal is left at the last timestep (arXiv:2305.08891, algorithm
        1): alphas_cumprod[T - 1] is 0, where only a network with prediction 'v' can start.
      rescale_timesteps: the network is given 1000 t / T in place of t, as those of
        arXiv:2102.09672 and arXiv:2105.05233 are; makes no difference where T is 1000.

    Raises:
      ValueError: if a value is outside the range above.
    """

    kind: str = 'linear'
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: Sequence[float] = ()
    rescale_betas_zero_snr: bool = False
    rescale_timesteps: bool = False

    def __post_init__(self):
        # A list, e.g. out of JSON, would make the schedule unhashable.
        object.__setattr__(self, 'trained_betas', tuple(map(float, self.trained_betas)))
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
        expected = self.num_train_timesteps if self.kind == 'trained' else 0
        if len(self.trained_betas) != expected:
            raise ValueError(
                f'{len(self.trained_betas)} trained_betas with kind={self.kind!r}: expected '
                f"{expected}; give num_train_timesteps of them, and those with kind='trained' only."
            )
        if not all(0 < beta < 1 for beta in self.trained_betas):
            raise ValueError('trained_betas: expected every one in (0, 1).')
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise ValueError('rescale_betas_zero_snr: expected at least 2 num_train_timesteps.')


def betas(schedule: Schedule) -> Float64[np.ndarray, 'T']:
    """The variance of the noise added by each timestep, in (0, 1]: 1 only at zero terminal SNR."""
    if schedule.rescale_betas_zero_snr:
        kept = alphas_cumprod(schedule)
        return 1 - kept / np.append(1.0, kept[:-1])
    return _given_betas(schedule)


def _given_betas(schedule):
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
        case 'trained':
            return np.array(schedule.trained_betas)
    raise AssertionError(f'{schedule.kind} is validated by Schedule')


def alphas_cumprod(schedule: Schedule) -> Float64[np.ndarray, 'T']:
    """The share of the image's variance left at each timestep: falls from almost 1 towards 0."""
    table = np.cumprod(1 - _given_betas(schedule))
    if not schedule.rescale_betas_zero_snr:
        return table
    alpha = np.sqrt(table)
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


def solver_alphas_cumprod(schedule: Schedule) -> Float64[np.ndarray, 'T']:
    """`alphas_cumprod` for solvers that divide by it: 2^-24 where there is no signal left."""
    table = alphas_cumprod(schedule)
    return np.where(table == 0, _SMALLEST_ALPHA_CUMPROD, table)


def sigmas_at(schedule: Schedule, timesteps: Shaped[np.ndarray, 'S']) -> Float64[np.ndarray, 'S']:
    """Noise per unit of signal, sqrt(1 / alphas_cumprod - 1), linear between two timesteps."""
    table = solver_alphas_cumprod(schedule)
    sigmas = np.sqrt((1 - table) / table)
    return np.interp(timesteps, np.arange(len(sigmas)), sigmas)


def karras_sigmas(
    schedule: Schedule, num_steps: int
) -> tuple[Float64[np.ndarray, 'S'], Float64[np.ndarray, 'S']]:
    """Noise levels that arXiv:2206.00364, eq. 5, spaces from the schedule's largest to its least.

    Returns:
      timesteps: where the schedule has these levels, descending from T - 1 to 0: not integers, but
        linear in the logarithm of sigma, as in `diffusers`.
      sigmas: the levels; see `sigmas_at`.

    Raises:
      ValueError: if `num_steps` is not in 2..T.
    """
    last = schedule.num_train_timesteps
    if not 2 <= num_steps <= last:
        raise ValueError(f'num_steps={num_steps}: expected 2..{last} (num_train_timesteps).')
    table = sigmas_at(schedule, np.arange(last))
    high, low = table[-1] ** (1 / _KARRAS_RHO), table[0] ** (1 / _KARRAS_RHO)
    sigmas = (high + np.linspace(0, 1, num_steps) * (low - high)) ** _KARRAS_RHO
    return np.interp(np.log(sigmas), np.log(table), np.arange(last)), sigmas


def network_timesteps(
    schedule: Schedule, timesteps: Shaped[np.ndarray, 'S']
) -> Shaped[np.ndarray, 'S']:
    """What the network is told at `timesteps`: int32, or float32 where they are not integers."""
    if schedule.rescale_timesteps:
        timesteps = timesteps * (_RESCALED_TIMESTEPS / schedule.num_train_timesteps)
    whole = np.round(timesteps)
    return whole.astype(np.int32) if np.all(whole == timesteps) else timesteps.astype(np.float32)


def sampling_timesteps(
    schedule: Schedule,
    num_steps: int,
    spacing: str,
    *,
    steps_offset: int = 0,
    sections: tuple[int, ...] = (),
) -> Int32[np.ndarray, 'S']:
    """The timesteps a sampler visits, in order of visiting: strictly descending.

    With T = schedule.num_train_timesteps, S = num_steps and i = 0..S-1, the set visited is
    (before it is turned round)

    * 'uniform': i * (T // S) + 1, latent diffusion's and so EfficientDM's. Where S does not divide
      T the reference code goes on past S steps; this stops at S.
    * 'quadratic': floor(linspace(0, sqrt(0.8 T), S)^2), DDIM (arXiv:2010.02502, section D.2). Where
      several fall on one timestep, at the low end, it is visited once: fewer than S of them. DDIM's
      code steps from t to t there, which changes nothing, with or without noise.
    * 'leading', 'linspace', 'trailing': table 2 of arXiv:2305.08891, rounded as in `diffusers`.
      'linspace' and 'trailing' visit T - 1; 'leading' is i * (T // S) + steps_offset.
    * 'compvis_uniform': every (T // S)-th from 1 on, latent diffusion's code to the letter: more
      than S of them where S does not divide T. 'compvis_quad': its `quad`, 'quadratic' + 1.
    * 'dpm_leading', 'dpm_linspace': those of S + 1 steps without the lowest, as DPM-Solver's in
      `diffusers`.
    * 'adm': `sections` as ADM (arXiv:2105.05233) strides them: T is cut into equal sections, each
      visited so often, its ends included. 'adm_ddim': its "ddimS", multiples of the smallest
      stride that gives exactly S.

    Where S does not divide T, `diffusers` takes the end of a DDIM or PNDM step at t - T // S even
    if 'linspace' or 'trailing' visits another timestep next. Here it is always the next visited.

    Args:
      schedule: gives T.
      num_steps: S, in 1..T.
      spacing: one of `SPACINGS`.
      steps_offset: at least 0; added to every timestep of 'leading' and 'dpm_leading' (Stable
        Diffusion uses 1).
      sections: of 'adm': visits per section, lowest timesteps first, that add up to S; () is one
        section.

    Raises:
      ValueError: if a value is outside its range, or the spacing visits a timestep twice or one
        beyond T - 1.
    """
    last = schedule.num_train_timesteps
    if spacing not in SPACINGS:
        raise ValueError(f'spacing={spacing!r}: expected one of {", ".join(SPACINGS)}.')
    if not 1 <= num_steps <= last:
        raise ValueError(f'num_steps={num_steps}: expected 1..{last} (num_train_timesteps).')
    if steps_offset < 0 or (steps_offset and spacing not in OFFSET_SPACINGS):
        raise ValueError(
            f'steps_offset={steps_offset} with spacing={spacing!r}: expected 0, or '
            "spacing='leading' or 'dpm_leading' and an offset of at least 0."
        )
    if sections and (spacing != 'adm' or sum(sections) != num_steps or min(sections) < 1):
        raise ValueError(
            f"sections={sections} with spacing={spacing!r}: expected (), or spacing='adm' and "
            f'positive numbers of sum num_steps={num_steps}.'
        )
    index = np.arange(num_steps)
    match spacing:
        case 'uniform':
            ascending = index * (last // num_steps) + 1
        case 'quadratic':
            ascending = (np.linspace(0, np.sqrt(0.8 * last), num_steps) ** 2).astype(int)
            ascending = np.unique(ascending)
        case 'leading':
            ascending = index * (last // num_steps) + steps_offset
        case 'linspace':
            ascending = np.linspace(0, last - 1, num_steps).round()
        case 'trailing':
            # np.arange, not index arithmetic: it decides which way exact halves round. It may
            # also give one element too many, for which `diffusers` visits t = -1.
            ascending = np.arange(last, 0, -last / num_steps)[:num_steps].round()[::-1] - 1
        case 'compvis_uniform':
            ascending = np.arange(0, last, last // num_steps) + 1
        case 'compvis_quad':
            # Rounded down before the 1 is added: 0.8 T is not a square in floating point.
            ascending = (np.linspace(0, np.sqrt(0.8 * last), num_steps) ** 2).astype(int) + 1
        case 'dpm_leading':
            ascending = (index + 1) * (last // (num_steps + 1)) + steps_offset
        case 'dpm_linspace':
            ascending = np.linspace(0, last - 1, num_steps + 1).round()[1:]
        case 'adm':
            ascending = _sectioned(last, sections or (num_steps,))
        case 'adm_ddim':
            ascending = _strided(last, num_steps)
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


def _sectioned(num_train_timesteps, sections):
    size, num_larger = divmod(num_train_timesteps, len(sections))
    begin, visited = 0, []
    for section, count in enumerate(sections):
        length = size + (section < num_larger)
        if count > length:
            raise ValueError(
                f'sections={sections}: {count} visits to the {length} timesteps of section '
                f'{section}; expected at most {length}.'
            )
        # A sum, as in ADM, not a product: it decides which way halves round.
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            visited.append(begin + round(place))
            place += stride
        begin += length
    return np.array(visited)


def _strided(num_train_timesteps, num_steps):
    for stride in range(1, num_train_timesteps):
        if len(range(0, num_train_timesteps, stride)) == num_steps:
            return np.arange(0, num_train_timesteps, stride)
    raise ValueError(
        f"spacing='adm_ddim' with num_steps={num_steps}: no integer stride through "
        f"{num_train_timesteps} timesteps gives that many; use another number or spacing='adm'."
    )
