"""Times the layers of real networks on integers against floats: `python -m kernels.bench`.

  python -m kernels.bench [--networks cifar10 sd15] [--layers NAME ...] [--modes W8A8 W4A4]
      [--implementations xla triton] [--batch-size 8] [--rounds 20] [--calls 20] [--json FILE]
  python -m kernels.bench --device-table

Of every layer: median time, spread (the middle half of the calls), operations per second, share of
the roofline, and how many times faster than float32 and bfloat16 by XLA (sums in float32; on NVIDIA
GPUs XLA's float32 is TF32) and than W8A8 by XLA. The roofline is measured here, not read off a data
sheet: the rate of a large product in each dtype, and that of a large copy (`--device-table` prints
these alone). No product but our own multiplies 4-bit codes, so their ceiling, where a GPU has
instructions for them, is twice that of W8A8, as the instructions are. Weights are packed, the
epilogue is included; activations are integers already. What was not measured is a dash.

A whole network, with quantization: `python -m dmq_jax.bench`.
"""

import argparse
import importlib.metadata
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import gpu, packing, timing, triton_ptx
from kernels.epilogue import Epilogue
from kernels.int_conv import int_conv
from kernels.int_matmul import int_matmul
from kernels.layer_lists import NETWORKS, Conv, Layer, Product

MODES = ('W8A8', 'W4A8', 'W4A4')
IMPLEMENTATIONS = ('triton', 'xla', 'reference')
BASELINES = ('float32', 'bfloat16', 'xla W8A8')
_BYTES = {'float32': 4, 'bfloat16': 2, 'W8A8': 1, 'W4A8': 1, 'W4A4': 1}
# Sides of the product, and elements of the copy, that measure the ceilings: on anything but a CPU
# they must take long beside a launch.
_SQUARE, _LARGE_SQUARE = 2048, 8192
_COPY, _LARGE_COPY = 2**26, 2**28


def operations(shape: Conv | Product, batch_size: int) -> int:
    """Multiplications and additions of one call."""
    if isinstance(shape, Conv):
        pixels = (shape.H // shape.stride) * (shape.W // shape.stride)
        return 2 * batch_size * pixels * shape.O * shape.C * shape.kernel**2
    return 2 * batch_size * math.prod(shape.batch) * shape.M * shape.N * shape.K


def least_bytes(shape: Conv | Product, batch_size: int, kind: str) -> float:
    """Bytes of both operands and of the result, bfloat16 or float32, as `kind` stores them."""
    x_bytes = _BYTES[kind]
    y_bytes = 2 if kind == 'bfloat16' else 4
    w_bytes = x_bytes / 2 if kind in ('W4A8', 'W4A4') else x_bytes
    if isinstance(shape, Conv):
        x = batch_size * shape.H * shape.W * shape.C
        w = shape.O * shape.C * shape.kernel**2
        y = batch_size * shape.H * shape.W * shape.O // shape.stride**2
        return x * x_bytes + w * w_bytes + y_bytes * y
    products = batch_size * math.prod(shape.batch)
    x, w, y = shape.M * shape.K, shape.N * shape.K, shape.M * shape.N
    num_w = products if shape.batch else 1
    return products * (x * x_bytes + y_bytes * y) + num_w * w * w_bytes


def float_call(shape: Conv | Product, batch_size: int, dtype: str) -> tuple[Callable, tuple]:
    """A function of XLA in `dtype`, its result too, and its operands.

    Sums are float32 inside. Asked for a float32 result, XLA for GPU would convert the operands of a
    convolution to float32 first, a slow baseline.
    """
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    if isinstance(shape, Conv):
        x = rng.standard_normal((batch_size, shape.H, shape.W, shape.C), np.float32)
        w = rng.standard_normal((shape.kernel, shape.kernel, shape.C, shape.O), np.float32)
        geometry = _geometry(shape)

        def convolve(x, w):
            return lax.conv_general_dilated(
                x, w, geometry['strides'], geometry['padding'],
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            )  # fmt: skip

        return convolve, (jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    x = rng.standard_normal((batch_size, *shape.batch, shape.M, shape.K), np.float32)
    leading = (batch_size, *shape.batch) if shape.batch else ()
    w = rng.standard_normal((*leading, shape.K, shape.N), np.float32)
    return jnp.matmul, (jnp.asarray(x, dtype), jnp.asarray(w, dtype))


def integer_call(
    shape: Conv | Product, batch_size: int, mode: str, implementation: str
) -> tuple[Callable, tuple]:
    """The library in `mode`, epilogue included, and its operands."""
    rng = np.random.default_rng(0)
    w_limit = 128 if mode == 'W8A8' else 8
    x_limit = 8 if mode == 'W4A4' else 128
    options = {'implementation': implementation, 'x_max': x_limit, 'w_max': w_limit}

    def codes(size, limit):
        return rng.integers(-limit, limit, size).astype(np.int8)

    if isinstance(shape, Conv):
        x = codes((batch_size, shape.H, shape.W, shape.C), x_limit)
        w = codes((shape.O, shape.kernel, shape.kernel, shape.C), w_limit)
        function, options = int_conv, options | _geometry(shape)
        num_outputs, is_weight = shape.O, True
    else:
        x = codes((batch_size, *shape.batch, shape.M, shape.K), x_limit)
        leading = (batch_size, *shape.batch) if shape.batch else ()
        w = codes((*leading, shape.N, shape.K), w_limit)
        function, num_outputs, is_weight = int_matmul, shape.N, not shape.batch
    if mode != 'W8A8' and is_weight:
        if isinstance(shape, Conv):
            w = w.reshape(shape.O, -1, shape.C)
        w = packing.pack(w, 4)
        options['bits'] = 4
        if mode == 'W4A4' and implementation == 'triton':
            x = packing.pack(x, 4)
            options['x_bits'] = 4
    epilogue = Epilogue(
        jnp.full(num_outputs, 0.01), jnp.full(1, 0.02), jnp.zeros((), jnp.int32), None,
        jnp.zeros(num_outputs),
    )  # fmt: skip

    def run(x, w, epilogue):
        return function(x, w, epilogue=epilogue, **options)

    return run, (jnp.asarray(x), jnp.asarray(w), epilogue)


def _geometry(shape: Conv) -> dict[str, Any]:
    low = 1 if shape.kernel == 3 and shape.stride == 1 else 0
    pads = (low, 1 if shape.kernel == 3 else 0)
    return {'strides': (shape.stride,) * 2, 'padding': (pads, pads)}


def measure_layer(
    layer: Layer, *, batch_size: int, modes: Sequence[str], implementations: Sequence[str],
    num_rounds: int, num_calls: int = 1,
) -> tuple[dict[str, timing.Timing], dict[str, str]]:  # fmt: skip
    """Timings by column, and why the other columns have none."""
    calls = {kind: float_call(layer.shape, batch_size, kind) for kind in ('float32', 'bfloat16')}
    refused = {}
    for implementation in implementations:
        for mode in modes:
            name = f'{implementation} {mode}'
            call = integer_call(layer.shape, batch_size, mode, implementation)
            try:
                jax.eval_shape(call[0], *call[1])
            except NotImplementedError as error:
                refused[name] = str(error)
                continue
            calls[name] = call
    return timing.measure(calls, num_rounds=num_rounds, num_calls=num_calls), refused


def measure_ceilings(*, num_rounds: int) -> dict[str, float]:
    """Operations per second of a large product by kind, and 'bytes' per second of a copy."""
    is_cpu = jax.default_backend() == 'cpu'
    size = _SQUARE if is_cpu else _LARGE_SQUARE
    copied = _COPY if is_cpu else _LARGE_COPY
    square = Product((), size, size, size)
    calls = {kind: float_call(square, 1, kind) for kind in ('float32', 'bfloat16')}
    calls['W8A8'] = integer_call(square, 1, 'W8A8', 'xla')
    calls['bytes'] = (lambda x: x + 1, (jnp.zeros(copied, jnp.float32),))
    timings = timing.measure(calls, num_rounds=num_rounds)
    ceilings = {
        kind: operations(square, 1) / timings[kind].median_s for kind in calls if kind != 'bytes'
    }
    target = gpu.current()
    if target is not None and triton_ptx.has_int4_instructions(target.capability):
        ceilings['W4A4'] = 2 * ceilings['W8A8']
    return ceilings | {'bytes': 8 * copied / timings['bytes'].median_s}


def roofline_share(
    shape: Conv | Product, batch_size: int, name: str, seconds: float, ceilings: dict[str, float]
) -> float:
    """The least time that the measured ceilings allow, relative to the time taken.

    Above 1 where an algorithm needs fewer operations than the definition, or a kernel is faster
    than the product that measured the ceiling.
    """
    kind = name.rpartition(' ')[2]
    compute = operations(shape, batch_size) / ceilings.get(kind, ceilings['W8A8'])
    memory = least_bytes(shape, batch_size, kind) / ceilings['bytes']
    return max(compute, memory) / seconds


def describe_device() -> dict[str, Any]:
    """Device, clocks and driver where the system tells them, and versions."""
    device = jax.devices()[0]
    facts = {'platform': device.platform, 'device': device.device_kind}
    if device.platform == 'cpu':
        text = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
        models = [line.partition(':')[2].strip() for line in text.splitlines()
                  if line.startswith('model name')]  # fmt: skip
        facts |= {'cpu': models[0] if models else 'unknown', 'cores': len(models) or None}
    elif shutil.which('nvidia-smi'):
        query = '--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit'
        done = subprocess.run(
            ['nvidia-smi', query, '--format=csv'], capture_output=True, text=True, check=False
        )
        facts['nvidia-smi'] = done.stdout.strip().splitlines()
    for name in ('jax', 'jaxlib', 'triton', 'jax-triton'):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    return facts


def table_row(layer: Layer, batch_size: int, name: str, found: dict, ceilings: dict) -> str:
    """One line of Markdown: a column of one layer."""
    taken = found[name]
    rate = operations(layer.shape, batch_size) / taken.median_s
    share = roofline_share(layer.shape, batch_size, name, taken.median_s, ceilings)
    ratios = [
        f'{found[other].median_s / taken.median_s:.2f}x'
        if other in found and other != name
        else '–'
        for other in BASELINES
    ]
    cells = [
        layer.name, f'{layer.count}', name, f'{taken.median_s * 1e6:.0f}',
        f'{taken.spread_s * 1e6:.0f}', f'{rate / 1e12:.3f}', f'{share:.0%}', *ratios,
    ]  # fmt: skip
    return f'| {" | ".join(cells)} |'


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints Markdown, and writes the same numbers as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument('--layers', nargs='+', help='names; all of the networks by default')
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES))
    parser.add_argument(
        '--implementations', nargs='+', choices=IMPLEMENTATIONS, default=['triton', 'xla']
    )
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=20, help='timed calls of each variant')
    parser.add_argument(
        '--calls', type=int, help='of a layer within each timed call; 20 on a GPU or TPU, 1 on CPU'
    )
    parser.add_argument('--device-table', action='store_true', help='only the measured ceilings')
    parser.add_argument('--json', type=Path, help='file that receives the same numbers')
    given = parser.parse_args(arguments)
    if min(given.batch_size, given.rounds, given.calls or 1) < 1:
        parser.error('--batch-size, --rounds and --calls: expected at least 1.')
    given.calls = given.calls or timing.default_calls()
    known = {layer.name for name in given.networks for layer in NETWORKS[name].layers}
    if unknown := set(given.layers or ()) - known:
        parser.error(f'unknown layers {sorted(unknown)}: expected some of {sorted(known)}')
    device = describe_device()
    ceilings = measure_ceilings(num_rounds=given.rounds)
    print(', '.join(f'{name} {value}' for name, value in device.items() if value is not None))
    print('\n| ceiling, measured | |\n|---|---|')
    for kind, value in ceilings.items():
        unit = 'GB/s' if kind == 'bytes' else 'Gop/s'
        print(f'| {kind} | {value / 1e9:.0f} {unit} |')
    result = {
        'device': device, 'ceilings': ceilings, 'batch_size': given.batch_size,
        'rounds': given.rounds, 'calls': given.calls, 'layers': [],
    }  # fmt: skip
    for network in () if given.device_table else given.networks:
        result['layers'] += _measure_network(network, given, ceilings)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + '\n')


def _measure_network(network: str, given: argparse.Namespace, ceilings: dict) -> list[dict]:
    """Prints the table of one network; the same as JSON values."""
    title, share, layers = NETWORKS[network]
    print(f'\n{title}, batch {given.batch_size}: {share:.0%} of its products\n')
    heads = ['layer', 'times', 'by', 'µs', 'spread', 'Top/s', 'of roofline']
    heads += [f'vs {name}' for name in BASELINES]
    print(f'| {" | ".join(heads)} |\n|{"---|" * len(heads)}')
    rows, reasons = [], {}
    for layer in layers:
        if given.layers and layer.name not in given.layers:
            continue
        found, refused = measure_layer(
            layer, batch_size=given.batch_size, modes=given.modes,
            implementations=given.implementations, num_rounds=given.rounds,
            num_calls=given.calls,
        )  # fmt: skip
        for name in found:
            print(table_row(layer, given.batch_size, name, found, ceilings), flush=True)
        reasons |= refused
        rows.append({
            'network': network, 'layer': layer.name, 'count': layer.count,
            'shape': layer.shape._asdict(), 'refused': refused,
            'operations': operations(layer.shape, given.batch_size),
            'timings': {
                name: taken._asdict() | {
                    'roofline_share': roofline_share(
                        layer.shape, given.batch_size, name, taken.median_s, ceilings
                    )
                }
                for name, taken in found.items()
            },
        })  # fmt: skip
    for name, reason in reasons.items():
        print(f'\nnot measured, {name}: {reason}')
    return rows


if __name__ == '__main__':
    main()
