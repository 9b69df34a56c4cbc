"""Tables of text, for the terminal: the results of a run, and what a plan quantizes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dmq_jax.quant.plan import LayerSpec, Plan, QuantizableLayer, split_layers
from dmq_jax.quant.tensor import QuantSpec, scale_shape
from dmq_jax.reporting.results import TEACHER, describe_sampler
from kernels.packing import packed_length


class Column(NamedTuple):
    """A column of the results.

    Attributes:
      key: of the row in `metrics.json`.
      title: its heading.
      show: number -> text.
      best: min, max, or None where nothing is better.
      ratio: teacher and student -> how many times better, where that is shown.
      about: what it means.
    """

    key: str
    title: str
    show: Callable[[float], str]
    best: Callable[..., Any] | None = None
    ratio: Callable[[float, float], float] | None = None
    about: str = ''


def percent(value: float) -> str:
    """A share in [0, 1] as '98.5 %'."""
    return f'{100 * value:.1f} %'.replace('100.0 %', '100 %')


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f'{value:.{digits}f}'


def _thousands(value: float) -> str:
    return f'{value / 1000:,.1f} k' if value else '–'


def columns(distance: str) -> list[Column]:
    """The columns of the results, for the distance named."""
    return [
        Column('fd', distance, _fixed(3), min, None, 'distance to the real images, features'),
        Column('precision', 'precision', _fixed(3), max, None, 'share that looks real'),
        Column('recall', 'recall', _fixed(3), max, None, 'share of the real images covered'),
        Column('class_accuracy', 'class', percent, max, None, 'recognised as their class'),
        Column('psnr_to_teacher', 'PSNR dB', _fixed(1), max, None, 'same seeds as the teacher'),
        Column('ssim_to_teacher', 'SSIM', _fixed(3), max, None, 'same seeds as the teacher'),
        Column('size_mb', 'MB', _fixed(2), min, lambda t, s: t / s, 'of the file'),
        Column('images_per_second', 'images/s', _fixed(1), max, lambda t, s: s / t, 'sampled'),
        Column('finetune_seconds', 'tuning s', _fixed(0), None, None, 'time of fine-tuning'),
        Column('training_mb', 'tuning MB', _fixed(0), None, None, 'memory of fine-tuning'),
        Column('trained_parameters', 'trained', _thousands, None, None, 'numbers that were tuned'),
        Column('set_mb', 'set MB', _fixed(3), None, None, 'of tuning the same integers again'),
        Column('cell_seconds', 'all s', _fixed(0), None, None, 'from calibration to metrics'),
        Column('peak_mb', 'peak MB', _fixed(0), None, None, 'memory of all that'),
    ]


def known_columns(distance: str, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those of `columns` in which some row has a number."""
    return [c for c in columns(distance) if any(is_known(row, c.key) for row in rows)]


def best_values(table: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The best value among the students in each column where they differ."""
    result = {}
    for column in table:
        values = [r[column.key] for r in rows if r['name'] != TEACHER and is_known(r, column.key)]
        if column.best is not None and len(set(values)) > 1:
            result[column.key] = column.best(values)
    return result


def is_known(row: Mapping[str, Any], key: str) -> bool:
    """Whether a row of `metrics.json` has a finite value there."""
    return row.get(key) is not None and math.isfinite(row[key])


def metrics_table(protocol: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as aligned lines of text; `*` marks the best student of a column.

    Args:
      protocol: of `metrics.json`.
      rows: one per network.
    """
    table = known_columns(protocol['distance'], rows)
    best = best_values(table, rows)
    cells = [['network', 'bits', *(column.title for column in table)]]
    for row in rows:
        line = [row['name'], f'W{row["weight_bits"]}A{row["activation_bits"]}']
        for column in table:
            if not is_known(row, column.key):
                line.append('-')
                continue
            text = column.show(row[column.key])
            is_best = row['name'] != TEACHER and row[column.key] == best.get(column.key)
            line.append(text + ('*' if is_best else ' '))
        cells.append(line)
    return [
        f'{protocol["num_images"]} images per network, {describe_sampler(protocol["sampler"])}, '
        f'seed {protocol["seed"]}, {protocol["device"]}',
        *_aligned(cells, left=2),
    ]


def plan_table(layers: Mapping[str, QuantizableLayer], plan: Plan) -> list[str]:
    """How every layer is quantized, with the megabytes of its kernel, as aligned lines of text.

    Args:
      layers: every quantizable layer, by path.
      plan: of a student.
    """
    cells = [['layer', 'kind', 'weights', 'inputs', 'per timestep', 'MB float', 'MB']]
    total_before = total_after = 0.0
    layers = split_layers(layers, plan)
    for path, layer in layers.items():
        spec = plan.get(path)
        before, after = kernel_bytes(layer, spec)
        total_before, total_after = total_before + before, total_after + after
        weight, inputs = (None, None) if spec is None else (spec.weight, spec.inputs)
        timed = '-' if inputs is None else ('yes' if spec.per_timestep else 'no')
        kernel = ['-', '-', '-']
        if layer.weight_shape is not None:
            kernel = [_describe_spec(weight), f'{before / 1e6:.4f}', f'{after / 1e6:.4f}']
        cells.append([path, layer.kind, kernel[0], _describe_spec(inputs), timed, *kernel[1:]])
    quantized = sum(path in plan for path in layers)
    cells.append(
        [f'{quantized} of {len(layers)} layers quantized', '', '', '', '',
         f'{total_before / 1e6:.4f}', f'{total_after / 1e6:.4f}']
    )  # fmt: skip
    return _aligned(cells, left=5)


def implementation_table(found: Mapping[str, Sequence[str]]) -> list[str]:
    """Which implementation runs each layer, and why, as aligned lines of text.

    Args:
      found: name and reason, by path.
    """
    cells = [['layer', 'implementation', 'reason']]
    cells += [[path, name, reason] for path, (name, reason) in found.items()]
    return _aligned(cells, left=3)


def kernel_bytes(layer: QuantizableLayer, spec: LayerSpec | None) -> tuple[int, int]:
    """Bytes of a layer's kernel in float32, and as `spec` stores it."""
    if layer.weight_shape is None:
        return 0, 0
    shape = layer.weight_shape
    before = 4 * math.prod(shape)
    if spec is None or spec.weight is None:
        return before, before
    num_rows = math.prod(shape) // shape[-2]
    num_scales = math.prod(scale_shape(shape, spec.weight))
    scales = num_scales * (4 if spec.weight.symmetric else 5)
    return before, num_rows * packed_length(shape[-2], spec.weight.bits) + scales


def _describe_spec(spec: QuantSpec | None) -> str:
    return 'float' if spec is None else f'{spec.bits} bits {spec.granularity}'


def _aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns two spaces apart, the first `left` flush left, a rule below the heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '  '.join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return [lines[0], '-' * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
