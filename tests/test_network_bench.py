"""The benchmark of networks: every case is a real network, and every number is measured."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmq_jax import network_bench
from dmq_jax.models import adm_weights, dit_weights
from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.autoencoder import AutoencoderKL
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.models.torch_weights import expected_tensors
from dmq_jax.network_bench import Case
from dmq_jax.runtime import memory

# Parameters in millions, as published or counted by diffusers (decoders: their half alone).
PARAMETERS = {
    'ddim_cifar10': 35.7, 'adm_imagenet64': 295.9, 'adm_imagenet256': 553.8,
    'ldm_imagenet256': 400.9, 'ldm_bedrooms': 274.1, 'sd15': 859.5, 'sdxl': 2567.5,
    'dit_imagenet256': 674.8, 'pixart': 610.9, 'kl_f8_decode': 49.5, 'vq_f4_decode': 33.0,
}  # fmt: skip

TINY = {
    'ddpm': Case(
        DDPMUNet(channels=(8,), layers_per_block=1, num_groups=4, down_attention=(True,)),
        network_bench.ddpm_weights.diffusers_source, 8,
    ),
    'adm': Case(
        ADMUNet(channels=(8,), num_blocks=1, attention=(True,), num_heads=(2,), num_groups=4,
                num_classes=3, out_channels=6),
        lambda path: adm_weights.adm_source(
            path, network=TINY['adm'].network, new_attention_order=True), 4,
    ),
    'ldm': Case(
        LDMUNet(channels=(8,), num_blocks=1, depth=(1,), num_heads=(2,), context_dim=6,
                added_dim=28, size_features=4, num_groups=4),
        network_bench.ldm_weights.diffusers_source, 4, stored='float16',
    ),
    'dit': Case(
        DiT(num_layers=1, num_heads=2, head_dim=4, sample_size=4, num_classes=3),
        dit_weights.original_dit_source, 4,
    ),
    'pixart': Case(
        PixArt(num_layers=1, num_heads=2, head_dim=4, sample_size=4, caption_channels=6),
        dit_weights.diffusers_pixart_source, 4,
    ),
    'kl': Case(
        AutoencoderKL(channels=(8, 8), layers_per_block=1, num_groups=4),
        network_bench.autoencoder_weights.diffusers_autoencoder_source, 4, 'decode',
    ),
}  # fmt: skip


# Tracing them takes seconds. Without 'slow', tests/models/test_adm_weights.py, test_ldm_weights.py
# and test_dit_weights.py compare these networks with the published ones tensor by tensor.
LARGE = (
    'adm_imagenet64', 'adm_imagenet256', 'ldm_imagenet256', 'ldm_bedrooms',
    'sd15', 'sdxl', 'pixart',
)  # fmt: skip


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in network_bench.CASES],
)
def test_every_case_is_the_published_network(name):
    assert network_bench.CASES.keys() == PARAMETERS.keys()
    shapes = network_bench.case_shapes(network_bench.make_case(name))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 1) == PARAMETERS[name]


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="network='sd3': expected one of ddim_cifar10"):
        network_bench.make_case('sd3')


@pytest.mark.parametrize('stored', ['float32', 'float16'])
def test_a_written_file_has_every_tensor_and_is_read_by_others(tmp_path, stored):
    expected = {'a.weight': (3, 5), 'norm.weight': (7,), 'norm.bias': (7,), 'scalar': ()}
    network_bench.write_random(tmp_path / 'x.safetensors', expected, stored)
    tensors = load_file(tmp_path / 'x.safetensors')
    assert {name: array.shape for name, array in tensors.items()} == expected
    assert {array.dtype.name for array in tensors.values()} == {stored}
    assert abs(tensors['norm.weight'].mean() - 1) < 0.1 and abs(tensors['norm.bias'].mean()) < 0.1


@pytest.mark.parametrize('case', TINY.values(), ids=TINY)
def test_one_program_serves_all_timesteps_conditions_and_images(tmp_path, case):
    file = tmp_path / 'x.safetensors'
    expected = expected_tensors(network_bench.case_shapes(case), case.source)
    network_bench.write_random(file, expected, case.stored)
    params = network_bench.read_random(case, file, 'float32')
    compiled, arguments, seconds = network_bench.compile_forward(case, params, batch_size=2)
    assert seconds > 0
    # A compiled program refuses whatever it was not compiled for.
    _, inputs, named = arguments
    for t in (0, 999):
        others = [inputs[0] + t, *(jnp.asarray(t, jnp.int32) for _ in inputs[1:])]
        changed = {key: value * 0 + value.dtype.type(1) for key, value in named.items()}
        assert np.isfinite(compiled(params, tuple(others), changed)).all()


def test_a_measurement_has_all_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(network_bench, 'make_case', lambda name: TINY['dit'])
    loaded = {'load_s': 1.0, 'load_peak_ratio': 1.1}
    done = subprocess.CompletedProcess([], 0, stdout='noise\n' + json.dumps(loaded))
    monkeypatch.setattr(network_bench.subprocess, 'run', lambda *a, **k: done)
    row = network_bench.measure('dit', num_rounds=2, folder=tmp_path)
    assert row.parameters > 100 and row.program_mb > 0 and row.compile_s > 0
    assert 0 < row.forward_s and row.forward_cpu_s >= 0 and row.torch_forward_s is None
    assert (row.load_s, row.load_peak_ratio) == (1.0, 1.1)
    columns = [
        line.count('|') for line in (*network_bench.HEADER, network_bench.markdown('d', row))
    ]
    assert len(set(columns)) == 1
    full = row._replace(
        torch_load_s=2.0, torch_forward_s=4 * row.forward_s, torch_layout='channels last',
        torch_forward_cpu_s=2 * row.forward_cpu_s + 1e-9,
    )  # fmt: skip
    assert '0.25' in network_bench.markdown('d', full)


def test_the_peak_of_a_process_is_its_own_and_not_its_parents():
    held = np.ones(64 * 2**20, np.uint8)
    script = 'from dmq_jax.runtime import memory; print(memory.peak_rss_mb())'
    command = [sys.executable, '-c', f'{script}']
    mine = memory.peak_rss_mb()
    child = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert held.sum() and mine > 64
    grown = f'import numpy; x = numpy.ones(100 * 2**20, numpy.uint8); {script}'
    command = [sys.executable, '-c', grown]
    more = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # The array, within what the allocator and the interpreter vary.
    assert abs(more - child - 104.9) < 20


@pytest.mark.slow
@pytest.mark.parametrize('name', network_bench.CASES)
def test_the_contestant_in_torch_is_a_network_of_the_same_size(name):
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    torch = pytest.importorskip('torch', reason='torch is the oracle here')
    from tests.oracles.bench_networks import NETWORKS

    with torch.device('meta'):
        network = NETWORKS[name]()
    parts = ('decoder', 'post_quant_conv', 'quantize') if name.endswith('_decode') else ('',)
    count = sum(p.numel() for n, p in network.named_parameters() if n.startswith(parts))
    if name == 'dit_imagenet256':
        # Every block embeds timestep and class by itself.
        own = sum(
            p.numel() for n, p in network.named_parameters()
            if '.norm1.emb.' in n and not n.startswith('transformer_blocks.0.')
        )  # fmt: skip
        count -= own
    assert round(count / 1e6, 1) == PARAMETERS[name]
