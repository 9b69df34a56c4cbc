"""What a checkpoint holds, and what quantizing it would cost.

  python -m dmq_jax.inspect PATH [--settings=...] [--components=...] [--batch-size=8]
  python -m dmq_jax.inspect PATH --mesh=data=8,fsdp=4 --batch-size=64 [--device=h100]

PATH is whatever `load_teacher` takes, or the folder of an export. Of a float network it prints
family, parameters, process and condition, what the coverages 'paper' and 'full' would quantize, the
size at 8, 4 and 2 bits, and the memory to expect; of an export its plan, its sizes, and which
implementation runs each layer on this platform and why. Every tensor is checked, none is kept in
memory.

The memory is an estimate, of arrays alone: sampling holds the weights and, for each image, the
operands and results of the largest single operation of the network; fine-tuning holds the float
weights, their codes and the gradient of these, a low-rank update with two moments of Adam, and for
each image the result of every operation.

With --mesh it says what one step of sampling and of fine-tuning costs each device: operations,
memory, traffic, and with --device the time; see `dmq_jax.costs` for the model. What XLA reports of
the compiled program stands beside it where the network is small enough.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmq_jax import costs, denoisers, exporting, networks, teachers
from dmq_jax.config import QuantConfig
from dmq_jax.quant.plan import Plan, QuantizableLayer, split_layers
from dmq_jax.reporting import tables
from dmq_jax.runtime import mesh

_WIDTHS = (8, 4, 2)
_COVERAGES = ('paper', 'full')
_RANK = costs.RANK
# Parameters: the compiled step of more takes minutes, and the memory of the machine.
_COMPILED_UP_TO = 10e6


class Activations(NamedTuple):
    """Bytes of the arrays of one pass for one image.

    Attributes:
      largest: operands and results of the largest operation.
      total: results of all operations.
    """

    largest: int
    total: int


def describe_teacher(teacher: denoisers.Denoiser, batch_size: int) -> list[str]:
    """What `inspect` says of a float network, whose parameters may be shapes alone."""
    info, layers = teacher.info, denoisers.quantizable(teacher)
    leaves = jax.tree.leaves(teacher.params)
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    kernels = sum(layer.weight_shape is not None for layer in layers.values())
    products = sum(layer.kind == 'product' for layer in layers.values())
    schedule = info.schedule
    lines = [
        f'family       {networks.family(teacher.network)}',
        f'parameters   {count / 1e6:.2f} M, {_mb(kept)}',
        f'layers       {kernels} with weights, {products} products of activations',
        f'draws        {"latents" if info.is_latent else "images"} {info.image_shape}'
        + (', with decoder' if teacher.decoder is not None else ''),
        f'condition    {"none" if info.num_classes is None else f"{info.num_classes} labels"}'
        f', {networks.class_rows(teacher.network)} rows',
        f'process      {schedule.kind}, {schedule.num_train_timesteps} timesteps, predicts '
        f'{info.prediction}' + (' and the variance' if info.learned_variance else ''),
        '',
        f'{"coverage":12} {"layers":>7} {"of weights":>11}'
        + ''.join(f' {f"W{bits} MB":>9}' for bits in _WIDTHS),
    ]
    for coverage in _COVERAGES:
        plans = [
            denoisers.make_plan(
                layers, QuantConfig(weight_bits=bits, coverage=coverage), teacher.network
            )
            for bits in _WIDTHS
        ]
        sizes = [quantized_bytes(layers, plan, 4 * count) for plan in plans]
        share = _quantized_share(layers, plans[0], count)
        lines.append(
            f'{coverage:12} {len(plans[0]):7} {share:11.1%}'
            + ''.join(f' {size / 1e6:9.2f}' for size in sizes)
        )
    passes = measure_activations(teacher)
    update = 12 * sum(_update_size(layer.weight_shape) for layer in layers.values())
    lines += [
        '',
        f'memory at batch {batch_size} (estimate, see --help)',
        f'sampling     {_mb(kept + batch_size * passes.largest)} in float',
        f'fine-tuning  {_mb(kept + 8 * count + update + batch_size * passes.total)} at rank '
        f'{_RANK}, {_mb(update)} of it for the update and its moments',
    ]
    return lines


def describe_export(folder: str, batch_size: int) -> list[str]:
    """What `inspect` says of an export: its plan, sizes, and what runs its layers here."""
    exported = exporting.load(folder)
    manifest = exporting.read_manifest(folder)
    shapes = denoisers.param_shapes(exported.network, exported.info)
    layers = denoisers.quantizable(
        denoisers.float_denoiser(exported.network, shapes, exported.info)
    )
    before = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    size = exporting.size_bytes(exported)
    return [
        f'family       {networks.family(exported.network)}, quantized',
        f'method       {manifest["facts"].get("method", "not stated")}',
        f'timesteps    {len(exported.timesteps)} rows',
        f'size         {_mb(size)}, {_mb(before)} in float32',
        '',
        *tables.plan_table(layers, exported.plan),
        '',
        f'on {jax.devices()[0].device_kind} ({jax.default_backend()}), batch {batch_size}',
        *tables.implementation_table(exporting.implementations(exported, batch_size)),
    ]


def quantized_bytes(layers: dict[str, QuantizableLayer], plan: Plan, float_bytes: int) -> int:
    """Bytes of all parameters, of which `plan` quantizes some; tables of activations apart."""
    pairs = [tables.kernel_bytes(layer, plan.get(path)) for path, layer in layers.items()]
    return float_bytes - sum(before for before, _ in pairs) + sum(after for _, after in pairs)


def measure_activations(teacher: denoisers.Denoiser) -> Activations:
    """The arrays of one pass for one image; the network is traced, nothing is computed."""
    x, t, y = denoisers.example_inputs(teacher.info, batch_size=1)
    jaxpr = jax.make_jaxpr(teacher.predict)(teacher.params, x, t, y)
    weights = {id(variable) for variable in jaxpr.jaxpr.invars}
    largest = total = 0
    for equation in _equations(jaxpr.jaxpr):
        results = sum(map(_bytes, equation.outvars))
        operands = sum(_bytes(v) for v in equation.invars if id(v) not in weights)
        largest, total = max(largest, results + operands), total + results
    return Activations(largest, total)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if hasattr(v, 'eqns') or hasattr(v, 'jaxpr')]
        if not inner:
            yield equation
        for each in inner:
            yield from _equations(getattr(each, 'jaxpr', each))


def _bytes(variable: Any) -> int:
    aval = variable.aval
    is_float = hasattr(aval, 'dtype') and jnp.issubdtype(aval.dtype, jnp.floating)
    return math.prod(aval.shape) * aval.dtype.itemsize if is_float else 0


def _quantized_share(layers: dict[str, QuantizableLayer], plan: Plan, count: int) -> float:
    known = split_layers(layers, plan)
    shapes = (known[path].weight_shape for path, spec in plan.items() if spec.weight is not None)
    return sum(math.prod(shape) for shape in shapes if shape is not None) / count


def _update_size(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else _RANK * (math.prod(shape[:-1]) + shape[-1])


def describe_costs(teacher: denoisers.Denoiser, given: argparse.Namespace) -> list[str]:
    """What --mesh asks for.

    Raises:
      ValueError: a mesh or a device that cannot be, or a batch that does not divide over it.
    """
    shape = costs.parse_mesh(given.mesh)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(teacher.params))
    is_small = count <= _COMPILED_UP_TO
    device_mesh = None
    if given.compile == 'always' or (given.compile == 'auto' and is_small):
        if mesh.emulate(shape.num_devices):
            device_mesh = mesh.make_mesh(*shape)
        elif given.compile == 'always':
            raise ValueError(
                f'--mesh={given.mesh}: {len(jax.devices())} devices; expected at least '
                f'{shape.num_devices}. Leave xla_force_host_platform_device_count out of XLA_FLAGS.'
            )
    device = costs.choose_device(given.device, given.tflops, given.gbps, given.link_gbps)
    return ['', *costs.report(
        teacher, given.batch_size, shape, device=device, device_mesh=device_mesh
    )]  # fmt: skip


def _mb(size: float) -> str:
    return f'{size / 1e6:.1f} MB'


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m dmq_jax.inspect`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m dmq_jax.inspect', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('path', help='a bundled name, a checkpoint, or the folder of an export')
    parser.add_argument('--kind', default='auto', help='see config.TeacherConfig')
    parser.add_argument('--settings', help='a published name or a JSON file')
    parser.add_argument('--components', help='a diffusers folder with what the checkpoint lacks')
    parser.add_argument('--batch-size', type=int, default=8, help='images, for memory and choices')
    parser.add_argument('--mesh', help='axes and sizes, e.g. data=8,fsdp=4: costs per device')
    parser.add_argument('--device', choices=costs.DEVICES, help='whose speed times are at')
    for name, meaning in (
        ('tflops', '10^12 operations per second of products'),
        ('gbps', '10^9 bytes per second of memory'),
        ('link-gbps', '10^9 bytes per second to other devices'),
    ):
        parser.add_argument(f'--{name}', type=float, help=f"{meaning}, instead of the device's")
    parser.add_argument(
        '--compile', choices=('auto', 'always', 'never'), default='auto',
        help='with --mesh, XLA\'s own numbers; auto: up to 10 M parameters',
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        if given.mesh is not None:
            # Before anything uses a device.
            mesh.emulate(costs.parse_mesh(given.mesh).num_devices)
        if exporting.is_export(given.path):
            lines = describe_export(given.path, given.batch_size)
        else:
            teacher = teachers.load_teacher(
                given.path, kind=given.kind, settings=given.settings,
                components=given.components, shapes_only=True,
            )  # fmt: skip
            lines = describe_teacher(teacher, given.batch_size)
            if given.mesh is not None:
                lines += describe_costs(teacher, given)
    except (ValueError, OSError) as error:
        print(f'Error: {error}', file=sys.stderr)
        return 2
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    sys.exit(main())
