"""Sets of scales for one quantized model: small files that change what the same integers draw.

What adapting a model by its scales alone (TuneQDM) leaves is a few numbers per channel, what QLoRA
leaves are branches of low rank. A set is one safetensors file of them; it names the integers it was
learnt on, and fits no others.
"""

import json
import os

import numpy as np

from dmq_jax import artefacts
from dmq_jax.exporting import Exported
from dmq_jax.files.safetensors import open_safetensors

FORMAT = 'dmq_jax.scales.1'
_HALVES = ('down', 'up')  # of a branch


def save(path: str | os.PathLike, exported: Exported) -> None:
    """Writes the factors of the channels of `exported` and its branches, and nothing else of it.

    Args:
      path: the file.
      exported: a quantized network.

    Raises:
      ValueError: it has neither.
    """
    from safetensors.numpy import save_file

    if not exported.channels and not exported.branches:
        raise ValueError(
            'this network has neither scales of single channels nor branches; nothing to save.'
        )
    tensors = _tensors(exported)
    timesteps = exported.channel_timesteps
    facts = {
        'format': FORMAT,
        'integers': fingerprint(exported),
        'timesteps': json.dumps(None if timesteps is None else np.asarray(timesteps).tolist()),
    }
    save_file(tensors, path, facts)


def size_bytes(exported: Exported) -> int:
    """Bytes of the numbers that `save` writes."""
    return sum(tensor.nbytes for tensor in _tensors(exported).values())


def _tensors(exported: Exported) -> dict[str, np.ndarray]:
    return {
        f'{layer}/{name}': np.ascontiguousarray(array)
        for group in (exported.channels, exported.branches)
        for layer, arrays in group.items()
        for name, array in arrays.items()
    }


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
    branches: dict[str, dict[str, np.ndarray]] = {}
    for name, array in dict(tensors).items():
        layer, kind = name.rsplit('/', 1)
        group = branches if kind in _HALVES else channels
        group.setdefault(layer, {})[kind] = np.asarray(array)
    timesteps = json.loads(facts['timesteps'])
    return exported._replace(
        channels=channels,
        branches=branches,
        channel_timesteps=None if timesteps is None else np.asarray(timesteps, np.float32),
    )


def fingerprint(exported: Exported) -> str:
    """Names the integers of a network."""
    return artefacts.digest({path: w.packed for path, w in exported.weights.items()})
