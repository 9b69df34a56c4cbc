"""Compiled programs: what the compiler is told, and the memory that it says one takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def step_options() -> dict[str, Any] | None:
    """What the compiler is told of a train step.

    XLA of jax 0.10 orders operations for concurrency unless told, at twice the memory: 1.58 GB of
    temporaries instead of 0.81 GB (loss and gradients, CIFAR-10 U-Net, batch 8). Later ones need
    no telling: with it the step takes 4.9 teacher forwards, without 4.3, in the same memory.
    """
    if jax.default_backend() == 'cpu' and jax.__version_info__ < (0, 11):
        return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    return None


@functools.cache
def network_options() -> dict[str, Any] | None:
    """What the compiler is told of a program that runs a network forwards and nothing else.

    On CPU XLA hands convolutions to YNNPACK, whose float32 kernels are slower than its own; its
    products are faster. GFLOP/s of two cores, YNNPACK's and XLA's, of 3x3 on jax 0.10.2: 512x512
    pixels, 128 channels 84 and 135; 256x256, 256 99 and 144; 64x64, 512 137 and 159; 16x16, 1024
    75 and 131; 8x8, 1280 36 and 118; 1x1 at 256x256, 512 to 256 41 and 124. Jax 0.12.0 likewise,
    but alike from 64x64 on. Slower is only a last convolution to 3 channels: 52 and 23.

    Seconds of both cores for whole networks, told nothing and told this: ADM at 256 pixels 36.4
    and 33.0, at 64 3.16 and 3.09; the decoder of Stable Diffusion 42.7 and 32.7, its U-Net 11.9 and
    11.4; LDM 3.01 and 2.93; VQ-f4 8.80 and 8.50; DDPM 0.195 and 0.190; Inception, 16 images 4.68
    and 2.74. Were products XLA's too, Stable Diffusion's U-Net would take 13.4. Integer steps
    change by less than they vary (CIFAR-10, batch 8: 0.52 and 0.51 s).

    Returns:
      Options for `jax.jit`; None on other back ends, and where XLA does not know them.
    """
    options = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}
    return options if jax.default_backend() == 'cpu' and are_known(options) else None


def are_known(options: dict[str, Any]) -> bool:
    """Whether this version of XLA has the compiler options: experimental ones may disappear."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


class NetworkProgram:
    """`jax.jit` with `network_options`, which are asked for at the first call.

    A module may so define one: to ask starts the back end, which nobody shall by an import.

    Attributes:
      function: what is compiled. JAX refuses options of programs within programs, so that these
        call the function.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any):
        """Of a function and the other arguments of `jax.jit`."""
        functools.update_wrapper(self, function)
        self.function, self._settings = function, settings

    @functools.cached_property
    def jitted(self) -> Any:
        """What `jax.jit` gives."""
        return jax.jit(self.function, compiler_options=network_options(), **self._settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function."""
        return self.jitted(*args, **kwargs)


def peak_bytes(compiled: Any) -> int:
    """Memory of a program while it runs: arguments, results and temporaries.

    Args:
      compiled: what `jit(...).lower(...).compile()` gave.
    """
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    # Donated arguments lie in the same memory as the results.
    return size + memory.output_size_in_bytes - memory.alias_size_in_bytes
