import types

import jax
import pytest

from kernels import gpu


def test_the_target_is_a_gpu_inside_its_block_only():
    assert gpu.current() is None
    with gpu.targeting(89, 'NVIDIA GeForce RTX 4090'):
        assert gpu.current() == (89, 'NVIDIA GeForce RTX 4090', 1)
    assert gpu.current() is None


@pytest.mark.parametrize(
    ('capability', 'expected'),
    [('8.6', (86, 'GPU A', 8)), ('12.0', (120, 'GPU A', 8)), ('gfx942', None)],
)
def test_the_gpu_here_is_read_from_jax_if_it_is_of_nvidia(capability, expected, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability, device_kind='GPU A')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'devices', lambda: [device] * 8)
    assert gpu.current() == expected
