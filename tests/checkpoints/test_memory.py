import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmq_jax.models import dit_weights
from dmq_jax.models.dit import DiT, position_features
from dmq_jax.models.torch_weights import expected_tensors
from tests import tiny_checkpoints as tiny

ROOT = Path(__file__).parents[2]
# Beside the parameters: a fourth of them, and this, for what tracing a network and reading one
# tensor take. Two copies of the network, or the file still mapped, would be far beyond.
SHARE, CONSTANT_MB = 1.25, 100

SCRIPT = """
import sys
import jax
from dmq_jax.network_bench import peak_rss_mb
from dmq_jax.teachers import load_teacher

jax.block_until_ready(jax.numpy.zeros(1))
before = peak_rss_mb()
teacher = load_teacher(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(teacher.params)
after = peak_rss_mb()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(teacher.params))
print(after - before, size / 1e6)
"""


def write_checkpoint(folder, container, num_layers, **beside):
    """An original DiT, 384 wide, all weights alike: 11 MB a layer; `beside`: of a file of torch."""
    network = DiT(num_layers=num_layers, num_heads=6, head_dim=64, num_classes=10, sample_size=32)
    wanted = expected_tensors(dit_weights._dit_shapes(network), dit_weights.original_dit_source)
    # Written bytes, not zeros that a file system need not store.
    tensors = {name: np.full(shape, 0.01, np.float32) for name, shape in wanted.items()}
    positions = position_features((16, 16), 384, base_size=16, scale=1.0)
    tensors['pos_embed'] = np.asarray(positions)[None]
    file = folder / f'DiT.{container}'
    if container == 'safetensors':
        save_file(tensors, file)
        return file
    pytest.importorskip('torch', reason='writes the file that is read without it')
    return tiny.save_torch(file, {'state_dict': tensors, **beside} if beside else tensors)


def grown_and_size_mb(file, dtype):
    """By how much a process grows that loads the teacher in `file`, and how large that is."""
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, str(file), dtype], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return map(float, done.stdout.split())


@pytest.mark.parametrize(
    'container, dtype, num_layers',
    [
        ('pt', 'float32', 24),
        ('safetensors', 'bfloat16', 24),
        pytest.param('pt', 'float32', 100, marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_the_teacher(tmp_path, container, dtype, num_layers):
    file = write_checkpoint(tmp_path, container, num_layers)
    grown_mb, size_mb = grown_and_size_mb(file, dtype)
    assert size_mb > (200 if dtype == 'float32' else 100)
    assert grown_mb < SHARE * size_mb + CONSTANT_MB, f'{grown_mb:.0f} MB for {size_mb:.0f} MB'


def test_what_training_saved_beside_the_weights_is_not_read(tmp_path):
    moments = {i: {'exp_avg': np.full((2500, 2500), 0.01, np.float32)} for i in range(16)}
    file = write_checkpoint(
        tmp_path, 'ckpt', num_layers=1, optimizer_states=[{'state': moments, 'param_groups': []}]
    )
    grown_mb, size_mb = grown_and_size_mb(file, 'float32')
    limit_mb = SHARE * size_mb + CONSTANT_MB
    assert file.stat().st_size / 1e6 > 3 * limit_mb
    assert grown_mb < limit_mb, f'{grown_mb:.0f} MB for {size_mb:.0f} MB'
