"""Compiled programs: what the compiler is told, and the memory that it says one takes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dmq_jax.runtime import memory
from kernels.int_conv.xla import DIRECT_IS_FAST_ON_CPU


def step_options(*, has_integers: bool) -> dict[str, Any] | None:
    """What the compiler is told of a train step.

    XLA for CPU orders operations for concurrency unless told, and then holds more at once: with jax
    0.10.2 1.58 instead of 0.81 GB of temporaries (loss and gradients, CIFAR-10 U-Net, batch 8),
    with 0.12.0 1.04 instead of 0.66 GB (a step of EfficientDM there). It is no slower.

    Convolutions are XLA's own, as `network_options` has them. Most depends on it where kernels have
    gradients: YNNPACK takes 2 to 4 times as long for those (3x3, 128 to 512 channels). A step of
    EfficientDM at W4A4 takes 0.88 of its time so (CIFAR-10 U-Net, batch 8, jax 0.10.2, four cores).

    Args:
      has_integers: whether layers multiply int8; see `network_options`.
    """
    return (_ordering_options() | _library_options(has_integers=has_integers)) or None


@functools.cache
def _ordering_options() -> dict[str, Any]:
    options = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}
    return options if jax.default_backend() == 'cpu' and are_known(options) else {}


def network_options(weights: Any = ()) -> dict[str, Any] | None:
    """What the compiler is told of a program that runs a network forwards and nothing else.

    On CPU XLA hands convolutions to YNNPACK, whose float32 kernels are slower than its own; its
    products and sums are faster, and stay. GFLOP/s of two cores, YNNPACK's and XLA's, of 3x3 on
    jax 0.10.2: 512x512 pixels, 128 channels 84 and 135; 256x256, 256 99 and 144; 64x64, 512 137 and
    159; 16x16, 1024 75 and 131; 8x8, 1280 36 and 118; 1x1 at 256x256, 512 to 256 41 and 124. Jax
    0.12.0 likewise, but alike from 64x64 on. Slower is only a last convolution to 3 channels: 52
    and 23.

    Seconds of both cores for whole networks, told nothing and told this: ADM at 256 pixels 36.4
    and 33.0, at 64 3.16 and 3.09; the decoder of Stable Diffusion 42.7 and 32.7, its U-Net 11.9 and
    11.4; LDM 3.01 and 2.93; VQ-f4 8.80 and 8.50; DDPM 0.195 and 0.190; Inception, 16 images 4.68
    and 2.74. Were products XLA's too, Stable Diffusion's U-Net would take 13.4.

    Were sums its own, as they were when this was measured, DDPM would take 1.05 to 1.07 times as
    long: those of a normalization over pixels take 1.1 ms instead of 0.2 (8x32x32x128).

    From jax 0.11 on integers are told nothing: they have convolutions of int8, of which XLA's own
    are plain loops. The bundled network at W4A8, coverage 'full', takes 25 ms a step so, and 219
    with the option. Before, all their convolutions are products (`kernels.int_conv.xla`).

    Args:
      weights: of the network, arrays or their shapes; int8 or packed ones make it an integer one.

    Returns:
      Options for `jax.jit`; None on other back ends, and where XLA does not know them.
    """
    return _library_options(has_integers=_are_integers(weights)) or None


def _are_integers(weights: Any) -> bool:
    return any(leaf.dtype in (jnp.int8, jnp.uint8) for leaf in jax.tree.leaves(weights))


def _library_options(*, has_integers: bool) -> dict[str, Any]:
    return {} if has_integers and DIRECT_IS_FAST_ON_CPU else _float_options()


@functools.cache
def _float_options() -> dict[str, Any]:
    kinds = 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'
    options = {'xla_cpu_experimental_ynn_fusion_type': kinds}
    return options if jax.default_backend() == 'cpu' and are_known(options) else {}


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

    def __init__(
        self, function: Callable[..., Any], *, weights: int | None = None, **settings: Any
    ):
        """Of a function.

        Args:
          function: to be compiled.
          weights: place among its arguments of weights that may be integers; None: all are floats.
          **settings: other arguments of `jax.jit`.
        """
        functools.update_wrapper(self, function)
        self.function, self._weights, self._settings = function, weights, settings

    def jitted(self, weights: Any = ()) -> Any:
        """What `jax.jit` gives, the same for all weights of one kind; see `network_options`."""
        return self._untold if network_options(weights) is None else self._told

    @functools.cached_property
    def _told(self):
        return jax.jit(self.function, compiler_options=network_options(), **self._settings)

    @functools.cached_property
    def _untold(self):
        return jax.jit(self.function, **self._settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the function."""
        weights = () if self._weights is None else args[self._weights]
        return self.jitted(weights)(*args, **kwargs)


def call_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a compiled function that nobody will call again, of which nothing is kept.

    `jax.jit` keeps what it compiled as long as the function lives, and a method lives long: 200 MB
    for its `init` on the CIFAR-10 U-Net. This one lives no longer than the call.
    """
    return jax.jit(lambda *given: function(*given))(*arguments)


def copied(tree: Any) -> Any:
    """The arrays of `tree` anew, where they lie: by one program, not by one for every shape.

    What was not placed explicitly is not so afterwards: a step of such a copy and of arrays that
    are not would be compiled again for its own results, which all are.
    """
    placement = jax.tree.map(
        lambda leaf: leaf.sharding if getattr(leaf, 'committed', False) else None, tree
    )
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=placement)(tree)


def compile_alone(function: Any, *arguments: Any) -> Any:
    """What a `jax.jit` compiles to, for a program that is now to run for long.

    Of what the function was traced to nothing is kept: 110 MB for a fine-tuning step of the
    CIFAR-10 U-Net. Were it called itself, it would be traced again.
    """
    compiled = function.lower(*arguments).compile()
    function.clear_cache()
    memory.give_back()
    return compiled


def peak_bytes(compiled: Any) -> int:
    """Memory of a program while it runs: arguments, results and temporaries.

    Args:
      compiled: what `jit(...).lower(...).compile()` gave.
    """
    return compiled.memory_analysis().argument_size_in_bytes + made_bytes(compiled)


def made_bytes(compiled: Any) -> int:
    """What a program adds to its arguments: results, but those in their place, and temporaries.

    Args:
      compiled: as in `peak_bytes`.
    """
    analysis = compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + results
