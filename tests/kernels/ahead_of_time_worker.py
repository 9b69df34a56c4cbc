"""Compiles one integer step of a denoiser for a device that is not there; prints optimised HLO.

`python -m tests.kernels.ahead_of_time_worker tpu v5e:2x2` or `... cuda`. In a process of its own:
environment variables say how the plugins load, and what is traced for another device must not meet
the caches of a test.
"""

import contextlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dmq_jax import denoisers, exporting
from dmq_jax.config import QuantConfig
from kernels import gpu
from tests import tiny
from tests.kernels.test_exported_student import NUM_ROWS, random_bound

# NVIDIA's GA102 (RTX 3090, A6000): compute capability 8.6.
GA102 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536
  shared_memory_per_block: 49152 shared_memory_per_core: 102400
  shared_memory_per_block_optin: 101376 core_count: 84 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 768096000000 l2_cache_size: 6291456 clock_rate_ghz: 1.8
  device_memory_size: 51050250240 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 8 minor: 6 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "GA102"
"""


def main(platform: str, chips: str = '') -> None:
    """Prints the HLO of the step with every layer on 4-bit weights and 8-bit activations."""
    if platform == 'tpu':
        topology = topologies.get_topology_desc(chips, 'tpu')
        target = contextlib.nullcontext()
    else:
        topology = topologies.get_topology_desc(
            'gpu', 'cuda', target_config=GA102, topology='1x1x1'
        )
        target = gpu.targeting(86)
    teacher = tiny.teacher()
    layers = denoisers.quantizable(teacher)
    quant = QuantConfig(weight_bits=4, activation_bits=8, coverage='full')
    plan = denoisers.make_plan(layers, quant)
    timesteps = np.linspace(49, 0, NUM_ROWS).round().astype(np.int32)
    model = exporting.make(teacher, plan, random_bound(layers, plan), timesteps, 'nearest')
    student = exporting.denoiser(model)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a), sharding=sharding),
        (student.params, *denoisers.example_inputs(teacher.info, batch_size=8)),
    )
    backend = 'gpu' if platform == 'cuda' else 'tpu'
    with target, mock.patch.object(jax, 'default_backend', lambda: backend):
        traced = jax.jit(student.predict).trace(*arguments)
        print(traced.lower().compile().as_text())


if __name__ == '__main__':
    main(*sys.argv[1:])
