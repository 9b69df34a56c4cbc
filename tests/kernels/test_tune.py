import json
import sys

import jax
import pytest

from kernels import gpu, timing, triton_tiles, tune
from kernels.int_conv.shapes import REAL as CONVOLUTIONS
from kernels.int_matmul.shapes import REAL as PRODUCTS

pytestmark = pytest.mark.usefixtures('interpreted')


def test_the_fastest_candidate_of_each_class_is_written_and_then_used(
    tmp_path, monkeypatch, interpreted
):
    fastest = triton_tiles.CANDIDATES[-1]

    def measure(variants, *, num_rounds, num_calls):
        ((function, operands),) = variants.values()
        jax.eval_shape(function, *operands)  # the shapes and the mode are right
        forced = triton_tiles.lookup('', '', 1, 1, 1, capability=86, device_kind='')
        return {'call': timing.Timing(0.0, 1.0 if forced == fastest else 2.0)}

    monkeypatch.setattr(timing, 'measure', measure)
    monkeypatch.setattr(tune, 'PRODUCTS', {'small': PRODUCTS['time_embedding']})
    monkeypatch.setattr(tune, 'CONVOLUTIONS', {'small': CONVOLUTIONS['conv_4x4_256_b8']})
    monkeypatch.setattr(sys, 'argv', ['tune', '--out', str(tmp_path)])
    with gpu.targeting(86, 'GPU A'):
        tune.main()
    (path,) = tmp_path.glob('*.json')
    content = json.loads(path.read_text())
    assert content['device_kind'] == 'GPU A'
    assert len(content['tiles']) == 6
    assert {tuple(tile) for tile in content['tiles'].values()} == {fastest}
    monkeypatch.setenv('KERNELS_TILES', str(tmp_path))
    got = triton_tiles.lookup('int_conv', 'W4A4', 128, 256, 128, capability=86, device_kind='GPU A')
    assert got == fastest


def test_without_a_gpu_tuning_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['tune'])
    monkeypatch.setattr(gpu, 'current', lambda: None)
    with pytest.raises(SystemExit):
        tune.main()
    assert 'no NVIDIA GPU here' in capsys.readouterr().err
