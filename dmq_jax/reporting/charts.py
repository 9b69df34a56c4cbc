"""Charts as SVG and images as data URIs: text that any browser shows, with nothing to load.

Colours are CSS classes, so that a page decides them once for light, dark and print: a series with
the colour 'c2' is drawn in `--c2`. Hovering over a point shows its values.
"""

import base64
import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

STYLE = """
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { font: 11px var(--sans); fill: var(--muted); }
svg.chart text.title { font-weight: 600; font-size: 12px; fill: var(--ink); }
svg.chart text.row { font: 10.5px var(--mono); fill: var(--ink); }
svg.chart .rule { stroke: var(--rule); stroke-width: 1; }
svg.chart .band { fill: var(--band); }
svg.chart .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
svg.chart .dashed { stroke-dasharray: 2 5; }
svg.chart .dot { fill: var(--c); }
svg.chart .hit { fill: transparent; }
svg.chart .hit:hover { fill: var(--c); fill-opacity: .35; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0 0 .8rem; padding: 0;
  list-style: none; font-size: .82rem; color: var(--muted); }
.legend svg { width: 22px; height: 8px; margin-right: .45em; vertical-align: middle; }
.legend path { fill: none; stroke: var(--c); stroke-width: 3; stroke-linecap: round; }
.legend .dashed { stroke-dasharray: 1 6; }
"""

_WIDTH = 460  # in SVG units: on a phone, about one CSS pixel each
_MOST_HITS = 80  # points of a series that can be hovered over


class Series(NamedTuple):
    """A line, or the dots of one network.

    Attributes:
      name: in the legend.
      color: CSS class, 'c0' and so on.
      points: (x, y); those that are not finite are left out.
      dashed: for what a line started from.
      dotted: its points are shown, which a line of a single one needs.
    """

    name: str
    color: str
    points: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    dotted: bool = False


class Axis(NamedTuple):
    """One axis.

    Attributes:
      label: quantity and unit.
      log: logarithmic.
      reverse: large values first.
      from_zero: linear, starting at 0.
      range: (low, high); None takes that of the data.
    """

    label: str
    log: bool = False
    reverse: bool = False
    from_zero: bool = False
    range: tuple[float, float] | None = None


def format_number(value: float) -> str:
    """Three significant digits, without needless zeros: '12.3', '0.0042', '4.2e-06'."""
    if value == 0 or not math.isfinite(value):
        return f'{value:g}'
    if 1e-4 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f'{value:.{digits}f}'
        return text.rstrip('0').rstrip('.') if '.' in text else text
    return f'{value:.2g}'


def ticks(low: float, high: float, log: bool, most: int = 6) -> list[float]:
    """Round numbers within [low, high], at most about `most`."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [s * 10.0**d for d in decades for s in steps]
            found = [v for v in found if low * 0.999 <= v <= high * 1.001]
            if 2 <= len(found) <= most:
                return found
        # Many decades show some of them; less than one is as good as linear.
        if len(found) > most:
            return found[:: -(-len(found) // most)]
    raw = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10) if s * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def data_range(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """The range that an axis shows of `values`, a little wider than they are."""
    if axis.range is not None:
        return axis.range
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    if not finite:
        return (0.1, 1.0) if axis.log else (0.0, 1.0)
    low, high = min(finite), max(finite)
    if axis.log:
        # At least a factor of 2, so that an axis has ticks.
        margin = max((high / low) ** 0.06, math.sqrt(2 * low / high) if high < 2 * low else 1.0)
        return low / margin, high * margin
    if axis.from_zero:
        return 0.0, high * 1.08 if high > 0 else 1.0
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


class _Scale:
    """From the values of an axis to SVG units."""

    def __init__(self, axis: Axis, low: float, high: float, begin: float, end: float):
        self.log, self.low, self.high = axis.log, low, high
        self._begin, self._end = (end, begin) if axis.reverse else (begin, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._begin + share * (self._end - self._begin)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, most: int) -> list[float]:
        return ticks(self.low, self.high, self.log, most)


def line_chart(
    series: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    *,
    title: str = '',
    width: int = _WIDTH,
    height: int = 270,
) -> str:
    """Lines over a common x axis.

    Args:
      series: drawn in order, the last on top.
      x_axis: horizontal.
      y_axis: vertical.
      title: above the chart.
      width: in SVG units, of which 11 are the size of the text.
      height: likewise.
    """
    left, right, top, bottom = 46, 12, 44 if title else 28, 40
    x = _Scale(
        x_axis, *data_range([p[0] for s in series for p in s.points], x_axis), left, width - right
    )
    y = _Scale(
        y_axis, *data_range([p[1] for s in series for p in s.points], y_axis), height - bottom, top
    )
    parts = _y_ticks(y, left, width - right)
    for value in x.ticks(5):
        parts.append(_text(x(value), height - bottom + 17, format_number(value), 'middle'))
    parts.append(_text(width - right, height - 6, x_axis.label, 'end'))
    parts.append(_text(0, 30 if title else 14, y_axis.label))
    for one in series:
        points = [p for p in one.points if x.shows(p[0]) and y.shows(p[1])]
        path = 'M' + 'L'.join(f'{x(a):.1f},{y(b):.1f}' for a, b in points)
        if points:
            dashed = ' dashed' * one.dashed
            parts.append(f'<path class="line {one.color}{dashed}" d="{path}"/>')
        for a, b in points[:: max(1, len(points) // _MOST_HITS)]:
            note = f'{one.name}: {format_number(b)} at {format_number(a)}'
            if one.dotted:
                parts.append(_dot(x(a), y(b), one.color, note, radius=4.5))
            else:
                parts.append(_hit(x(a), y(b), one.color, note))
    return _svg(parts, height, title, width)


def dot_chart(rows: Mapping[str, Mapping[str, float]], series: Sequence[Series], axis: Axis) -> str:
    """One row per name with a dot per series, on a common horizontal axis.

    Args:
      rows: {row: {name of a series: value}}.
      series: names and colours; the last is drawn on top.
      axis: horizontal.
    """
    # Half the width is enough for the names: longer ones lose their beginning.
    longest = 36
    left = 14 + 6.4 * min(max(map(len, rows), default=0), longest)
    right, top, pitch = 16, 26, 21
    bottom = top + pitch * len(rows)
    x = _Scale(
        axis,
        *data_range([v for values in rows.values() for v in values.values()], axis),
        left,
        _WIDTH - right,
    )
    parts = []
    for value in x.ticks(5):
        at = f'{x(value):.1f}'
        parts.append(f'<path class="rule" d="M{at},{top - 4}V{bottom}"/>')
        parts.append(_text(x(value), top - 9, format_number(value), 'middle'))
    parts.append(_text(_WIDTH - right, bottom + 18, axis.label, 'end'))
    for index, (name, values) in enumerate(rows.items()):
        at = top + pitch * (index + 0.5)
        shown = name if len(name) <= longest else '…' + name[1 - longest :]
        parts.append(_text(left - 12, at + 3.5, shown, 'end', 'row'))
        found = [x(v) for v in values.values() if x.shows(v)]
        if len(found) > 1:
            parts.append(f'<path class="rule" d="M{min(found):.1f},{at}H{max(found):.1f}"/>')
        for one in series:
            if one.name in values and x.shows(values[one.name]):
                value = values[one.name]
                note = f'{name}, {one.name}: {format_number(value)}'
                parts.append(_dot(x(value), at, one.color, note, radius=4.5))
    return _svg(parts, bottom + 24, '')


def strip_chart(
    values: Mapping[str, Mapping[str, float]], series: Sequence[Series], axis: Axis
) -> str:
    """A narrow column per name with a dot per series, grouped by the first part of the names.

    Args:
      values: {'group/rest of the name': {name of a series: value}}, in the order shown.
      series: names and colours; the last is drawn on top.
      axis: vertical.
    """
    width, left, right, top, bottom, height = 2 * _WIDTH, 50, 12, 26, 30, 260
    y = _Scale(
        axis,
        *data_range([v for row in values.values() for v in row.values()], axis),
        height - bottom,
        top,
    )
    pitch = (width - left - right) / max(len(values), 1)
    parts = []
    begin, shaded, names = 0, True, list(values)
    for index in range(1, len(names) + 1):
        group = names[begin].partition('/')[0]
        if index < len(names) and names[index].partition('/')[0] == group:
            continue
        if shaded:
            at, size = left + pitch * begin, pitch * (index - begin)
            parts.append(
                f'<rect class="band" x="{at:.1f}" y="{top}" width="{size:.1f}" '
                f'height="{height - bottom - top}"/>'
            )
        # A group of few layers has no room for its name.
        if (index - begin) * pitch >= 6.5 * len(group):
            parts.append(_text(left + pitch * (begin + index) / 2, height - 12, group, 'middle'))
        begin, shaded = index, not shaded
    parts += _y_ticks(y, left, width - right)
    parts.append(_text(0, 14, axis.label))
    for index, (name, row) in enumerate(values.items()):
        for one in series:
            if one.name in row and y.shows(row[one.name]):
                note = f'{name}, {one.name}: {format_number(row[one.name])}'
                at = left + pitch * (index + 0.5)
                parts.append(_dot(at, y(row[one.name]), one.color, note, radius=3.5))
    return _svg(parts, height, '', width)


def legend(series: Sequence[Series]) -> str:
    """Names beside a stroke of their colour; equal entries once."""
    entries = dict.fromkeys((s.name, s.color, s.dashed) for s in series)
    items = [
        f'<li><svg class="{color}" viewBox="0 0 22 8" aria-hidden="true">'
        f'<path class="{"dashed" * dashed}" d="M2,4H20"/></svg>{html.escape(name)}</li>'
        for name, color, dashed in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def image_grid(images: UInt8[np.ndarray, 'R K H W C']) -> UInt8[np.ndarray, 'h w D']:
    """R rows of K images as one picture, with an alpha channel, one clear pixel between images."""
    rows, columns, height, width, channels = images.shape
    cell = np.zeros((rows, columns, height + 1, width + 1, channels + 1), np.uint8)
    cell[:, :, :-1, :-1, :-1] = images
    cell[:, :, :-1, :-1, -1] = 255
    picture = cell.swapaxes(1, 2).reshape(rows * (height + 1), columns * (width + 1), -1)
    return picture[:-1, :-1]


def data_uri(picture: UInt8[np.ndarray, 'h w D']) -> str:
    """A picture as a PNG in a `data:` URI; see `encode_png`."""
    return 'data:image/png;base64,' + base64.b64encode(encode_png(picture)).decode()


def encode_png(picture: UInt8[np.ndarray, 'h w D']) -> bytes:
    """The content of a PNG file.

    Args:
      picture: D is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).

    Raises:
      ValueError: another dtype or number of channels.
    """
    color_types = {1: 0, 2: 4, 3: 2, 4: 6}  # PNG specification, table 11.1
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in color_types:
        raise ValueError(f'{picture.dtype} {picture.shape}: expected uint8 [h, w, 1 to 4].')
    height, width, depth = picture.shape
    header = struct.pack('>IIBBBBB', width, height, 8, color_types[depth], 0, 0, 0)
    # Every line starts with its filter: 0, none.
    lines = np.concatenate(
        [np.zeros((height, 1), np.uint8), picture.reshape(height, width * depth)], axis=1
    )
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        _png_chunk(kind, content)
        for kind, content in (
            (b'IHDR', header),
            (b'IDAT', zlib.compress(lines.tobytes(), 9)),
            (b'IEND', b''),
        )
    )


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', check)


def _svg(parts: Sequence[str], height: float, title: str, width: float = _WIDTH) -> str:
    heading = _text(0, 12, title, css='title') if title else ''
    label = html.escape(title, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{label}">{heading}{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, content: str, anchor: str = 'start', css: str = '') -> str:
    attributes = f' class="{css}"' if css else ''
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>'
        f'{html.escape(content)}</text>'
    )


def _y_ticks(y: _Scale, left: float, right: float) -> list[str]:
    parts = []
    for value in y.ticks(5):
        parts.append(f'<path class="rule" d="M{left},{y(value):.1f}H{right}"/>')
        parts.append(_text(left - 7, y(value) + 3.5, format_number(value), 'end'))
    return parts


def _hit(x: float, y: float, color: str, note: str) -> str:
    return (
        f'<circle class="hit {color}" cx="{x:.1f}" cy="{y:.1f}" r="7">'
        f'<title>{html.escape(note)}</title></circle>'
    )


def _dot(x: float, y: float, color: str, note: str, *, radius: float) -> str:
    return (
        f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f'<title>{html.escape(note)}</title></circle>'
    )
