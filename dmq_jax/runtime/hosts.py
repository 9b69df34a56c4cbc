"""Processes: how those of one run find one another, agree, and end together.

Every process of a run executes the same program. The first one, process 0, alone prints and writes
what all have computed, and decides whatever is read from the disk; `by_first` is how. One process
is a run of one, without any of this.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

T = TypeVar('T')

# What launchers take for "run me again" (EX_TEMPFAIL of sysexits.h): interrupted, all saved.
REQUEUE = 75
# Nothing is wrong here, but another process is gone (EX_UNAVAILABLE): its status says more.
LOST = 69
# After this long without a sign of life of one process the others stop. One that fails waits as
# long for the others to say goodbye before it ends: nobody lives on for more than twice this.
HEARTBEAT_TIMEOUT_S = 30

_AUTO = 'auto'
_VARIABLES = {
    'coordinator': 'JAX_COORDINATOR_ADDRESS',
    'num_processes': 'JAX_NUM_PROCESSES',
    'process_id': 'JAX_PROCESS_ID',
}


class Cluster(NamedTuple):
    """What `jax.distributed.initialize` must be told.

    Attributes:
      coordinator: host:port of process 0; None where jax reads it from the launcher's variables.
      num_processes: of the run; None likewise.
      process_id: of this process, 0..num_processes-1; None likewise.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class _Launcher(NamedTuple):
    """The variables by which a launcher tells a process its place."""

    name: str
    count: str
    index: str
    needed: tuple[str, ...]  # for jax to find the coordinator


_LAUNCHERS = (
    _Launcher(
        'Slurm', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID',
        ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_LOCALID',
         'SLURM_STEP_NUM_NODES'),
    ),
    # Only Open MPI 4 says where its first process runs.
    _Launcher(
        'Open MPI', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK',
        ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_LOCAL_RANK'),
    ),
)  # fmt: skip


def find_cluster(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """The processes this one belongs to; None if it is alone.

    What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    and what is not there either from the variables of Slurm (`srun`), Open MPI (`mpirun`) or a
    slice of TPU hosts.

    Args:
      environ: environment variables.
      coordinator: host:port of process 0; 'auto' leaves all three to jax, which asks the machine.
      num_processes: of the run.
      process_id: of this process.

    Raises:
      ValueError: something is missing; names the option and the variable.
    """
    given = {
        'coordinator': coordinator or environ.get(_VARIABLES['coordinator']),
        'num_processes': _number(environ, _VARIABLES['num_processes'], num_processes),
        'process_id': _number(environ, _VARIABLES['process_id'], process_id),
    }
    if given['coordinator'] == _AUTO:
        return Cluster()
    launcher = next((x for x in _LAUNCHERS if (_number(environ, x.count) or 1) > 1), None)
    if any(value is not None for value in given.values()):
        if launcher is not None:
            for name, variable in ('num_processes', launcher.count), ('process_id', launcher.index):
                if given[name] is None:
                    given[name] = _number(environ, variable)
        return _explicit(given)
    if launcher is not None:
        missing = [v for v in (launcher.index, *launcher.needed) if v not in environ]
        if missing:
            raise ValueError(
                f'{launcher.name} started {environ[launcher.count]} processes but did not set '
                f'{", ".join(missing)}: give --coordinator=HOST:PORT of the first process, or set '
                f'{_VARIABLES["coordinator"]}.'
            )
        return Cluster()
    if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
        if 'TPU_WORKER_ID' not in environ:
            raise ValueError(
                'TPU_WORKER_HOSTNAMES names several hosts, but TPU_WORKER_ID is not set: set it '
                'to the place of this host among them.'
            )
        return Cluster()
    return None


def _number(environ: Mapping[str, str], variable: str, given: int | None = None) -> int | None:
    if given is not None or variable not in environ:
        return given
    if not environ[variable].isdecimal():
        raise ValueError(f'{variable}={environ[variable]!r}: expected a number.')
    return int(environ[variable])


def _explicit(given: dict[str, Any]) -> Cluster | None:
    if given['num_processes'] == 1 and given['process_id'] in (None, 0):
        return None
    for name, value in given.items():
        if value is None:
            raise ValueError(
                f'--{name} is missing: give it, or set {_VARIABLES[name]}; a run of several '
                f'processes needs {", ".join(f"--{n}" for n in _VARIABLES)}.'
            )
    address, _, port = given['coordinator'].rpartition(':')
    if not address or not port.isdecimal():
        raise ValueError(f'--coordinator={given["coordinator"]!r}: expected HOST:PORT.')
    if not 0 <= given['process_id'] < given['num_processes']:
        raise ValueError(
            f'--process_id={given["process_id"]}: expected 0..{given["num_processes"] - 1}, since '
            f'--num_processes={given["num_processes"]}.'
        )
    return Cluster(**given)


def join(cluster: Cluster | None) -> None:
    """Makes this process part of its run; to be called before any device is used.

    From here on a SIGTERM asks the run to stop at its next safe point (`stop_if_asked`), and of
    several processes only the first one has a standard output.

    Args:
      cluster: from `find_cluster`.

    Raises:
      ValueError: the processes do not find one another in five minutes.
    """
    if cluster is None:
        signal.signal(signal.SIGTERM, _note_signal)
        return
    try:
        jax.distributed.initialize(
            *cluster,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f'process {cluster.process_id} of {cluster.num_processes} did not find the others at '
            f'{cluster.coordinator}: is process 0 running there, and is the port open? {error}'
        ) from error
    # The first contact, while all are here: gloo waits 30 s for it, and compiling what would be the
    # first otherwise may take one process longer than that.
    wait_for_all()
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def by_first(action: Callable[[], T]) -> T:
    """What `action`, called by the first process alone, returns; a barrier for all.

    Args:
      action: returns a JSON value, the same in every process after this.

    Raises:
      ValueError: in the others, if `action` fails in the first, which raises its own error.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if is_first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    failure, result = _broadcast([None if error is None else str(error), result])
    if error is not None:
        raise error
    if failure is not None:
        raise ValueError(f'{failure} (said by process 0)')
    return result


def wait_for_all() -> None:
    """Returns once every process has come here."""
    by_first(lambda: None)


def all_agree(is_so: bool) -> bool:
    """Whether it is so in every process; a barrier for all."""
    if jax.process_count() == 1:
        return is_so
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(is_so))))


def gather(arrays: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    """The arrays of every process, in the order of the processes; a call that all make.

    Args:
      arrays: of one shape and dtype in all processes, any dtype: they travel as bytes.
    """
    if jax.process_count() == 1:
        return [arrays]
    from jax.experimental import multihost_utils

    sent = tuple(np.frombuffer(array.tobytes(), np.uint8) for array in arrays)  # C order
    found = [np.asarray(part) for part in multihost_utils.process_allgather(sent)]
    return [
        tuple(
            np.frombuffer(part[process].tobytes(), array.dtype).reshape(array.shape)
            for part, array in zip(found, arrays, strict=True)
        )
        for process in range(jax.process_count())
    ]  # fmt: skip


def _broadcast(value: Any) -> Any:
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if is_first() else b''
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    # Few lengths, few programs.
    buffer = np.zeros(max(256, 1 << (length - 1).bit_length()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))[:length]))


# What back ends say when a process they talk to is gone: gloo, NCCL, and jax's own coordination.
_SIGNS_OF_LOSS = (
    'Gloo', 'Connection reset by peer', 'Connection closed by peer', 'remote process exited',
    'coordination service', 'CoordinationService', 'heartbeat',
)  # fmt: skip


def is_loss(error: BaseException) -> bool:
    """Whether an error comes of the end of another process of this run."""
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return (
        is_of_jax and jax.process_count() > 1 and any(sign in str(error) for sign in _SIGNS_OF_LOSS)
    )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within it, the loss of another process ends this one at once, with a message and `LOST`.

    Where a back end waits for the lost process instead of failing, jax ends this one after
    `HEARTBEAT_TIMEOUT_S`, with a message of its own.
    """
    try:
        yield
    except Exception as error:
        if not is_loss(error):
            raise
        print(
            f'Error: process {jax.process_index()} of {jax.process_count()}: another process of '
            f'this run has ended or cannot be reached; see what it says. What was saved is kept: '
            f'the same command goes on from there (exit {LOST}). {str(error).splitlines()[0]}',
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        # An ordinary exit would wait for the lost one to say goodbye.
        os._exit(LOST)


class Interrupted(SystemExit):
    """The run was asked to stop and has saved what it had; the process exits with `REQUEUE`."""

    def __init__(self):
        super().__init__(REQUEUE)


_signalled: list[int] = []
_sync_points = itertools.count()


def _note_signal(number: int, frame: Any) -> None:
    del frame
    _signalled.append(number)
    # Whoever asks twice does not want to wait.
    signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether the run must stop here, the same answer in every process.

    All processes ask equally often: a signal to one of them makes all stop at the same call.
    """
    if jax.process_count() == 1:
        return bool(_signalled)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_sync_points))


def stop_if_asked() -> None:
    """Ends the run here if it was asked to stop; for places where nothing is left to be saved.

    Raises:
      Interrupted: it was.
    """
    if stop_requested():
        raise interrupted()


def interrupted() -> Interrupted:
    """Says that the run stops, and gives the exception to raise."""
    if is_first():
        print(
            f'asked to stop: all is saved, the same command goes on from here (exit {REQUEUE}).',
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return Interrupted()
