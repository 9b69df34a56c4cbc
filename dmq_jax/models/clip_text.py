"""The text encoders of Stable Diffusion in plain Flax.

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision
(arXiv:2103.00020, section 2.4): a causal transformer, in what transformers' `CLIPTextModel` and
`CLIPTextModelWithProjection` compute. What the families use of it:

* Stable Diffusion 1 (CLIP ViT-L): `last`;
* Stable Diffusion 2 (OpenCLIP ViT-H): `last` of a network with one layer fewer than the checkpoint,
  which is the penultimate layer after the final norm;
* SDXL (CLIP ViT-L and OpenCLIP ViT-bigG): `penultimate` of both, joined along the channels, and
  `pooled` of the second.

Blocks are a Python loop, so that every layer has a module path of its own.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmq_jax.models.tap import Attend

ACTIVATIONS = {
    # Hendrycks and Gimpel 2016 (arXiv:1606.08415): the first approximation of CLIP, and GELU.
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}


class TextEncoding(NamedTuple):
    """What a text encoder says of a text.

    Attributes:
      last: features of every token after the last layer and the final norm.
      penultimate: before the last layer, without a norm.
      pooled: `last` at the end of the text, projected where the network has a projection.
    """

    last: Float[Array, 'B L D']
    penultimate: Float[Array, 'B L D']
    pooled: Float[Array, 'B P']


class CLIPText(nn.Module):
    """Texts to features.

    Attributes:
      vocabulary_size: rows of the table of tokens.
      width: channels.
      hidden: channels inside the feed-forward layers.
      num_layers: transformer blocks.
      num_heads: attention heads of a block.
      max_length: tokens of a text, at most.
      activation: a name of `ACTIVATIONS`.
      epsilon: added to the variance in the norms.
      projection: channels of `pooled`; None leaves it as wide as the network, without projection.
      end_token: marks the end of a text, at its first place; None takes the place of the highest
        token, as checkpoints from before 2023 want it.
      dtype: of the computation; parameters stay float32.
    """

    vocabulary_size: int = 49408
    width: int = 768
    hidden: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    activation: str = 'quick_gelu'
    epsilon: float = 1e-5
    projection: int | None = None
    end_token: int | None = None
    dtype: jnp.dtype = jnp.float32

    def _check(self, tokens: Array) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f'activation={self.activation!r}: expected {" or ".join(map(repr, ACTIVATIONS))}.'
            )
        if self.width % self.num_heads:
            raise ValueError(f'num_heads={self.num_heads} does not divide width={self.width}.')
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f'texts of {tokens.shape[1]} tokens: expected at most {self.max_length}.'
            )

    @nn.compact
    def __call__(self, tokens: Int[Array, 'B L']) -> TextEncoding:
        """The features of texts that are padded to one length.

        Padding comes after the end, where a causal network does not look from before it.

        Raises:
          ValueError: texts that are too long, or settings that contradict one another.
        """
        self._check(tokens)
        length = tokens.shape[1]
        table = nn.Embed(self.vocabulary_size, self.width, dtype=self.dtype, name='token_embed')
        positions = self.param(
            'position_embed', nn.initializers.normal(0.01), (self.max_length, self.width)
        )
        h = table(tokens) + positions[None, :length].astype(self.dtype)
        causal = jnp.tril(jnp.ones((length, length), bool))
        penultimate = h
        for i in range(self.num_layers):
            penultimate = h
            h = Block(
                self.num_heads, self.hidden, self.activation, self.epsilon, self.dtype,
                name=f'block_{i}',
            )(h, causal)  # fmt: skip
        last = LayerNorm(self.epsilon, self.dtype, name='norm_out')(h)
        if self.end_token is None:
            end = jnp.argmax(tokens, axis=-1)
        else:
            end = jnp.argmax(tokens == self.end_token, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        if self.projection is not None:
            pooled = nn.Dense(
                self.projection, use_bias=False, dtype=self.dtype, name='projection'
            )(pooled)  # fmt: skip
        return TextEncoding(last, penultimate, pooled)


class LayerNorm(nn.Module):
    """Every token with mean 0 and variance 1, scaled and shifted, in float32; then `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
        """`x` normalized."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (p.astype(jnp.float32)[None, None] for p in (scale, bias))
        return (h * scale + bias).astype(self.dtype)


class Block(nn.Module):
    """Attention to the tokens before, and feed-forward."""

    num_heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B L D'], mask: Bool[Array, 'L L']) -> Float[Array, 'B L D']:
        """`x` plus two branches."""
        width = x.shape[-1]

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, dtype=self.dtype, name=name)

        h = LayerNorm(self.epsilon, self.dtype, name='norm1')(x)
        q, k, v = (
            dense(width, name)(h).reshape(*h.shape[:2], self.num_heads, -1) for name in 'qkv'
        )
        h = Attend(name='attend')(q, k, v, mask).reshape(x.shape)
        x = x + dense(width, 'out')(h)
        h = LayerNorm(self.epsilon, self.dtype, name='norm2')(x)
        h = ACTIVATIONS[self.activation](dense(self.hidden, 'dense_0')(h))
        return x + dense(width, 'dense_1')(h)
