"""What a step costs each device of a mesh: operations, bytes, memory, traffic, time.

Two ways to know. The *model* traces the very functions that a run compiles, with shapes instead of
arrays, and counts; it serves networks of any size and meshes of any number of devices. The
*compiled* numbers are XLA's own of the partitioned program, for networks small enough to compile
here; a step of fine-tuning, which a run compiles as two programs, counts as one. The model says:

* a device computes its part of the batch, `batch_size / (data * fsdp)`, with whole weights; its
  products have `1 / tensor` of their output channels;
* products, gathers and loops read operands and write results; what is elementwise is fused into
  its consumer, and lies in memory only where a product reads it;
* memory is what a device keeps (weights and state by the rules of the run) and the most that lives
  at once of one step, of which XLA for CPU has taken up to twice as much; weights split over
  'fsdp' are gathered whole for their use;
* fsdp gathers every split weight once per program, which is one step of fine-tuning but all steps
  of a batch of images; gradients are reduced over the parts of the batch once per step; 'tensor'
  gathers the output of each product;
* time is the roofline: operations or bytes of memory, whichever takes longer, and traffic on top,
  as if nothing overlapped.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax import denoisers, finetune, methods, operations, sampling
from dmq_jax.config import EfficientDMConfig, FinetuneConfig, QuantConfig, SamplerConfig
from dmq_jax.methods.base import Decay
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import INPUT_ROLES, multiplies_integers
from dmq_jax.runtime import mesh, programs

RANK = 32  # of the low-rank updates that fine-tuning is counted with
TABLE_STEPS = 20  # rows of the tables of scales that a state is made up with


class Device(NamedTuple):
    """An accelerator as its vendor's table has it.

    Attributes:
      tflops: dense products of bfloat16, 10^12 operations per second.
      gbps: memory, 10^9 bytes per second.
      link_gbps: to the other devices, 10^9 bytes per second one way.
      memory_gb: 10^9 bytes.
    """

    tflops: float
    gbps: float
    link_gbps: float
    memory_gb: float


DEVICES = {
    'a100': Device(312, 2039, 300, 80),
    'h100': Device(989, 3350, 450, 80),
    'h200': Device(989, 4800, 450, 141),
    'l4': Device(121, 300, 32, 24),
    'tpu-v5e': Device(197, 819, 200, 16),
    'tpu-v5p': Device(459, 2765, 600, 95),
    'tpu-v6e': Device(918, 1640, 448, 32),
}


class Collective(NamedTuple):
    """What devices tell one another in one place of a program.

    Attributes:
      kind: as XLA names it: 'all-gather', 'all-reduce', ...
      size: bytes of the result on one device.
      group_size: devices that take part.
      in_loop: whether it runs in every round of a loop.
    """

    kind: str
    size: int
    group_size: int
    in_loop: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one device sends: a ring of the group."""
        others = (self.group_size - 1) / self.group_size
        if self.kind == 'all-reduce':
            return 2 * others * self.size
        # Its result is one part of what is summed.
        return others * self.size * (self.group_size if self.kind == 'reduce-scatter' else 1)


class Cost(NamedTuple):
    """One program on one device.

    Attributes:
      flops: operations of one step.
      bytes_moved: to and from its memory in one step.
      kept: bytes of arguments: weights, and what a step changes.
      temporary: bytes that the step needs besides.
      collectives: in order of the program.
    """

    flops: float
    bytes_moved: float
    kept: float
    temporary: float
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Bytes that the device sends to others."""
        return sum(each.sent for each in self.collectives)

    def seconds(self, device: Device) -> float:
        """Of one step at the roofline of `device`."""
        here = max(self.flops / (device.tflops * 1e12), self.bytes_moved / (device.gbps * 1e9))
        return here + self.sent / (device.link_gbps * 1e9)


class Shape(NamedTuple):
    """Sizes of a mesh, whether or not there are as many devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return math.prod(self)

    @property
    def parts(self) -> int:
        """Into how many a batch is split."""
        return self.data * self.fsdp


def parse_mesh(text: str) -> Shape:
    """The sizes that e.g. 'data=8,fsdp=4' names; an axis left out has size 1.

    Raises:
      ValueError: another axis, or no positive number.
    """
    sizes = {}
    for part in text.split(','):
        name, _, size = part.partition('=')
        if name not in mesh.AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f'--mesh={text}: {part!r} is none of {", ".join(f"{a}=N" for a in mesh.AXES)}.'
            )
        sizes[name] = int(size)
    return Shape(**sizes)


def choose_device(
    name: str | None,
    tflops: float | None = None,
    gbps: float | None = None,
    link_gbps: float | None = None,
) -> tuple[str, Device] | None:
    """A device of the table, with other speeds where they are given; None if nothing is.

    Raises:
      ValueError: speeds that are not positive, or without a device too few of them.
    """
    given = {'tflops': tflops, 'gbps': gbps, 'link_gbps': link_gbps}
    given = {field: value for field, value in given.items() if value is not None}
    if name is None and not given:
        return None
    if min(given.values(), default=1) <= 0 or (name is None and len(given) < 3):
        raise ValueError(
            f'--device={name}, {given}: expected a device, one of {", ".join(DEVICES)}, or all of '
            f'--tflops, --gbps and --link-gbps, each above 0.'
        )
    if name is None:
        return 'this device', Device(tflops, gbps, link_gbps, math.inf)
    return name + ' (changed)' * bool(given), DEVICES[name]._replace(**given)


class Program(NamedTuple):
    """A function of a run, and the shapes of its arguments.

    Attributes:
      run: of (kept, weights, rest).
      kept: what the function changes: shapes; None if it changes nothing.
      weights: of the float network: shapes.
      rest: the remaining arguments, batches among them, as arrays or shapes.
      rules: how `kept` lies on a mesh.
      options: of the compiler.
    """

    run: Callable[..., Any]
    kept: PyTree
    weights: PyTree
    rest: PyTree
    rules: mesh.Rules = ()
    options: dict[str, Any] | None = None


def sampling_step(
    teacher: denoisers.Denoiser, batch_size: int, device_mesh: mesh.Mesh | None = None
) -> Program:
    """One network evaluation of the sampler's loop, and the update that follows it."""
    sampler = denoisers.make_denoiser_sampler(teacher, SamplerConfig(num_steps=1))
    predict = teacher.predict
    if device_mesh is not None:
        predict = mesh.on_whole(device_mesh, predict)
    labels = None
    if teacher.info.num_classes is not None:
        labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))

    def run(kept, weights, batch):
        del kept
        draw = sampling.sample_batch.function
        return draw(predict, teacher.info, 1.0, weights, sampler, *batch)

    options = programs.network_options()
    return Program(run, None, teacher.params, (keys, labels), options=options)


def finetuning_step(
    teacher: denoisers.Denoiser,
    batch_size: int,
    device_mesh: mesh.Mesh | None = None,
    *,
    rank: int = RANK,
    bits: int = 4,
) -> Program:
    """One optimizer step of EfficientDM with the coverage 'paper'."""
    config = FinetuneConfig(num_iterations=1000, batch_size=batch_size)
    layers = denoisers.quantizable(teacher)
    # Min-max ranges: what a search for better ones costs is no part of a step.
    quant = QuantConfig(
        weight_bits=bits, activation_bits=bits,
        weight_observer='minmax', activation_observer='minmax',
    )  # fmt: skip
    plan = denoisers.make_plan(layers, quant, teacher.network)
    method = methods.make(EfficientDMConfig(lora_rank=rank), plan)
    row = jax.ShapeDtypeStruct((TABLE_STEPS,), jnp.float32)
    seen = TensorStats(row, row, jax.ShapeDtypeStruct((TABLE_STEPS, 2), jnp.float32))
    stats = {path: dict.fromkeys(INPUT_ROLES[layers[path].kind], seen) for path in plan}
    timesteps = np.linspace(990, 0, TABLE_STEPS).astype(np.int32)
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    loss = finetune.make_loss(teacher, method, plan, timesteps, 'nearest', config)
    decay = Decay(config.num_iterations, config.schedule)
    has_integers = multiplies_integers(plan)

    def start(params, stats):
        key = jax.random.key(0)
        state = method.init(params, stats, key)
        positions = finetune.start_positions(teacher, sampler, config, params, key)
        moments = method.optimizer(state, decay).init(state)
        return finetune.TrainState(state, moments, positions, jnp.zeros((), jnp.int32))

    def run(train, weights, key):
        # Its learning rates come from values of the state, which here are none yet.
        optimizer = method.optimizer(train.state, decay)
        step = finetune.make_train_step(
            teacher, loss, optimizer, config, device_mesh, has_integers=has_integers
        )
        return step(train, weights, sampler, key)

    kept = jax.eval_shape(start, teacher.params, stats)
    key = jax.eval_shape(lambda: jax.random.key(0))
    options = programs.step_options(has_integers=has_integers)
    return Program(run, kept, teacher.params, key, finetune.SHARDING_RULES, options)


def compiled(program: Program, device_mesh: mesh.Mesh) -> Cost:
    """XLA's own numbers of `program`, made with the same mesh; nothing of it runs."""
    executable = compile_program(program, device_mesh)
    memory = executable.memory_analysis()
    counted = executable.cost_analysis()
    return Cost(
        flops=counted.get('flops', 0.0),
        bytes_moved=counted.get('bytes accessed', 0.0),
        kept=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        collectives=collectives(executable.as_text()),
    )


def compile_program(program: Program, device_mesh: mesh.Mesh) -> jax.stages.Compiled:
    """`program`, partitioned over `device_mesh`, from shapes alone."""
    weights = mesh.abstract(device_mesh, program.weights, mesh.WEIGHT_RULES)
    kept = program.kept and mesh.abstract(device_mesh, program.kept, program.rules)
    is_batch = [bool(leaf.shape) for leaf in jax.tree.leaves(program.rest)]
    rules = (('.*', (mesh.BATCH,) if all(is_batch) else ()),)
    rest = mesh.abstract(device_mesh, program.rest, rules)
    function = jax.jit(program.run, donate_argnums=0, compiler_options=program.options)
    return function.lower(kept, weights, rest).compile()


_ITEM_BYTES = {
    'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4, 'u32': 4,
    'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip
_KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'


def collectives(text: str) -> tuple[Collective, ...]:
    """Everything that devices tell one another in a compiled program.

    Args:
      text: of the program, as `as_text` of a compiled function gives it.
    """
    found, loops = [], _called_in_loops(text)
    for name, body in _computations(text):
        for line in body:
            match = re.search(rf'= (.*?) ({_KINDS})(?:-start)?\(', line)
            if match is None:
                continue
            shapes = re.findall(r'(\w+)\[([\d,]*)\]', match[1])
            size = sum(
                _ITEM_BYTES[dtype] * math.prod(int(n) for n in dims.split(',') if n)
                for dtype, dims in shapes
                if dtype in _ITEM_BYTES
            )
            found.append(Collective(match[2], size, _group_size(line), name in loops))
    return tuple(found)


def _group_size(line: str) -> int:
    # {{0,1},{2,3}}, [groups,devices of each]<=[...], or mesh['a'=2,'b'=4], ... {'a'}.
    if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
        return len(listed[1].split(','))
    if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # A part of an axis is written 'a':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2  # a permutation: from one device to another


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, body = '', []
    for line in text.splitlines():
        head = re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
        if head is not None:
            yield name, body
            name, body = head[1], []
        body.append(line)
    yield name, body


def _called_in_loops(text: str) -> set[str]:
    """Names of the computations that loops run, and of what these call."""
    calls = {
        name: set(re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', '\n'.join(body)))
        for name, body in _computations(text)
    }
    found, left = set(), re.findall(r'(?:body|condition)=%?([\w.\-]+)', text)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left.extend(calls.get(name, ()))
    return found


def modelled(
    make: Callable[..., Program], teacher: denoisers.Denoiser, batch_size: int, shape: Shape
) -> Cost:
    """The model's numbers of the program that `make` makes; see the head of this module.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    if batch_size % shape.parts:
        raise ValueError(
            f'--batch-size={batch_size} is not divisible by the {shape.parts} parts of a batch.'
        )
    program = make(teacher, batch_size // shape.parts)
    counts = operations.count(
        jax.make_jaxpr(program.run)(program.kept, program.weights, program.rest)
    )
    split = {name: _bytes_of(tree) for name, tree in _split(program, shape).items()}
    state = getattr(program.kept, 'state', {})
    told = list(_weight_gathers(program, shape))
    if program.kept is not None and shape.parts > 1:
        told.append(Collective('all-reduce', _gradient_bytes(state, program.weights), shape.parts))
    if shape.tensor > 1:
        # Of a product read by the next one, all channels; a gradient goes the same way back.
        told.append(Collective('all-gather', counts.products, shape.tensor))
    gathered = sum(each.size for each in _weight_gathers(program, shape))
    positions = _bytes_of(getattr(program.kept, 'positions', ()))
    return Cost(
        flops=counts.product_flops / shape.tensor + counts.other_flops,
        bytes_moved=counts.bytes_moved,
        kept=split['weights'] + split['kept'] + positions,
        temporary=counts.live + gathered,
        collectives=tuple(told),
    )


def _split(program: Program, shape: Shape) -> dict[str, list[Any]]:
    """Leaves as large as the parts of them that one device keeps."""
    kept = program.kept and {
        'state': program.kept.state, 'optimizer': program.kept.optimizer
    }  # fmt: skip
    spread = mesh.Spread(largest='fsdp')
    return {
        'weights': [_part(leaf, mesh.Spread('fsdp', 'tensor'), shape)
                    for leaf in jax.tree.leaves(program.weights)],
        'kept': [_part(leaf, spread, shape) for leaf in jax.tree.leaves(kept)],
    }  # fmt: skip


def _part(leaf: Any, spread: mesh.Spread, shape: Shape) -> jax.ShapeDtypeStruct:
    sizes = shape._asdict()
    names = spread.split(leaf.shape, sizes)
    dims = (n // (sizes[name] if name else 1) for n, name in zip(leaf.shape, names, strict=True))
    return jax.ShapeDtypeStruct(tuple(dims), leaf.dtype)


def _weight_gathers(program: Program, shape: Shape) -> Iterator[Collective]:
    if shape.fsdp == 1:
        return
    trees = [(program.weights, mesh.Spread('fsdp', 'tensor'))]
    if program.kept is not None:
        trees.append((program.kept.state, mesh.Spread(largest='fsdp')))
    for tree, spread in trees:
        for leaf in jax.tree.leaves(tree):
            part = _part(leaf, spread, shape)
            if 'fsdp' in spread.split(leaf.shape, shape._asdict()):
                whole = _part(leaf, spread._replace(largest=None), shape)
                assert part.size * shape.fsdp == whole.size
                yield Collective('all-gather', _bytes_of([whole]), shape.fsdp)


def _gradient_bytes(state: PyTree, weights: PyTree) -> int:
    """A low-rank update's gradient is reduced as that of the kernel it is added to."""
    if 'lora' not in state:
        return _bytes_of(state)
    learnt = {name: group for name, group in state.items() if name not in ('lora', 'calibrated')}
    kernels = (_kernel_bytes(weights, path) for path in state['lora'])
    return _bytes_of(learnt) + sum(kernels)


def _kernel_bytes(weights: PyTree, path: str) -> int:
    return _bytes_of([functools.reduce(lambda tree, name: tree[name], path.split('/'), weights)])


def _bytes_of(tree: PyTree) -> int:
    return sum(
        math.prod(leaf.shape) * (leaf.dtype.itemsize if hasattr(leaf.dtype, 'itemsize') else 8)
        for leaf in jax.tree.leaves(tree)
    )


def report(
    teacher: denoisers.Denoiser,
    batch_size: int,
    shape: Shape,
    *,
    device: tuple[str, Device] | None = None,
    device_mesh: mesh.Mesh | None = None,
) -> list[str]:
    """The costs of sampling and fine-tuning, for people.

    Args:
      teacher: the float network; its parameters may be shapes alone.
      batch_size: images of all devices together.
      shape: of the mesh.
      device: name and speed of what time is estimated for; None leaves time out.
      device_mesh: of this shape, to compile for; None: the model alone.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    sizes = ', '.join(f'{name}={size}' for name, size in shape._asdict().items() if size > 1)
    lines = [
        f'cost per device on {sizes or "one device"}, {shape.num_devices} in all; batch '
        f'{batch_size}, {batch_size // shape.parts} images each',
    ]
    for title, make in (
        ('sampling, one step', sampling_step),
        (f'fine-tuning, one step (EfficientDM, W4A4, rank {RANK})', finetuning_step),
    ):
        costs = {'model': modelled(make, teacher, batch_size, shape)}
        if device_mesh is not None:
            costs['compiled'] = compiled(make(teacher, batch_size, device_mesh), device_mesh)
        lines += ['', f'{title:52}' + ''.join(f' {name:>14}' for name in costs)]
        rows = {
            'operations, G': [cost.flops / 1e9 for cost in costs.values()],
            'memory read and written, MB': [cost.bytes_moved / 1e6 for cost in costs.values()],
            'memory held: weights and state, MB': [cost.kept / 1e6 for cost in costs.values()],
            'memory held: during a step, MB': [cost.temporary / 1e6 for cost in costs.values()],
            'sent to other devices, MB': [cost.sent / 1e6 for cost in costs.values()],
        }
        if device is not None:
            name = f'time at the roofline of {device[0]}, ms'
            rows[name] = [1e3 * cost.seconds(device[1]) for cost in costs.values()]
        lines += [f'  {n:50}' + ''.join(f' {v:14,.3f}' for v in row) for n, row in rows.items()]
        needed = max(cost.kept + cost.temporary for cost in costs.values()) / 1e9
        if device is not None and needed > device[1].memory_gb:
            lines.append(f'  does not fit: {needed:,.1f} GB of {device[1].memory_gb} GB')
        for source, cost in costs.items():
            told = {}
            for each in cost.collectives:
                told.setdefault((each.kind, each.group_size), []).append(each.size)
            lines += [
                f'  {source}: {kind} of {size} devices, {len(sent)} times, {sum(sent) / 1e6:.3f} MB'
                for (kind, size), sent in told.items()
            ]
    return lines
