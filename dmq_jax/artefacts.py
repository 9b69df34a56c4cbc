"""Folders that a stage makes once: written whole or not at all, and tied to their options.

And the folder of a run around them, in which one process works at a time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import jax
import numpy as np

from dmq_jax.runtime import hosts, log

M = TypeVar('M')
T = TypeVar('T')

_LOGGER = logging.getLogger(__name__)
_MARK = 'complete.json'
_CLAIM = 'options.json'
_LOCK = '.lock'


def artefact(
    path: Path,
    options: Any,
    *,
    make: Callable[[], M],
    save: Callable[[Path, M], None],
    load: Callable[[Path], T],
) -> T:
    """What `load` reads from the folder `path`, made first if it is not complete.

    Of a run of several processes all call this: the first one decides whether the folder is
    complete, all make its content, the first one writes it, and then all load it.

    Args:
      path: the folder.
      options: JSON values on which its content depends; kept in it.
      make: computes the content.
      save: writes it into the folder it is given.
      load: reads it back.

    Raises:
      ValueError: the folder was made with other options; says which.
      Interrupted: the run was asked to stop, and the folder is not complete.
    """
    options = _plain(options)
    made_with = hosts.by_first(lambda: _read(path / _MARK))
    if made_with is not None:
        _check(path, made_with, options)
        return load(path)
    hosts.stop_if_asked()
    content = make()
    hosts.by_first(lambda: _write(path, options, lambda partial: save(partial, content)))
    return load(path)


def _read(mark: Path) -> Any:
    return json.loads(mark.read_text()) if mark.is_file() else None


def _write(path: Path, options: Any, save: Callable[[Path], None]) -> None:
    # Written beside its final name and renamed when complete: a kill leaves no half artefact.
    partial = path.with_name(path.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    log.write_json(partial / _MARK, options)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


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
    begun_with = hosts.by_first(lambda: _read(path / _CLAIM))
    if begun_with is not None:
        _check(path, begun_with, options)
    else:
        hosts.by_first(lambda: log.write_json(path / _CLAIM, options))


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Within it, this run is the only one in `folder`, which is made if absent.

    The operating system holds the lock for as long as the process lives, so nothing is left to be
    cleaned up after a kill; where the disk has no locks, a warning says so. Of a run of several
    processes, the first one holds it for all.

    Raises:
      ValueError: another run works there, and which; or the folder is not the same one for all
        processes of this run.
    """
    held: list[IO[str]] = []
    hosts.by_first(lambda: held.append(_lock(folder)))
    try:
        if not (folder / _LOCK).is_file():
            raise ValueError(
                f'process {jax.process_index()} does not see in {folder} what process 0 wrote '
                f'there: --workdir must lie on a disk that all hosts share.'
            )
        yield
    finally:
        for file in held:
            file.truncate(0)
            file.close()


def _lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / _LOCK, 'a+')  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or 'another process'
        file.close()
        raise ValueError(
            f'{folder} is in use by {holder}: wait for its end, or use another --workdir.'
        ) from None
    except OSError as error:
        # Some shared file systems (Lustre, unless mounted with flock) have no locks.
        _LOGGER.warning(
            '%s cannot be locked (%s): nothing keeps a second run out of it; start none.',
            folder, error.strerror,
        )  # fmt: skip
    file.truncate(0)
    file.write(f'process {os.getpid()} on {os.uname().nodename}')
    file.flush()
    return file


@contextlib.contextmanager
def turn(file: Path) -> Iterator[None]:
    """Within it no other run is at the same `file`; waits until that is so.

    Of a run of several processes all call this, and the first one waits for all. Where the disk has
    no locks nothing waits.

    Args:
      file: made if absent; it stays empty.
    """
    held: list[IO[str]] = []
    hosts.by_first(lambda: held.append(_wait(file)))
    try:
        yield
    finally:
        for lock in held:
            lock.close()


def _wait(file: Path) -> IO[str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = open(file, 'a')  # noqa: SIM115
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def is_complete(path: Path) -> bool:
    """Whether the artefact is there, whole."""
    return (path / _MARK).is_file()


def fingerprint(path: Path) -> str:
    """Names the content an artefact was made with, for the options of what is made from it."""
    return hashlib.sha256((path / _MARK).read_bytes()).hexdigest()[:16]


def digest(
    arrays: Mapping[str, Any],
    settings: Any = None,
    *,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> str:
    """Sixteen hex digits that name the content of some arrays and their settings.

    Args:
      arrays: by name.
      settings: JSON values.
      fetch: makes an array of an entry, one at a time.
    """
    result = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(fetch(arrays[name]))
        result.update(f'{name} {array.dtype} {array.shape}'.encode())
        # As bytes: a bfloat16 array has no buffer of its own.
        result.update(array.view(np.uint8).data)
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
