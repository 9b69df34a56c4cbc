"""The parts of a folder saved by diffusers: where a component's settings and weights lie."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dmq_jax.checkpoints.opening import Tensors, open_tensors

CONFIG = 'config.json'
# Weights by the names that diffusers and transformers give them; a variant, such as fp16, stands
# before the ending.
_STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model')
_ENDINGS = ('.safetensors', '.bin')


class Component(NamedTuple):
    """One network of a folder.

    Attributes:
      folder: where it lies.
      config: its settings.
    """

    folder: Path
    config: dict[str, Any]

    @property
    def class_name(self) -> str | None:
        """The class that its settings name."""
        return self.config.get('_class_name') or (self.config.get('architectures') or [None])[0]

    def open(self) -> Tensors:
        """Its weights.

        Raises:
          FileNotFoundError: there are none.
        """
        return open_tensors(find_weights(self.folder))


def find_component(folder: Path, *names: str) -> Component | None:
    """The first subfolder of these names that has settings, or else None.

    Args:
      folder: of the checkpoint.
      *names: subfolders; '' is the folder itself.
    """
    for name in names:
        file = folder / name / CONFIG
        if file.is_file():
            return Component(file.parent, read_json(file))
    return None


def find_weights(folder: Path) -> Path:
    """The file of weights in the folder of a component, or the index of its shards.

    Full precision comes before a variant, safetensors before files of torch.

    Raises:
      FileNotFoundError: none of the known names.
    """
    for ending in _ENDINGS:
        for stem in _STEMS:
            for name in (f'{stem}{ending}', f'{stem}{ending}.index.json'):
                if (folder / name).is_file():
                    return folder / name
            patterns = f'{stem}{ending}.index.*.json', f'{stem}.*{ending}.index.json'
            patterns += (f'{stem}.*{ending}',)
            for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
                if '-of-' not in file.name:  # a shard, which is found through its index
                    return file
    stem = _STEMS[0]
    raise FileNotFoundError(
        f'{folder}: no {stem}.safetensors or {stem}.safetensors.index.json, and no .bin or variant '
        f'of them; copy the weights into it.'
    )


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
      ValueError: not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file}: not a JSON file ({error}).') from error
    if not isinstance(content, dict):
        raise ValueError(f'{file}: expected a JSON object.')
    return content


@contextlib.contextmanager
def reading_settings(file: Path) -> Iterator[None]:
    """What makes something of the settings in `file`: values of a wrong type are the file's fault.

    Raises:
      ValueError: in place of what a value of a wrong type, such as null for a list, leads to.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f'{file}: a setting has a value of another type ({error}).') from error
