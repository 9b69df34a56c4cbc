"""The text encoder of PixArt in plain Flax: the encoder of T5, version 1.1.

Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer (arXiv:1910.10683, section 2.1), with the gated feed-forward layers of Shazeer 2020
(arXiv:2002.05202); what transformers' `T5EncoderModel` computes. Neither scale in the attention nor
biases; positions enter as a bias by distance, which all blocks share. Blocks are a Python loop, so
that every layer has a module path of its own.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmq_jax.models.tap import Product


class T5Encoder(nn.Module):
    """Texts to features; the defaults are T5-XXL.

    Attributes:
      vocabulary_size: rows of the table of tokens.
      width: channels.
      head_dim: channels of an attention head.
      num_heads: attention heads of a block; `num_heads * head_dim` need not be `width`.
      hidden: channels inside the feed-forward layers.
      num_layers: transformer blocks.
      num_buckets: classes of distances, half of them for tokens after.
      max_distance: from here on, all distances are one class.
      epsilon: added to the mean square in the norms.
      dtype: of the computation; parameters stay float32.
    """

    vocabulary_size: int = 32128
    width: int = 4096
    head_dim: int = 64
    num_heads: int = 64
    hidden: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, 'B L'], mask: Int[Array, 'B L'] | None = None
    ) -> Float[Array, 'B L D']:
        """The features of every token of texts that are padded to one length.

        Args:
          tokens: rows of the table.
          mask: 1 where there is a token, 0 where there is padding; None: tokens everywhere.
        """
        length = tokens.shape[1]
        h = nn.Embed(self.vocabulary_size, self.width, dtype=self.dtype, name='token_embed')(tokens)
        buckets = distance_buckets(length, self.num_buckets, self.max_distance)
        table = nn.Embed(self.num_buckets, self.num_heads, name='distance_embed')
        bias = table(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)[None]
        if mask is not None:
            unseen = jnp.finfo(jnp.float32).min
            bias = jnp.where(mask.astype(bool)[:, None, None, :], bias, unseen)
        for i in range(self.num_layers):
            h = Block(
                self.num_heads, self.head_dim, self.hidden, self.epsilon, self.dtype,
                name=f'block_{i}',
            )(h, bias)  # fmt: skip
        return RMSNorm(self.epsilon, self.dtype, name='norm_out')(h)


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The class [L, L] of the distance from each token (row) to each other (column).

    Half of the classes are for tokens after. Of each half, one half has a class for every distance,
    the other classes that grow geometrically up to `max_distance`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    # float32, as in the original: at its rounding a distance changes its class.
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    grown = np.log(far) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    grown = np.minimum(exact + grown.astype(np.int32), half - 1)
    near = np.abs(distance)
    return (half * (distance > 0) + np.where(near < exact, near, grown)).astype(np.int32)


class RMSNorm(nn.Module):
    """Every token with mean square 1, scaled, in float32; then `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
        """`x` normalized."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + self.epsilon)
        return (h * scale.astype(jnp.float32)[None, None]).astype(self.dtype)


class Block(nn.Module):
    """Self-attention with a bias, and gated feed-forward."""

    num_heads: int
    head_dim: int
    hidden: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B L D'], bias: Float[Array, 'b H L L']
    ) -> Float[Array, 'B L D']:
        """`x` plus two branches; `bias` is added to the scores of every head."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)

        h = RMSNorm(self.epsilon, self.dtype, name='norm1')(x)
        heads = (*h.shape[:2], self.num_heads, self.head_dim)
        width = self.num_heads * self.head_dim
        q, k, v = (dense(width, name)(h).reshape(heads).swapaxes(1, 2) for name in 'qkv')
        # Not `Attend`, whose scores have a scale and no bias.
        scores = Product(name='scores')(q, k).astype(jnp.float32)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(self.dtype)
        h = Product(name='mix')(weights, v.swapaxes(2, 3))
        h = h.swapaxes(1, 2).reshape(*x.shape[:2], width)
        x = x + dense(x.shape[-1], 'out')(h)
        h = RMSNorm(self.epsilon, self.dtype, name='norm2')(x)
        gate = nn.gelu(dense(self.hidden, 'gate')(h), approximate=True)
        return x + dense(x.shape[-1], 'dense_1')(gate * dense(self.hidden, 'dense_0')(h))
