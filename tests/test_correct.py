"""What a correction is fitted to: both networks' predictions along the teacher's trajectories."""

import jax
import numpy as np

from dmq_jax import correct, denoisers
from dmq_jax.config import CalibrateConfig, SamplerConfig
from dmq_jax.methods.base import Bound, Method
from tests import tiny

CONFIG = CalibrateConfig(num_images=8, batch_size=4, sampler=SamplerConfig(num_steps=3))
# float32 steps beside float64 ones; a step divides by alpha >= 0.3.
TOLERANCE = 1e-5


def stub(factor):
    """A network that says something different at each timestep and of each class."""

    def predict(params, x, t, y):
        return (
            params
            * factor
            * (x + 0.01 * t.astype(x.dtype) + y[:, None, None, None].astype(x.dtype))
        )

    return denoisers.Denoiser(predict, np.float32(1), tiny.INFO, network=None)


def pairs(monkeypatch):
    """(timesteps, predictions of the student, of the teacher), as `Method.correct` gets them."""
    teacher, student = stub(0.5), stub(0.25)
    monkeypatch.setattr(denoisers, 'fake_student', lambda *arguments: student)
    method = Method(None, None, None, None, correct=lambda *both: both)
    timesteps = denoisers.make_denoiser_sampler(teacher, CONFIG.sampler).timesteps
    bound = Bound(weights={}, tables={})
    found = correct.run(
        teacher, method, bound, {}, timesteps, 'nearest', CONFIG, key=jax.random.key(0)
    )
    assert found._replace(correction=None) == bound
    return np.asarray(timesteps), *map(np.asarray, found.correction)


def test_both_predict_from_the_same_images_at_every_step(monkeypatch):
    timesteps, student, teacher = pairs(monkeypatch)
    assert student.shape == teacher.shape == (3, 8, *tiny.INFO.image_shape)
    np.testing.assert_array_equal(student, teacher / 2)


def test_the_trajectories_are_those_of_the_teacher(monkeypatch):
    timesteps, _, teacher = pairs(monkeypatch)
    schedule = tiny.INFO.schedule
    betas = np.linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
    alphas_cumprod = np.cumprod(1 - betas)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])[:, None, None, None]
    eps = teacher.astype(np.float64)
    x = [2 * e - 0.01 * t - labels for e, t in zip(eps, timesteps, strict=True)]
    for i in range(2):
        # DDIM, arXiv:2010.02502, eq. 12 with sigma 0.
        here, there = alphas_cumprod[timesteps[i]], alphas_cumprod[timesteps[i + 1]]
        x_0 = (x[i] - np.sqrt(1 - here) * eps[i]) / np.sqrt(here)
        want = np.sqrt(there) * x_0 + np.sqrt(1 - there) * eps[i]
        np.testing.assert_allclose(x[i + 1], want, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_method_without_a_correction_leaves_the_student_as_it_is():
    bound, method = Bound(weights={}, tables={}), Method(None, None, None, None)
    found = correct.run(
        stub(0.5), method, bound, {}, np.arange(3), 'nearest', CONFIG, key=jax.random.key(0)
    )
    assert found is bound
