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


def init(
    kernels: Mapping[str, Float[Array, '...']], rank: int, key: Key[Array, '']
) -> dict[str, dict[str, Float[Array, '...']]]:
    """Updates that start at zero: `down` uniform in ±1/sqrt(fan in), `up` zero.

    Args:
      kernels: by name, [K, N] or [kh, kw, C, O].
      rank: R; more than the smaller side of a kernel is cut to it.
      key: for `down`; each kernel's numbers depend on its place among the others.
    """
    shapes = {name: _down_shape(kernel.shape, rank) for name, kernel in kernels.items()}
    # A generator is compiled for each size: few sizes, of which each kernel takes what it needs.
    sizes = {name: 1 << (math.prod(shape) - 1).bit_length() for name, shape in shapes.items()}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(kernels)))
    drawn = base.map_alike(
        lambda key, size: jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0),
        {name: keys[index] for index, name in enumerate(kernels)},
        sizes,
    )
    updates = {}
    for name, shape in shapes.items():
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        down = drawn[name][: math.prod(shape)].reshape(shape) * bound
        updates[name] = {'down': down, 'up': jnp.zeros((shape[-1], kernels[name].shape[-1]))}
    return updates


def _down_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return *shape[:-1], min(rank, math.prod(shape[:-1]), shape[-1])


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
