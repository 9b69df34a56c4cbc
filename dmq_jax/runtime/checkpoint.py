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
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, step: int, tree: Any) -> None:
        """Stores `tree` as checkpoint `step`; writing goes on in the background.

        The values are copied before this returns, so the arrays may be donated or changed.

        Args:
          step: optimizer steps done; larger than that of any earlier checkpoint.
          tree: a pytree of arrays, typed keys and Python numbers.

        Raises:
          ValueError: if `step` is not larger than the latest.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f'step={step}: checkpoint {latest} exists; expected a later step.')
        self._manager.save(step, args=ocp.args.StandardSave(_without_keys(tree)), force=True)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """Checkpoint `step`, with the structure, dtypes and placement of `like`.

        Args:
          step: one that `latest` returned.
          like: the tree saved, or `jax.ShapeDtypeStruct`s; their shardings need not be those
            the checkpoint was saved with.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: its structure or shapes differ from `like`.
        """
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f'No checkpoint {step} in {self._path}; there are {self._manager.all_steps()}.'
            )
        raw = jax.tree.map(_abstract, _without_keys(like))
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(raw))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f'Checkpoint {step} in {self._path} does not fit this configuration; use another '
                f'--workdir or delete that folder. orbax says: {error}'
            ) from error
        _check_shapes(restored, raw, self._path / str(step))
        return _with_keys(restored, like)

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes nested dicts of arrays to the folder `path`, replacing what was there.

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
    with ocp.StandardCheckpointer() as checkpointer:
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
