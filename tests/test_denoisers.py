import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers
from dmq_jax.config import QuantConfig, SamplerConfig
from dmq_jax.denoisers import guided
from dmq_jax.diffusion.schedule import Schedule
from tests import tiny


def linear_predict(params, x, t, y):
    """A stand-in whose answer differs for each class, timestep and image."""
    t = jnp.broadcast_to(t, y.shape).astype(jnp.float32)
    return params * x + t[:, None, None, None] + y.astype(jnp.float32)[:, None, None, None]


@pytest.mark.parametrize('t', [np.int32(5), np.array([3, 9], np.int32)], ids=['scalar', 'each'])
def test_guidance_is_its_formula(t):
    x = np.random.default_rng(0).integers(-4, 4, (2, 4, 6, 1)).astype(np.float32)
    y = np.array([2, 0], np.int32)
    params = jnp.float32(2)
    out = guided(linear_predict, tiny.INFO, 1.5)(params, x, t, y)
    conditional = linear_predict(params, x, t, y)
    null = linear_predict(params, x, t, np.full(2, tiny.INFO.num_classes, np.int32))
    # Small halves and integers: exact in float32.
    np.testing.assert_array_equal(out, null + 1.5 * (conditional - null))


def test_guidance_calls_the_network_once_on_a_doubled_batch():
    calls = []

    def predict(params, x, t, y):
        calls.append((x.shape, np.shape(t), y.tolist()))
        return linear_predict(params, x, t, y)

    x, y = np.zeros((2, 4, 6, 1), np.float32), np.array([2, 0], np.int32)
    guided(predict, tiny.INFO, 3.0)(jnp.float32(1), x, np.array([1, 2], np.int32), y)
    assert calls == [((4, 4, 6, 1), (4,), [3, 3, 2, 0])]


def test_scale_one_is_no_guidance():
    assert guided(linear_predict, tiny.INFO, 1.0) is linear_predict


def test_guidance_of_an_unconditional_denoiser_is_refused():
    teacher = tiny.teacher()
    teacher = teacher._replace(info=dataclasses.replace(teacher.info, num_classes=None))
    with pytest.raises(ValueError, match='guidance_scale=2.0: this denoiser is unconditional'):
        denoisers.make_denoiser_sampler(teacher, SamplerConfig(guidance_scale=2.0))


def test_guidance_without_a_null_class_is_refused():
    teacher = tiny.teacher()
    teacher = teacher._replace(info=dataclasses.replace(teacher.info, num_classes=4))
    with pytest.raises(ValueError, match='guidance_scale=2.0.*each of the 4 rows'):
        denoisers.make_denoiser_sampler(teacher, SamplerConfig(guidance_scale=2.0))


@pytest.mark.parametrize(
    'options, timesteps',
    [
        ({'name': 'plms', 'spacing': 'leading', 'steps_offset': 1}, [16, 11, 11, 6, 1]),
        ({'name': 'euler', 'spacing': 'linspace'}, [19, 12.667, 6.333, 0]),
        ({'name': 'dpm_solver', 'spacing': 'dpm_leading', 'final_order': 'first'}, [16, 12, 8, 4]),
        ({'name': 'ddpm', 'spacing': 'adm', 'sections': (1, 3)}, [19, 14, 10, 0]),
    ],
)
def test_options_of_the_sampler_reach_it(options, timesteps):
    teacher = tiny.teacher()
    schedule = Schedule(num_train_timesteps=20, beta_end=0.2)
    info = dataclasses.replace(teacher.info, schedule=schedule)
    config = SamplerConfig(num_steps=4, clip_sample=1.0, final_alpha='first', **options)
    sampler = denoisers.make_denoiser_sampler(teacher._replace(info=info), config)
    np.testing.assert_allclose(sampler.timesteps, timesteps, atol=1e-3)
    assert sampler.clip_sample == 1.0


def test_a_learnt_variance_of_a_denoiser_without_one_is_refused():
    teacher = tiny.teacher()
    config = SamplerConfig(name='ddpm', variance='learned_range')
    with pytest.raises(ValueError, match='this denoiser predicts no variance'):
        denoisers.make_denoiser_sampler(teacher, config)
    info = dataclasses.replace(teacher.info, learned_variance=True)
    sampler = denoisers.make_denoiser_sampler(teacher._replace(info=info), config)
    assert sampler.learns_variance


@pytest.mark.parametrize('num_images', [1, 7, 30])
def test_labels_go_round_the_classes(num_images):
    labels = denoisers.balanced_labels(num_images, 3)
    counts = np.bincount(labels, minlength=3)
    assert len(labels) == num_images and counts.max() - counts.min() <= 1
    assert denoisers.balanced_labels(num_images, None) is None


def test_a_softmax_has_a_width_of_its_own_and_the_values_it_weighs_have_not():
    config = QuantConfig(
        coverage='full', activation_bits=4, softmax_bits=8, activation_symmetric=True
    )
    plan = denoisers.make_plan(denoisers.quantizable(tiny.teacher()), config)
    with_own = {path for path, spec in plan.items() if spec.lhs is not None}
    assert with_own == {path for path in plan if path.endswith('/mix')} != set()
    for path in with_own:
        softmax, values = (plan[path].activation(role) for role in ('lhs', 'rhs'))
        assert (softmax.grid, values.grid) == ((0, 255), (-8, 7))
