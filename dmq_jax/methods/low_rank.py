"""Low-rank updates of Dense and Conv kernels, shared by methods (LoRA, arXiv:2106.09685).

The update of a kernel [..., K, N] is `down @ up`: for a convolution [kh, kw, C, O] each tap has
its own `down` [C, R] and all share `up` [R, O], so the update as a [kh kw C, O] matrix has rank R.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dmq_jax.methods import base


def init(shape: tuple[int, ...], rank: int, key: Key[Array, '']) -> dict[str, Float[Array, '...']]:
    """An update that starts at zero: `down` uniform in ±1/sqrt(fan in), `up` zero.

    Args:
      shape: of the kernel, [K, N] or [kh, kw, C, O].
      rank: R; more than the smaller side of the kernel is cut to it.
      key: for `down`.
    """
    fan_in = math.prod(shape[:-1])
    rank = min(rank, fan_in, shape[-1])
    bound = 1 / math.sqrt(fan_in)
    down = jax.random.uniform(key, (*shape[:-1], rank), minval=-bound, maxval=bound)
    return {'down': down, 'up': jnp.zeros((rank, shape[-1]))}


def delta(update: Mapping[str, Float[Array, '...']]) -> Float[Array, '...']:
    """The update as a kernel."""
    return (
        update['down'] @ update['up']
        if update['down'].ndim == 2
        else jnp.einsum('hwcr,ro->hwco', update['down'], update['up'])
    )


def subtract(params: PyTree, branches: Mapping[str, Mapping[str, Array]]) -> PyTree:
    """`params` with what `branches`, by the path of their layer, leave of the kernels."""
    rests = {
        path: base.get_kernel(params, path) - delta(branch) for path, branch in branches.items()
    }
    return base.with_kernels(params, rests)


def as_stored(branches: PyTree) -> PyTree:
    """Branches of the values that float16 holds, straight through: what an export keeps of them."""
    return jax.tree.map(_in_float16, branches)


@jax.custom_jvp
def _in_float16(half: Array) -> Array:
    return half.astype(jnp.float16).astype(jnp.float32)


@_in_float16.defjvp
def _straight_through(primals, tangents):
    return _in_float16(*primals), tangents[0]
