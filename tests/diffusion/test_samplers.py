import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmq_jax.diffusion import samplers
from dmq_jax.diffusion.samplers import Sampler, make_sampler, sample, trajectory
from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod, sampling_timesteps
from tests.oracles import samplers as oracle

EPS = float(np.finfo(np.float32).eps)
# x_0 = (x - sigma eps) / alpha is rounded at the size of its terms, and so is each weighted sum:
# about 8 roundings a step, not amplified by the toy network (seen: 1 EPS a step).
STEP_TOLERANCE = 8 * EPS
# The same float32 operations, fused or vectorized differently: a few roundings, no more.
REORDER_TOLERANCE = 8 * EPS

SCHEDULE = Schedule(kind='scaled_linear', beta_start=0.0015, beta_end=0.0195)
TABLE = alphas_cumprod(SCHEDULE)
SHAPE = (4, 4, 2, 3)
SAMPLERS = {
    'ddpm': ('ddpm', {}),
    'ddpm fixed_large': ('ddpm', {'variance': 'fixed_large'}),
    'ddim': ('ddim', {}),
    'ddim eta=0.4': ('ddim', {'eta': 0.4}),
    'ddim eta=1': ('ddim', {'eta': 1.0}),
    'dpm_solver': ('dpm_solver', {}),
}
# Sums of predictions: of eps and of v they are not the same, and their papers print no marginals.
SUMMING = {'plms': ('plms', {}), 'pndm': ('pndm', {})}
every_table = pytest.mark.parametrize(
    'name, options', [*SAMPLERS.values(), *SUMMING.values()], ids=[*SAMPLERS, *SUMMING]
)
every_sampler = pytest.mark.parametrize('name, options', SAMPLERS.values(), ids=SAMPLERS)


def eps_of(x, t, numpy=np):
    """Noise of images of standard deviation 0.5, bent so that no rule is exact for it.

    The slope is between 0 and 2 for all t, so errors do not grow along a trajectory.
    """
    slope = np.sqrt(1 - TABLE) / (0.25 * TABLE + 1 - TABLE)
    slope = numpy.asarray(slope, x.dtype)[t]
    return slope * x + 0.05 * numpy.sin(3 * x + slope)


def predict(x, t):
    return eps_of(x, t, jnp), None


def steps(num_steps=20, spacing='uniform'):
    return sampling_timesteps(SCHEDULE, num_steps, spacing)


def keys_of(batch, seed=0):
    return jax.random.split(jax.random.key(seed), batch)


def draws(shape=SHAPE, *, num_steps=20, seed=0):
    rng = np.random.default_rng(seed)
    x_T = rng.standard_normal(shape).astype(np.float32)
    return x_T, rng.standard_normal((num_steps, *shape)).astype(np.float32)


one_step = jax.jit(Sampler.step)


def run(sampler, predict, x_T, noises):
    """Every x_t after x_T, with the noise given."""
    carry, xs = sampler.init(jnp.asarray(x_T)), []
    for i, t in enumerate(sampler.timesteps):
        noise = jnp.asarray(noises[i]) if sampler.is_stochastic else None
        carry = one_step(sampler, carry, predict(carry.x, t), i, noise)
        xs.append(carry.x)
    return np.stack(xs)


def assert_close(ours, theirs, tolerance):
    error = np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)))
    error /= np.max(np.abs(np.asarray(theirs))) or 1.0
    assert error < tolerance, f'{error:.2e} >= {tolerance:.2e}'


def visited(timesteps, final_alpha='one'):
    return np.append(TABLE[timesteps], 1.0 if final_alpha == 'one' else TABLE[0])


@pytest.mark.parametrize('final_alpha', ['one', 'first'])
@pytest.mark.parametrize('spacing, num_steps', [('uniform', 1), ('uniform', 10), ('trailing', 7)])
@every_sampler
def test_trajectory_equals_float64_oracle(name, options, spacing, num_steps, final_alpha):
    timesteps = steps(num_steps, spacing)
    x_T, noises = draws(num_steps=num_steps)
    sampler = make_sampler(name, SCHEDULE, timesteps, final_alpha=final_alpha, **options)
    ours = run(sampler, lambda x, t: eps_of(x, t, jnp), x_T, noises)
    theirs = getattr(oracle, name)(
        eps_of,
        timesteps,
        visited(timesteps, final_alpha),
        x_T.astype(np.float64),
        noises,
        **options,
    )
    assert_close(ours, theirs, num_steps * STEP_TOLERANCE)


def test_clipped_ddim_equals_float64_oracle():
    timesteps, (x_T, noises) = steps(), draws()
    sampler = make_sampler('ddim', SCHEDULE, timesteps, clip_sample=0.5)
    ours = run(sampler, lambda x, t: eps_of(x, t, jnp), x_T, noises)
    theirs = oracle.ddim(eps_of, timesteps, visited(timesteps), x_T.astype(float), noises, clip=0.5)
    assert np.max(np.abs(ours[-1])) <= 0.5
    assert_close(ours, theirs, 20 * STEP_TOLERANCE)


@every_table
def test_the_image_comes_back_when_eps_is_the_true_one(name, options):
    image = jnp.asarray(draws(seed=3)[0])
    table = jnp.asarray(TABLE, jnp.float32)

    def true_eps(x, t):
        return (x - jnp.sqrt(table[t]) * image) / jnp.sqrt(1 - table[t]), None

    sampler = make_sampler(name, SCHEDULE, steps(), **options)
    x_0, _ = sample(true_eps, sampler, jnp.asarray(draws()[0]), keys_of(SHAPE[0]))
    # The last step starts at t = 1, where 1 - alphas_cumprod = 3e-3 is known to EPS, hence sigma
    # to EPS / 2 / 3e-3 of itself, and x_0 to sigma times that.
    assert_close(x_0, image, EPS / 2 / np.sqrt(1 - TABLE[1]) + STEP_TOLERANCE)


@pytest.mark.parametrize('spacing', ['uniform', 'linspace'])
@every_sampler
def test_marginals_are_the_forward_ones_for_a_single_image(name, options, spacing):
    """If x_t = alpha x_0 + sigma n, then the next x has mean alpha' x_0 and spread sigma'."""
    if options.get('variance') == 'fixed_large':
        options = {}  # by design right for another law: the next test
    w = make_sampler(name, SCHEDULE, steps(spacing=spacing), **options).weights
    w = {term: table.astype(np.float64) for term, table in w.items()}
    zero = np.zeros(20)
    there = visited(steps(spacing=spacing))[1:]
    x_0 = w.get('x_0', zero) + w.get('x_0_previous', zero) + w.get('x', zero) * w['alpha']
    spread = np.hypot(w.get('x', zero) * w['sigma'] + w.get('eps', zero), w.get('noise', zero))
    np.testing.assert_allclose(x_0, np.sqrt(there), atol=STEP_TOLERANCE)
    np.testing.assert_allclose(spread, np.sqrt(1 - there), atol=STEP_TOLERANCE)


def test_fixed_large_keeps_standard_normal_data_standard_normal():
    w = make_sampler('ddpm', SCHEDULE, steps(), variance='fixed_large').weights
    # For x_0 ~ N(0, 1) the best x_0 given x_t is alpha x_t. The last step adds no noise.
    spread = np.hypot(w['x'] + w['x_0'] * w['alpha'], w['noise'])
    np.testing.assert_allclose(spread[:-1], 1, atol=STEP_TOLERANCE)


def gaussian_error(name, num_steps):
    """Relative error of the spread at t = 200, from t = 800, for x_0 ~ N(0, 0.5^2) known exactly.

    The probability flow scales a Gaussian, so x is the ratio of the standard deviations.
    """
    spread = np.sqrt(0.25 * TABLE + 1 - TABLE)
    slope = jnp.asarray(np.sqrt(1 - TABLE) / spread**2, jnp.float32)
    timesteps = np.linspace(800, 200, num_steps + 1, dtype=np.int32)
    sampler = make_sampler(name, SCHEDULE, timesteps)
    _, carries = trajectory(lambda x, t: (slope[t] * x, None), sampler, jnp.ones((1, 1)))
    return abs(float(carries.x[-1, 0, 0]) * spread[800] / spread[200] - 1)


@pytest.mark.parametrize('name, order', [('ddim', 1), ('dpm_solver', 2)])
def test_ode_samplers_transport_a_gaussian_at_their_order(name, order):
    errors = [gaussian_error(name, num_steps) for num_steps in (10, 20, 40)]
    assert errors[0] < 0.02
    for coarse, fine in zip(errors[:2], errors[1:], strict=True):
        # Higher orders are what is left: 5 % (seen: 1.2 %).
        assert coarse / fine == pytest.approx(2**order, rel=0.05), errors


def test_ddim_with_eta_one_is_ddpm():
    x_T, noises = draws()
    network = lambda x, t: eps_of(x, t, jnp)  # noqa: E731
    ddim = run(make_sampler('ddim', SCHEDULE, steps(), eta=1.0), network, x_T, noises)
    ddpm = run(make_sampler('ddpm', SCHEDULE, steps()), network, x_T, noises)
    assert_close(ddim, ddpm, 20 * STEP_TOLERANCE)


@every_sampler
def test_v_and_eps_networks_give_the_same_trajectory(name, options):
    x_T, noises = draws()
    table = jnp.asarray(TABLE, jnp.float32)

    def velocity(x, t):
        eps = eps_of(x, t, jnp)
        return (eps - jnp.sqrt(1 - table[t]) * x) / jnp.sqrt(table[t])

    by_v = make_sampler(name, SCHEDULE, steps(), prediction='v', **options)
    by_eps = make_sampler(name, SCHEDULE, steps(), **options)
    # Here v, not x_0, is divided by alpha >= sqrt(TABLE[-1]): its rounding counts 1 / alpha times
    # in the early steps, of which x_0's weight alpha' takes most back.
    assert_close(
        run(by_v, velocity, x_T, noises),
        run(by_eps, lambda x, t: eps_of(x, t, jnp), x_T, noises),
        20 * STEP_TOLERANCE,
    )


@every_table
def test_one_position_per_image_equals_one_for_all(name, options):
    sampler = make_sampler(name, SCHEDULE, steps(), **options)
    x_T, noises = draws()
    x_T, noise = jnp.asarray(x_T), jnp.asarray(noises[0])
    # Every leaf different, as in the midst of a trajectory.
    leaves, structure = jax.tree.flatten(sampler.init(x_T))
    leaves = [leaf + 0.3 * k * noises[k] for k, leaf in enumerate(leaves)]
    carry = jax.tree.unflatten(structure, leaves)
    positions = jnp.asarray([0, 19, 7, 7])
    together = sampler.step(carry, noise, positions, noise)
    for b, i in enumerate(positions):
        one = slice(b, b + 1)
        alone = sampler.step(
            jax.tree.map(lambda leaf, one=one: leaf[one], carry), noise[one], i, noise[one]
        )
        jax.tree.map(
            lambda got, want, b=b: assert_close(got[b], want[0], REORDER_TOLERANCE), together, alone
        )


@pytest.mark.parametrize('name, options', [('ddim', {'eta': 1.0}), ('dpm_solver', {})])
def test_a_batch_equals_its_parts(name, options):
    sampler = make_sampler(name, SCHEDULE, steps(), **options)
    keys = keys_of(SHAPE[0])
    x_T = samplers.initial_noise(keys, SHAPE[1:])
    whole, _ = sample(predict, sampler, x_T, keys)
    alone, _ = sample(predict, sampler, samplers.initial_noise(keys[1:], SHAPE[1:]), keys[1:])
    assert_close(alone, whole[1:], 20 * STEP_TOLERANCE)


def test_images_do_not_depend_on_the_number_of_devices():
    sampler = make_sampler('ddim', SCHEDULE, steps(5), eta=1.0)
    keys = keys_of(8)
    devices = np.array(jax.devices()[:8])
    sharding = NamedSharding(Mesh(devices, ('data',)), PartitionSpec('data'))

    @jax.jit
    def images(keys):
        return sample(predict, sampler, samplers.initial_noise(keys, SHAPE[1:]), keys)[0]

    assert_close(images(jax.device_put(keys, sharding)), images(keys), 5 * STEP_TOLERANCE)


@every_table
def test_one_compile_serves_every_step(name, options):
    sampler = make_sampler(name, SCHEDULE, steps(), **options)
    step = jax.jit(sampler.step)
    x_T = jnp.asarray(draws()[0])
    carry = sampler.init(x_T)
    for i in range(len(sampler.timesteps)):
        carry = step(carry, x_T, i, x_T)
    assert step._cache_size() == 1


def test_the_loop_traces_the_network_once_and_visits_the_timesteps_in_order():
    traced = []

    def network(x, t):
        traced.append(t)
        assert t.shape == () and t.dtype == jnp.int32
        return 0.5 * x, {'t': t, 'size': jnp.max(x, axis=(1, 2, 3))}

    sampler = make_sampler('ddim', SCHEDULE, steps())
    _, aux = jax.jit(lambda x_T: sample(network, sampler, x_T))(jnp.asarray(draws()[0]))
    assert len(traced) == 1
    np.testing.assert_array_equal(aux['t'], sampler.timesteps)
    assert aux['size'].shape == (20, SHAPE[0])


@pytest.mark.parametrize(
    'name, options', [('ddim', {'eta': 1.0}), ('dpm_solver', {}), ('plms', {})]
)
def test_a_trajectory_can_be_taken_up_at_any_position(name, options):
    sampler = make_sampler(name, SCHEDULE, steps(), **options)
    keys, x_T = keys_of(SHAPE[0]), jnp.asarray(draws()[0])
    x_0, carries = trajectory(predict, sampler, x_T, keys)
    num_rows = len(sampler.timesteps)
    np.testing.assert_array_equal(carries.x[0], x_T)
    assert carries.x.shape == (num_rows, *SHAPE)
    assert_close(sample(predict, sampler, x_T, keys)[0], x_0, REORDER_TOLERANCE)
    carry = jax.tree.map(lambda leaf: leaf[-3], carries)
    for i in range(num_rows - 3, num_rows):
        noise = samplers.step_noise(keys, i, SHAPE[1:])
        carry = sampler.step(carry, eps_of(carry.x, sampler.timesteps[i], jnp), i, noise)
    assert_close(carry.x, x_0, 3 * STEP_TOLERANCE)


def test_noise_is_fresh_in_every_step_and_image():
    keys = keys_of(3)
    noise = [samplers.initial_noise(keys, (64,))]
    noise += [samplers.step_noise(keys, i, (64,)) for i in range(4)]
    flat = np.concatenate([np.asarray(n) for n in noise])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    # 15 rows of 64 normals: the largest of 105 correlations of spread 1/8 stays below 5 of them.
    assert np.max(np.abs(correlation)) < 5 / 8
    np.testing.assert_array_equal(
        samplers.step_noise(keys, jnp.asarray([3, 0, 2]), (64,)),
        np.stack([noise[4][0], noise[1][1], noise[3][2]]),
    )


def test_initial_noise_is_standard_normal():
    noise = np.asarray(samplers.initial_noise(keys_of(4), (32, 32, 3)))
    assert noise.shape == (4, 32, 32, 3) and noise.dtype == np.float32
    # Standard errors of mean and spread over n draws: 1 / sqrt(n) and 1 / sqrt(2 n); 4 of them.
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)


def test_deterministic_samplers_need_no_keys():
    for name in ('ddim', 'dpm_solver'):
        sampler = make_sampler(name, SCHEDULE, steps())
        assert not sampler.is_stochastic
        assert np.all(np.isfinite(sample(predict, sampler, jnp.asarray(draws()[0]))[0]))


def test_predictions_of_low_precision_are_summed_in_float32():
    sampler = make_sampler('dpm_solver', SCHEDULE, steps())
    x_T = jnp.asarray(draws()[0])
    low = lambda x, t: (eps_of(x, t, jnp).astype(jnp.bfloat16), None)  # noqa: E731
    x_0, _ = sample(low, sampler, x_T)
    assert x_0.dtype == jnp.float32
    # bfloat16 rounds eps to 2^-9; errors of the steps add up at most.
    assert_close(x_0, sample(predict, sampler, x_T)[0], 20 * 2.0**-9)


@pytest.mark.parametrize('alpha_cumprod', [0.3, np.array([0.9999, 0.5, 0.1, 0.004])])
def test_noise_image_and_velocity_name_the_same_point(alpha_cumprod):
    x_0, (noise, *_) = draws()
    x_0, noise = jnp.asarray(x_0), jnp.asarray(noise)
    for a in (alpha_cumprod, jnp.asarray(alpha_cumprod, jnp.float32)):
        x_t = samplers.add_noise(x_0, noise, a)
        v = samplers.velocity_target(x_0, noise, a)
        assert_close(samplers.to_x_0(v, x_t, a, 'v'), x_0, STEP_TOLERANCE)
        assert_close(samplers.to_eps(v, x_t, a, 'v'), noise, STEP_TOLERANCE)
        # Dividing by alpha, at least sqrt(0.004), enlarges the rounding of x_t.
        assert_close(samplers.to_x_0(noise, x_t, a, 'eps'), x_0, STEP_TOLERANCE / np.sqrt(0.004))
        np.testing.assert_array_equal(samplers.to_eps(noise, x_t, a, 'eps'), noise)


def test_noisy_image_has_the_forward_moments():
    x_t = samplers.add_noise(jnp.full((2, 1), 2.0), jnp.full((2, 1), 3.0), np.array([0.64, 0.0]))
    np.testing.assert_allclose(x_t[:, 0], [0.8 * 2 + 0.6 * 3, 3.0], rtol=STEP_TOLERANCE)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('heun', {}, "name='heun': expected one of ddpm, ddim, dpm_solver, plms, pndm, euler"),
        ('ddim', {'variance': 'learned_range'}, "option of 'ddpm', not of 'ddim'"),
        ('ddim', {'final_order': 'first'}, "option of 'dpm_solver', not of 'ddim'"),
        ('dpm_solver', {'final_order': 'third'}, "final_order='third': expected one of auto"),
        ('ddim', {'scale_initial_noise': True}, "option of 'euler', not of 'ddim'"),
        ('plms', {'sigmas': np.ones(20)}, "option of 'dpm_solver' and 'euler', not of 'plms'"),
        ('euler', {'sigmas': np.ones(20)}, 'one per timestep, strictly descending and above 0'),
        ('ddpm', {'eta': 0.5}, "eta=0.5 with 'ddpm'"),
        ('ddim', {'eta': 1.5}, r'a value in \[0, 1\]'),
        ('ddim', {'variance': 'fixed_large'}, "option of 'ddpm'"),
        ('ddpm', {'variance': 'learned'}, "variance='learned': expected one of fixed_small, "),
        ('ddim', {'prediction': 'x_0'}, "prediction='x_0': expected one of eps, v"),
        ('ddim', {'final_alpha': 'zero'}, "final_alpha='zero': expected one of one, first"),
        ('ddim', {'clip_sample': 0.0}, 'clip_sample=0.0'),
    ],
)
def test_impossible_samplers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name, SCHEDULE, steps(), **options)


@pytest.mark.parametrize(
    'timesteps', [[], [1, 2], [5, 5], [1000, 1], [3, -1], [2.0, 1.0], [[2, 1]]]
)
def test_impossible_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match='strictly descending, in 0..999'):
        make_sampler('ddim', SCHEDULE, np.array(timesteps))


@pytest.mark.parametrize('name, fewest', [('plms', 2), ('pndm', 4)])
def test_too_few_steps_for_a_sum_of_predictions_are_refused(name, fewest):
    make_sampler(name, SCHEDULE, steps(fewest))
    with pytest.raises(ValueError, match=f'expected at least {fewest}'):
        make_sampler(name, SCHEDULE, steps(fewest - 1))


def test_karras_levels_are_for_rules_that_go_by_the_level_of_noise():
    with pytest.raises(ValueError, match="'karras' with name='ddim'.*expected one of dpm_solver"):
        samplers.make_spaced_sampler('ddim', SCHEDULE, 20, spacing='karras')


@pytest.mark.parametrize('given, learned, expected', [(6, False, 3), (3, True, 6), (4, True, 6)])
def test_a_prediction_of_the_wrong_width_is_refused(given, learned, expected):
    variance = 'learned_range' if learned else 'fixed_small'
    sampler = make_sampler('ddpm', SCHEDULE, steps(), variance=variance)
    x_T = jnp.zeros((2, 4, 4, 3))
    message = f'has {given} channels, the images 3: expected a prediction of {expected} channels'
    with pytest.raises(ValueError, match=message):
        sampler.step(sampler.init(x_T), jnp.zeros((2, 4, 4, given)), 0, x_T)


def test_learned_variances_lie_between_the_fixed_ones():
    x_T, (noise, *_) = map(jnp.asarray, draws())
    fixed = {
        name: make_sampler('ddpm', SCHEDULE, steps(), variance=name)
        for name in ('fixed_small', 'fixed_large', 'learned_range')
    }
    for i in (0, 7, 18, 19):

        def moved(name, *place, i=i):
            prediction = jnp.concatenate([x_T, *(jnp.full_like(x_T, p) for p in place)], axis=-1)
            return fixed[name].step(fixed[name].init(x_T), prediction, i, noise).x

        for place, name in ((-1, 'fixed_small'), (1, 'fixed_large')):
            assert_close(moved('learned_range', place), moved(name), STEP_TOLERANCE)


@pytest.mark.parametrize('name', ['ddpm', 'plms', 'pndm'])
def test_images_that_start_anew_do_not_hear_of_the_past(name):
    sampler = make_sampler(name, SCHEDULE, steps())
    x_T, noises = draws()
    x_T = jnp.asarray(x_T)
    fresh = sampler.init(x_T)
    spoilt = fresh._replace(
        remembered=jax.tree.map(lambda leaf: leaf + 9.0, fresh.remembered),
    )
    for carry_now in (fresh, spoilt):
        carry = carry_now
        for i in range(8):
            carry = one_step(sampler, carry, jnp.asarray(noises[i]), i, jnp.asarray(noises[-1]))
        if carry_now is fresh:
            expected = carry.x
    assert_close(carry.x, expected, 8 * STEP_TOLERANCE)


def test_missing_noise_is_refused():
    sampler, x_T = make_sampler('ddpm', SCHEDULE, steps()), jnp.asarray(draws()[0])
    for keys in (None, keys_of(3)):
        with pytest.raises(ValueError, match=r'one key per image \(4\)'):
            sample(predict, sampler, x_T, keys)
    with pytest.raises(ValueError, match='pass noise='):
        sampler.step(sampler.init(x_T), x_T, 0)
    with pytest.raises(ValueError, match="kind='x': expected one of eps, v"):
        samplers.to_eps(x_T, x_T, 0.5, 'x')


def test_a_sampler_is_a_pytree_of_tables():
    sampler = make_sampler('ddim', SCHEDULE, steps(), eta=1.0)
    leaves, treedef = jax.tree.flatten(sampler)
    assert all(leaf.shape == (20,) for leaf in leaves)
    again = jax.tree.unflatten(treedef, leaves)
    assert isinstance(again, Sampler) and again.is_stochastic


@pytest.mark.parametrize('prediction', ['eps', 'v'])
@every_table
def test_the_gain_is_how_far_a_step_moves_per_unit_of_prediction(name, options, prediction):
    timesteps = np.array([900, 500, 100, 1], np.int32)
    sampler = samplers.make_sampler(name, Schedule(), timesteps, prediction=prediction, **options)
    gain = np.asarray(samplers.prediction_gain(sampler))
    x, zero = jnp.full((1, 1), 0.5), jnp.zeros((1, 1))
    for i in range(len(sampler.timesteps)):
        carry = sampler.init(x)
        moved = sampler.step(carry, x, i, zero).x - sampler.step(carry, zero, i, zero).x
        # Differences of float32 numbers whose terms are as large as 1 / alpha = 90.
        np.testing.assert_allclose(gain[i] * 0.5, float(moved[0, 0]), rtol=1e-3, atol=1e-4)
