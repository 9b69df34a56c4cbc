"""Samplers: one update rule each, and the one loop that runs them.

Every rule here is linear: with x_0 and eps read off the network's prediction at x_t,

    x_{t'} = w_x x_t + w_x_0 x_0 + w_eps eps + w_noise noise + w_previous x_0(at the step before)

where t' is the next timestep visited. A sampler is therefore a table of weights, one row per step,
computed once in float64; the loop carries `x` alone, or also the last x_0 where a rule looks back.
alpha and sigma stand for sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), as in DPM-Solver.

* `ddpm`: Denoising Diffusion Probabilistic Models, arXiv:2006.11239, eq. 7 on the visited steps.
* `ddim`: Denoising Diffusion Implicit Models, arXiv:2010.02502, eq. 12 and 16.
* `dpm_solver`: DPM-Solver++ (2M), arXiv:2211.01095, algorithm 2.

The position of a step in the table never leaves this module: a network sees the timestep `t`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key, PyTree

from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod

PREDICTIONS = ('eps', 'v')
VARIANCES = ('fixed_small', 'fixed_large')
FINAL_ALPHAS = ('one', 'first')

# Steps are folded in as 0..S-1, so the last uint32 is free for ever.
_INITIAL_NOISE = 2**32 - 1

# Below this many steps the last one of DPM-Solver++ is of first order even where it ends at some
# noise: a stability measure of the authors' code, and its count.
_NUM_STEPS_LOW_ORDER_FINAL = 15


class Carry(NamedTuple):
    """What one step hands to the next: float32, batch first.

    Attributes:
      x: x_t; after the last step, the image.
      x_0: the image predicted at the step before, or None where the rule does not look back.
    """

    x: Float[Array, 'B *image']
    x_0: Float[Array, 'B *image'] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('timesteps', 'weights'),
    meta_fields=('is_stochastic', 'prediction', 'clip_sample'),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """A sampler's table, and its step. Made by `make_sampler`; a pytree of [S] arrays.

    Law: step S - 1 ends at the image; a rule has an entry in `weights` iff it uses that term.

    Attributes:
      timesteps: the timesteps visited, descending; the `t` the network is given.
      weights: the rule's terms by name: 'alpha' and 'sigma' of x_t always, then any of 'x', 'x_0',
        'eps', 'noise', 'x_0_previous'.
      is_stochastic: whether `step` needs noise.
      prediction: what the network predicts, 'eps' or 'v'.
      clip_sample: x_0 is clipped to [-clip_sample, clip_sample]; None leaves it alone.
    """

    timesteps: Int32[Array | np.ndarray, 'S']
    weights: dict[str, Float[Array | np.ndarray, 'S']]
    is_stochastic: bool
    prediction: str
    clip_sample: float | None

    def init(self, x_T: Float[Array, 'B *image']) -> Carry:
        """The carry before the first step, from the noise `x_T`."""
        x = jnp.asarray(x_T, jnp.float32)
        return Carry(x, jnp.zeros_like(x) if 'x_0_previous' in self.weights else None)

    def step(
        self,
        carry: Carry,
        prediction: Float[Array, 'B *image'],
        i: Int[Array, '*position'] | int,
        noise: Float[Array, 'B *image'] | None = None,
    ) -> Carry:
        """One step of the rule: from `timesteps[i]` to the next.

        Args:
          carry: from `init` or from the step before.
          prediction: the network's at `carry.x` and `timesteps[i]`, any float type; the sum is
            taken in float32.
          i: position in the table, in 0..S-1; one for the batch, or one per image ([B]).
          noise: standard normal; needed iff `is_stochastic`.

        Raises:
          ValueError: if the sampler is stochastic and `noise` is missing.
        """
        if self.is_stochastic and noise is None:
            raise ValueError('This sampler is stochastic; pass noise=step_noise(keys, i, shape).')
        weights = {
            name: _expand(jnp.asarray(table)[i], carry.x.ndim)
            for name, table in self.weights.items()
        }
        alpha, sigma = weights['alpha'], weights['sigma']
        x_0, eps = _split(
            prediction.astype(jnp.float32), carry.x, alpha, sigma, kind=self.prediction
        )
        if self.clip_sample is not None:
            x_0 = jnp.clip(x_0, -self.clip_sample, self.clip_sample)
            # x_t = alpha x_0 + sigma eps must keep holding (as in ADM, arXiv:2105.05233).
            eps = (carry.x - alpha * x_0) / sigma
        terms = {
            'x': carry.x,
            'x_0': x_0,
            'eps': eps,
            'noise': noise if noise is None else noise.astype(jnp.float32),
            'x_0_previous': carry.x_0,
        }
        x = sum(weights[name] * term for name, term in terms.items() if name in weights)
        return Carry(x, x_0 if 'x_0_previous' in self.weights else None)


def make_sampler(
    name: str,
    schedule: Schedule,
    timesteps: np.ndarray,
    *,
    eta: float = 0.0,
    variance: str = 'fixed_small',
    prediction: str = 'eps',
    clip_sample: float | None = None,
    final_alpha: str = 'one',
) -> Sampler:
    """The sampler `name` on the timesteps given.

    Args:
      name: 'ddpm', 'ddim' or 'dpm_solver'.
      schedule: the teacher's noise schedule.
      timesteps: integers [S], strictly descending, in 0..T-1 (see `sampling_timesteps`).
      eta: in [0, 1], 'ddim' alone: 0 follows the ODE, 1 has the variance of 'ddpm'.
      variance: 'ddpm' alone: 'fixed_small', the posterior's (right for a single image), or
        'fixed_large', the forward step's (right for x_0 ~ N(0, 1)); arXiv:2006.11239 section 3.2.
        The last step adds no noise.
      prediction: what the network predicts: 'eps', or 'v' (arXiv:2202.00512, appendix D).
      clip_sample: clip x_0 to [-clip_sample, clip_sample] at every step; pixels use 1, latents
        None.
      final_alpha: alphas_cumprod after the last step: 'one' (no noise left), or 'first',
        alphas_cumprod[0], as in latent diffusion (`set_alpha_to_one=False` in `diffusers`).

    Raises:
      ValueError: for an unknown name, a value outside its range, or an option of another sampler.
    """
    if name not in _RULES:
        raise ValueError(f'name={name!r}: expected one of {", ".join(_RULES)}.')
    for option, value, known in (
        ('variance', variance, VARIANCES),
        ('prediction', prediction, PREDICTIONS),
        ('final_alpha', final_alpha, FINAL_ALPHAS),
    ):
        if value not in known:
            raise ValueError(f'{option}={value!r}: expected one of {", ".join(known)}.')
    if not 0 <= eta <= 1 or (eta and name != 'ddim'):
        raise ValueError(f"eta={eta} with {name!r}: expected 0, or 'ddim' and a value in [0, 1].")
    if variance != VARIANCES[0] and name != 'ddpm':
        raise ValueError(f"variance={variance!r} is an option of 'ddpm', not of {name!r}.")
    if clip_sample is not None and clip_sample <= 0:
        raise ValueError(f'clip_sample={clip_sample}: expected None or a value above 0.')
    timesteps = _check_timesteps(timesteps, schedule.num_train_timesteps)

    table = alphas_cumprod(schedule)
    here = table[timesteps]
    there = np.append(here[1:], 1.0 if final_alpha == 'one' else table[0])
    options = {'ddim': {'eta': eta}, 'ddpm': {'variance': variance}}.get(name, {})
    weights = _RULES[name](here, there, **options)
    # A sampler that adds no noise draws none.
    is_stochastic = bool(np.any(weights.get('noise', 0)))
    if not is_stochastic:
        weights.pop('noise', None)
    weights |= {'alpha': np.sqrt(here), 'sigma': np.sqrt(1 - here)}
    return Sampler(
        timesteps=timesteps,
        weights={term: column.astype(np.float32) for term, column in weights.items()},
        is_stochastic=is_stochastic,
        prediction=prediction,
        clip_sample=clip_sample,
    )


def prediction_gain(sampler: Sampler) -> Float[Array, 'S']:
    """How far one step moves x per unit of the network's prediction, at each position.

    An error of size e in the prediction at position i puts an error gain[i] * e into the next x:
    weighing errors by it compares the means of the next step, mu in DDPM, instead of predictions.
    """
    weights = {name: jnp.asarray(table) for name, table in sampler.weights.items()}
    alpha, sigma = weights['alpha'], weights['sigma']
    none = jnp.zeros_like(alpha)
    by_x_0, by_eps = weights.get('x_0', none), weights.get('eps', none)
    if sampler.prediction == 'v':
        return by_eps * alpha - by_x_0 * sigma
    return by_eps - by_x_0 * sigma / alpha


def _check_timesteps(timesteps, num_train_timesteps):
    timesteps = np.asarray(timesteps)
    if (
        timesteps.ndim != 1
        or timesteps.size == 0
        or not np.issubdtype(timesteps.dtype, np.integer)
        or np.any(timesteps[1:] >= timesteps[:-1])
        or timesteps[0] >= num_train_timesteps
        or timesteps[-1] < 0
    ):
        raise ValueError(
            f'timesteps={timesteps} ({timesteps.dtype}): expected at least one integer, strictly '
            f'descending, in 0..{num_train_timesteps - 1}.'
        )
    return timesteps.astype(np.int32)


def _ddpm_weights(here, there, *, variance):
    """arXiv:2006.11239, eq. 6 and 7, with beta recomputed between the timesteps visited."""
    beta = 1 - here / there
    noise = np.sqrt(beta * (1 - there) / (1 - here) if variance == 'fixed_small' else beta)
    noise[-1] = 0.0  # algorithm 2, line 3: no noise in the last step
    return {
        'x_0': np.sqrt(there) * beta / (1 - here),
        'x': np.sqrt(1 - beta) * (1 - there) / (1 - here),
        'noise': noise,
    }


def _ddim_weights(here, there, *, eta):
    """arXiv:2010.02502, eq. 12, with sigma from eq. 16."""
    noise = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    return {
        'x_0': np.sqrt(there),
        'eps': np.sqrt(1 - there - noise**2),
        'noise': noise,
    }


def _dpm_solver_weights(here, there):
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
    if there[-1] == 1 or len(here) < _NUM_STEPS_LOW_ORDER_FINAL:
        extrapolation[-1] = 0.0
    return {
        'x': sigma_ratio,
        'x_0': first_order * (1 + extrapolation),
        'x_0_previous': -first_order * extrapolation,
    }


_RULES = {'ddpm': _ddpm_weights, 'ddim': _ddim_weights, 'dpm_solver': _dpm_solver_weights}


def to_eps(
    prediction: Float[Array, '*shape'],
    x: Float[Array, '*shape'],
    alpha_cumprod: Float[Array | np.ndarray, '*times'] | float,
    kind: str,
) -> Float[Array, '*shape']:
    """The noise in `x` according to a prediction of `kind` ('eps' or 'v').

    Here and below, `alpha_cumprod` is one value for all, or one per image ([B]).

    Raises:
      ValueError: if `kind` is unknown.
    """
    return _split(prediction, x, *_alpha_sigma(alpha_cumprod, x), kind=kind)[1]


def to_x_0(
    prediction: Float[Array, '*shape'],
    x: Float[Array, '*shape'],
    alpha_cumprod: Float[Array | np.ndarray, '*times'] | float,
    kind: str,
) -> Float[Array, '*shape']:
    """The image in `x` according to a prediction of `kind` ('eps' or 'v').

    Raises:
      ValueError: if `kind` is unknown.
    """
    return _split(prediction, x, *_alpha_sigma(alpha_cumprod, x), kind=kind)[0]


def add_noise(
    x_0: Float[Array, '*shape'],
    noise: Float[Array, '*shape'],
    alpha_cumprod: Float[Array | np.ndarray, '*times'] | float,
) -> Float[Array, '*shape']:
    """A draw of x_t from the forward process (arXiv:2006.11239, eq. 4)."""
    alpha, sigma = _alpha_sigma(alpha_cumprod, x_0)
    return alpha * x_0 + sigma * noise


def velocity_target(
    x_0: Float[Array, '*shape'],
    noise: Float[Array, '*shape'],
    alpha_cumprod: Float[Array | np.ndarray, '*times'] | float,
) -> Float[Array, '*shape']:
    """What a network with prediction 'v' is trained to say (arXiv:2202.00512, appendix D)."""
    alpha, sigma = _alpha_sigma(alpha_cumprod, x_0)
    return alpha * noise - sigma * x_0


def _expand(values, ndim):
    return values.reshape(values.shape + (1,) * (ndim - values.ndim) if values.ndim else ())


def _alpha_sigma(alpha_cumprod, x):
    # Host numbers keep float64 through 1 - alpha_cumprod, which cancels near t = 0.
    numpy = jnp if isinstance(alpha_cumprod, jax.Array) else np
    alpha_cumprod = numpy.asarray(alpha_cumprod)
    alpha, sigma = numpy.sqrt(alpha_cumprod), numpy.sqrt(1 - alpha_cumprod)
    return _expand(jnp.asarray(alpha, x.dtype), x.ndim), _expand(
        jnp.asarray(sigma, x.dtype), x.ndim
    )


def _split(prediction, x, alpha, sigma, *, kind):
    if kind == 'eps':
        return (x - sigma * prediction) / alpha, prediction
    if kind == 'v':
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x
    raise ValueError(f'kind={kind!r}: expected one of {", ".join(PREDICTIONS)}.')


def initial_noise(
    keys: Key[Array, 'B'], image_shape: tuple[int, ...]
) -> Float[Array, 'B *image_shape']:
    """The standard normal x_T a sampler starts from: image b depends on `keys[b]` alone."""
    return step_noise(keys, _INITIAL_NOISE, image_shape)


def step_noise(
    keys: Key[Array, 'B'], i: Int[Array, '*position'] | int, image_shape: tuple[int, ...]
) -> Float[Array, 'B *image_shape']:
    """The standard normal noise of step `i`: image b depends on `keys[b]` and its `i` alone.

    Args:
      keys: one typed key per image, so that neither batch size nor device count matters.
      i: the step's position in the sampler's table, one for all or one per image ([B]).
      image_shape: without the batch.
    """
    i = jnp.broadcast_to(jnp.asarray(i, jnp.uint32), keys.shape)
    return jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), image_shape))(
        keys, i
    )


def sample(
    predict: Callable[..., tuple[Float[Array, 'B *image'], Any]],
    sampler: Sampler,
    x_T: Float[Array, 'B *image'],
    keys: Key[Array, '_'] | None = None,
) -> tuple[Float[Array, 'B *image'], PyTree]:
    """Runs the sampler from noise to images, in one `jax.lax.scan`.

    Args:
      predict: `predict(x, t) -> (prediction, aux)`, with `t` a scalar int32 out of
        `sampler.timesteps`; `aux` is any pytree of arrays, or None.
      sampler: from `make_sampler`.
      x_T: standard normal, e.g. from `initial_noise`.
      keys: one typed key per image; needed iff the sampler is stochastic.

    Returns:
      x_0: the images, float32.
      aux: what `predict` returned at every step, stacked: leading axis S, in order of visiting.

    Raises:
      ValueError: if the sampler is stochastic and there is not one key per image.
    """
    carry, (aux, _) = _scan(predict, sampler, x_T, keys, keep=lambda carry: None)
    return carry.x, aux


def trajectory(
    predict: Callable[..., tuple[Float[Array, 'B *image'], Any]],
    sampler: Sampler,
    x_T: Float[Array, 'B *image'],
    keys: Key[Array, '_'] | None = None,
) -> tuple[Float[Array, 'B *image'], Carry]:
    """Like `sample`, but returns the carry before every step instead of `aux`.

    Row i of the carries (leading axis S) is what `sampler.step(..., i)` starts from: its `x` is
    x_t at `timesteps[i]`, row 0 is x_T.
    """
    carry, (_, carries) = _scan(predict, sampler, x_T, keys, keep=lambda carry: carry)
    return carry.x, carries


def _scan(predict, sampler, x_T, keys, *, keep):
    if sampler.is_stochastic and (keys is None or keys.shape != x_T.shape[:1]):
        raise ValueError(
            f'This sampler is stochastic: expected one key per image ({x_T.shape[0]}), got '
            f'{None if keys is None else keys.shape}; pass keys=jax.random.split(key, batch).'
        )

    def visit(carry, position):
        i, t = position
        prediction, aux = predict(carry.x, t)
        noise = step_noise(keys, i, x_T.shape[1:]) if sampler.is_stochastic else None
        return sampler.step(carry, prediction, i, noise), (aux, keep(carry))

    positions = jnp.arange(len(sampler.timesteps), dtype=jnp.int32), jnp.asarray(sampler.timesteps)
    return jax.lax.scan(visit, sampler.init(x_T), positions)
