"""Folders that a stage makes once: written whole or not at all, and tied to their options.

And the folder of a run around them, in which one process works at a time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from dmq_jax.runtime import log

T = TypeVar('T')

_MARK = 'complete.json'
_CLAIM = 'options.json'
_LOCK = '.lock'


def artefact(
    path: Path, options: Any, make: Callable[[Path], None], load: Callable[[Path], T]
) -> T:
    """What `load` reads from the folder `path`, made first if it is not complete.

    Args:
      path: the folder.
      options: JSON values on which its content depends; kept in it.
      make: writes everything into the folder it is given.
      load: reads it back.

    Raises:
      ValueError: the folder was made with other options; says which.
    """
    options = _plain(options)
    if is_complete(path):
        _check(path, json.loads((path / _MARK).read_text()), options)
        return load(path)
    # Made beside its final name and renamed when complete: a kill leaves no half artefact.
    partial = path.with_name(path.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    make(partial)
    log.write_json(partial / _MARK, options)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    return load(path)


def claim(path: Path, options: Any) -> None:
    """Ties a folder that fills up over time, such as one of checkpoints, to its options.

    Call it before anything in the folder is read or written.

    Args:
      path: the folder, made if absent.
      options: JSON values on which its content depends; kept in it.

    Raises:
      ValueError: the folder was begun with other options; says which.
    """
    options = _plain(options)
    mark = path / _CLAIM
    if mark.is_file():
        _check(path, json.loads(mark.read_text()), options)
    else:
        log.write_json(mark, options)


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Within it, this run is the only one in `folder`, which is made if absent.

    The operating system holds the lock for as long as the process lives, so nothing is left to be
    cleaned up after a kill. Of a run of several processes, the first one holds it for all.

    Raises:
      ValueError: another process works there; says which.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, 'a+') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or 'another process'
            raise ValueError(
                f'{folder} is in use by {holder}: wait for its end, or use another --workdir.'
            ) from None
        file.truncate(0)
        file.write(f'process {os.getpid()} on {os.uname().nodename}')
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def is_complete(path: Path) -> bool:
    """Whether the artefact is there, whole."""
    return (path / _MARK).is_file()


def fingerprint(path: Path) -> str:
    """Names the content an artefact was made with, for the options of what is made from it."""
    return hashlib.sha256((path / _MARK).read_bytes()).hexdigest()[:16]


def digest(arrays: Mapping[str, Any], settings: Any = None) -> str:
    """Sixteen hex digits that name the content of some arrays and their settings.

    Args:
      arrays: by name.
      settings: JSON values.
    """
    result = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        result.update(f'{name} {array.dtype} {array.shape}'.encode())
        result.update(array.data)
    return result.hexdigest()[:16]


def _plain(options: Any) -> Any:
    """`options` as they come back from a JSON file."""
    return json.loads(json.dumps(options, sort_keys=True, default=str))


def _check(path: Path, made_with: Any, options: Any) -> None:
    if made_with != options:
        raise ValueError(
            f'{path} was made with other options: {_difference(made_with, options)}. Use '
            f'another --workdir, or delete that folder and what was made from it.'
        )


def _difference(old: Any, new: Any, where: str = '') -> str:
    """The first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            values = [side.get(name, 'absent') for side in (old, new)]
            if values[0] != values[1]:
                return _difference(*values, f'{where}.{name}' if where else name)
    return f'{where} was {old!r}, now {new!r}'
