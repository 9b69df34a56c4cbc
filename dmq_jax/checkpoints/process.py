"""The noise schedule and the prediction type that a checkpoint was trained with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmq_jax.diffusion.schedule import Schedule, alphas_cumprod

SCHEDULER_CONFIG = 'scheduler_config.json'
_KINDS = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'squaredcos_cap_v2': 'cosine'}
PREDICTIONS = {'epsilon': 'eps', 'v_prediction': 'v'}
# The buffers of a checkpoint are float32, and cumulative products of a thousand of these.
_BUFFER_TOLERANCE = 1e-5


def process_from_settings(
    settings: Mapping[str, Any], source: str = SCHEDULER_CONFIG
) -> tuple[Schedule, str]:
    """Schedule and prediction type of a `scheduler_config.json`, or of values called the same.

    Args:
      settings: of diffusers' schedulers.
      source: what to call them in messages.

    Raises:
      ValueError: a setting that is missing, or one that has no counterpart here.
    """
    prediction = prediction_from_settings(settings, source)
    if settings.get('beta_schedule') not in _KINDS:
        raise ValueError(
            f'{source}: beta_schedule={settings.get("beta_schedule")!r}: expected one of '
            f'{", ".join(_KINDS)}; flow matching is not supported.'
        )
    names = ('num_train_timesteps', 'beta_start', 'beta_end')
    if absent := [name for name in names if name not in settings]:
        raise ValueError(f'{source}: no {absent[0]}.')
    values = {name: settings[name] for name in names}
    values['rescale_betas_zero_snr'] = bool(settings.get('rescale_betas_zero_snr'))
    if settings.get('trained_betas'):
        betas = tuple(settings['trained_betas'])
        return Schedule(kind='trained', trained_betas=betas, **values), prediction
    return Schedule(kind=_KINDS[settings['beta_schedule']], **values), prediction


def prediction_from_settings(settings: Mapping[str, Any], source: str = SCHEDULER_CONFIG) -> str:
    """The prediction type alone.

    Raises:
      ValueError: one that has no counterpart here.
    """
    # Files older than the setting are of models that predict eps.
    prediction = settings.get('prediction_type', 'epsilon')
    if prediction not in PREDICTIONS:
        raise ValueError(
            f'{source}: prediction_type={prediction!r}: expected one of {", ".join(PREDICTIONS)}.'
        )
    return PREDICTIONS[prediction]


def schedule_from_buffers(tensors: Mapping[str, np.ndarray]) -> Schedule | None:
    """The schedule whose tables a checkpoint of CompVis holds; None where it holds none."""
    if 'betas' not in tensors:
        return None
    betas = np.asarray(tensors['betas'], np.float64)
    # What a config file said, before it was rounded to float32.
    first, last = (float(f'{value:.6g}') for value in (betas[0], betas[-1]))
    table = np.cumprod(1 - betas)
    if 'alphas_cumprod' in tensors:
        table = np.asarray(tensors['alphas_cumprod'], np.float64)
    for kind in _KINDS.values():
        schedule = Schedule(
            kind=kind, num_train_timesteps=len(betas), beta_start=first, beta_end=last
        )
        if np.abs(alphas_cumprod(schedule) - table).max() < _BUFFER_TOLERANCE:
            return schedule
    return Schedule(
        kind='trained', num_train_timesteps=len(betas), trained_betas=tuple(betas.tolist())
    )
