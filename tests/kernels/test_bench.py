import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dmq_jax.models.ddpm_unet import DDPMUNet
from kernels import bench, gpu, timing
from kernels.layer_lists import NETWORKS, Conv, Layer, Product

SMALL = (
    Layer('conv', 1, Conv(6, 6, 32, 32, 3, 1)),
    Layer('strided', 1, Conv(6, 6, 8, 8, 3, 2)),
    Layer('dense', 1, Product((), 5, 7, 8)),
    Layer('attention', 1, Product((2,), 5, 7, 8)),
)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """No second is spent on finding what this machine can do at most."""
    monkeypatch.setattr(bench, '_SQUARE', 256)
    monkeypatch.setattr(bench, '_COPY', 2**20)


@pytest.mark.parametrize('layer', SMALL, ids=lambda layer: layer.name)
@pytest.mark.parametrize('mode', bench.MODES)
def test_every_implementation_times_the_same_numbers(layer, mode):
    results = [
        jax.jit(function)(*operands)
        for function, operands in (
            bench.integer_call(layer.shape, 2, mode, name) for name in ('xla', 'reference')
        )
    ]
    np.testing.assert_array_equal(*results)
    function, operands = bench.float_call(layer.shape, 2, 'float32')
    assert jax.eval_shape(function, *operands).shape == results[0].shape


def test_layers_are_those_of_the_cifar_unet():
    found = set()

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == '__call__':
            _, height, width, channels = args[0].shape
            found.add((height, width, channels, context.module.features))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda x, t: DDPMUNet().init(jax.random.key(0), x, t, None),
            jnp.zeros((1, 32, 32, 3)), jnp.zeros((), jnp.int32),
        )  # fmt: skip
    listed = {
        layer.shape[:4] for layer in NETWORKS['cifar10'].layers if isinstance(layer.shape, Conv)
    }
    assert listed and listed <= found


def test_names_of_a_network_are_unique():
    for network in NETWORKS.values():
        names = [layer.name for layer in network.layers]
        assert len(set(names)) == len(names) and 0 < network.share <= 1


def test_a_table_and_json_hold_what_was_measured_and_why_the_rest_was_not(tmp_path, capsys):
    file = tmp_path / 'bench.json'
    name = 'conv_4x4_256_256_k3'
    arguments = ['--networks', 'cifar10', '--layers', name, '--batch-size', '1', '--rounds', '2']
    bench.main([*arguments, '--modes', 'W4A4', '--json', str(file)])
    out = capsys.readouterr().out
    assert f'| {name} | 11 | xla W4A4 |' in out and f'| {name} | 11 | float32 |' in out
    assert '| triton W4A4 |' not in out and 'not measured, triton W4A4: triton: no NVIDIA' in out
    (row,) = json.loads(file.read_text())['layers']
    assert set(row['timings']) == {'float32', 'bfloat16', 'xla W4A4'}
    taken = row['timings']['xla W4A4']
    assert taken['median_s'] > 0
    bound = row['operations'] / json.loads(file.read_text())['ceilings']['W8A8']
    assert taken['roofline_share'] >= bound / taken['median_s'] * (1 - 1e-6)


def test_a_gpu_with_4_bit_instructions_has_a_ceiling_of_its_own(monkeypatch):
    fixed = timing.Timing(0.0, 1.0)
    monkeypatch.setattr(timing, 'measure', lambda calls, **_: dict.fromkeys(calls, fixed))
    shape = Product((), 4096, 4096, 4096)
    for capability, factor in ((86, 2), (90, 1)):
        with gpu.targeting(capability):
            ceilings = bench.measure_ceilings(num_rounds=1)
        shares = [bench.roofline_share(shape, 1, f'triton {m}', 1.0, ceilings)
                  for m in ('W8A8', 'W4A4')]  # fmt: skip
        assert shares[0] == pytest.approx(factor * shares[1])


def test_unknown_layers_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(['--networks', 'cifar10', '--layers', 'conv_9x9'])
    assert 'expected some of' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(['--rounds', '0'])
    assert 'expected at least 1' in capsys.readouterr().err
