"""Update rules: what one step of each sampler does, as tables of weights in NumPy float64.

`here` and `there` are alphas_cumprod at the timestep a step starts from and at the one it ends at,
[S] each; alpha and sigma stand for their square roots and those of their complements.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Shaped

# Below this many steps the last one of DPM-Solver++ is of first order even where it ends at some
# noise: a stability measure of the authors' code, and its count.
_NUM_STEPS_LOW_ORDER_FINAL = 15

# Adams-Bashforth of order 1 to 4, newest prediction first (arXiv:2202.09778, eq. 12).
_MULTISTEP = (
    np.array([1.0, 0.0, 0.0, 0.0]),
    np.array([3.0, -1.0, 0.0, 0.0]) / 2,
    np.array([23.0, -16.0, 5.0, 0.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)
_NUM_REMEMBERED = 3


class Rule(NamedTuple):
    """A rule on the timesteps given; the rows of a table are network evaluations, R of them.

    Attributes:
      timesteps: what the network is evaluated at.
      here: alphas_cumprod where each row's step starts from.
      weights: by term; see `samplers.Sampler`.
    """

    timesteps: Shaped[np.ndarray, 'R']
    here: Float64[np.ndarray, 'R']
    weights: dict[str, Float64[np.ndarray, 'R *matrix']]


def ddpm(here: np.ndarray, there: np.ndarray, *, variance: str) -> dict[str, np.ndarray]:
    """arXiv:2006.11239, eq. 6 and 7, with beta recomputed between the timesteps visited."""
    beta = 1 - here / there
    posterior = beta * (1 - there) / (1 - here)
    noise = np.sqrt(beta if variance == 'fixed_large' else posterior)
    noise[-1] = 0.0  # algorithm 2, line 3: no noise in the last step
    weights = {
        'x_0': np.sqrt(there) * beta / (1 - here),
        'x': np.sqrt(1 - beta) * (1 - there) / (1 - here),
        'noise': noise,
    }
    if variance == 'learned_range':
        # arXiv:2102.09672, eq. 15: exp(v log beta + (1 - v) log posterior), v in [0, 1]. Without
        # the last row, where the posterior may be 0 and the noise is.
        log_range = np.zeros_like(beta)
        log_range[:-1] = np.log(beta[:-1] / posterior[:-1]) / 2
        weights['log_noise_range'] = log_range
    return weights


def ddim(here: np.ndarray, there: np.ndarray, *, eta: float = 0.0) -> dict[str, np.ndarray]:
    """arXiv:2010.02502, eq. 12, with sigma from eq. 16."""
    # Where a step ends at the level it starts from, rounding may leave less than 0.
    noise = eta * np.sqrt((1 - there) / (1 - here) * np.maximum(1 - here / there, 0.0))
    return {
        'x_0': np.sqrt(there),
        'eps': np.sqrt(1 - there - noise**2),
        'noise': noise,
    }


def dpm_solver(
    here: np.ndarray, there: np.ndarray, *, final_order: str = 'auto'
) -> dict[str, np.ndarray]:
    """arXiv:2211.01095, algorithm 2: the data-prediction multistep solver of order 2."""
    sigma_ratio = np.sqrt((1 - there) / (1 - here))
    # exp(-h) for h = lambda(there) - lambda(here), lambda = log(alpha / sigma): finite at alpha 1.
    exp_minus_h = sigma_ratio * np.sqrt(here / there)
    first_order = np.sqrt(there) * (1 - exp_minus_h)
    with np.errstate(divide='ignore'):
        h = -np.log(exp_minus_h)
    # D = (1 + 1 / 2r) x_0 - 1 / 2r x_0_previous, r = h(step before) / h. The first step has nothing
    # to look back on; the last is of first order where h is infinite or the steps are few.
    extrapolation = np.zeros_like(here)
    extrapolation[1:] = h[1:] / (2 * h[:-1])
    is_short = final_order == 'auto' and len(here) < _NUM_STEPS_LOW_ORDER_FINAL
    if there[-1] == 1 or is_short or final_order == 'first':
        extrapolation[-1] = 0.0
    return {
        'x': sigma_ratio,
        'x_0': first_order * (1 + extrapolation),
        'x_0_previous': -first_order * extrapolation,
    }


def plms(timesteps: np.ndarray, here: np.ndarray, there: np.ndarray) -> Rule:
    """arXiv:2202.09778, eq. 12, started by an improved Euler step instead of Runge-Kutta.

    The first step is taken twice: a trial with the first prediction, whose end the network sees,
    then with the mean of the two. So R = S + 1, and the second timestep is visited twice.
    """
    rows = np.r_[0, 0, 1 : len(here)]
    visited = np.r_[0, 1, 1 : len(here)]
    order = np.minimum(np.arange(len(rows)) - 1, 3)
    combine = np.stack([_MULTISTEP[max(i, 0)] for i in order])
    combine[1, :2] = 0.5
    is_new = np.arange(len(rows)) != 1
    weights = ddim(here[rows], there[rows]) | {
        'combine': combine,
        'remember': np.stack([_remember(is_new=new) for new in is_new]),
        'hold': (np.arange(len(rows)) == 0).astype(np.float64),
    }
    return Rule(timesteps[visited], here[rows], weights)


def pndm(timesteps: np.ndarray, here: np.ndarray, there: np.ndarray, table: np.ndarray) -> Rule:
    """arXiv:2202.09778, algorithm 2 (F-PNDM): three steps of Runge-Kutta, then eq. 12.

    A step of Runge-Kutta takes four evaluations (eq. 13), so R = S + 9. Its halves are rounded as
    `diffusers` does where they fall between two timesteps.
    """
    visited, starts, ends, combine, remember, hold = [], [], [], [], [], []
    for i in range(3):
        half = (timesteps[i] - timesteps[i + 1]) // 2
        middle = timesteps[i + 1] + half
        visited += [timesteps[i], middle, middle, timesteps[i + 1]]
        starts += [here[i]] * 4
        ends += [table[timesteps[i] - half], table[middle], there[i], there[i]]
        # Trials with the newest prediction alone; then with the sum, 1/6 1/3 1/3 1/6.
        combine += [[1.0, 0.0, 0.0, 0.0, 0.0]] * 3 + [[1 / 6, 0.0, 0.0, 0.0, 1.0]]
        remember += [
            _remember(is_new=True, share=1 / 6),
            _remember(is_new=False, share=1 / 3, kept=1.0),
            _remember(is_new=False, share=1 / 3, kept=1.0),
            _remember(is_new=False, share=0.0),
        ]
        hold += [1.0, 1.0, 1.0, 0.0]
    visited += list(timesteps[3:])
    starts, ends = np.r_[starts, here[3:]], np.r_[ends, there[3:]]
    for _ in timesteps[3:]:
        combine.append([*_MULTISTEP[3], 0.0])
        remember.append(_remember(is_new=True, share=0.0))
        hold.append(0.0)
    weights = ddim(starts, ends) | {
        'combine': np.array(combine),
        'remember': np.stack(remember),
        'hold': np.array(hold),
    }
    return Rule(np.array(visited, timesteps.dtype), starts, weights)


def _remember(*, is_new, share=None, kept=0.0):
    """What is remembered, [K, 1 + K], of the prediction and of what was remembered before.

    Three predictions, newest first; and with a `share` of the new one, the sum of Runge-Kutta, to
    the part `kept`.
    """
    num_slots = _NUM_REMEMBERED + (share is not None)
    matrix = np.zeros((num_slots, 1 + num_slots))
    for slot in range(_NUM_REMEMBERED):
        matrix[slot, slot if is_new else slot + 1] = 1.0
    if share is not None:
        matrix[-1, 0], matrix[-1, -1] = share, kept
    return matrix
