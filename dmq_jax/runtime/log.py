"""Records of a run: metrics.jsonl, TensorBoard events, JSON files, versions and git revision.

Only process 0 writes; in the others every writer is silent.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

METRICS_FILE = 'metrics.jsonl'


class MetricWriter:
    """Scalars to metrics.jsonl (one JSON object per line) and, with the images, to TensorBoard.

    Each line reaches the disk as it is written, so a killed run loses at most the last one. Made
    by `make_writer`; also a context manager that closes itself.

    Args:
      workdir: where metrics.jsonl goes; None writes nothing at all.
      events: receives the same calls, for TensorBoard; None for none.
    """

    def __init__(self, workdir: Path | None, events: Any = None):
        self._events = events
        self._lines = None
        if workdir is not None:
            _cut_unfinished_line(workdir / METRICS_FILE)
            self._lines = open(workdir / METRICS_FILE, 'a', encoding='utf-8')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends named numbers.

        Args:
          step: optimizer steps done.
          scalars: names to numbers or arrays of one element.
        """
        values = {name: np.asarray(value).item() for name, value in scalars.items()}
        if self._lines is not None:
            self._lines.write(json.dumps({'step': int(step), **values}) + '\n')
            self._lines.flush()
        if self._events is not None:
            self._events.write_scalars(int(step), values)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows named pictures in TensorBoard.

        Args:
          step: optimizer steps done.
          images: names to uint8 [H, W, C], C 1 or 3.

        Raises:
          ValueError: for another dtype or shape.
        """
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
                raise ValueError(
                    f'image {name!r} is {image.dtype} {image.shape}: expected uint8 [H, W, 1 or 3].'
                )
        if self._events is not None:
            self._events.write_images(int(step), images)

    def close(self) -> None:
        """Finishes the files; nothing can be written afterwards."""
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()


def make_writer(workdir: str | os.PathLike) -> MetricWriter:
    """The writer of a run: clu's events if TensorFlow is there, tensorboardX's otherwise.

    A resumed run appends to what is in `workdir`.

    Args:
      workdir: folder of the run; made if absent.
    """
    if jax.process_index() != 0:
        return MetricWriter(None)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with_clu = all(map(importlib.util.find_spec, ('tensorflow', 'clu')))
    events = (_CluEvents if with_clu else _TensorboardXEvents)(workdir / 'tensorboard')
    return MetricWriter(workdir, events)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order of step.

    A run that was killed and went on from a checkpoint has written some steps twice; the later
    values of a name count. A line cut short by a kill is left out.

    Args:
      workdir: folder of the run; without metrics.jsonl the result is empty.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
        if line.endswith('\n'):
            values = json.loads(line)
            by_step.setdefault(values['step'], {}).update(values)
    return [by_step[step] for step in sorted(by_step)]


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as JSON so that `path` holds the old or the new text, never part of one.

    Args:
      path: the file; its folder is made if absent.
      obj: JSON values, and among them dataclasses, NumPy numbers, arrays, and paths.
    """
    write_text(path, json.dumps(obj, indent=2, default=_to_json) + '\n')


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as `write_json` does: process 0 alone, the old or the new text, never a part.

    Args:
      path: the file; its folder is made if absent.
      text: its content.
    """
    if jax.process_index() != 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, since os.replace is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with open(handle, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def git_revision() -> str:
    """Commit of this source tree, with '-dirty' if tracked files differ; 'unknown' outside git."""
    folder = Path(__file__).parent

    def git(*arguments):
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside a repository that does not track it.
        git('ls-files', '--error-unmatch', Path(__file__).name)
        revision = git('rev-parse', 'HEAD')
        dirty = git('status', '--porcelain', '--untracked-files=no')
    except (subprocess.CalledProcessError, OSError):
        return 'unknown'
    return revision + ('-dirty' if dirty else '')


def versions() -> dict[str, str]:
    """Versions that decide the numbers of a run; 'source' for a package that is not installed."""
    packages = {
        'jax': 'jax',
        'jaxlib': 'jaxlib',
        'flax': 'flax',
        'optax': 'optax',
        'orbax': 'orbax-checkpoint',
        'numpy': 'numpy',
        'dmq_jax': 'dmq_jax',
    }
    result = {'python': platform.python_version()}
    for name, distribution in packages.items():
        try:
            result[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            result[name] = 'source'
    return result


class _TensorboardXEvents:
    def __init__(self, folder: Path):
        # To take its tensors too, tensorboardX imports PyTorch: for two seconds and 200 MB.
        with _unseen('torch'):
            import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(folder))

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_images(self, step, images):
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats='HWC')
        self._writer.flush()

    def close(self):
        self._writer.close()


@contextlib.contextmanager
def _unseen(module: str) -> Iterator[None]:
    """Within it, importing a module that nobody has imported fails as if it were not there."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # what the import system documents for this
    try:
        yield
    finally:
        del sys.modules[module]


class _CluEvents:
    def __init__(self, folder: Path):
        from clu import metric_writers

        self._writer = metric_writers.SummaryWriter(str(folder))

    def write_scalars(self, step, scalars):
        self._writer.write_scalars(step, scalars)
        self._writer.flush()

    def write_images(self, step, images):
        self._writer.write_images(step, {name: image[None] for name, image in images.items()})
        self._writer.flush()

    def close(self):
        self._writer.close()


def _cut_unfinished_line(path: Path) -> None:
    """Removes what a killed process wrote after its last newline."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b'\n') + 1)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f'{type(value).__name__} has no JSON form.')
