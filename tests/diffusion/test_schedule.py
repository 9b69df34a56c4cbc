import numpy as np
import pytest

from dmq_jax.diffusion.schedule import (
    KINDS,
    SPACINGS,
    Schedule,
    alphas_cumprod,
    betas,
    sampling_timesteps,
)

# diffusers takes betas and their running product in float32: 1 - beta is off by up to eps / 2 in
# each of 1000 factors, always in the direction beta rounds (seen: 3e-5 relative, cosine's end).
CUMPROD_TOLERANCE = 1000 * np.finfo(np.float32).eps
# A few float32 roundings per beta.
BETA_TOLERANCE = 8 * np.finfo(np.float32).eps

DIFFUSERS_KINDS = {
    'linear': 'linear',
    'scaled_linear': 'scaled_linear',
    'cosine': 'squaredcos_cap_v2',
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('num_train_timesteps', [1, 10, 1000])
def test_alphas_cumprod_falls_strictly_inside_zero_and_one(kind, num_train_timesteps):
    table = alphas_cumprod(Schedule(kind=kind, num_train_timesteps=num_train_timesteps))
    assert table.shape == (num_train_timesteps,) and table.dtype == np.float64
    assert np.all(np.diff(table) < 0)
    assert 0 < table[-1] <= table[0] < 1


@pytest.mark.parametrize('kind', KINDS)
def test_schedule_equals_diffusers(kind):
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    theirs = diffusers.DDPMScheduler(
        beta_schedule=DIFFUSERS_KINDS[kind], beta_start=0.0015, beta_end=0.0195
    )
    schedule = Schedule(kind=kind, beta_start=0.0015, beta_end=0.0195)
    np.testing.assert_allclose(betas(schedule), theirs.betas.numpy(), rtol=BETA_TOLERANCE)
    np.testing.assert_allclose(
        alphas_cumprod(schedule), theirs.alphas_cumprod.numpy(), rtol=CUMPROD_TOLERANCE
    )


def test_cosine_is_its_closed_form_before_the_cap():
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    table = alphas_cumprod(Schedule(kind='cosine'))
    # float64: a product of 999 factors telescopes to 1000 eps.
    np.testing.assert_allclose(table[:999], f[1:1000] / f[0], rtol=1000 * np.finfo(float).eps)
    assert betas(Schedule(kind='cosine')).max() == 0.999


def test_beta_ends_are_the_ones_given():
    for kind in ('linear', 'scaled_linear'):
        table = betas(Schedule(kind=kind, beta_start=0.001, beta_end=0.03))
        # float64: one square root and its square.
        np.testing.assert_allclose(table[[0, -1]], [0.001, 0.03], rtol=4 * np.finfo(float).eps)


@pytest.mark.parametrize('num_steps', [1, 4, 7, 20, 50, 61, 100, 250, 999, 1000])
@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_timesteps_equal_diffusers(spacing, num_steps):
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    # Where S steps of T / S overrun by a rounding error, diffusers adds a visit to t = -1.
    expected = theirs.timesteps.numpy()[:num_steps]
    np.testing.assert_array_equal(sampling_timesteps(Schedule(), num_steps, spacing), expected)


def test_steps_offset_equals_diffusers():
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    theirs = diffusers.DDIMScheduler(timestep_spacing='leading', steps_offset=1)
    theirs.set_timesteps(50)
    ours = sampling_timesteps(Schedule(), 50, 'leading', steps_offset=1)
    np.testing.assert_array_equal(ours, theirs.timesteps.numpy())


@pytest.mark.parametrize('num_steps', [1, 4, 20, 50, 100, 200, 250, 500])
def test_uniform_equals_latent_diffusion(num_steps):
    expected = [t + 1 for t in range(0, 1000, 1000 // num_steps)][::-1]
    np.testing.assert_array_equal(
        sampling_timesteps(Schedule(), num_steps, 'uniform'), expected, strict=False
    )


def test_uniform_stops_at_num_steps_where_they_do_not_divide():
    timesteps = sampling_timesteps(Schedule(), 300, 'uniform')
    np.testing.assert_array_equal(timesteps, np.arange(1, 901, 3)[::-1])


@pytest.mark.parametrize('num_steps', [1, 5, 10, 20, 25])
def test_quadratic_equals_ddim(num_steps):
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), num_steps) ** 2][::-1]
    np.testing.assert_array_equal(sampling_timesteps(Schedule(), num_steps, 'quadratic'), expected)


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('num_steps', [1, 3, 10, 20])
def test_timesteps_descend_strictly_within_the_schedule(spacing, num_steps):
    timesteps = sampling_timesteps(Schedule(num_train_timesteps=500), num_steps, spacing)
    assert timesteps.shape == (num_steps,) and timesteps.dtype == np.int32
    assert np.all(np.diff(timesteps) < 0)
    assert 0 <= timesteps[-1] and timesteps[0] < 500


@pytest.mark.parametrize(
    'num_steps, spacing, offset, message',
    [
        (0, 'uniform', 0, r'num_steps=0: expected 1\.\.1000'),
        (1001, 'leading', 0, r'num_steps=1001: expected 1\.\.1000'),
        (20, 'quad', 0, "spacing='quad': expected one of uniform, quadratic, leading"),
        (100, 'quadratic', 0, 'visits a timestep twice'),
        (1000, 'uniform', 0, 'visits t=1000, beyond the last timestep 999'),
        (20, 'linspace', 1, 'steps_offset=1'),
        (20, 'leading', -1, 'steps_offset=-1'),
    ],
)
def test_impossible_timesteps_are_refused(num_steps, spacing, offset, message):
    with pytest.raises(ValueError, match=message):
        sampling_timesteps(Schedule(), num_steps, spacing, steps_offset=offset)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'kind': 'sqrt'}, "kind='sqrt': expected one of linear, scaled_linear, cosine"),
        ({'num_train_timesteps': 0}, 'num_train_timesteps=0'),
        ({'beta_start': 0.0}, 'expected 0 < beta_start'),
        ({'beta_start': 0.03}, 'beta_start <= beta_end'),
        ({'beta_end': 1.0}, 'beta_end < 1'),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_equal_schedules_have_equal_hashes():
    assert hash(Schedule(kind='cosine')) == hash(Schedule(kind='cosine'))
    assert Schedule(kind='cosine') != Schedule()
