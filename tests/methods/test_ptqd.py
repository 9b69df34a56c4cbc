import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import correct, denoisers, exporting, methods
from dmq_jax.config import PTQDConfig, QDiffusionConfig, RoundToNearestConfig, SamplerConfig
from dmq_jax.diffusion import samplers
from dmq_jax.methods import base, ptqd
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.quant.tensor import QuantSpec
from tests import tiny

SHAPE = (3, 64, 8, 8, 2)  # [S, N, H, W, C]


def predictions(seed=0):
    """A student that is wrong in the way the paper describes, and the numbers it is wrong by."""
    rng = np.random.default_rng(seed)
    teacher = rng.standard_normal(SHAPE)
    gain = np.array([0.05, 0.2, 0.0])
    bias = np.array([[0.1, -0.2], [0.0, 0.3], [-0.1, 0.0]])
    spread = np.array([0.05, 0.1, 0.2])
    wide = (slice(None), None, None, None, None)
    noise = spread[wide] * rng.standard_normal(SHAPE)
    student = (1 + gain[wide]) * teacher + bias[:, None, None, None] + noise
    return student.astype(np.float32), teacher.astype(np.float32), gain, bias, spread


# Means of 64 * 64 numbers or more of spread up to 0.2 (standard error 0.003).
TOLERANCE = 0.015


def test_the_fit_finds_gain_bias_and_noise():
    student, teacher, gain, bias, spread = predictions()
    got = ptqd.fit(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(got.gain, gain, atol=TOLERANCE)
    np.testing.assert_allclose(got.bias, bias, atol=TOLERANCE)
    np.testing.assert_allclose(np.sqrt(got.variance), spread / (1 + gain), rtol=0.05)


def test_a_gain_below_zero_is_left_to_the_noise():
    student, teacher, *_ = predictions()
    got = ptqd.fit(jnp.asarray(0.5 * teacher), jnp.asarray(teacher))
    np.testing.assert_array_equal(got.gain, 0)


def test_a_corrected_prediction_is_nearer_to_the_teacher_on_other_images():
    student, teacher, *_ = predictions()
    correction = ptqd.fit(jnp.asarray(student), jnp.asarray(teacher))
    student, teacher, *_ = predictions(seed=1)
    for i in range(3):
        row = {name: table[i] for name, table in correction._asdict().items()}
        fixed = denoisers._corrected(jnp.asarray(student[i]), row)
        before, after = (np.mean((p - teacher[i]) ** 2) for p in (student[i], np.asarray(fixed)))
        assert after < before / (5 if i < 2 else 1), (i, before, after)


def test_the_noise_in_the_prediction_takes_the_place_of_the_sampler_s_own():
    config = SamplerConfig(num_steps=3, eta=1.0)
    sampler = denoisers.make_denoiser_sampler(tiny.teacher(), config)
    own = np.asarray(sampler.weights['noise'], np.float64) ** 2
    gain = np.asarray(samplers.prediction_gain(sampler), np.float64) ** 2
    variance = np.array([0.1, 1e4, 0.0])
    absorbed = samplers.absorb_noise(sampler, jnp.asarray(variance, jnp.float32))
    kept = np.asarray(absorbed.weights['noise'], np.float64) ** 2
    np.testing.assert_allclose(kept, np.maximum(own - gain * variance, 0), rtol=1e-4, atol=1e-7)
    assert kept[1] == 0 and kept[0] < own[0]


def test_a_sampler_without_noise_stays_as_it_is():
    sampler = denoisers.make_denoiser_sampler(tiny.teacher(), SamplerConfig(num_steps=3))
    assert samplers.absorb_noise(sampler, jnp.ones(3)) is sampler


def student():
    """Plan, bound and corrected student of the tiny teacher at 3 bits."""
    weight = QuantSpec(bits=3, symmetric=True, per_channel=True, observer='minmax')
    inputs = QuantSpec(bits=4, symmetric=False, observer='minmax')
    # Rounded enough to be wrong, and few layers to compile.
    layers = ('up_0/block_0/conv1', 'up_0/block_1/conv2', 'conv_out')
    plan = dict.fromkeys(layers, LayerSpec(weight=weight, inputs=inputs))
    teacher, calibration = tiny.teacher(), tiny.calibration()
    method = methods.make(PTQDConfig(), plan)
    state = jax.jit(method.init)(teacher.params, calibration.stats, jax.random.key(0))
    bound = jax.jit(method.bind)(teacher.params, state)
    corrected = correct.run(
        teacher, method, bound, plan, calibration.timesteps, 'nearest', tiny.CALIBRATE,
        key=jax.random.key(5),
    )  # fmt: skip
    return plan, bound, corrected


def test_the_correction_of_a_student_survives_its_export_and_reaches_the_sampler(tmp_path):
    plan, bound, corrected = student()
    teacher, timesteps = tiny.teacher(), tiny.calibration().timesteps
    assert bound.correction is None and corrected.correction.gain.shape == timesteps.shape
    made = exporting.make(teacher, plan, corrected, timesteps, 'nearest')
    exporting.save(tmp_path, made)
    loaded = exporting.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.correction, made.correction)

    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 8, 8, 1)).astype(np.float32))
    y, t = jnp.zeros(4, jnp.int32), jnp.asarray(timesteps[[0, 1, 2, 0]])
    plain = exporting.denoiser(exporting.make(teacher, plan, bound, timesteps, 'nearest'), 'fake')
    fixed = exporting.denoiser(loaded, 'fake')
    before, after = (np.asarray(jax.jit(d.predict)(d.params, x, t, y)) for d in (plain, fixed))
    row = jax.tree.map(lambda table: np.asarray(table)[[0, 1, 2, 0]], made.correction)
    want = (before - row.bias[:, None, None]) / (1 + row.gain[:, None, None, None])
    np.testing.assert_allclose(after, want, rtol=1e-5, atol=1e-5)

    config = SamplerConfig(num_steps=3, eta=1.0)
    noise = [denoisers.make_denoiser_sampler(d, config).weights['noise'] for d in (plain, fixed)]
    assert np.all(np.asarray(noise[1]) <= np.asarray(noise[0]))
    assert np.any(np.asarray(noise[1]) < np.asarray(noise[0]))


def test_methods_without_a_correction_are_left_alone():
    # Nothing is looked at.
    plan, bound = {}, base.Bound({}, {})
    for config in (RoundToNearestConfig(), QDiffusionConfig()):
        method = methods.make(config, plan)
        same = correct.run(
            tiny.teacher(), method, bound, plan, np.array([9], np.int32), 'nearest',
            tiny.CALIBRATE, key=jax.random.key(5),
        )  # fmt: skip
        assert same is bound
