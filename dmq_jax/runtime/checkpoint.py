"""Checkpoints on disk, through orbax.

A checkpoint appears under its final name only when it is complete, so a process killed at any
moment leaves the earlier ones intact and restorable. Typed random keys are stored as their raw
integers and come back typed.
"""

import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dmq_jax.runtime import hosts

_LOGGER = logging.getLogger(__name__)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # `hosts.stop_requested` is who asks; a second count of steps would disturb its own.
        return False


class Checkpoints:
    """The numbered checkpoints of one training run; also a context manager that closes itself.

    Args:
      path: folder of the checkpoints; made if absent.
      max_to_keep: how many are kept; older ones are deleted once a newer one is complete.
    """

    def __init__(self, path: str | os.PathLike, max_to_keep: int = 2):
        _quieten_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, create=True, cleanup_tmp_directories=True
        )
        self._path = Path(path).absolute()
        self._warn_of_unfinished()
        self._manager = _Manager(self._path, options=options)
        # The manager's own restore waits for all processes, also for one that has failed.
        self._reader = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
            multiprocessing_options=_alone(),
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # What is being written cannot be finished without a process that is gone.
        if error is None or not hosts.is_loss(error):
            self.close()

    def _warn_of_unfinished(self) -> None:
        # Now, since the manager deletes them.
        if jax.process_index() == 0 and self._path.is_dir():
            for folder in sorted(self._path.glob('*.orbax-checkpoint-tmp*')):
                step = folder.name.partition('.')[0]
                _LOGGER.warning(
                    'checkpoint %s in %s is half written and is skipped.', step, self._path
                )

    def save(self, step: int, tree: Any) -> None:
        """Stores `tree` as checkpoint `step`; writing goes on in the background.

        The values are copied before this returns, so the arrays may be donated or changed. Of
        several processes all call this, each writes the parts of arrays that it holds, and the
        first one what is not spread over all of them.

        Args:
          step: optimizer steps done; larger than that of any earlier checkpoint.
          tree: a pytree of arrays, typed keys and Python numbers.

        Raises:
          ValueError: if `step` is not larger than the latest.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f'step={step}: checkpoint {latest} exists; expected a later step.')
        tree = jax.tree.map(_to_host, _without_keys(tree))
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """Checkpoint `step`, with the structure, dtypes and placement of `like`.

        Args:
          step: one that `latest` returned.
          like: the tree saved, or `jax.ShapeDtypeStruct`s; their shardings need not be those
            the checkpoint was saved with.

        Every process reads its parts by itself, and may fail where others do not.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: its structure or shapes differ from `like`.
        """
        if step not in self._manager.all_steps():
            # A shared disk may show a folder to one host later than to another.
            self._manager.reload()
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f'No checkpoint {step} in {self._path}; there are {self._manager.all_steps()}.'
            )
        raw = jax.tree.map(_abstract, jax.tree.map(_to_host, _without_keys(like)))
        try:
            restored = self._reader.restore(self._folder(step), args=ocp.args.StandardRestore(raw))
        except Exception as error:
            # Of an array that it cannot read orbax says so in a bare Exception.
            if type(error) is not Exception and not isinstance(error, ValueError | KeyError):
                raise
            raise ValueError(
                f'Checkpoint {step} in {self._path} does not fit this configuration; use another '
                f'--workdir or delete that folder. orbax says: {error}'
            ) from error
        _check_shapes(restored, raw, self._path / str(step))
        return _with_keys(jax.tree.map(_to_device, restored, like), like)

    def _folder(self, step: int) -> Path:
        return self._path / str(step) / 'default'  # where the manager puts the one thing it saves

    def restore_latest(self, like: Any) -> Any:
        """The newest checkpoint that can be read, see `restore`; None if there is none.

        One that fits but is damaged is deleted with a warning, and an older one taken; it is
        damaged for all processes if one of them cannot read its parts.

        Raises:
          ValueError: its structure or shapes differ from `like`, or all of several are damaged.
        """
        while (step := hosts.by_first(self.latest)) is not None:
            restored, error = None, None
            try:
                restored = self.restore(step, like)
            except (ValueError, FileNotFoundError) as raised:
                error = raised
            if hosts.all_agree(error is None):
                return restored
            error = error or ValueError('Another process could not read its parts of it.')
            is_other, is_last = hosts.by_first(
                lambda step=step: (self._is_other(step, like), len(self._manager.all_steps()) == 1)
            )
            if is_other:
                raise error
            if is_last:
                raise ValueError(
                    f'Checkpoint {step} in {self._path} is damaged, and there is no other; '
                    f'delete that folder to begin anew. {error}'
                ) from error
            if hosts.is_first():
                _LOGGER.warning('checkpoint %s in %s is damaged and is deleted.', step, self._path)
            self._manager.delete(step)
        return None

    def _is_other(self, step: int, like: Any) -> bool:
        """Whether a checkpoint can be read well enough to see that it is not one of `like`."""
        try:
            saved = self._reader.metadata(self._folder(step)).item_metadata
        except (ValueError, KeyError, AttributeError, OSError):
            return False
        is_read = saved is not None
        return is_read and _names_and_shapes(saved) != _names_and_shapes(_without_keys(like))

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes nested dicts of arrays to the folder `path`, replacing what was there.

    Of several processes, one calls this.

    Args:
      path: a folder, for this alone.
      tree: nested dicts with string keys; leaves are arrays or numbers, not typed keys.

    Raises:
      ValueError: if `tree` holds anything but dicts and arrays, since `load_tree` could not
        give it back.
    """
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        plain = all(isinstance(k, jax.tree_util.DictKey) and type(k.key) is str for k in key_path)
        if not plain or not key_path or _is_key(leaf):
            where = jax.tree_util.keystr(key_path)
            raise ValueError(f'tree{where}: expected nested dicts (string keys) of plain arrays.')
    _quieten_orbax()
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        checkpointer.save(Path(path).absolute(), tree, force=True)


def load_tree(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_tree` wrote, as nested dicts of NumPy arrays.

    Raises:
      FileNotFoundError: if there is no complete tree at `path`.
    """
    _quieten_orbax()
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: expected a folder written by an earlier stage.')
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return checkpointer.restore(path, restore_args=to_numpy)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Makes orbax wait for no other process."""
    this = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f'process_{this}'
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    """`tree` with typed keys as their raw integers; abstract leaves stay abstract."""

    def raw(leaf):
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.Array):
            return jax.random.key_data(leaf)
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(raw, tree)


def _with_keys(tree: Any, like: Any) -> Any:
    """The inverse of `_without_keys`, told by `like` which leaves were keys."""

    def typed(leaf, like_leaf):
        if not _is_key(like_leaf):
            return leaf
        # An abstract key does not reveal its generator, a traced one does.
        found = []
        jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like_leaf)
        return jax.random.wrap_key_data(leaf, impl=found[0])

    return jax.tree.map(typed, tree, like)


def _names_and_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): tuple(getattr(leaf, 'shape', ()))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _to_host(leaf: Any) -> Any:
    """What orbax takes for an array that is the same in each of several processes: NumPy."""
    if jax.process_count() == 1:
        return leaf
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
        return np.asarray(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return np.zeros(leaf.shape, leaf.dtype)
    return leaf


def _to_device(leaf: Any, like: Any) -> Any:
    """The inverse of `_to_host`."""
    is_array = isinstance(like, jax.Array | jax.ShapeDtypeStruct)
    return jnp.asarray(leaf) if is_array and isinstance(leaf, np.ndarray) else leaf


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _check_shapes(restored: Any, like: Any, path: Path) -> None:
    for (key_path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(like), strict=True
    ):
        if np.shape(leaf) != np.shape(expected):
            where = jax.tree_util.keystr(key_path, simple=True, separator='/')
            raise ValueError(
                f'{path}: {where} has shape {np.shape(leaf)}, expected {np.shape(expected)}; '
                f'the checkpoint belongs to another configuration: use another --workdir.'
            )


class _DropOrbaxChatter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or 'orbax' not in record.pathname


def _quieten_orbax() -> None:
    """Hides orbax's messages below errors; it logs dozens of lines per checkpoint to absl."""
    logger = logging.getLogger('absl')
    if not any(isinstance(f, _DropOrbaxChatter) for f in logger.filters):
        logger.addFilter(_DropOrbaxChatter())
