"""Folders that a stage makes once: written whole or not at all, and tied to their options."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dmq_jax.runtime import log

T = TypeVar('T')

_MARK = 'complete.json'


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
    options = json.loads(json.dumps(options, sort_keys=True, default=str))
    if is_complete(path):
        made_with = json.loads((path / _MARK).read_text())
        if made_with != options:
            raise ValueError(
                f'{path} was made with other options: {_difference(made_with, options)}. Use '
                f'another --workdir, or delete that folder and what was made from it.'
            )
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


def is_complete(path: Path) -> bool:
    """Whether the artefact is there, whole."""
    return (path / _MARK).is_file()


def fingerprint(path: Path) -> str:
    """Names the content an artefact was made with, for the options of what is made from it."""
    return hashlib.sha256((path / _MARK).read_bytes()).hexdigest()[:16]


def _difference(old: Any, new: Any, where: str = '') -> str:
    """The first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                inner = f'{where}.{name}' if where else name
                return _difference(old.get(name), new.get(name), inner)
    return f'{where} was {old!r}, now {new!r}'
