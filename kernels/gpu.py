"""Which GPU code is traced for: the one here, or one named for lowering without it."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

# Part of the key of jit's caches: a trace for one GPU is not taken for another.
_TARGET = jax.make_user_context(None)


class Gpu(NamedTuple):
    """NVIDIA GPUs: `capability` is 86 for compute capability 8.6; `kind` names the product."""

    capability: int
    kind: str
    count: int = 1


def current() -> Gpu | None:
    """The GPUs that code is traced for, None where there is no NVIDIA GPU."""
    target = _TARGET.value
    if target is not None:
        return target
    if jax.default_backend() != 'gpu':
        return None
    device = jax.devices()[0]
    # '8.6' on NVIDIA, 'gfx942' on AMD.
    major, _, minor = str(getattr(device, 'compute_capability', '')).partition('.')
    if not (major.isdigit() and minor.isdigit()):
        return None
    return Gpu(10 * int(major) + int(minor), device.device_kind, jax.device_count())


@contextlib.contextmanager
def targeting(capability: int, kind: str = 'named, not present') -> Iterator[None]:
    """Inside, kernels are chosen and lowered for one GPU that need not be here.

    For `jax.jit(f).trace(...).lower(lowering_platforms=('cuda',))` and `jax.export` on another
    machine; what is traced inside must not run on the devices here.

    Args:
      capability: 80, 86, 89, 90, 120, ...
      kind: name of the product, as in `jax.Device.device_kind`.
    """
    with _TARGET(Gpu(capability, kind)):
        yield
