import dataclasses
import json

import jax
import pytest

from dmq_jax import denoisers, exporting, inspect
from dmq_jax.config import QuantConfig
from tests import tiny, tiny_checkpoints


def test_a_float_network_is_described_and_nothing_of_it_is_kept(tmp_path, capsys):
    folder = tiny_checkpoints.ddpm_folder(tmp_path)
    assert inspect.main([str(folder), '--batch-size=2']) == 0
    out = capsys.readouterr().out
    for text in ('family       ddpm', 'images (8, 8, 3)', 'linear, 1000', 'paper', 'full'):
        assert text in out


def test_what_is_not_there_ends_in_a_message(tmp_path, capsys):
    assert inspect.main([str(tmp_path / 'absent')]) == 2
    assert 'expected a bundled name' in capsys.readouterr().err


def test_an_export_is_described_with_its_plan(tmp_path, capsys):
    plan, bound = tiny.rounded()
    model = exporting.make(tiny.teacher(), plan, bound, tiny.calibration().timesteps, 'nearest')
    exporting.save(tmp_path / 'export', model, {'method': 'round_to_nearest'})
    assert inspect.main([str(tmp_path / 'export')]) == 0
    out = capsys.readouterr().out
    assert 'round_to_nearest' in out and 'conv_in' in out
    size = json.loads((tmp_path / 'export/manifest.json').read_text())['size_bytes']
    assert f'{size / 1e6:.1f} MB' in out
    chosen = out[out.index('implementation') :].splitlines()
    (line,) = [line for line in chosen if line.startswith('conv_in ')]
    assert ' xla ' in line and 'int_conv' in line and 'the first that can run' in line


def test_sizes_are_those_of_the_packed_weights():
    teacher = tiny.teacher()
    layers = denoisers.quantizable(teacher)
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(teacher.params))
    plan, bound = tiny.rounded(weight_bits=8)
    model = exporting.make(teacher, plan, bound, tiny.calibration().timesteps, 'nearest')
    tables = sum(
        array.size * (4 if field == 'scale' else 1)
        for roles in model.tables.values() for table in roles.values()
        for field, array in table.items()
    )  # fmt: skip
    expected = inspect.quantized_bytes(layers, plan, total)
    assert exporting.size_bytes(model) == expected + tables + model.timesteps.nbytes


def test_activations_grow_with_the_image():
    teacher = tiny.teacher()
    large = dataclasses.replace(teacher.info, image_shape=(16, 16, 1))
    small = inspect.measure_activations(teacher)
    grown = inspect.measure_activations(teacher._replace(info=large))
    assert small.largest < small.total
    assert 3 < grown.total / small.total < 17  # attention grows with the square of the pixels


@pytest.mark.parametrize('coverage', ['paper', 'full'])
def test_narrower_weights_are_smaller(coverage):
    layers = denoisers.quantizable(tiny.teacher())
    sizes = [
        inspect.quantized_bytes(
            layers, denoisers.make_plan(layers, QuantConfig(weight_bits=bits, coverage=coverage)), 0
        )
        for bits in (8, 4, 2)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
