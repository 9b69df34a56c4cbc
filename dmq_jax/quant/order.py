"""What must not be computed before what: XLA's own order would keep more in memory."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def not_before(first: Sequence[Array], then: Sequence[Array]) -> Sequence[Array]:
    """`then`, which no compiler computes with before `first` is there."""
    first, then = jax.lax.optimization_barrier((first, then))
    heads = [a[(0,) * a.ndim] for a in first if jnp.issubdtype(a.dtype, jnp.floating) and a.size]
    if jax.default_backend() != 'cpu' or jax.device_count() > 1 or not heads:
        return then
    # A dependency that XLA cannot see to be none, since it drops barriers: on NaN.
    is_nan = functools.reduce(jnp.logical_or, [head != head for head in heads])
    floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in then]
    return [
        jnp.where(is_nan, jnp.full_like(a, jnp.nan), a) if is_float else a
        for a, is_float in zip(then, floating, strict=True)
    ]
