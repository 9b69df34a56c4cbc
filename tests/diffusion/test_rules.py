"""Every rule against the code it comes from, step by step, in float64 unless that cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.diffusion.samplers import Sampler, make_sampler, make_spaced_sampler
from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod, solver_alphas_cumprod
from tests.oracles import samplers as oracle

# Of the largest value: a step's float32 weights, and the roundings of x_0 = (x - sigma eps) / alpha
# and of the sum (seen: 2e-7 a step, 9e-7 in all). Errors of the steps before are carried along.
STEP_TOLERANCE = 1e-6

SCHEDULE = Schedule(kind='scaled_linear', beta_start=0.00085, beta_end=0.012)
STABLE_DIFFUSION = {
    'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012,
}  # fmt: skip
TABLE = alphas_cumprod(SCHEDULE)
ZERO_SNR = Schedule(
    kind='scaled_linear', beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
)
SHAPE = (2, 4, 4, 3)

one_step = jax.jit(Sampler.step)
every_prediction = pytest.mark.parametrize('prediction', ['eps', 'v'])
every_model = pytest.mark.parametrize('model', ['random', 'analytic'])
THEIR_NAMES = {'eps': 'epsilon', 'v': 'v_prediction'}


def analytic(x, t):
    """A bounded function of both, in NumPy float64; near the noise's size."""
    return 0.9 * x + 0.2 * np.sin(2 * x + t / 100)


def network_of(model):
    """`network(i, x, t)`: what is predicted at evaluation i."""
    if model == 'analytic':
        return lambda i, x, t: analytic(x, t)
    outputs = np.random.default_rng(7).standard_normal((80, *SHAPE))
    return lambda i, x, t: outputs[i]


def draws():
    rng = np.random.default_rng(1)
    x_T = rng.standard_normal(SHAPE).astype(np.float32)
    return x_T, rng.standard_normal((80, *SHAPE)).astype(np.float32)


def run(sampler, network, x_T, noises=None):
    """x before the first and after every evaluation."""
    carry = sampler.init(jnp.asarray(x_T))
    xs = [carry.x]
    for i, t in enumerate(np.asarray(sampler.timesteps)):
        output = network(i, np.asarray(carry.x, np.float64), float(t))
        noise = jnp.asarray(noises[i]) if sampler.is_stochastic else None
        carry = one_step(sampler, carry, jnp.asarray(output, jnp.float32), i, noise)
        xs.append(carry.x)
    return np.stack(xs)


def run_diffusers(scheduler, network, x_T, **options):
    """The same of a scheduler of diffusers; its x is what its network sees."""
    import torch

    x = torch.from_numpy(np.asarray(x_T, np.float64))
    xs = [x.numpy()]
    for i, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(i, x.numpy(), float(t)))
        x = scheduler.step(output, int(t), x, **options).prev_sample
        xs.append(x.numpy())
    return np.stack(xs)


def run_euler(scheduler, network, x_T):
    """Euler's x is scaled for the network: here it is x as the network sees it."""
    import torch

    x = torch.from_numpy(x_T * float(scheduler.init_noise_sigma))
    seen = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t).double()
        seen.append(scaled.numpy())
        output = torch.from_numpy(network(i, scaled.numpy(), float(t)))
        x = scheduler.step(output, t, x).prev_sample
    last = float(scheduler.sigmas[-1])
    return np.stack([*seen, x.numpy() / np.sqrt(1 + last**2)])


def diffusers_scheduler(name, table, **options):
    """A scheduler of diffusers whose alphas_cumprod are float64."""
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    import torch

    scheduler = getattr(diffusers, name)(**options)
    scheduler.alphas_cumprod = torch.from_numpy(table.copy())
    scheduler.one = torch.ones((), dtype=torch.float64)
    if hasattr(scheduler, 'final_alpha_cumprod'):
        to_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = scheduler.one if to_one else scheduler.alphas_cumprod[0]
    return scheduler


def assert_steps_equal(ours, theirs, tolerance=STEP_TOLERANCE):
    assert ours.shape == theirs.shape
    for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
        error = np.max(np.abs(got - want)) / np.max(np.abs(want))
        assert error < (i + 1) * tolerance, f'step {i}: {error:.2e}'


@every_model
@every_prediction
@pytest.mark.parametrize('skip_prk', [True, False], ids=['plms', 'pndm'])
@pytest.mark.parametrize('num_steps, offset, to_one', [(20, 1, False), (12, 0, True), (5, 0, True)])
def test_pndm_equals_diffusers(skip_prk, num_steps, offset, to_one, prediction, model):
    theirs = diffusers_scheduler(
        'PNDMScheduler', TABLE, skip_prk_steps=skip_prk, steps_offset=offset,
        set_alpha_to_one=to_one, prediction_type=THEIR_NAMES[prediction],
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    sampler = make_spaced_sampler(
        'plms' if skip_prk else 'pndm', SCHEDULE, num_steps, spacing='leading',
        steps_offset=offset, final_alpha='one' if to_one else 'first', prediction=prediction,
    )  # fmt: skip
    np.testing.assert_array_equal(sampler.timesteps, theirs.timesteps.numpy())
    assert len(sampler.timesteps) == num_steps + (1 if skip_prk else 9)
    x_T, _ = draws()
    network = network_of(model)
    assert_steps_equal(run(sampler, network, x_T), run_diffusers(theirs, network, x_T))


@pytest.mark.parametrize('num_steps', [2, 5, 20, 30])
def test_plms_equals_latent_diffusion(num_steps):
    sampler = make_spaced_sampler(
        'plms', SCHEDULE, num_steps, spacing='compvis_uniform', final_alpha='first'
    )
    timesteps = np.arange(0, 1000, 1000 // num_steps)[::-1] + 1
    x_T, _ = draws()
    theirs = oracle.plms(
        analytic, timesteps, np.append(TABLE[timesteps], TABLE[0]), x_T.astype(float)
    )
    ours = run(sampler, network_of('analytic'), x_T)
    # The first two evaluations are one timestep of theirs.
    assert_steps_equal(ours[2:], theirs, STEP_TOLERANCE)


@every_model
@every_prediction
@pytest.mark.parametrize(
    'spacing, offset', [('leading', 1), ('linspace', 0), ('trailing', 0), ('karras', 0)]
)
@pytest.mark.parametrize('sigmas_type', ['zero', 'sigma_min'])
def test_dpm_solver_equals_diffusers(spacing, offset, prediction, model, sigmas_type):
    theirs = diffusers_scheduler(
        'DPMSolverMultistepScheduler', TABLE, prediction_type=THEIR_NAMES[prediction],
        use_karras_sigmas=spacing == 'karras', steps_offset=offset,
        timestep_spacing='linspace' if spacing == 'karras' else spacing,
        final_sigmas_type=sigmas_type, **STABLE_DIFFUSION,
    )  # fmt: skip
    theirs.set_timesteps(20)
    ours = {'leading': 'dpm_leading', 'linspace': 'dpm_linspace'}.get(spacing, spacing)
    sampler = make_spaced_sampler(
        'dpm_solver', SCHEDULE, 20, spacing=ours, steps_offset=offset,
        final_alpha='one' if sigmas_type == 'zero' else 'first', prediction=prediction,
    )  # fmt: skip
    np.testing.assert_array_equal(sampler.timesteps, theirs.timesteps.numpy())
    x_T, _ = draws()
    network = network_of(model)
    # Their sigmas and their x are float32, whatever the input.
    assert_steps_equal(
        run(sampler, network, x_T), run_diffusers(theirs, network, x_T), STEP_TOLERANCE
    )


@pytest.mark.parametrize(
    'final_order, lower_order_final, euler_at_final',
    [
        ('auto', True, False),
        ('first', True, True),
        ('first', False, True),
        ('second', False, False),
    ],
)
@pytest.mark.parametrize('num_steps', [1, 2, 14, 15])
@pytest.mark.parametrize('sigmas_type', ['zero', 'sigma_min'])
def test_order_of_the_last_dpm_solver_step_equals_diffusers(
    final_order, lower_order_final, euler_at_final, num_steps, sigmas_type
):
    theirs = diffusers_scheduler(
        'DPMSolverMultistepScheduler', TABLE, lower_order_final=lower_order_final,
        euler_at_final=euler_at_final, final_sigmas_type=sigmas_type,
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    sampler = make_spaced_sampler(
        'dpm_solver', SCHEDULE, num_steps, spacing='dpm_linspace', final_order=final_order,
        final_alpha='one' if sigmas_type == 'zero' else 'first',
    )  # fmt: skip
    x_T, _ = draws()
    network = network_of('random')
    assert_steps_equal(
        run(sampler, network, x_T), run_diffusers(theirs, network, x_T), STEP_TOLERANCE
    )


@every_model
@every_prediction
@pytest.mark.parametrize(
    'spacing, offset', [('leading', 1), ('linspace', 0), ('trailing', 0), ('karras', 0)]
)
@pytest.mark.parametrize('sigmas_type', ['zero', 'sigma_min'])
def test_euler_equals_diffusers(spacing, offset, prediction, model, sigmas_type):
    theirs = diffusers_scheduler(
        'EulerDiscreteScheduler', TABLE, prediction_type=THEIR_NAMES[prediction],
        use_karras_sigmas=spacing == 'karras', steps_offset=offset,
        timestep_spacing='linspace' if spacing == 'karras' else spacing,
        final_sigmas_type=sigmas_type,
    )  # fmt: skip
    theirs.set_timesteps(20)
    sampler = make_spaced_sampler(
        'euler', SCHEDULE, 20, spacing=spacing, steps_offset=offset, prediction=prediction,
        final_alpha='one' if sigmas_type == 'zero' else 'first',
    )  # fmt: skip
    assert not sampler.is_stochastic
    # Fractions of a timestep are float32, and theirs of `karras` start from float32 sigmas.
    np.testing.assert_allclose(sampler.timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-5)
    x_T, _ = draws()
    network = network_of(model)
    # Their sigmas and their x are float32, whatever the input.
    assert_steps_equal(run(sampler, network, x_T), run_euler(theirs, network, x_T), STEP_TOLERANCE)


@every_model
@every_prediction
@pytest.mark.parametrize(
    'eta, clip, keep', [(0.0, None, False), (0.6, None, True), (0.0, 0.8, True), (0.5, 0.8, False)]
)
@pytest.mark.parametrize('offset, to_one', [(1, False), (0, True)])
def test_ddim_equals_diffusers(eta, clip, keep, offset, to_one, prediction, model):
    import torch

    theirs = diffusers_scheduler(
        'DDIMScheduler', TABLE, steps_offset=offset, set_alpha_to_one=to_one,
        clip_sample=clip is not None, clip_sample_range=clip or 1.0,
        prediction_type=THEIR_NAMES[prediction],
    )  # fmt: skip
    theirs.set_timesteps(20)
    sampler = make_spaced_sampler(
        'ddim', SCHEDULE, 20, spacing='leading', steps_offset=offset, eta=eta, clip_sample=clip,
        keep_eps=keep, final_alpha='one' if to_one else 'first', prediction=prediction,
    )  # fmt: skip
    x_T, noises = draws()
    noises[:] = noises[0]
    network = network_of(model)
    noise = torch.from_numpy(noises[0].astype(np.float64)) if eta else None
    expected = run_diffusers(
        theirs, network, x_T, eta=eta, variance_noise=noise, use_clipped_model_output=not keep
    )
    assert_steps_equal(run(sampler, network, x_T, noises), expected)


@every_model
@every_prediction
@pytest.mark.parametrize('clip', [None, 0.8])
@pytest.mark.parametrize('variance', ['fixed_small', 'fixed_large', 'learned_range'])
def test_ddpm_equals_diffusers(variance, clip, prediction, model, monkeypatch):
    theirs = diffusers_scheduler(
        'DDPMScheduler', TABLE, variance_type=variance, clip_sample=clip is not None,
        clip_sample_range=clip or 1.0, prediction_type=THEIR_NAMES[prediction],
    )  # fmt: skip
    import torch
    from diffusers.schedulers import scheduling_ddpm

    theirs.set_timesteps(20)
    x_T, noises = draws()
    # Channels are the second axis there, the last one here.
    queue = iter(np.moveaxis(noises.astype(np.float64), -1, 2))
    monkeypatch.setattr(
        scheduling_ddpm, 'randn_tensor', lambda *_, **__: torch.from_numpy(next(queue))
    )
    learns = variance == 'learned_range'
    mean = network_of(model)

    def network(i, x, t):
        output = mean(i, x, t)
        return np.concatenate([output, np.sin(3 * output)], axis=-1) if learns else output

    def network_first(i, x, t):
        return np.moveaxis(network(i, np.moveaxis(x, 1, -1), t), -1, 1)

    expected = run_diffusers(theirs, network_first, np.moveaxis(x_T, -1, 1))
    sampler = make_spaced_sampler(
        'ddpm', SCHEDULE, 20, spacing='leading', variance=variance, clip_sample=clip,
        prediction=prediction,
    )  # fmt: skip
    assert sampler.learns_variance == learns
    ours = run(sampler, network, x_T, noises)
    assert_steps_equal(ours, np.moveaxis(expected, 2, -1))


@pytest.mark.parametrize('num_train_timesteps, sections', [(1000, (10, 15, 20)), (4000, (25,))])
def test_learned_variance_on_a_respaced_process_equals_adm(num_train_timesteps, sections):
    schedule = Schedule(
        kind='cosine', num_train_timesteps=num_train_timesteps, rescale_timesteps=True
    )
    visited = oracle.adm_timesteps(num_train_timesteps, sections)
    x_T, noises = draws()

    def network(i, x, t):
        output = analytic(x, t)
        return np.concatenate([output, np.sin(3 * output)], axis=-1)

    def two_parts(x, t):
        # The network is told t in thousandths of the process.
        return np.split(network(0, x, t * 1000 / num_train_timesteps), 2, axis=-1)

    theirs = oracle.adm(
        two_parts, visited, alphas_cumprod(schedule)[visited], x_T.astype(float), noises, clip=1.0
    )
    sampler = make_spaced_sampler(
        'ddpm', schedule, sum(sections), spacing='adm', sections=sections,
        variance='learned_range', clip_sample=1.0,
    )  # fmt: skip
    told = np.array(visited[::-1]) * 1000 / num_train_timesteps
    np.testing.assert_allclose(sampler.timesteps, told, rtol=1e-6)
    assert_steps_equal(run(sampler, network, x_T, noises)[1:], theirs)


@pytest.mark.parametrize('name', ['ddim', 'dpm_solver', 'euler'])
@every_model
def test_zero_terminal_snr_with_trailing_timesteps_equals_diffusers(name, model):
    scheduler = {
        'ddim': 'DDIMScheduler', 'dpm_solver': 'DPMSolverMultistepScheduler',
        'euler': 'EulerDiscreteScheduler',
    }[name]  # fmt: skip
    table = alphas_cumprod(ZERO_SNR) if name == 'ddim' else solver_alphas_cumprod(ZERO_SNR)
    clip = {'clip_sample': False} if name == 'ddim' else {}
    theirs = diffusers_scheduler(
        scheduler, table, timestep_spacing='trailing', rescale_betas_zero_snr=True,
        prediction_type='v_prediction', **clip,
    )  # fmt: skip
    theirs.set_timesteps(20)
    sampler = make_spaced_sampler(name, ZERO_SNR, 20, spacing='trailing', prediction='v')
    assert sampler.timesteps[0] == 999
    x_T, _ = draws()
    network = network_of(model)
    run_theirs = run_euler if name == 'euler' else run_diffusers
    assert_steps_equal(run(sampler, network, x_T), run_theirs(theirs, network, x_T), STEP_TOLERANCE)


def test_no_signal_left_needs_a_network_that_predicts_v():
    with pytest.raises(ValueError, match="prediction='eps' at t=999, where the schedule leaves no"):
        make_spaced_sampler('ddim', ZERO_SNR, 20, spacing='trailing')
    below = make_spaced_sampler('ddim', ZERO_SNR, 20, spacing='leading')
    assert np.all(np.isfinite(np.concatenate(list(below.weights.values()))))


def test_sums_of_predictions_have_shares_of_one():
    for name in ('plms', 'pndm'):
        weights = make_spaced_sampler(name, SCHEDULE, 20, spacing='leading').weights
        combine, remember = weights['combine'], weights['remember']
        if name == 'plms':
            # float32: shares up to 59 / 24.
            np.testing.assert_allclose(combine.sum(axis=-1), 1, atol=1e-6)
        constant = np.zeros(remember.shape[1])
        for combined, kept in zip(combine, remember, strict=True):
            terms = np.append(1.0, constant)
            if np.all(terms[1:4] == 1):
                assert combined @ terms == pytest.approx(1, abs=1e-6)
            constant = kept @ terms


def test_higher_orders_transport_a_gaussian_more_exactly():
    """The probability flow scales a Gaussian of spread 0.5; relative error of the spread."""
    spread = np.sqrt(0.25 * TABLE + 1 - TABLE)
    slope = np.sqrt(1 - TABLE) / spread**2

    def error(name, num_steps):
        timesteps = np.linspace(800, 200, num_steps + 1, dtype=np.int32)
        sampler = make_sampler(name, SCHEDULE, timesteps)
        xs = run(sampler, lambda i, x, t: slope[int(t)] * x, np.ones(SHAPE, np.float32))
        # Before the last step, which ends at t = 200.
        return abs(xs[-2, 0, 0, 0, 0] * spread[800] / spread[200] - 1)

    for name in ('plms', 'pndm'):
        assert error(name, 20) < error('dpm_solver', 20) / 2 < error('ddim', 20) / 10
