"""Paths for tensors that no layer owns: the operands of a product, or a tensor by itself.

Quantization addresses a layer by its module path. `Dense` and `Conv` have one already; the two
modules here give one to the attention products and to single tensors. In a float network both
are exactly the plain operation.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Product(nn.Module):
    """A matrix product of two activations: `lhs @ rhs^T` over the last axis of both.

    One layout for every use (q·kᵀ, softmax·v with v transposed), so that an integer product can
    take its place without reading an equation.
    """

    @nn.compact
    def __call__(
        self, lhs: Float[Array, '*batch M K'], rhs: Float[Array, '*batch N K']
    ) -> Float[Array, '*batch M N']:
        """The product of every batch entry; the dtype is that of the operands."""
        return jnp.einsum('...mk,...nk->...mn', lhs, rhs)


class Tap(nn.Module):
    """An identity that gives a tensor a path."""

    @nn.compact
    def __call__(self, x: Float[Array, '*shape']) -> Float[Array, '*shape']:
        """`x`, unchanged."""
        return x
