"""Commands that run beside one another, each on its part of this machine."""

import collections
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmq_jax.runtime import hosts

_LOOK_EVERY_S = 0.1
# Of Linux, <sys/prctl.h>: the signal a process gets when the one that started it ends.
_PR_SET_PDEATHSIG = 1
_PARENT = 'DMQ_STARTED_BY'


class Share(NamedTuple):
    """A part of this machine.

    Attributes:
      cores: that a command may use.
      gpus: as CUDA_VISIBLE_DEVICES names them; None: no GPU is split.
    """

    cores: frozenset[int]
    gpus: str | None


class Command(NamedTuple):
    """What is to be run.

    Attributes:
      name: of its result.
      arguments: the program and what it is told.
      log: file that receives all it prints, after what is in it.
    """

    name: str
    arguments: Sequence[str]
    log: Path


def split(count: int, environ: Mapping[str, str]) -> list[Share]:
    """The machine in `count` parts: its cores, and its NVIDIA GPUs where jax may use them.

    Args:
      count: of the parts.
      environ: of this process.

    Raises:
      ValueError: fewer cores or GPUs than parts.
    """
    cores = sorted(_cores())
    if not 1 <= count <= len(cores):
        raise ValueError(f'{count} workers: expected 1 to {len(cores)}, the cores of this machine.')
    gpus = _gpus(environ)
    if gpus and count > len(gpus):
        raise ValueError(f'{count} workers: expected {len(gpus)} at most, a GPU for each.')
    return [
        Share(frozenset(map(int, some)), ','.join(devices) if gpus else None)
        for some, devices in zip(
            np.array_split(cores, count), np.array_split(gpus, count), strict=True
        )
    ]


def run(commands: Sequence[Command], shares: Sequence[Share]) -> Iterator[tuple[str, int]]:
    """Runs all commands, as many at a time as there are shares.

    A request to stop this process (`hosts.stop_requested`) is handed on to those that run, and
    none is begun after it. What leaves the loop early ends them at once.

    Args:
      commands: in the order in which they begin.
      shares: of the machine.

    Yields:
      The name and the exit status of each command that has ended; that of a signal as a shell
      tells it, 128 and its number.
    """
    waiting, free = collections.deque(commands), list(shares)
    running: list[tuple[Command, Share, subprocess.Popen]] = []
    asked = False
    try:
        while running or (waiting and not asked):
            if not asked and hosts.stop_requested():
                asked = True
                for _, _, process in running:
                    process.send_signal(signal.SIGTERM)
            while waiting and free and not asked:
                command, share = waiting.popleft(), free.pop(0)
                running.append((command, share, _start(command, share)))
            ended = [entry for entry in running if entry[2].poll() is not None]
            for entry in ended:
                command, share, process = entry
                running.remove(entry)
                free.append(share)
                status = process.returncode
                yield command.name, status if status >= 0 else 128 - status
            if not ended:
                time.sleep(_LOOK_EVERY_S)
    finally:
        for _, _, process in running:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """Asks this process to stop when the one that has started it with `run` ends without a word.

    For the start of a command; elsewhere, and where Linux is not, it does nothing.
    """
    if os.environ.get(_PARENT) != str(os.getppid()):
        return
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    except (AttributeError, TypeError):
        return


def _start(command: Command, share: Share) -> subprocess.Popen:
    environ = {**os.environ, _PARENT: str(os.getpid())}
    if share.gpus is not None:
        environ['CUDA_VISIBLE_DEVICES'] = share.gpus
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log, 'ab') as log:
        process = subprocess.Popen(
            command.arguments, env=environ, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    # Before jax counts the cores for its threads, which an interpreter that starts does not.
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(process.pid, share.cores)
    return process


def _cores() -> set[int]:
    if hasattr(os, 'sched_getaffinity'):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _gpus(environ: Mapping[str, str]) -> list[str]:
    if environ.get('JAX_PLATFORMS') == 'cpu':
        return []
    if environ.get('CUDA_VISIBLE_DEVICES'):
        return environ['CUDA_VISIBLE_DEVICES'].split(',')
    try:
        listed = subprocess.run(
            ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()
