import numpy as np
import pytest

from dmq_jax.diffusion.schedule import (
    KINDS,
    SPACINGS,
    Schedule,
    alphas_cumprod,
    betas,
    karras_sigmas,
    network_timesteps,
    sampling_timesteps,
    sigmas_at,
    solver_alphas_cumprod,
)
from tests.oracles import samplers as oracle

# diffusers takes betas and their running product in float32: 1 - beta is off by up to eps / 2 in
# each of 1000 factors, always in the direction beta rounds (seen: 3e-5 relative, cosine's end).
CUMPROD_TOLERANCE = 1000 * np.finfo(np.float32).eps
# A few float32 roundings per beta.
BETA_TOLERANCE = 8 * np.finfo(np.float32).eps

FORMULAS = [kind for kind in KINDS if kind != 'trained']
DIFFUSERS_KINDS = {
    'linear': 'linear',
    'scaled_linear': 'scaled_linear',
    'cosine': 'squaredcos_cap_v2',
}


@pytest.mark.parametrize('kind', FORMULAS)
@pytest.mark.parametrize('num_train_timesteps', [1, 10, 1000])
def test_alphas_cumprod_falls_strictly_inside_zero_and_one(kind, num_train_timesteps):
    table = alphas_cumprod(Schedule(kind=kind, num_train_timesteps=num_train_timesteps))
    assert table.shape == (num_train_timesteps,) and table.dtype == np.float64
    assert np.all(np.diff(table) < 0)
    assert 0 < table[-1] <= table[0] < 1


@pytest.mark.parametrize('zero_snr', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_schedule_equals_diffusers(kind, zero_snr):
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    trained = tuple(np.linspace(0.01, 0.5, 7)) if kind == 'trained' else ()
    schedule = Schedule(
        kind=kind, beta_start=0.0015, beta_end=0.0195, trained_betas=trained,
        num_train_timesteps=len(trained) or 1000, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    theirs = diffusers.DDPMScheduler(
        beta_schedule=DIFFUSERS_KINDS.get(kind, 'linear'), beta_start=0.0015, beta_end=0.0195,
        trained_betas=trained or None, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    if zero_snr:
        # Differences of float32 numbers near 1: absolute, and amplified near the ends.
        np.testing.assert_allclose(betas(schedule), theirs.betas.numpy(), atol=2e-4)
        np.testing.assert_allclose(
            alphas_cumprod(schedule), theirs.alphas_cumprod.numpy(), atol=CUMPROD_TOLERANCE
        )
        return
    np.testing.assert_allclose(betas(schedule), theirs.betas.numpy(), rtol=BETA_TOLERANCE)
    np.testing.assert_allclose(
        alphas_cumprod(schedule), theirs.alphas_cumprod.numpy(), rtol=CUMPROD_TOLERANCE
    )


def test_zero_terminal_snr_keeps_the_first_timestep_and_empties_the_last():
    schedule = Schedule(kind='scaled_linear', rescale_betas_zero_snr=True)
    table, before = alphas_cumprod(schedule), alphas_cumprod(Schedule(kind='scaled_linear'))
    assert table[-1] == 0 and np.all(np.diff(table) < 0)
    # float64: a difference and a ratio of square roots near 1.
    assert table[0] == pytest.approx(before[0], rel=8 * np.finfo(float).eps)
    np.testing.assert_allclose(np.cumprod(1 - betas(schedule)), table, atol=1e-13)
    solver = solver_alphas_cumprod(schedule)
    assert solver[-1] == 2.0**-24
    np.testing.assert_array_equal(solver[:-1], table[:-1])


def test_sigmas_are_the_schedules_at_whole_timesteps_and_linear_between():
    table = alphas_cumprod(Schedule())
    low, middle, high = sigmas_at(Schedule(), np.array([10, 10.25, 11]))
    # float64, a few roundings.
    assert low == pytest.approx(np.sqrt(1 / table[10] - 1), rel=1e-14)
    assert middle == pytest.approx(0.75 * low + 0.25 * high, rel=1e-14)


def test_karras_levels_are_even_to_the_power_of_one_seventh():
    timesteps, sigmas = karras_sigmas(Schedule(), 10)
    steps = np.diff(sigmas ** (1 / 7))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-12)
    np.testing.assert_allclose(timesteps[[0, -1]], [999, 0], atol=1e-9)
    with pytest.raises(ValueError, match=r'num_steps=1: expected 2\.\.1000'):
        karras_sigmas(Schedule(), 1)


def test_the_network_is_told_thousandths_of_a_rescaled_schedule():
    rescaled = Schedule(num_train_timesteps=4000, rescale_timesteps=True)
    told = network_timesteps(rescaled, np.array([3999, 4, 1]))
    np.testing.assert_array_equal(told, np.array([999.75, 1, 0.25], np.float32))
    assert network_timesteps(rescaled, np.array([8, 4])).dtype == np.int32
    assert network_timesteps(Schedule(rescale_timesteps=True), np.array([999, 1])).tolist() == [
        999, 1,
    ]  # fmt: skip


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


def test_quadratic_visits_a_timestep_once_where_ddim_stays_on_it():
    ddim = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 100) ** 2]
    visited = sampling_timesteps(Schedule(), 100, 'quadratic')
    assert ddim[:8] == [0, 0, 0, 0, 1, 2, 2, 3] and len(visited) == 96
    np.testing.assert_array_equal(visited, sorted(set(ddim), reverse=True))


def test_uniform_stops_at_num_steps_where_they_do_not_divide():
    timesteps = sampling_timesteps(Schedule(), 300, 'uniform')
    np.testing.assert_array_equal(timesteps, np.arange(1, 901, 3)[::-1])


@pytest.mark.parametrize('num_steps', [1, 5, 10, 20, 25])
def test_quadratic_equals_ddim(num_steps):
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), num_steps) ** 2][::-1]
    np.testing.assert_array_equal(sampling_timesteps(Schedule(), num_steps, 'quadratic'), expected)


@pytest.mark.parametrize('num_steps', [1, 4, 20, 30, 50, 70])
def test_compvis_uniform_equals_latent_diffusion_to_the_last_step(num_steps):
    expected = np.asarray(list(range(0, 1000, 1000 // num_steps)))[::-1] + 1
    ours = sampling_timesteps(Schedule(), num_steps, 'compvis_uniform')
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize('num_steps', [1, 5, 10, 20])
def test_compvis_quad_equals_latent_diffusion(num_steps):
    expected = [int(s) + 1 for s in np.linspace(0, np.sqrt(1000 * 0.8), num_steps) ** 2][::-1]
    ours = sampling_timesteps(Schedule(), num_steps, 'compvis_quad')
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize('num_steps', [1, 4, 7, 20, 50, 61, 250])
@pytest.mark.parametrize('spacing, offset', [('leading', 0), ('leading', 1), ('linspace', 0)])
def test_dpm_timesteps_equal_diffusers(spacing, offset, num_steps):
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    theirs = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(num_steps)
    ours = sampling_timesteps(Schedule(), num_steps, f'dpm_{spacing}', steps_offset=offset)
    np.testing.assert_array_equal(ours, theirs.timesteps.numpy())


@pytest.mark.parametrize(
    'num_train_timesteps, sections',
    [(300, (10, 15, 20)), (1000, (250,)), (1000, (25,)), (1000, (1, 90, 7)), (4000, (5, 5, 5))],
)
def test_sections_equal_adm(num_train_timesteps, sections):
    schedule = Schedule(num_train_timesteps=num_train_timesteps)
    ours = sampling_timesteps(schedule, sum(sections), 'adm', sections=sections)
    np.testing.assert_array_equal(ours[::-1], oracle.adm_timesteps(num_train_timesteps, sections))
    if len(sections) == 1:
        whole = sampling_timesteps(schedule, sections[0], 'adm')
        np.testing.assert_array_equal(whole, ours)


def test_adm_visits_both_ends_of_a_section():
    ours = sampling_timesteps(Schedule(num_train_timesteps=10), 6, 'adm', sections=(3, 3))
    np.testing.assert_array_equal(ours, [9, 7, 5, 4, 2, 0])


@pytest.mark.parametrize('num_steps, stride', [(25, 40), (50, 20), (100, 10), (63, 16)])
def test_adm_ddim_has_the_smallest_stride_that_gives_so_many(num_steps, stride):
    ours = sampling_timesteps(Schedule(), num_steps, 'adm_ddim')
    np.testing.assert_array_equal(ours, np.arange(0, 1000, stride)[::-1])


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('num_steps', [2, 4, 10, 20])
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
        (100, 'compvis_quad', 0, 'visits a timestep twice'),
        (1000, 'uniform', 0, 'visits t=1000, beyond the last timestep 999'),
        (20, 'linspace', 1, 'steps_offset=1'),
        (20, 'leading', -1, 'steps_offset=-1'),
        (450, 'adm_ddim', 0, 'no integer stride through 1000 timesteps gives that many'),
        (1000, 'compvis_uniform', 0, 'visits t=1000, beyond the last timestep 999'),
    ],
)
def test_impossible_timesteps_are_refused(num_steps, spacing, offset, message):
    with pytest.raises(ValueError, match=message):
        sampling_timesteps(Schedule(), num_steps, spacing, steps_offset=offset)


@pytest.mark.parametrize(
    'num_steps, spacing, sections, message',
    [
        (10, 'adm', (5, 6), 'positive numbers of sum num_steps=10'),
        (10, 'adm', (0, 10), 'positive numbers of sum num_steps=10'),
        (10, 'leading', (10,), "expected \\(\\), or spacing='adm'"),
        (
            601,
            'adm',
            (600, 1),
            '600 visits to the 500 timesteps of section 0; expected at most 500',
        ),
    ],
)
def test_impossible_sections_are_refused(num_steps, spacing, sections, message):
    with pytest.raises(ValueError, match=message):
        sampling_timesteps(Schedule(), num_steps, spacing, sections=sections)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'kind': 'sqrt'}, "kind='sqrt': expected one of linear, scaled_linear, cosine"),
        ({'kind': 'trained'}, "0 trained_betas with kind='trained': expected 1000"),
        ({'trained_betas': (0.1,)}, "1 trained_betas with kind='linear': expected 0"),
        (
            {'kind': 'trained', 'num_train_timesteps': 2, 'trained_betas': (0.1, 1.0)},
            r'trained_betas: expected every one in \(0, 1\)',
        ),
        (
            {'num_train_timesteps': 1, 'rescale_betas_zero_snr': True},
            'expected at least 2 num_train_timesteps',
        ),
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
    trained = [
        Schedule(kind='trained', num_train_timesteps=2, trained_betas=given)
        for given in ((0.1, 0.2), [0.1, 0.2])
    ]
    assert len(set(trained)) == 1
