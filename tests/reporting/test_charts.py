import base64
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dmq_jax.reporting import charts
from dmq_jax.reporting.charts import Axis, Series

X, Y = Axis('x'), Axis('y')


def elements(svg, kind, css=''):
    root = ElementTree.fromstring(svg)
    return [e for e in root.iter(kind) if css in e.get('class', '').split() or not css]


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_a_picture_comes_back_from_its_data_uri(channels):
    image = pytest.importorskip('PIL.Image', reason='decodes the PNG independently')
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    kind, _, content = charts.data_uri(picture).partition(',')
    decoded = np.asarray(image.open(io.BytesIO(base64.b64decode(content))))
    assert kind == 'data:image/png;base64'
    np.testing.assert_array_equal(decoded.reshape(picture.shape), picture)


@pytest.mark.parametrize(
    'shape, dtype', [((4, 4), 'uint8'), ((4, 4, 5), 'uint8'), ((2, 2, 1), 'f4')]
)
def test_what_is_not_a_picture_is_refused(shape, dtype):
    with pytest.raises(ValueError, match='expected uint8'):
        charts.data_uri(np.zeros(shape, dtype))


def test_a_grid_keeps_every_pixel_and_is_clear_between_images():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5, 1)
    grid = charts.image_grid(images)
    assert grid.shape == (2 * 4 + 1, 3 * 5 + 2, 2)
    for row in range(2):
        for column in range(3):
            cell = grid[row * 5 : row * 5 + 4, column * 6 : column * 6 + 5]
            np.testing.assert_array_equal(cell[..., :1], images[row, column])
            assert (cell[..., 1] == 255).all()
    assert (grid[4, :, 1] == 0).all() and (grid[:, 5, 1] == 0).all()


@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('low, high', [(1e-7, 3e-2), (0.4, 0.9), (31, 34), (1, 1e6), (20, 100)])
def test_ticks_lie_within_the_range_and_are_few(low, high, log):
    found = charts.ticks(low, high, log)
    assert 2 <= len(found) <= 8
    assert found == sorted(found)
    assert low * 0.99 <= found[0] and found[-1] <= high * 1.01


@pytest.mark.parametrize(
    'value, text',
    [
        (0, '0'),
        (1000, '1000'),
        (0.5, '0.5'),
        (12.345, '12.3'),
        (0.00421, '0.00421'),
        (1e-6, '1e-06'),
    ],
)
def test_numbers_are_short(value, text):
    assert charts.format_number(value) == text


def test_a_line_runs_through_its_points_in_order():
    series = Series('a', 'c0', [(0, 0), (1, 2), (2, 1)])
    (line,) = elements(charts.line_chart([series], X, Y), 'path', 'line')
    x, y = np.array([p.split(',') for p in line.get('d')[1:].split('L')], float).T
    assert (np.diff(x) > 0).all() and np.isclose(x[1] - x[0], x[2] - x[1])
    # SVG counts y downwards.
    assert y[0] > y[2] > y[1]


def test_a_reversed_axis_runs_backwards():
    series = Series('a', 'c0', [(900, 1), (100, 2)])
    (line,) = elements(charts.line_chart([series], X._replace(reverse=True), Y), 'path', 'line')
    first, last = (float(p.split(',')[0]) for p in line.get('d')[1:].split('L'))
    assert first < last


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm():
    series = Series('a', 'c0', [(0, 0.0), (1, 1e-3), (2, float('nan')), (3, 1e-1)])
    svg = charts.line_chart([series], X, Y._replace(log=True))
    assert len(elements(svg, 'circle', 'hit')) == 2


@pytest.mark.parametrize('chart', [charts.dot_chart, charts.strip_chart])
def test_there_is_a_dot_for_every_value(chart):
    values = {'g/a': {'s': 1.0, 'r': 2.0}, 'g/b': {'s': 3.0}, 'h': {'r': 0.5}}
    svg = chart(values, [Series('s', 'c0'), Series('r', 'c1')], Axis('v', log=True))
    assert len(elements(svg, 'circle', 'c0')) == 2
    assert len(elements(svg, 'circle', 'c1')) == 2


def test_charts_of_nothing_are_still_charts():
    for svg in (
        charts.line_chart([Series('a', 'c0')], X, Y),
        charts.dot_chart({}, [], X),
        charts.strip_chart({}, [], X._replace(log=True)),
    ):
        assert elements(svg, 'text')


def test_names_are_escaped():
    name = '<b>&"'
    svg = charts.line_chart(
        [Series(name, 'c0', [(0, 1), (1, 2)])], Axis(name), Axis(name), title=name
    )
    assert '<b>' not in svg + charts.legend([Series(name, 'c0')])
    assert name in [e.text for e in elements(svg, 'text')]


def test_a_dotted_series_of_one_point_can_be_seen():
    one = charts.Series('a', 'c0', points=[(1.0, 2.0)])
    axes = charts.Axis('x'), charts.Axis('y')
    assert 'class="dot c0"' not in charts.line_chart([one], *axes)
    assert 'class="dot c0"' in charts.line_chart([one._replace(dotted=True)], *axes)
