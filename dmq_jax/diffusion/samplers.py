"""Samplers: the table of an update rule, its step, and the one loop that runs it.

Every rule here is linear: with x_0 and eps read off the network's prediction at x_t,

    x_{t'} = w_x x_t + w_x_0 x_0 + w_eps eps + w_noise noise + w_previous x_0(at the step before)

where t' is where the step ends. A sampler is therefore a table of weights, one row per evaluation
of the network, computed once in float64 (`rules.py`); the loop carries `x`, and what a rule looks
back on. Rules of higher order first put a weighed sum of several predictions in place of the last.
alpha and sigma stand for sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), as in DPM-Solver.

* `ddpm`: Denoising Diffusion Probabilistic Models, arXiv:2006.11239, eq. 7 on the visited steps;
  learned variances of Improved DDPM, arXiv:2102.09672, eq. 15.
* `ddim`: Denoising Diffusion Implicit Models, arXiv:2010.02502, eq. 12 and 16.
* `dpm_solver`: DPM-Solver++ (2M), arXiv:2211.01095, algorithm 2.
* `plms`: latent diffusion's, arXiv:2202.09778, eq. 12 after an improved Euler step; PNDM with
  `skip_prk_steps` in `diffusers`. `pndm`: the same after three steps of Runge-Kutta.
* `euler`: Euler's method in x / alpha over sigma / alpha, arXiv:2206.00364. In x that is `ddim`:
  what the network sees, x / alpha divided by sqrt(1 + (sigma / alpha)^2), is x itself.

The position of a step in the table never leaves this module: a network sees the timestep `t`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from dmq_jax.diffusion import rules
from dmq_jax.diffusion.schedule import (
    Schedule,
    alphas_cumprod,
    karras_sigmas,
    network_timesteps,
    sampling_timesteps,
    sigmas_at,
    solver_alphas_cumprod,
)

NAMES = ('ddpm', 'ddim', 'dpm_solver', 'plms', 'pndm', 'euler')
PREDICTIONS = ('eps', 'v')
VARIANCES = ('fixed_small', 'fixed_large', 'learned_range')
FINAL_ALPHAS = ('one', 'first')
FINAL_ORDERS = ('auto', 'first', 'second')

# Rules in terms of sigma / alpha, which is infinite where no signal is left.
_SIGMA_RULES = ('dpm_solver', 'euler')
_MIN_STEPS = {'plms': 2, 'pndm': 4}

# Steps are folded in as 0..S-1, so the last uint32 is free for ever.
_INITIAL_NOISE = 2**32 - 1


class Carry(NamedTuple):
    """What one step hands to the next: float32, batch first.

    Attributes:
      x: x_t; after the last step, the image.
      x_0: the image predicted at the step before, or None where the rule does not look back.
      base: where the step under way starts from, or None where each evaluation ends a step.
      remembered: earlier predictions that the rule sums, or sums of them; () if it sums none.
    """

    x: Float[Array, 'B *image']
    x_0: Float[Array, 'B *image'] | None
    base: Float[Array, 'B *image'] | None = None
    remembered: tuple[Float[Array, 'B *image'], ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('timesteps', 'weights'),
    meta_fields=(
        'is_stochastic', 'prediction', 'clip_sample', 'keeps_eps', 'learns_variance',
        'initial_scale',
    ),
)  # fmt: skip
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """A sampler's table, and its step. Made by `make_sampler`; a pytree of arrays [S, ...].

    Law: step S - 1 ends at the image; a rule has an entry in `weights` iff it uses that term.

    Attributes:
      timesteps: the `t` the network is given at each evaluation, descending: int32, or float32
        where not all are integers. `plms` and `pndm` visit some twice.
      weights: the rule's terms by name: 'alpha' and 'sigma' of x_t always, then any of 'x', 'x_0',
        'eps', 'noise', 'x_0_previous'. Besides, 'log_noise_range' [S]: logarithm of the largest
        over the least weight of the noise, between which the network chooses. Where predictions
        are summed, K of them remembered: 'combine' [S, 1 + K], the shares of the new one and of
        those in the sum; 'remember' [S, K, 1 + K], the shares in what is remembered next; 'hold'
        [S], 1 where the next step starts from where this one did.
      is_stochastic: whether `step` needs noise.
      prediction: what the network predicts, 'eps' or 'v'.
      clip_sample: x_0 is clipped to [-clip_sample, clip_sample]; None leaves it alone.
      keeps_eps: eps stays as predicted where x_0 was clipped.
      learns_variance: predictions have twice the channels of x; the second half says, from -1 to
        1, where the logarithm of the variance lies in its range.
      initial_scale: standard deviation of the noise that the first step starts from.
    """

    timesteps: Shaped[Array | np.ndarray, 'S']
    weights: dict[str, Float[Array | np.ndarray, 'S *matrix']]
    is_stochastic: bool
    prediction: str
    clip_sample: float | None
    keeps_eps: bool = False
    learns_variance: bool = False
    initial_scale: float = 1.0

    def init(self, x_T: Float[Array, 'B *image']) -> Carry:
        """The carry before the first step, from the standard normal noise `x_T`."""
        x = jnp.asarray(x_T, jnp.float32)
        if self.initial_scale != 1.0:
            x = x * self.initial_scale
        if 'combine' not in self.weights:
            return Carry(x, jnp.zeros_like(x) if 'x_0_previous' in self.weights else None)
        num_remembered = self.weights['combine'].shape[-1] - 1
        # Arrays of their own: donated buffers must not be shared.
        return Carry(x, None, jnp.copy(x), tuple(jnp.zeros_like(x) for _ in range(num_remembered)))

    def step(
        self,
        carry: Carry,
        prediction: Float[Array, 'B *channels'],
        i: Int[Array, '*position'] | int,
        noise: Float[Array, 'B *image'] | None = None,
    ) -> Carry:
        """One step of the rule: from `timesteps[i]` to the next.

        Args:
          carry: from `init` or from the step before.
          prediction: the network's at `carry.x` and `timesteps[i]`, any float type; the sum is
            taken in float32. As wide as `carry.x`, or twice iff `learns_variance`.
          i: position in the table, in 0..S-1; one for the batch, or one per image ([B]).
          noise: standard normal; needed iff `is_stochastic`.

        Raises:
          ValueError: if the sampler is stochastic and `noise` is missing, or the prediction is not
            as wide as it should be.
        """
        if self.is_stochastic and noise is None:
            raise ValueError('This sampler is stochastic; pass noise=step_noise(keys, i, shape).')
        prediction, place = self._halves(prediction.astype(jnp.float32), carry.x.shape[-1])
        rows = {name: jnp.asarray(table)[i] for name, table in self.weights.items()}
        start, remembered = carry.x, carry.remembered
        if 'combine' in rows:
            terms = (prediction, *remembered)
            start, prediction = carry.base, _weighed(rows['combine'], terms)
            remembered = tuple(
                _weighed(rows['remember'][..., slot, :], terms) for slot in range(len(remembered))
            )
            del rows['combine'], rows['remember']
        weights = {name: _expand(row, start.ndim) for name, row in rows.items()}
        alpha, sigma = weights['alpha'], weights['sigma']
        x_0, eps = _split(prediction, start, alpha, sigma, kind=self.prediction)
        if self.clip_sample is not None:
            x_0 = jnp.clip(x_0, -self.clip_sample, self.clip_sample)
            if not self.keeps_eps:
                # x_t = alpha x_0 + sigma eps must keep holding (as in ADM, arXiv:2105.05233).
                eps = (start - alpha * x_0) / sigma
        if noise is not None:
            noise = noise.astype(jnp.float32)
            if 'log_noise_range' in weights:
                noise = noise * jnp.exp(weights['log_noise_range'] * (place + 1) / 2)
        terms = {'x': start, 'x_0': x_0, 'eps': eps, 'noise': noise, 'x_0_previous': carry.x_0}
        x = sum(weights[name] * term for name, term in terms.items() if name in weights)
        base = None
        if carry.base is not None:
            base = jnp.where(weights['hold'] == 1, start, x)
        return Carry(x, x_0 if 'x_0_previous' in self.weights else None, base, remembered)

    def _halves(self, prediction, channels):
        expected = (1 + self.learns_variance) * channels
        if prediction.shape[-1] != expected:
            known = 'as the sampler has a learned variance' if self.learns_variance else (
                'as the sampler has a fixed variance: drop the channels of a learnt one, or use '
                "'ddpm' with variance='learned_range'"
            )  # fmt: skip
            raise ValueError(
                f'The prediction has {prediction.shape[-1]} channels, the images {channels}: '
                f'expected a prediction of {expected} channels, {known}.'
            )
        if not self.learns_variance:
            return prediction, None
        return prediction[..., :channels], prediction[..., channels:]


def make_sampler(
    name: str,
    schedule: Schedule,
    timesteps: np.ndarray,
    *,
    sigmas: np.ndarray | None = None,
    eta: float = 0.0,
    variance: str = 'fixed_small',
    prediction: str = 'eps',
    clip_sample: float | None = None,
    keep_eps: bool = False,
    final_alpha: str = 'one',
    final_order: str = 'auto',
    scale_initial_noise: bool = False,
) -> Sampler:
    """The sampler `name` on the timesteps given.

    Args:
      name: one of `NAMES`.
      schedule: the teacher's noise schedule.
      timesteps: [S], strictly descending, in 0..T-1 (see `sampling_timesteps`): integers, or for
        'dpm_solver' and 'euler' also numbers between them. 'plms' needs 2 at least, 'pndm' 4.
      sigmas: [S], strictly descending, 'dpm_solver' and 'euler' alone: noise levels to put for
        those of the schedule at `timesteps` (see `karras_sigmas`); a timestep may then come twice.
      eta: in [0, 1], 'ddim' alone: 0 follows the ODE, 1 has the variance of 'ddpm'.
      variance: 'ddpm' alone: 'fixed_small', the posterior's (right for a single image), or
        'fixed_large', the forward step's (right for x_0 ~ N(0, 1)); arXiv:2006.11239 section 3.2.
        Or 'learned_range': the network has twice the channels, and their second half says where
        between the logarithms of these two (arXiv:2102.09672, eq. 15). The last step adds none.
      prediction: what the network predicts: 'eps', or 'v' (arXiv:2202.00512, appendix D).
      clip_sample: clip x_0 to [-clip_sample, clip_sample] at every step; pixels use 1, latents
        None.
      keep_eps: leave eps as it was predicted where x_0 was clipped, as `DDIMScheduler` of
        `diffusers` does unless told to `use_clipped_model_output`.
      final_alpha: alphas_cumprod after the last step: 'one' (no noise left), or 'first',
        alphas_cumprod[0], as in latent diffusion (`set_alpha_to_one=False` in `diffusers`, or
        `final_sigmas_type='sigma_min'`).
      final_order: of the last step of 'dpm_solver': 'auto', first if there are fewer than 15 or
        if it ends at no noise; 'first' (`euler_at_final`); 'second' where it ends at some noise
        (`lower_order_final=False`).
      scale_initial_noise: 'euler' alone: start from noise of the spread sigma of the first
        timestep, which leaves no room for a signal, as `diffusers` does with 'linspace' and
        'trailing'; else from standard normal noise.

    Raises:
      ValueError: for an unknown name, a value outside its range, or an option of another sampler.
    """
    _check_options(name, eta, variance, final_order, scale_initial_noise, sigmas)
    for option, value, known in (
        ('prediction', prediction, PREDICTIONS),
        ('final_alpha', final_alpha, FINAL_ALPHAS),
    ):
        if value not in known:
            raise ValueError(f'{option}={value!r}: expected one of {", ".join(known)}.')
    if clip_sample is not None and clip_sample <= 0:
        raise ValueError(f'clip_sample={clip_sample}: expected None or a value above 0.')
    timesteps = _check_timesteps(name, timesteps, schedule.num_train_timesteps, sigmas)

    table = (solver_alphas_cumprod if name in _SIGMA_RULES else alphas_cumprod)(schedule)
    if np.issubdtype(timesteps.dtype, np.integer) and sigmas is None:
        here = table[timesteps]
    else:
        here = 1 / (1 + (sigmas_at(schedule, timesteps) if sigmas is None else sigmas) ** 2)
    if here[0] == 0 and prediction == 'eps':
        raise ValueError(
            f"prediction='eps' at t={timesteps[0]}, where the schedule leaves no signal: expected "
            "prediction='v', or timesteps below it."
        )
    there = np.append(here[1:], 1.0 if final_alpha == 'one' else table[0])
    match name:
        case 'ddpm':
            weights = rules.ddpm(here, there, variance=variance)
        case 'ddim' | 'euler':
            weights = rules.ddim(here, there, eta=eta)
        case 'dpm_solver':
            weights = rules.dpm_solver(here, there, final_order=final_order)
        case 'plms':
            timesteps, here, weights = rules.plms(timesteps, here, there)
        case 'pndm':
            timesteps, here, weights = rules.pndm(timesteps, here, there, table)
    # A sampler that adds no noise draws none.
    is_stochastic = bool(np.any(weights.get('noise', 0)))
    if not is_stochastic:
        weights.pop('noise', None)
        weights.pop('log_noise_range', None)
    weights |= {'alpha': np.sqrt(here), 'sigma': np.sqrt(1 - here)}
    return Sampler(
        timesteps=network_timesteps(schedule, timesteps),
        weights={term: column.astype(np.float32) for term, column in weights.items()},
        is_stochastic=is_stochastic,
        prediction=prediction,
        clip_sample=clip_sample,
        keeps_eps=keep_eps,
        learns_variance=variance == 'learned_range',
        initial_scale=float(np.sqrt(1 - here[0])) if scale_initial_noise else 1.0,
    )


def make_spaced_sampler(
    name: str,
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: str,
    steps_offset: int = 0,
    sections: tuple[int, ...] = (),
    **options: Any,
) -> Sampler:
    """`make_sampler` on the timesteps that `spacing` chooses.

    Args:
      name: one of `NAMES`.
      schedule: the teacher's noise schedule.
      num_steps: see `sampling_timesteps`.
      spacing: one of `SPACINGS`; with 'euler', 'linspace' is not rounded, as in `diffusers`. Or
        'karras' with 'dpm_solver' and 'euler': see `karras_sigmas`; 'dpm_solver' gives the network
        whole timesteps.
      steps_offset: see `sampling_timesteps`.
      sections: see `sampling_timesteps`.
      **options: see `make_sampler`.

    Raises:
      ValueError: as `sampling_timesteps`, `karras_sigmas` and `make_sampler`.
    """
    if name == 'euler':
        options['scale_initial_noise'] = spacing in ('linspace', 'trailing', 'karras')
    if spacing == 'karras':
        if name not in _SIGMA_RULES or steps_offset or sections:
            raise ValueError(
                f"spacing='karras' with name={name!r}, steps_offset={steps_offset}, "
                f'sections={sections}: expected one of {", ".join(_SIGMA_RULES)}, 0 and ().'
            )
        timesteps, sigmas = karras_sigmas(schedule, num_steps)
        if name == 'dpm_solver':
            timesteps = np.floor(timesteps) if schedule.kind == 'cosine' else np.round(timesteps)
        return make_sampler(name, schedule, timesteps, sigmas=sigmas, **options)
    timesteps = sampling_timesteps(
        schedule, num_steps, spacing, steps_offset=steps_offset, sections=sections
    )
    if name == 'euler' and spacing == 'linspace':
        # float32: the noise level is that of the very number the network is given.
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, num_steps, dtype=np.float32)
        timesteps = timesteps[::-1]
    return make_sampler(name, schedule, timesteps, **options)


def prediction_gain(sampler: Sampler) -> Float[Array, 'S']:
    """How far one step moves x per unit of the network's prediction, at each position.

    The next x alone: what a rule that looks back makes of the prediction later does not count.

    An error of size e in the prediction at position i puts an error gain[i] * e into the next x:
    weighing errors by it compares the means of the next step, mu in DDPM, instead of predictions.
    """
    weights = {name: jnp.asarray(table) for name, table in sampler.weights.items()}
    alpha, sigma = weights['alpha'], weights['sigma']
    none = jnp.zeros_like(alpha)
    by_x_0, by_eps = weights.get('x_0', none), weights.get('eps', none)
    if sampler.prediction == 'v':
        gain = by_eps * alpha - by_x_0 * sigma
    else:
        gain = by_eps - by_x_0 * sigma / alpha
    return gain * weights['combine'][:, 0] if 'combine' in weights else gain


def absorb_noise(sampler: Sampler, variance: Float[Array, 'S']) -> Sampler:
    """`sampler` for predictions that hold noise, which takes the place of its own.

    PTQD (arXiv:2305.10657): at each position the variance that a step adds is less by what the
    noise in the prediction brings, and not below 0. A sampler that adds none stays as it is, and so
    does a learnt variance.

    Args:
      sampler: any.
      variance: of the noise in the prediction at each position.
    """
    if not sampler.is_stochastic or sampler.learns_variance:
        return sampler
    noise = jnp.asarray(sampler.weights['noise'])
    brought = prediction_gain(sampler) ** 2 * variance
    kept = jnp.sqrt(jnp.maximum(noise**2 - brought, 0.0))
    return dataclasses.replace(sampler, weights={**sampler.weights, 'noise': kept})


def _check_options(name, eta, variance, final_order, scale_initial_noise, sigmas):
    if name not in NAMES:
        raise ValueError(f'name={name!r}: expected one of {", ".join(NAMES)}.')
    for option, value, known in (
        ('variance', variance, VARIANCES),
        ('final_order', final_order, FINAL_ORDERS),
    ):
        if value not in known:
            raise ValueError(f'{option}={value!r}: expected one of {", ".join(known)}.')
    if not 0 <= eta <= 1 or (eta and name != 'ddim'):
        raise ValueError(f"eta={eta} with {name!r}: expected 0, or 'ddim' and a value in [0, 1].")
    for option, value, is_given, owners in (
        ('variance', variance, variance != VARIANCES[0], ('ddpm',)),
        ('final_order', final_order, final_order != FINAL_ORDERS[0], ('dpm_solver',)),
        ('scale_initial_noise', scale_initial_noise, scale_initial_noise, ('euler',)),
        ('sigmas', sigmas, sigmas is not None, _SIGMA_RULES),
    ):
        if is_given and name not in owners:
            known = ' and '.join(map(repr, owners))
            raise ValueError(f'{option}={value!r} is an option of {known}, not of {name!r}.')


def _check_timesteps(name, timesteps, num_train_timesteps, sigmas):
    timesteps = np.asarray(timesteps)
    kinds = 'integer'
    is_kind = np.issubdtype(timesteps.dtype, np.integer)
    if name in _SIGMA_RULES:
        kinds, is_kind = 'number', is_kind or np.issubdtype(timesteps.dtype, np.floating)
    if (
        timesteps.ndim != 1
        or timesteps.size == 0
        or not is_kind
        or np.any(
            (np.greater_equal if sigmas is None else np.greater)(timesteps[1:], timesteps[:-1])
        )
        or timesteps[0] > num_train_timesteps - 1
        or timesteps[-1] < 0
    ):
        raise ValueError(
            f'timesteps={timesteps} ({timesteps.dtype}): expected at least one {kinds}, strictly '
            f'descending, in 0..{num_train_timesteps - 1}.'
        )
    if timesteps.size < _MIN_STEPS.get(name, 1):
        raise ValueError(
            f'{name!r} on {timesteps.size} timesteps: expected at least {_MIN_STEPS[name]}; use '
            "more steps or 'ddim'."
        )
    if sigmas is not None and (
        np.shape(sigmas) != timesteps.shape or np.any(np.diff(sigmas) >= 0) or sigmas[-1] <= 0
    ):
        raise ValueError(
            f'sigmas={sigmas}: expected {timesteps.size}, one per timestep, strictly descending '
            'and above 0.'
        )
    whole = np.round(timesteps)
    return whole.astype(np.int32) if np.all(whole == timesteps) else timesteps.astype(np.float64)


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


def _weighed(shares, terms):
    shares = jnp.moveaxis(shares, -1, 0)
    return sum(_expand(s, term.ndim) * term for s, term in zip(shares, terms, strict=True))


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
