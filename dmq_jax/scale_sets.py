"""Sets of scales for one quantized model: small files that change what the same integers draw.

What adapting a model by its scales alone (TuneQDM) leaves is a few numbers per channel. A set is
one safetensors file of them; it names the integers it was learnt on, and fits no others.
"""

import json
import os

import numpy as np

from dmq_jax import artefacts
from dmq_jax.exporting import Exported
from dmq_jax.files.safetensors import open_safetensors

FORMAT = 'dmq_jax.scales.1'


def save(path: str | os.PathLike, exported: Exported) -> None:
    """Writes the factors of the channels of `exported`, and nothing else of it.

    Args:
      path: the file.
      exported: a quantized network.

    Raises:
      ValueError: it has no factors of channels.
    """
    from safetensors.numpy import save_file

    if not exported.channels:
        raise ValueError('this network has no scales of single channels; nothing to save.')
    tensors = {
        f'{layer}/{end}': np.ascontiguousarray(factor)
        for layer, factors in exported.channels.items()
        for end, factor in factors.items()
    }
    timesteps = exported.channel_timesteps
    facts = {
        'format': FORMAT,
        'integers': fingerprint(exported),
        'timesteps': json.dumps(None if timesteps is None else np.asarray(timesteps).tolist()),
    }
    save_file(tensors, path, facts)


def load(path: str | os.PathLike, exported: Exported) -> Exported:
    """`exported` with the scales that `save` wrote.

    Args:
      path: the file.
      exported: the integers they were learnt on.

    Raises:
      ValueError: not such a file, or learnt on other integers.
    """
    tensors = open_safetensors(path)
    facts = tensors.metadata
    if facts.get('format') != FORMAT:
        raise ValueError(f'{path}: format is {facts.get("format")!r}, expected {FORMAT!r}.')
    if facts['integers'] != fingerprint(exported):
        raise ValueError(f'{path} was learnt on other integers than those of this network.')
    channels: dict[str, dict[str, np.ndarray]] = {}
    for name, factor in dict(tensors).items():
        layer, end = name.rsplit('/', 1)
        channels.setdefault(layer, {})[end] = np.asarray(factor)
    timesteps = json.loads(facts['timesteps'])
    return exported._replace(
        channels=channels,
        channel_timesteps=None if timesteps is None else np.asarray(timesteps, np.float32),
    )


def fingerprint(exported: Exported) -> str:
    """Names the integers of a network."""
    return artefacts.digest({path: w.packed for path, w in exported.weights.items()})
