"""Diffusion transformers on latents: DiT, and PixArt with a caption, in plain Flax.

* `DiT`: Peebles and Xie 2023, Scalable Diffusion Models with Transformers (arXiv:2212.09748), the
  class-conditional network with adaLN-Zero.
* `PixArt`: Chen et al. 2023, PixArt-alpha (arXiv:2310.00426, section 2.3), which shares one
  modulation among all blocks (adaLN-single) and attends to the caption; PixArt-Sigma (2403.04692)
  is the same network without micro-conditioning and with longer captions.

Both follow diffusers' `DiTTransformer2DModel` and `PixArtTransformer2DModel` in what they compute.
Layout NHWC outside, tokens [B, L, D] inside, row by row. Blocks are a Python loop, so that every
layer has a module path of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dmq_jax.models.ddpm_unet import depth_to_space, timestep_features
from dmq_jax.models.tap import Attend

# Sinusoids of a timestep or of an image size: 256 in every published network, cosines first.
_NUM_FEATURES = 256
# Of every LayerNorm but the one before the feed-forward layers of diffusers' DiT.
_EPSILON = 1e-6


class DiT(nn.Module):
    """Predicts eps, and the variance where `out_channels` is twice `in_channels`, from a latent.

    Attributes:
      in_channels: channels of the latent.
      out_channels: channels of the output: eps first, then the learned variance (the interpolation
        v of Nichol and Dhariwal 2021, in [-1, 1]); as many as `in_channels` if it is not learned.
      num_layers: transformer blocks.
      num_heads: attention heads of a block.
      head_dim: channels of a head; the network is `num_heads * head_dim` wide.
      patch_size: side of the square of latent pixels that makes a token.
      sample_size: side of the latents in training; other sizes stretch the same positions.
      num_classes: without the null class, which is row `num_classes` of the table.
      frequency_shift: 0 spaces the timestep's frequencies over 128 (the original), 1 over 127
        (diffusers, for the same weights).
      mlp_epsilon: added to the variance before the feed-forward layers: 1e-6 in the original, 1e-5
        in diffusers.
      embedding_per_block: every block after the first embeds timestep and class by itself, as
        diffusers' does; its published weights are copies of one embedding, which need no such.
      dtype: of the computation; parameters stay float32.
    """

    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    patch_size: int = 2
    sample_size: int = 32
    num_classes: int = 1000
    frequency_shift: float = 0.0
    mlp_epsilon: float = _EPSILON
    embedding_per_block: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Int[Array, '*B'] | Float[Array, '*B'],
        y: Int[Array, 'B'],
    ) -> Float[Array, 'B H W O']:
        """The prediction for noisy latents `x` at timesteps `t` (scalar or one per image).

        Args:
          x: noisy latents; both sides multiples of `patch_size`.
          t: timesteps, 0 to 999 in training.
          y: classes; `num_classes` stands for none.

        Raises:
          ValueError: a latent of a size or with channels that the settings do not fit.
        """
        _check_latent(x, self.in_channels, self.patch_size)
        width = self.num_heads * self.head_dim
        t = jnp.broadcast_to(t, x.shape[:1])

        def embedding(name: str, parent: nn.Module | None = None) -> Array:
            module = ClassEmbedding(
                width, self.num_classes, self.frequency_shift, self.dtype, name=name
            )
            return module(t, y)

        tokens = Patches(width, self.patch_size, self.sample_size, dtype=self.dtype, name='patches')
        h = tokens(x)
        shared = embedding('embed')
        for i in range(self.num_layers):
            own = i > 0 and self.embedding_per_block
            h = DiTBlock(
                self.num_heads, self.head_dim, self.mlp_epsilon, self.dtype, name=f'block_{i}'
            )(h, embedding(f'embed_{i}') if own else shared)

        modulation = nn.Dense(2 * width, dtype=self.dtype, name='modulation_out')
        shift, scale = jnp.split(modulation(nn.silu(shared))[:, None], 2, axis=-1)
        h = layer_norm(h) * (1 + scale) + shift
        h = nn.Dense(self.patch_size**2 * self.out_channels, dtype=self.dtype, name='out')(h)
        return _unpatch(h, x, self.patch_size)


class PixArt(nn.Module):
    """Predicts eps, and the variance where it is learned, from a latent and a caption.

    Attributes:
      in_channels: channels of the latent.
      out_channels: of the output: eps first, then the learned variance, which PixArt's samplers
        drop.
      num_layers: transformer blocks.
      num_heads: attention heads of a block.
      head_dim: channels of a head; the network is `num_heads * head_dim` wide.
      patch_size: side of the square of latent pixels that makes a token.
      sample_size: side of the latents in training; other sizes stretch the same positions.
      position_scale: positions are divided by it (2 for networks grown from 512 to 1024 pixels).
      caption_channels: width of the text encoder's output; None takes it as it comes.
      size_conditions: the network is told the size of the image (PixArt-alpha at 1024 pixels).
      dtype: of the computation; parameters stay float32.
    """

    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    patch_size: int = 2
    sample_size: int = 128
    position_scale: float = 2.0
    caption_channels: int | None = 4096
    size_conditions: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Int[Array, '*B'] | Float[Array, '*B'],
        text: Float[Array, 'B T E'],
        text_mask: Int[Array, 'B T'] | None = None,
        resolution: Float[Array, 'B 2'] | None = None,
        aspect_ratio: Float[Array, 'B'] | None = None,
    ) -> Float[Array, 'B H W O']:
        """The prediction for noisy latents `x` at timesteps `t` (scalar or one per image).

        Args:
          x: noisy latents; both sides multiples of `patch_size`.
          t: timesteps, 0 to 999 in training.
          text: what the text encoder says of the caption.
          text_mask: 1 where `text` holds a token, 0 where it is padding; None: all are tokens.
          resolution: height and width of the image in pixels; with `size_conditions` only.
          aspect_ratio: height over width; with `size_conditions` only.

        Raises:
          ValueError: a latent or a caption that the settings do not fit, or sizes that are given
            though the network takes none, or missing.
        """
        _check_latent(x, self.in_channels, self.patch_size)
        sizes = (resolution is not None) + (aspect_ratio is not None)
        if sizes != 2 * self.size_conditions:
            raise ValueError(
                f'size_conditions={self.size_conditions}: expected '
                f'{"both" if self.size_conditions else "neither"} of resolution and aspect_ratio, '
                f'{sizes} given.'
            )
        width = self.num_heads * self.head_dim
        if text.shape[-1] != (self.caption_channels or width):
            raise ValueError(
                f'text has {text.shape[-1]} channels: expected {self.caption_channels or width}.'
            )
        t = jnp.broadcast_to(t, x.shape[:1])
        h = Patches(
            width, self.patch_size, self.sample_size, self.position_scale, self.dtype,
            name='patches',
        )(x)  # fmt: skip
        embedding = Sinusoids(width, dtype=self.dtype, name='time_embed')(t)
        if self.size_conditions:
            # Three thirds of the width: height, width, ratio.
            third = Sinusoids(width // 3, dtype=self.dtype, name='resolution_embed')(resolution)
            ratio = Sinusoids(width // 3, dtype=self.dtype, name='ratio_embed')(
                aspect_ratio.reshape(-1)
            )
            third = third.reshape(x.shape[0], -1)
            embedding = embedding + jnp.concatenate([third, ratio], axis=-1)
        modulation = nn.Dense(6 * width, dtype=self.dtype, name='modulation')(nn.silu(embedding))
        modulation = modulation.reshape(x.shape[0], 6, width)

        text = text.astype(self.dtype)
        if self.caption_channels is not None:
            text = FeedForward(width, width, self.dtype, name='caption')(text)
        for i in range(self.num_layers):
            h = PixArtBlock(self.num_heads, self.head_dim, self.dtype, name=f'block_{i}')(
                h, modulation, text, text_mask
            )

        table = self.param('scale_shift_table', _table_init, (2, width))
        shift, scale = _split_modulation(table, embedding[:, None, :], self.dtype)
        h = layer_norm(h) * (1 + scale) + shift
        h = nn.Dense(self.patch_size**2 * self.out_channels, dtype=self.dtype, name='out')(h)
        return _unpatch(h, x, self.patch_size)


def position_features(
    size: tuple[int, int], width: int, *, base_size: int, scale: float
) -> Float[Array, 'L D']:
    """Sinusoids of the column (first half) and the row (second half) of every token.

    Positions run from 0 to `base_size / scale`, whatever `size` is.

    Args:
      size: rows and columns of tokens.
      width: features of a token, a multiple of 4: sines, then cosines, of either coordinate.
      base_size: tokens along a side in training.
      scale: divides the positions.

    Raises:
      ValueError: `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f'a width of {width}: positions need a multiple of 4.')
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))

    def line(count: int) -> np.ndarray:
        angle = (np.arange(count) * (base_size / count / scale))[:, None] * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)

    # Two lines, not a table of all tokens: for 1024 pixels that would be a constant of 19 MB.
    rows, columns = (jnp.asarray(line(count)) for count in size)
    grid = (*size, width // 2)
    parts = [jnp.broadcast_to(columns[None], grid), jnp.broadcast_to(rows[:, None], grid)]
    return jnp.concatenate(parts, axis=-1).reshape(-1, width)


def layer_norm(x: Float[Array, 'B L D'], epsilon: float = _EPSILON) -> Float[Array, 'B L D']:
    """Every token with mean 0 and variance 1, computed in float32; the dtype stays."""
    centred = x.astype(jnp.float32)
    centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


class Patches(nn.Module):
    """Squares of pixels as tokens, with their positions."""

    width: int
    patch_size: int
    sample_size: int
    position_scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B L D']:
        """One token for every square, row by row."""
        side = (self.patch_size, self.patch_size)
        h = nn.Conv(
            self.width, side, strides=side, padding='VALID', dtype=self.dtype, name='proj'
        )(x.astype(self.dtype))  # fmt: skip
        positions = position_features(
            h.shape[1:3], self.width, base_size=self.sample_size // self.patch_size,
            scale=self.position_scale,
        )  # fmt: skip
        return h.reshape(h.shape[0], -1, self.width) + positions[None].astype(self.dtype)


class Sinusoids(nn.Module):
    """Two dense layers on the sinusoids of a number."""

    width: int
    frequency_shift: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, value: Array) -> Float[Array, '*B E']:
        """The embedding of every entry of `value`."""
        # Images stay the first axis, of which a quantized layer may have one scale each.
        features = timestep_features(value.reshape(-1), _NUM_FEATURES, True, self.frequency_shift)
        features = features.reshape(*value.shape, _NUM_FEATURES)
        h = nn.Dense(self.width, dtype=self.dtype, name='dense_0')(features.astype(self.dtype))
        return nn.Dense(self.width, dtype=self.dtype, name='dense_1')(nn.silu(h))


class ClassEmbedding(nn.Module):
    """The sum of what is known of timestep and class."""

    width: int
    num_classes: int
    frequency_shift: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: Array, y: Int[Array, 'B']) -> Float[Array, 'B E']:
        """The embedding that modulates the blocks; the last row of the table is the null class."""
        h = Sinusoids(self.width, self.frequency_shift, self.dtype, name='time')(t)
        table = nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype, name='class')
        return h + table(y)


class FeedForward(nn.Module):
    """Two dense layers with the tanh approximation of GELU between."""

    hidden: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L O']:
        """Every token by itself."""
        h = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name='dense_0')(x), approximate=True)
        return nn.Dense(self.width, dtype=self.dtype, name='dense_1')(h)


class Attention(nn.Module):
    """Attention of tokens to one another, or to another sequence."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B L D'],
        context: Float[Array, 'B T E'] | None = None,
        mask: Bool[Array, 'B T'] | None = None,
    ) -> Float[Array, 'B L D']:
        """What tokens of `x` gather from `context` (`x` if None), as far as `mask` lets them."""
        width = self.num_heads * self.head_dim
        context = x if context is None else context
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None], (x.shape[0], x.shape[1], context.shape[1]))

        def heads(name: str, source: Array) -> Float[Array, 'B L N D']:
            h = nn.Dense(width, dtype=self.dtype, name=name)(source)
            return h.reshape(*h.shape[:2], self.num_heads, self.head_dim)

        q, k, v = heads('q', x), heads('k', context), heads('v', context)
        h = Attend(name='attend')(q, k, v, mask).reshape(*x.shape[:2], width)
        return nn.Dense(width, dtype=self.dtype, name='out')(h)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each modulated and gated by the embedding (adaLN-Zero)."""

    num_heads: int
    head_dim: int
    mlp_epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B L D'], embedding: Float[Array, 'B D']
    ) -> Float[Array, 'B L D']:
        """`x` plus two gated branches."""
        width = x.shape[-1]
        modulation = nn.Dense(6 * width, dtype=self.dtype, name='modulation')(nn.silu(embedding))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None], 6, axis=-1)
        h = layer_norm(x) * (1 + scale1) + shift1
        attention = Attention(self.num_heads, self.head_dim, self.dtype, name='attention')
        x = x + gate1 * attention(h)
        h = layer_norm(x, self.mlp_epsilon) * (1 + scale2) + shift2
        return x + gate2 * FeedForward(4 * width, width, self.dtype, name='mlp')(h)


class PixArtBlock(nn.Module):
    """Self-attention, attention to the caption, feed-forward (adaLN-single)."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B L D'],
        modulation: Float[Array, 'B 6 D'],
        text: Float[Array, 'B T D'],
        text_mask: Int[Array, 'B T'] | None,
    ) -> Float[Array, 'B L D']:
        """`x` plus three branches; attention to the caption has neither norm nor gate."""
        width = x.shape[-1]
        table = self.param('scale_shift_table', _table_init, (6, width))
        shift1, scale1, gate1, shift2, scale2, gate2 = _split_modulation(
            table, modulation, self.dtype
        )
        heads = (self.num_heads, self.head_dim, self.dtype)
        h = layer_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * Attention(*heads, name='attention')(h)
        mask = None if text_mask is None else text_mask.astype(bool)
        x = x + Attention(*heads, name='cross_attention')(x, text, mask)
        h = layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * FeedForward(4 * width, width, self.dtype, name='mlp')(h)


def _table_init(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape) * shape[-1] ** -0.5


def _split_modulation(table: Array, modulation: Array, dtype: jnp.dtype) -> list[Array]:
    """The rows of `table` plus `modulation` ([B, rows or 1, D]), each as [B, 1, D]."""
    rows = (table[None].astype(jnp.float32) + modulation.astype(jnp.float32)).astype(dtype)
    return jnp.split(rows, table.shape[0], axis=1)


def _check_latent(x: Array, in_channels: int, patch_size: int) -> None:
    if x.shape[3] != in_channels:
        raise ValueError(f'latent has {x.shape[3]} channels: expected {in_channels}.')
    if x.shape[1] % patch_size or x.shape[2] % patch_size:
        raise ValueError(
            f'latent of {x.shape[1]}x{x.shape[2]}: both sides must be multiples of '
            f'patch_size={patch_size}.'
        )


def _unpatch(h: Float[Array, 'B L D'], x: Array, patch_size: int) -> Float[Array, 'B H W O']:
    rows, columns = x.shape[1] // patch_size, x.shape[2] // patch_size
    return depth_to_space(h.reshape(h.shape[0], rows, columns, -1), patch_size)
