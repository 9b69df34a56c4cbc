"""Paths for tensors that no layer owns: the operands of a product, or a tensor by itself.

Quantization addresses a layer by its module path. `Dense` and `Conv` have one already; the
modules here give one to the attention products and to single tensors. In a float network they
are exactly the plain operation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Queries and scores of a head from which attention on CPU is worth dividing, and scores of a
# piece (8 MB).
_LONG, _MANY, _PIECE = 256, 2**16, 2**21


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


class Attend(nn.Module):
    """What each query gathers from the values: softmax(q k^T / sqrt(D)) v, head by head.

    A float network computes it in one piece, which a compiler may fuse. The two products have the
    paths `scores` and `mix` all the same: whoever wants to quantize their operands calls
    `by_products` in place of the module.
    """

    def setup(self) -> None:
        """Names the two products."""
        self.scores = Product()
        self.mix = Product()

    def __call__(
        self,
        q: Float[Array, 'B L H D'],
        k: Float[Array, 'B M H D'],
        v: Float[Array, 'B M H D'],
        mask: Bool[Array, '*B L M'] | None = None,
    ) -> Float[Array, 'B L H D']:
        """The result for every head; keys where `mask` (or the image's own) is False are unseen."""
        is_long = q.shape[1] >= _LONG and q.shape[1] * k.shape[1] >= _MANY
        if is_long and jax.default_backend() == 'cpu':
            return _attend_in_pieces(q, k, v, mask)
        mask = None if mask is None else _per_head(mask)
        # It widens to float32 where it must, which strict promotion takes for an accident.
        with jax.numpy_dtype_promotion('standard'):
            return jax.nn.dot_product_attention(q, k, v, mask=mask)

    def by_products(
        self,
        q: Float[Array, 'B L H D'],
        k: Float[Array, 'B M H D'],
        v: Float[Array, 'B M H D'],
        mask: Bool[Array, '*B L M'] | None = None,
    ) -> Float[Array, 'B L H D']:
        """The same through the modules `scores` (q, k) and `mix` (softmax, v transposed)."""
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        scores = self.scores(q, k) * (q.shape[-1] ** -0.5)
        # float32: a softmax in bfloat16 loses the small weights of a large image.
        scores = scores.astype(jnp.float32)
        if mask is not None:
            scores = jnp.where(_per_head(mask), scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.mix(weights, v.swapaxes(2, 3)).swapaxes(1, 2)


def _attend_in_pieces(
    q: Float[Array, 'B L H D'],
    k: Float[Array, 'B M H D'],
    v: Float[Array, 'B M H D'],
    mask: Bool[Array, '*B L M'] | None,
) -> Float[Array, 'B L H D']:
    """The same one head and a few queries at a time, so that their scores stay in the cache.

    XLA writes all scores to memory, and reads them four times: for the 4096 pixels of Stable
    Diffusion's finest level half a gigabyte. On CPU this takes a quarter of the time there, half
    of it at 1024 pixels (two cores, jax 0.10.2); other back ends have kernels of their own.
    """
    b, length, _, depth = q.shape
    size = min(length, 512, max(64, _PIECE // (b * k.shape[1])))
    ragged = (0, -length % size)
    queries = jnp.pad(q * depth**-0.5, ((0, 0), ragged, (0, 0), (0, 0)))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = jnp.pad(mask, ((0, 0), ragged, (0, 0)))
        mask = mask.reshape(mask.shape[0], -1, size, mask.shape[2]).swapaxes(0, 1)

    @jax.checkpoint  # or a gradient would keep the scores after all
    def piece(q: Array, mask: Array | None, k: Array, v: Array) -> Array:
        scores = jnp.einsum('bld,bmd->blm', q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum(
            'blm,bmd->bld', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (mixed / total).astype(v.dtype)

    def head(operands: tuple[Array, Array, Array]) -> Array:
        q, k, v = operands
        pieces = q.reshape(b, -1, size, depth).swapaxes(0, 1)
        mixed = jax.lax.map(lambda part: piece(*part, k, v), (pieces, mask))
        return mixed.swapaxes(0, 1).reshape(b, -1, v.shape[-1])[:, :length]

    mixed = jax.lax.map(head, tuple(x.transpose(2, 0, 1, 3) for x in (queries, k, v)))
    return mixed.transpose(1, 2, 0, 3)


def _per_head(mask: Bool[Array, '*B L M']) -> Bool[Array, 'b 1 L M']:
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
