"""Files of tensors, whatever wrote them, as one lazy mapping; and which family they hold.

What a file holds is told by the names of its tensors, never by the name of the file. The tensors of
a checkpoint may lie under an entry of it, beside optimizers and callbacks, and under prefixes that
training left on their names; here they are found.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmq_jax.checkpoints import strangers
from dmq_jax.files import torch_files
from dmq_jax.files.safetensors import open_safetensors, read_weight_map

# Name of a kind -> tensors that it alone has; the first match wins.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('compvis', ('model.diffusion_model.input_blocks.0.0.weight',)),
    ('compvis', ('model_ema.diffusion_modelinput_blocks00weight',)),
    ('compvis', ('input_blocks.0.0.weight', 'middle_block.1.transformer_blocks.0.norm1.weight')),
    ('adm', ('input_blocks.0.0.weight', 'time_embed.0.weight')),
    ('ddim', ('temb.dense.0.weight', 'conv_in.weight')),
    ('pixart', ('x_embedder.proj.weight', 'y_embedder.y_proj.fc1.weight')),
    ('dit', ('x_embedder.proj.weight', 'y_embedder.embedding_table.weight')),
    ('diffusers', ('time_embedding.linear_1.weight', 'conv_in.weight')),
    ('diffusers', ('pos_embed.proj.weight',)),
)
KINDS = ('dmq_jax', 'diffusers', 'compvis', 'adm', 'ddim', 'dit', 'pixart')
# Packages whose objects stand beside the tensors of a checkpoint: they become inert.
_IGNORED = (
    'pytorch_lightning', 'lightning', 'lightning_fabric', 'lightning_utilities', 'omegaconf',
    'argparse', 'torch.optim', 'torchmetrics', 'diffusion', 'ldm', 'sgm', '__main__', 'typing',
    'collections.Counter', 'pathlib', 'functools', 'torch._utils._get_async_or_non_blocking',
)  # fmt: skip
# Entries of a checkpoint that hold tensors: with the moving average first, or the weights.
_AVERAGES = ('ema', 'model_ema', 'ema_state_dict', 'state_dict_ema')
_WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'module', 'net')


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by name, of which one at a time is in memory.

    Attributes:
      path: the file, for messages.
    """

    def __init__(self, path: Path, source: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self.path = path
        self._source = source
        self._names = names
        self._last: np.ndarray | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """The array; one of a mapped file is to be copied before the next is asked for."""
        if self._last is not None:
            torch_files.release(self._last)
        self._last = getattr(self._source, 'view', self._source.__getitem__)(self._names[name])
        return self._last

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the array called `name`, of which nothing is read."""
        key = self._names[name]
        if hasattr(self._source, 'shape_of'):
            return self._source.shape_of(key)
        return tuple(self._source[key].shape)

    def without(self, *prefixes: str) -> 'Tensors':
        """The same file without the tensors whose names begin so."""
        kept = {name: key for name, key in self._names.items() if not name.startswith(prefixes)}
        return Tensors(self.path, self._source, kept)


def open_tensors(path: str | os.PathLike, *, ema: bool | None = None) -> Tensors:
    """The tensors of a `.safetensors` file (or index), or of a file of `torch.save` by any name.

    Args:
      path: the file.
      ema: where the file has both, take the moving average (True, None) or the weights (False).
        An average among the tensors themselves (`model_ema.`) is not what is meant.

    Raises:
      FileNotFoundError: no such file.
      ValueError: neither format, a damaged file, or one without tensors.
    """
    path = Path(path)
    if path.suffix == '.json' and '.bin.' in path.name:
        source: Mapping[str, np.ndarray] = _open_torch_index(path)
    elif path.suffix == '.json' or is_safetensors(path):
        source = open_safetensors(path)
    else:
        source = _state_dict(torch_files.load(path, ignore=_IGNORED), path, ema is not False)
    names = {name: name for name in source}
    for prefix in ('module.', '_orig_mod.'):
        if all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): key for name, key in names.items()}
    return Tensors(path, source, names)


def is_safetensors(path: Path) -> bool:
    """Whether it is a safetensors file rather than one of torch.

    The content decides, whatever the name; where it says nothing, the name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is known to be neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file; expected a checkpoint.')
    with path.open('rb') as file:
        head = file.read(32)
    # The length of a header, and the header, which is JSON.
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= path.stat().st_size:
        return True
    if stranger := strangers.by_beginning(head):
        raise ValueError(f'{path}: this is {stranger}.')
    return path.suffix == '.safetensors' and not head.startswith((b'PK\x03\x04', b'\x80'))


def recognise(tensors: Mapping[str, Any], path: Path) -> str:
    """The kind of checkpoint that has such tensors, one of `KINDS`.

    Raises:
      ValueError: none that is known.
    """
    for kind, marks in _MARKS:
        if all(mark in tensors for mark in marks):
            return kind
    if stranger := strangers.by_names(tensors):
        raise ValueError(f'{path}: this is {stranger}.')
    some = ', '.join(map(repr, sorted(tensors)[:3]))
    raise ValueError(
        f'{path}: not a checkpoint that is known here; its {len(tensors)} tensors are called '
        f'{some}, ...; expected those of diffusers, CompVis (latent or Stable Diffusion), ADM, '
        f'DDIM, DiT or PixArt. If it is one of them, name it as teacher.kind.'
    )


def check_kind(kind: str, tensors: Mapping[str, Any], path: Path) -> None:
    """Refuses a kind that has no such tensors.

    Raises:
      ValueError: naming the tensor that is missing, and what the file looks like.
    """
    marks = [marks for name, marks in _MARKS if name == kind]
    if any(all(mark in tensors for mark in some) for some in marks):
        return
    missing = next(mark for mark in marks[0] if mark not in tensors)
    try:
        looks = f'; its tensors are those of kind {recognise(tensors, path)!r}'
    except ValueError:
        looks = ''
    raise ValueError(f'{path}: teacher.kind={kind!r}, but there is no tensor {missing!r}{looks}.')


def _open_torch_index(path: Path) -> dict[str, np.ndarray]:
    """The shards that a `pytorch_model.bin.index.json` lists."""
    weight_map = read_weight_map(path)
    found: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        found |= _state_dict(
            torch_files.load(path.parent / shard, ignore=_IGNORED), path.parent / shard, True
        )
    if found.keys() != weight_map.keys():
        name = min(found.keys() ^ weight_map.keys())
        raise ValueError(f'{path}: the shards and their index disagree about {name!r}.')
    return found


def _state_dict(content: Any, path: Path, prefers_average: bool) -> dict[str, np.ndarray]:
    """The tensors by name within what `torch.save` was given."""
    if isinstance(content, list | tuple):
        # DDIM's training: [model, optimizer, epoch, step, average].
        found = [_tensors_of(entry) for entry in content]
        found = [tensors for tensors in found if any('.' in name for name in tensors)]
        if found:
            return found[-1 if prefers_average else 0]
    elif isinstance(content, Mapping):
        entries = (*_AVERAGES, *_WEIGHTS) if prefers_average else (*_WEIGHTS, *_AVERAGES)
        for entry in entries:
            if isinstance(content.get(entry), Mapping) and (tensors := _tensors_of(content[entry])):
                return tensors
        if tensors := _tensors_of(content):
            return tensors
    raise ValueError(
        f'{path}: no tensors in it; expected a state dict, or one under an entry such as '
        f'{_WEIGHTS[0]!r} or {_AVERAGES[0]!r}.'
    )


def _tensors_of(entry: Any) -> dict[str, np.ndarray]:
    if not isinstance(entry, Mapping):
        return {}
    return {
        name: array
        for name, array in entry.items()
        if isinstance(name, str) and isinstance(array, np.ndarray)
    }
