"""One integer step of a denoiser, compiled by XLA for devices that are not there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOAT_PRODUCT = re.compile(r'= (?:f|bf)\d+\S* (?:dot|convolution)\(')
INTEGER_PRODUCT = re.compile(r'= s32\S* (?:dot|convolution)\(')


def compile_step(*arguments, **environment):
    """The optimised HLO of `ahead_of_time_worker`."""
    done = subprocess.run(
        [sys.executable, '-m', 'tests.kernels.ahead_of_time_worker', *arguments],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not is_installed('libtpu'), reason='needs libtpu (requirements-tpu.txt)')
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_a_step_for_a_tpu_has_integer_products_alone(topology):
    # No TPU is asked for its name, and none of its machines for its place among others.
    hlo = compile_step(
        'tpu', topology, TPU_SKIP_MDS_QUERY='1', TPU_WORKER_ID='0',
        TPU_WORKER_HOSTNAMES='localhost', TPU_ACCELERATOR_TYPE='v5litepod-4',
    )  # fmt: skip
    assert len(INTEGER_PRODUCT.findall(hlo)) > 10
    assert FLOAT_PRODUCT.findall(hlo) == []


GPU_PACKAGES = ('triton', 'jax_triton', 'jax_plugins.xla_cuda13', 'jax_cuda13_plugin')


@pytest.mark.skipif(
    not all(map(is_installed, GPU_PACKAGES)),
    reason='needs triton, jax-triton, jax-cuda13-plugin and jax-cuda13-pjrt (--no-deps)',
)
@pytest.mark.parametrize('implementation', ['xla', 'triton'])
def test_a_step_for_a_gpu_has_integer_products_alone(implementation, tmp_path):
    # The two files of CUDA that XLA needs to compile are in Triton's wheel.
    nvidia = Path(importlib.util.find_spec('triton').origin).parent / 'backends' / 'nvidia'
    for source, link in (
        (nvidia / 'bin' / 'ptxas', tmp_path / 'bin' / 'ptxas'),
        (nvidia / 'lib' / 'libdevice.10.bc', tmp_path / 'nvvm' / 'libdevice' / 'libdevice.10.bc'),
    ):
        link.parent.mkdir(parents=True)
        link.symlink_to(source)
    flags = f'--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={tmp_path}'
    hlo = compile_step('cuda', XLA_FLAGS=flags, KERNELS_IMPLEMENTATION=implementation)
    products = INTEGER_PRODUCT if implementation == 'xla' else re.compile('"triton_kernel_call"')
    assert len(products.findall(hlo)) > 10
    assert FLOAT_PRODUCT.findall(hlo) == []
    assert 'cublas' not in hlo and 'cudnn' not in hlo
