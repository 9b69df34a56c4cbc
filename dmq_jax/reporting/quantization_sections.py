"""Sections about what quantization did: scales over time, errors, sensitive layers, plans."""

from collections.abc import Sequence

import numpy as np

from dmq_jax import denoisers, exporting
from dmq_jax.config import ReportConfig
from dmq_jax.methods.base import init_inputs
from dmq_jax.quant.plan import LayerSpec, QuantizableLayer, split_layers
from dmq_jax.reporting import charts
from dmq_jax.reporting.charts import Axis, Series
from dmq_jax.reporting.markup import absent, escape, figure
from dmq_jax.reporting.results import Artefacts, describe_student
from dmq_jax.reporting.tables import implementation_table, kernel_bytes, plan_table

NUM_SCALE_PANELS = 6  # layers whose scales are plotted, where the config names none
NUM_SENSITIVE_LAYERS = 15
_PANEL = {'width': 340, 'height': 230}  # of a chart among several
_TIME = Axis('timestep t, from noise to image', reverse=True)


def scales_section(found: Artefacts, config: ReportConfig) -> str:
    """Scales of the activations over time, calibrated and learnt."""
    timed = [n for n in found.students if n in found.exports and _has_rows(found.exports[n])]
    if not found.exports:
        return absent('No scales yet', 'export')
    if not timed and not config.layers:
        return '<p class="absent">No student of this run has scales that change over time.</p>'
    names = [n for n in found.students if n in found.exports]
    paths = list(config.layers) or varying_layers(found.exports[timed[-1]], NUM_SCALE_PANELS)
    used: list[Series] = []
    panels = ''
    for path in paths:
        known = [n for n in names if path in found.exports[n].tables]
        if not known:
            raise ValueError(
                f'report.layers has {path!r}: expected layers with quantized inputs, such as '
                f'{list(found.exports[names[-1]].tables)[:3]}.'
            )
        for role in found.exports[known[-1]].tables[path]:
            series = _scale_series(found, known, path, role)
            used += series
            title = path if role == 'input' else f'{path}, {role}'
            y_axis = Axis('scale (units per integer step)', from_zero=True)
            panels += charts.line_chart(series, _TIME, y_axis, title=title, **_PANEL)
    return figure(
        f'{charts.legend(used)}<div class="panels">{panels}</div>',
        'The size of one integer step of a layer’s inputs. Where it changes over time, one scale '
        'for all timesteps must either clip or waste resolution; dotted lines are the calibrated '
        'scales that learning started from.',
    )


def _has_rows(exported: exporting.Exported) -> bool:
    return any(
        table['scale'].size > 1 for roles in exported.tables.values() for table in roles.values()
    )


def _scale_series(found: Artefacts, names: Sequence[str], path: str, role: str) -> list[Series]:
    series = []
    for name in names:
        exported = found.exports[name]
        spec = {path: exported.plan[path]}
        method = found.student_config(name).get('method', {}).get('name')
        is_scaled = path in exported.channels  # then the calibration saw other values
        if found.calibration is not None and method != 'round_to_nearest' and not is_scaled:
            start = init_inputs(spec, found.calibration.stats)[path][role]['scale']
            label = f'{name}, calibrated'
            points = _over_time(found.calibration.timesteps, np.asarray(start))
            series.append(found.series(name, points=points, dashed=True)._replace(name=label))
        scale = exported.tables[path][role]['scale']
        series.append(found.series(name, points=_over_time(exported.timesteps, scale)))
    return series


def _over_time(timesteps: np.ndarray, scale: np.ndarray) -> list[tuple[float, float]]:
    values = np.broadcast_to(scale.reshape(-1), np.shape(timesteps))
    return [(float(t), float(v)) for t, v in zip(timesteps, values, strict=True)]


def varying_layers(exported: exporting.Exported, count: int) -> list[str]:
    """The layers whose scales change most over time, at most one of each name, such as 'conv2'."""
    changes = {
        path: max(float(np.std(t['scale']) / np.mean(t['scale'])) for t in roles.values())
        for path, roles in exported.tables.items()
    }
    chosen: dict[str, str] = {}
    for path in sorted(changes, key=changes.get, reverse=True):
        if changes[path] > 0:
            chosen.setdefault(path.rpartition('/')[2], path)
    return list(chosen.values())[:count]


def error_section(found: Artefacts) -> str:
    """The error of the prediction over time: in all, and of weights and activations alone."""
    if not found.analyses:
        return absent('No error analysis yet', 'analyse')
    titles = {
        'student': 'The whole student',
        'weights': 'Its weights alone',
        'activations': 'Its activations alone',
    }
    values = [v for a in found.analyses.values() for part in a['error'].values() for v in part]
    y_axis = Axis('relative squared error', log=True)
    y_axis = y_axis._replace(range=charts.data_range(values, y_axis))
    panels = ''
    for part, title in titles.items():
        series = [
            found.series(n, points=list(zip(a['timesteps'], a['error'][part], strict=True)))
            for n, a in found.analyses.items()
        ]
        panels += charts.line_chart(series, _TIME, y_axis, title=title, **_PANEL)
    return figure(
        f'{charts.legend(series)}<div class="panels">{panels}</div>',
        '|student − teacher|² / |teacher|² of the predicted noise, on the teacher’s own '
        'trajectory. Whichever is higher, weights alone or activations alone, deserves more bits.',
    )


def sensitivity_section(found: Artefacts) -> str:
    """The layers that cost most when they alone are quantized."""
    if not found.analyses:
        return absent('No error analysis yet', 'analyse')
    values, series = _layer_values(found, 'sensitivity')
    last = series[-1].name
    most = sorted(values, key=lambda p: values[p].get(last, 0.0), reverse=True)
    rows = {path: values[path] for path in most[:NUM_SENSITIVE_LAYERS]}
    analysis = found.analyses[last]
    times = ', '.join(map(str, analysis['sensitivity_timesteps']))
    chart = charts.dot_chart(rows, series, Axis('relative squared error', log=True))
    return figure(
        f'<div>{charts.legend(series)}{chart}</div>',
        f'Error of the prediction when this layer alone, its kernel and its inputs, is quantized '
        f'(mean over t = {times}); the {len(rows)} largest of {escape(last)}. The first rows are '
        f'where a rule with more bits helps most.',
        'beside',
    )


def kernel_section(found: Artefacts) -> str:
    """How far every quantized kernel is from the teacher's."""
    if not found.analyses:
        return absent('No error analysis yet', 'analyse')
    values, series = _layer_values(found, 'weight_error')
    if not values:
        return '<p class="absent">No student of this run quantizes weights.</p>'
    axis = Axis('|W − Ŵ|² / |W|²', log=True)
    return figure(
        f'{charts.legend(series)}<div class="scroll"><div class="strip">'
        f'{charts.strip_chart(values, series, axis)}</div></div>',
        'One column per layer in the order of execution. Rounding alone sets the level of a bit '
        'width; a learnt student may move further from the teacher’s weights and still predict '
        'better. Dots of students with equal kernels cover each other.',
    )


def _layer_values(found: Artefacts, key: str) -> tuple[dict[str, dict[str, float]], list[Series]]:
    values: dict[str, dict[str, float]] = {}
    for name, analysis in found.analyses.items():
        for path, layer in analysis['layers'].items():
            if layer[key] is not None:
                values.setdefault(path, {})[name] = layer[key]
    return values, [found.series(name) for name in found.analyses]


def plan_section(found: Artefacts) -> str:
    """Bits, megabytes and exempt layers of every student."""
    if not found.exports:
        return absent('No exports yet', 'export')
    heading = ''.join(
        f'<th scope="col">{title}</th>'
        for title in ('student', 'layers', 'kernels MB', 'activation scales', 'left in float')
    )
    body = details = ''
    layers = quantizable_layers(next(iter(found.exports.values())))
    for name in (n for n in found.students if n in found.exports):
        plan = found.exports[name].plan
        known = split_layers(layers, plan)
        counts: dict[str, int] = {}
        for path in known:
            spec = plan.get(path)
            width = 'float' if spec is None else _describe_bits(spec)
            counts[width] = counts.get(width, 0) + 1
        sizes = np.sum([kernel_bytes(layer, plan.get(p)) for p, layer in known.items()], axis=0)
        scales = sum(
            table['scale'].size for t in found.exports[name].tables.values() for table in t.values()
        )
        kinds = [path.rpartition('/')[2] for path in known if path not in plan]
        exempt = ', '.join(f'{kinds.count(kind)} × {kind}' for kind in dict.fromkeys(kinds))
        bits = '<br>'.join(f'{count} × {escape(width)}' for width, count in counts.items())
        body += (
            f'<tr><th scope="row"><span class="name {found.series(name).color}">{escape(name)}'
            f'</span><small>{escape(describe_student(found.student_config(name)))}</small></th>'
            f'<td>{bits}</td><td>{sizes[1] / 1e6:.2f}<small>of {sizes[0] / 1e6:.2f}</small></td>'
            f'<td>{scales}</td><td class="paths">{escape(exempt) or "–"}</td></tr>'
        )
        lines = '\n'.join(plan_table(known, plan))
        details += (
            f'<details><summary>Every layer of {escape(name)}</summary>'
            f'<pre>{escape(lines)}</pre></details>'
        )
        if name in found.implementations:
            lines = '\n'.join(implementation_table(found.implementations[name]))
            details += (
                f'<details><summary>What ran each layer of {escape(name)} while it sampled'
                f'</summary><pre>{escape(lines)}</pre></details>'
            )
    return (
        figure(
            f'<div class="scroll"><table class="plan"><thead><tr>{heading}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>',
            'W is the width of a layer’s weights, A of its inputs; the remaining parameters '
            '(biases, norms, embeddings) stay in float and are part of the file’s size only.',
        )
        + details
    )


def _describe_bits(spec: LayerSpec) -> str:
    weight, inputs = (
        f'{s.bits}' if s is not None else ' float' for s in (spec.weight, spec.inputs)
    )
    return f'A{inputs}' if spec.weight is None else f'W{weight}A{inputs}'


def quantizable_layers(exported: exporting.Exported) -> dict[str, QuantizableLayer]:
    """Every layer of the float network that could be quantized, in the order of execution."""
    network, info = exported.network, exported.info
    params = denoisers.param_shapes(network, info)
    return denoisers.quantizable(denoisers.float_denoiser(network, params, info))
