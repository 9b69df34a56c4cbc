"""Devices: the mesh of a run, and how batches and parameters are spread over it.

The only place that knows `jax.sharding`. Arrays are placed with explicit transfers and `jit`
partitions the computation (axis type Auto); one device is a mesh of one, not a special case.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# (pattern, spec): the whole path must match the regular expression; the spec has, per array
# axis, the name of a mesh axis or None, and may be shorter than the array's shape.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(data: int = -1) -> Mesh:
    """A mesh with the single axis 'data', over the first `data` devices of all processes.

    Args:
      data: number of devices, or -1 for all.

    Raises:
      ValueError: if there are fewer devices than asked for.
    """
    devices = jax.devices()
    if data != -1 and not 1 <= data <= len(devices):
        raise ValueError(f'data={data}: expected 1..{len(devices)} (the devices here), or -1.')
    devices = devices if data == -1 else devices[:data]
    # jax.make_mesh has made Explicit axes the default, under which a reshape of a split axis
    # is an error; the networks here leave the partitioning to the compiler.
    return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(mesh: Mesh, batch_size: int, *, name: str = 'batch_size') -> None:
    """Refuses a batch that does not divide over the devices of `mesh`.

    Args:
      mesh: the devices.
      batch_size: images per batch.
      name: what the error calls the number, e.g. 'sample.batch_size'.

    Raises:
      ValueError: naming the nearest sizes that would do.
    """
    devices = mesh.shape['data']
    below = batch_size - batch_size % devices
    if below != batch_size:
        near = f'{below} or {below + devices}' if below else f'{devices}'
        raise ValueError(
            f'{name}={batch_size} is not divisible by {devices} devices; try {near}, or fewer '
            f'devices with mesh.data.'
        )


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree`, their first axes split over the devices of `mesh`.

    With several processes, each passes the same whole batch and keeps its part.

    Args:
      mesh: the devices.
      tree: a pytree of arrays with at least one axis; typed keys may be among them.

    Raises:
      ValueError: if a first axis does not divide over the devices.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim == 0:
            raise ValueError(f'{_path_string(path)} is a scalar: only arrays can be split.')
        check_batch_size(mesh, leaf.shape[0])
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec('data')))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree`, whole on every device of `mesh`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree`, whole, as NumPy arrays in every process."""
    if jax.process_count() > 1:
        whole = NamedSharding(mesh, PartitionSpec())
        tree = jax.jit(lambda leaves: leaves, out_shardings=whole)(tree)
    return jax.device_get(tree)


def shardings(mesh: Mesh, tree: Any, rules: Rules) -> Any:
    """The sharding of every leaf of `tree`, by the first rule that matches its path.

    Paths are joined with '/': 'params/down_0/conv1/kernel'. The result has the structure of
    `tree`, for `jax.device_put`, `jax.jit` and abstract trees to restore a checkpoint into.

    Args:
      mesh: the devices.
      tree: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      rules: pairs of a regular expression and a spec; see `Rules`.

    Raises:
      ValueError: a path without a rule, a rule without a path (also one shadowed by an earlier
        rule), a spec longer than the array's shape, an axis that does not divide.
    """
    used = set()

    def sharding(path, leaf):
        path = _path_string(path)
        index = next((i for i, rule in enumerate(rules) if re.fullmatch(rule[0], path)), None)
        if index is None:
            raise ValueError(f"No sharding rule matches {path!r}; end the list with ('.*', ()).")
        used.add(index)
        _check_spec(mesh, path, leaf.shape, rules[index][1])
        return NamedSharding(mesh, PartitionSpec(*rules[index][1]))

    result = jax.tree_util.tree_map_with_path(sharding, tree)
    unused = [rule[0] for i, rule in enumerate(rules) if i not in used]
    if unused:
        paths = [_path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        raise ValueError(
            f'Sharding rules that match no path first: {unused}. Paths: {sorted(paths)[:5]}, ...'
        )
    return result


def _path_string(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _check_spec(mesh: Mesh, path: str, shape: tuple[int, ...], spec: Sequence[str | None]) -> None:
    if len(spec) > len(shape):
        raise ValueError(f'{path} has shape {shape}: the spec {spec} has too many axes.')
    for size, axis in zip(shape, spec, strict=False):
        if axis is None:
            continue
        if axis not in mesh.shape:
            raise ValueError(f'{path}: no mesh axis {axis!r}; expected {", ".join(mesh.shape)}.')
        if size % mesh.shape[axis]:
            raise ValueError(
                f'{path} has shape {shape}: {size} is not divisible by the {mesh.shape[axis]} '
                f'devices of mesh axis {axis!r}; leave that axis None.'
            )
