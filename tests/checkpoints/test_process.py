import numpy as np
import pytest

from dmq_jax.checkpoints.process import process_from_settings, schedule_from_buffers
from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod

SETTINGS = {
    'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'beta_start': 0.00085,
    'beta_end': 0.012,
}  # fmt: skip


@pytest.mark.parametrize(
    'name, kind',
    [('linear', 'linear'), ('scaled_linear', 'scaled_linear'), ('squaredcos_cap_v2', 'cosine')],
)
@pytest.mark.parametrize('said, prediction', [('epsilon', 'eps'), ('v_prediction', 'v')])
def test_schedule_and_prediction_are_those_of_diffusers(name, kind, said, prediction):
    settings = {**SETTINGS, 'beta_schedule': name, 'prediction_type': said}
    schedule, found = process_from_settings(settings)
    assert (schedule.kind, found) == (kind, prediction)
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)


def test_files_older_than_the_setting_predict_eps():
    assert process_from_settings(SETTINGS)[1] == 'eps'


def test_trained_betas_and_the_rescaling_to_no_signal_are_kept():
    settings = {**SETTINGS, 'num_train_timesteps': 3, 'trained_betas': [0.1, 0.2, 0.3]}
    schedule, _ = process_from_settings(settings)
    np.testing.assert_allclose(alphas_cumprod(schedule), [0.9, 0.72, 0.504], rtol=1e-12)
    rescaled, _ = process_from_settings({**SETTINGS, 'rescale_betas_zero_snr': True})
    assert alphas_cumprod(rescaled)[-1] == 0


@pytest.mark.parametrize(
    'change, text',
    [
        ({'beta_schedule': 'sigmoid'}, "mine: beta_schedule='sigmoid': expected one of linear"),
        ({'prediction_type': 'sample'}, "prediction_type='sample': expected one of"),
        ({'beta_end': ...}, 'mine: no beta_end'),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(change, text):
    settings = {name: value for name, value in {**SETTINGS, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=text):
        process_from_settings(settings, 'mine')


@pytest.mark.parametrize('kind', ['linear', 'scaled_linear'])
def test_the_buffers_of_compvis_tell_their_schedule_to_the_digit(kind):
    wanted = Schedule(kind=kind, num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195)
    table = alphas_cumprod(wanted)
    betas = 1 - table / np.concatenate([[1.0], table[:-1]])
    buffers = {'betas': betas.astype(np.float32), 'alphas_cumprod': table.astype(np.float32)}
    assert schedule_from_buffers(buffers) == wanted


def test_buffers_of_no_known_schedule_are_taken_as_they_are():
    betas = np.linspace(0.1, 0.3, 5).astype(np.float32) ** 3
    schedule = schedule_from_buffers({'betas': betas})
    assert schedule.kind == 'trained'
    np.testing.assert_allclose(
        alphas_cumprod(schedule), np.cumprod(1 - betas.astype(np.float64)), rtol=1e-12
    )
    assert schedule_from_buffers({}) is None
