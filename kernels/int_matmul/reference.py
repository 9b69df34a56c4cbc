"""The definition: a plain int32 einsum over unpacked weights."""

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32


def int_matmul(
    x: Int8[Array, '*batch M K'], w: Int8[Array, '*batch N K']
) -> Int32[Array, '*batch M N']:
    """out[..., m, n] = sum over k of x[..., m, k] w[..., n, k]."""
    return jnp.einsum('...mk,...nk->...mn', x.astype(jnp.int32), w.astype(jnp.int32))
