"""Devices: the mesh of a run, and how batches and parameters are spread over it.

The only place that knows `jax.sharding`. Arrays are placed with explicit transfers and `jit`
partitions the computation (axis type Auto); one device is a mesh of one, not a special case, and
neither are the devices of several processes: each passes the same whole arrays and keeps its part.

Axes of the mesh: 'data' splits batches; 'fsdp' splits batches and, between their uses, weights;
'tensor' splits the output channels of weights.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # what the first axis of a batch is split over


class Spread(NamedTuple):
    """A spec that the shape decides: what a mesh axis does not divide stays whole.

    Arrays of fewer than two axes stay whole too.

    Attributes:
      largest: mesh axis for the largest array axis that it divides.
      last: mesh axis for the last array axis, chosen first.
    """

    largest: str | None = None
    last: str | None = None

    def spec(self, shape: Sequence[int], mesh: Mesh) -> tuple[str | None, ...]:
        """The mesh axis of every array axis."""
        return self.split(shape, mesh.shape)

    def split(self, shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[str | None, ...]:
        """`spec` on a mesh of these sizes, which need not exist."""
        result: list[str | None] = [None] * len(shape)
        if len(shape) < 2:
            return tuple(result)
        if self.last is not None and shape[-1] % sizes[self.last] == 0:
            result[-1] = self.last
        if self.largest is not None:
            free = [
                i for i, size in enumerate(shape)
                if result[i] is None and size % sizes[self.largest] == 0
            ]  # fmt: skip
            if free:
                # The later of two equal ones: output channels, which no product sums over.
                result[max(free, key=lambda i: (shape[i], i))] = self.largest
        return tuple(result)


# (pattern, spec): the whole path must match the regular expression; the spec is a `Spread`, or
# has, per array axis, the name of a mesh axis, several, or None, and may be shorter than the shape.
Spec = Spread | tuple[str | tuple[str, ...] | None, ...]
Rules = Sequence[tuple[str, Spec]]

# Kernels, packed codes and embeddings are spread; vectors stay whole.
WEIGHT_RULES: Rules = (('.*', Spread(largest='fsdp', last='tensor')),)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh with the axes `AXES`, over the first devices of all processes.

    Args:
      data: number of parts of a batch; one of the three may be -1, for all devices left.
      fsdp: number of parts of weights and of batches; batches have data * fsdp parts.
      tensor: number of parts of the output channels of weights.

    Raises:
      ValueError: if there are fewer devices than asked for, or a process would have none of them.
    """
    devices = jax.devices()
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size != -1 and not 1 <= size <= len(devices):
            raise ValueError(
                f'{name}={size}: expected 1..{len(devices)} (the devices here), or -1.'
            )
    if len(free) > 1 or given > len(devices) or (free and len(devices) % given):
        shape = ', '.join(f'{name}={size}' for name, size in sizes.items())
        raise ValueError(
            f'{shape}: expected a product that {len(devices)} devices can make, with -1 once.'
        )
    for name in free:
        sizes[name] = len(devices) // given
    devices = devices[: math.prod(sizes.values())]
    idle = set(range(jax.process_count())) - {device.process_index for device in devices}
    if idle:
        raise ValueError(
            f'a mesh of {len(devices)} devices leaves process {min(idle)} without one; start '
            f'fewer processes, or set mesh.data=-1.'
        )
    # jax.make_mesh has made Explicit axes the default, under which a reshape of a split axis
    # is an error; the networks here leave the partitioning to the compiler.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def emulate(num_devices: int) -> bool:
    """Makes CPU devices, on which programs are compiled rather than run; whether there are enough.

    To be called before any device is used; afterwards those at hand must do.
    """
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        try:
            jax.config.update('jax_num_cpu_devices', num_devices)
            jax.config.update('jax_platforms', 'cpu')
        except RuntimeError:
            pass  # used already
    return len(jax.devices()) >= num_devices


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def check_batch_size(mesh: Mesh, batch_size: int, *, name: str = 'batch_size') -> None:
    """Refuses a batch that does not divide over the devices of `mesh`.

    Args:
      mesh: the devices.
      batch_size: images per batch.
      name: what the error calls the number, e.g. 'sample.batch_size'.

    Raises:
      ValueError: naming the nearest sizes that would do.
    """
    devices = batch_parts(mesh)
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
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return place(tree, jax.tree.map(lambda _: sharding, tree))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree`, whole on every device of `mesh`."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return place(tree, jax.tree.map(lambda _: sharding, tree))


def shard_weights(mesh: Mesh, tree: Any) -> Any:
    """The weights of `tree` on the devices of `mesh`, spread by `WEIGHT_RULES`."""
    if not jax.tree.leaves(tree):
        return tree
    return place(tree, shardings(mesh, tree, WEIGHT_RULES))


class WeightPlacer:
    """Places one weight after another as `shard_weights` would all of them, by its path.

    Of a weight that is still in a file, `indices` are the parts that lie on devices of this
    process, and `join` makes the weight of them: nobody needs the whole.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def __call__(self, path: str, array: np.ndarray) -> jax.Array:
        """The weight on its devices, of an array that every process has in whole."""
        return jax.block_until_ready(shard_weights(self.mesh, {path: array})[path])

    def indices(self, path: str, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
        """The parts that lie here, each once, however many devices have it."""
        found = self._sharding(path, shape).addressable_devices_indices_map(shape)
        return list({_bounds(index, shape): index for index in found.values()}.values())

    def join(self, path: str, shape: tuple[int, ...], parts: Sequence[np.ndarray]) -> jax.Array:
        """The weight on its devices, of the parts of `indices`."""
        wanted = self.indices(path, shape)
        held = {_bounds(index, shape): part for index, part in zip(wanted, parts, strict=True)}
        return jax.block_until_ready(
            jax.make_array_from_callback(
                shape, self._sharding(path, shape), lambda index: held[_bounds(index, shape)]
            )
        )

    def _sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        abstract = {path: jax.ShapeDtypeStruct(shape, np.float32)}
        return shardings(self.mesh, abstract, WEIGHT_RULES)[path]


def weight_placer(mesh: Mesh) -> WeightPlacer | None:
    """What places weights as they are read; None where weights are not spread.

    Then they need not leave the default device.
    """
    return None if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1 else WeightPlacer(mesh)


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The index as something that can be compared: where it begins and ends on each axis."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def place(tree: Any, placement: Any) -> Any:
    """The arrays of `tree`, each with its sharding.

    Args:
      tree: a pytree of arrays, the same in every process.
      placement: a tree of shardings of the same structure.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, placement)
    return jax.tree.map(_place_part, tree, placement)


def _place_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place_part(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Not device_put, which first compares the arrays of all processes.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(mesh: Mesh, tree: Any) -> Any:
    """The arrays of `tree`, whole, as NumPy arrays in every process."""
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves):
        tree = _gathering(NamedSharding(mesh, PartitionSpec()))(tree)
    return jax.device_get(tree)


@functools.lru_cache
def _gathering(whole: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda leaves: leaves, out_shardings=whole)


def local_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(indices, rows): those rows of a batch that this process has to look after.

    Every row is one of exactly one process, whatever lies on several devices.
    """
    if array.is_fully_addressable:
        return np.arange(len(array)), np.asarray(array)
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards = sorted(shards, key=lambda shard: shard.index[0].start or 0)
    indices = [np.arange(len(array))[shard.index[0]] for shard in shards]
    parts = [np.asarray(shard.data) for shard in shards]
    if not shards:
        return np.arange(0), np.zeros((0, *array.shape[1:]), array.dtype)
    return np.concatenate(indices), np.concatenate(parts)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Inside `jit`: weights that 'fsdp' splits, gathered for their use; 'tensor' keeps its parts.

    Without it the compiler may instead split sums over the parts of a weight, and send
    activations around, which are larger.
    """
    if mesh.shape['fsdp'] == 1:
        return tree
    spread = Spread(last='tensor')

    def gathered(leaf):
        spec = PartitionSpec(*spread.spec(leaf.shape, mesh))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(gathered, tree)


@dataclasses.dataclass(frozen=True)
class _OnWhole:
    mesh: Mesh
    function: Callable[..., Any]

    def __call__(self, weights: Any, *rest: Any) -> Any:
        return self.function(whole(self.mesh, weights), *rest)


def on_whole(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of weights placed by `shard_weights`, its first argument; see `whole`.

    The result is a value: two calls with equal arguments give equal functions.
    """
    return function if mesh.shape['fsdp'] == 1 else _OnWhole(mesh, function)


def abstract(mesh: Mesh, tree: Any, rules: Rules) -> Any:
    """Shapes like the arrays of `tree`, placed by `rules`: to compile for what is not there."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree, shardings(mesh, tree, rules),
    )  # fmt: skip


def constrain(tree: Any, placement: Any) -> Any:
    """Inside `jit`: the arrays of `tree`, computed to lie as `placement` says."""
    return jax.lax.with_sharding_constraint(tree, placement)


def split(mesh: Mesh, tree: Any) -> Any:
    """Inside `jit`: arrays whose first axis is the batch, split over the devices."""
    return constrain(tree, shardings(mesh, tree, (('.*', (BATCH,)),)))


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
        spec = rules[index][1]
        if isinstance(spec, Spread):
            spec = spec.spec(leaf.shape, mesh)
        _check_spec(mesh, path, leaf.shape, spec)
        return NamedSharding(mesh, PartitionSpec(*spec))

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


def _check_spec(mesh: Mesh, path: str, shape: tuple[int, ...], spec: Sequence[Any]) -> None:
    if len(spec) > len(shape):
        raise ValueError(f'{path} has shape {shape}: the spec {spec} has too many axes.')
    for size, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        for name in names:
            if name not in mesh.shape:
                known = ', '.join(mesh.shape)
                raise ValueError(f'{path}: no mesh axis {name!r}; expected {known}.')
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f'{path} has shape {shape}: {size} is not divisible by the {parts} devices of '
                f'mesh axis {", ".join(map(repr, names))}; leave that axis None.'
            )
