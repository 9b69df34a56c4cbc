"""The U-Net of DDPM and DDIM in plain Flax.

Ho et al. 2020 (arXiv:2006.11239), appendix B, in the parametrisation that diffusers'
`UNet2DModel` gives it: with the same weights and settings both compute the same function.
Layout NHWC. Blocks are a Python loop, so that every layer has a module path of its own.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmq_jax.models.convolution import convolve, convolve_enlarged, upsampled
from dmq_jax.models.tap import Product


class DDPMUNet(nn.Module):
    """Predicts eps (or v) from a noisy image and its timestep.

    Attributes:
      channels: width of each resolution level, finest first (`block_out_channels`).
      in_channels: channels of the image; the output has as many unless `out_channels` is given.
      out_channels: channels of the output.
      layers_per_block: residual blocks of a level on the way down; one more on the way up.
      down_attention: for each level, whether its blocks on the way down are followed by attention.
      up_attention: the same on the way up, coarsest first; None mirrors `down_attention`.
      mid_attention: attention in the middle.
      head_dim: channels of one attention head; None makes a single head.
      num_groups: groups of every GroupNorm.
      epsilon: added to the variance in GroupNorm.
      pad_downsample: 'asymmetric' pads one row and column after the image (DDPM, diffusers'
        `downsample_padding=0`); 'symmetric' pads one on every side (`downsample_padding=1`).
      cos_first: order of the halves of the timestep features (diffusers' `flip_sin_to_cos`).
      frequency_shift: 1 spaces frequencies over `half - 1` (DDPM), 0 over `half` (ADM).
      scale_shift: the timestep scales and shifts after the second norm (ADM) instead of adding.
      num_class_embeds: rows of the class table, the null class included; None is unconditional.
      patch_size: side of the pixel blocks folded into channels before the first convolution and
        unfolded after the last; 1 is the original.
      dtype: of the computation; parameters stay float32.
    """

    channels: tuple[int, ...] = (128, 256, 256, 256)
    in_channels: int = 3
    out_channels: int | None = None
    layers_per_block: int = 2
    down_attention: tuple[bool, ...] = (False, True, False, False)
    up_attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    head_dim: int | None = None
    num_groups: int = 32
    epsilon: float = 1e-6
    pad_downsample: str = 'asymmetric'
    cos_first: bool = False
    frequency_shift: float = 1.0
    scale_shift: bool = False
    num_class_embeds: int | None = None
    patch_size: int = 1
    dtype: jnp.dtype = jnp.float32

    def _check(self, x: Array, y: Array | None) -> None:
        levels = len(self.channels)
        ups = self.up_attention or self.down_attention
        if len(self.down_attention) != levels or len(ups) != levels:
            raise ValueError(
                f'attention is given for {len(self.down_attention)} levels down and {len(ups)} up: '
                f'expected {levels} each, one per entry of channels={self.channels}.'
            )
        if self.pad_downsample not in ('asymmetric', 'symmetric'):
            raise ValueError(
                f"pad_downsample={self.pad_downsample!r}: expected 'asymmetric' or 'symmetric'."
            )
        factor = self.patch_size * 2 ** (levels - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f'image of {x.shape[1]}x{x.shape[2]}: both sides must be multiples of {factor} '
                f'({levels} levels, patch_size={self.patch_size}).'
            )
        if x.shape[3] != self.in_channels:
            raise ValueError(f'image has {x.shape[3]} channels: expected {self.in_channels}.')
        if (y is None) != (self.num_class_embeds is None):
            raise ValueError(
                f'y is {"missing" if y is None else "given"} but '
                f'num_class_embeds={self.num_class_embeds}.'
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Int[Array, '*B'] | Float[Array, '*B'],
        y: Int[Array, 'B'] | None = None,
    ) -> Float[Array, 'B H W O']:
        """The prediction for noisy images `x` at timesteps `t` (scalar or one per image).

        Raises:
          ValueError: image size, channels or classes that the settings do not fit.
        """
        self._check(x, y)
        x = x.astype(self.dtype)
        t = jnp.broadcast_to(t, x.shape[:1])
        embedding = timestep_features(t, self.channels[0], self.cos_first, self.frequency_shift)
        embedding = TimeEmbedding(4 * self.channels[0], self.dtype, name='time_embed')(embedding)
        if self.num_class_embeds is not None:
            table = nn.Embed(
                self.num_class_embeds, 4 * self.channels[0], dtype=self.dtype, name='class_embed'
            )
            embedding = embedding + table(y)

        level = dict(
            num_groups=self.num_groups, epsilon=self.epsilon, dtype=self.dtype,
            scale_shift=self.scale_shift, head_dim=self.head_dim,
        )  # fmt: skip
        last = len(self.channels) - 1
        x = space_to_depth(x, self.patch_size)
        x = conv3x3(self.channels[0], 'conv_in', self.dtype)(x)
        skips = [x]
        for i, (width, attention) in enumerate(
            zip(self.channels, self.down_attention, strict=True)
        ):
            x, more = DownLevel(
                width, self.layers_per_block, attention,
                downsample=i < last, padding=self.pad_downsample, name=f'down_{i}', **level,
            )(x, embedding)  # fmt: skip
            skips += more
        x = Middle(self.channels[-1], self.mid_attention, name='mid', **level)(x, embedding)
        up_attention = self.up_attention or self.down_attention[::-1]
        for i, (width, attention) in enumerate(zip(self.channels[::-1], up_attention, strict=True)):
            count = self.layers_per_block + 1
            skips, used = skips[:-count], skips[-count:]
            x = UpLevel(
                width, count, attention, upsample=i < last, name=f'up_{i}', **level
            )(x, used, embedding)  # fmt: skip
        x = GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm_out')(x)
        out_channels = self.out_channels or self.in_channels
        x = conv3x3(out_channels * self.patch_size**2, 'conv_out', self.dtype)(nn.silu(x))
        return depth_to_space(x, self.patch_size)


def timestep_features(
    t: Array, width: int, cos_first: bool, frequency_shift: float
) -> Float[Array, 'B D']:
    """Sinusoids of `t` at `width / 2` geometric frequencies from 1 to 1/10000, float32."""
    half = width // 2
    exponent = jnp.arange(half, dtype=jnp.float32) * (-math.log(10000.0) / (half - frequency_shift))
    angle = t.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]
    parts = [jnp.cos(angle), jnp.sin(angle)] if cos_first else [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts, axis=-1)


def space_to_depth(x: Float[Array, 'B H W C'], size: int) -> Float[Array, 'B h w D']:
    """Folds blocks of `size` x `size` pixels into channels."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: Float[Array, 'B h w D'], size: int) -> Float[Array, 'B H W C']:
    """The inverse of `space_to_depth`."""
    if size == 1:
        return x
    b, h, w, d = x.shape
    x = x.reshape(b, h, w, size, size, d // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * size, w * size, d // size**2)


def conv3x3(
    width: int,
    name: str,
    dtype: jnp.dtype,
    strides: int = 1,
    padding: object = 1,
    *,
    enlarged: bool = False,
) -> Callable[[Array], Array]:
    """A 3x3 convolution that pads with zeros like the original (one pixel unless told).

    Args:
      width: channels of the output.
      name: of the layer.
      dtype: of the computation.
      strides: of both sides.
      padding: of both sides.
      enlarged: whether its input comes from `upsampled`.
    """
    return nn.Conv(
        width, (3, 3), strides=(strides, strides), padding=padding, dtype=dtype, name=name,
        conv_general_dilated=convolve_enlarged if enlarged else convolve,
    )  # fmt: skip


class GroupNorm(nn.Module):
    """Normalizes groups of channels to mean 0 and variance 1, in float32; the result is `dtype`.

    The function of Flax's `GroupNorm(use_fast_variance=False)`, whose variance about the mean does
    not cancel (E[x^2] - E[x]^2 is wrong by 1e-3 where the mean is 100 standard deviations). Sums
    run over pixels first and then over the few channels of a group: on CPU 1.7 to 2.7 times faster
    forward, 1.6 to 2.1 times backward, SiLU included (medians on a busy machine; 8 images,
    32x32x128 and 16x16x256, jax 0.10.2 and 0.12.0).
    """

    num_groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        """`x` normalized, scaled and shifted.

        Raises:
          ValueError: `num_groups` does not divide the channels.
        """
        c = x.shape[-1]
        if c % self.num_groups:
            raise ValueError(f'num_groups={self.num_groups} does not divide {c} channels.')
        scale = self.param('scale', nn.initializers.ones, (c,))
        bias = self.param('bias', nn.initializers.zeros, (c,))

        def group_means(x: Array) -> Array:
            means = jnp.mean(x, axis=(1, 2)).reshape(x.shape[0], self.num_groups, -1)
            means = jnp.mean(means, axis=-1, keepdims=True)
            return jnp.broadcast_to(means, (*means.shape[:2], c // self.num_groups)).reshape(
                x.shape[0], 1, 1, c
            )

        centred = x.astype(jnp.float32)
        centred = centred - group_means(centred)
        factor = jax.lax.rsqrt(group_means(centred**2) + self.epsilon)
        # The parameters may be kept in bfloat16.
        scale, bias = (p.astype(jnp.float32)[None, None, None] for p in (scale, bias))
        return (centred * (factor * scale) + bias).astype(self.dtype)


class TimeEmbedding(nn.Module):
    """Two dense layers on the timestep features."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, 'B D']) -> Float[Array, 'B E']:
        """The embedding that every residual block receives."""
        h = nn.Dense(self.width, dtype=self.dtype, name='dense_0')(features)
        return nn.Dense(self.width, dtype=self.dtype, name='dense_1')(nn.silu(h))


def averaged(x: Float[Array, 'B H W C']) -> Float[Array, 'B h w C']:
    """The mean of every 2x2 pixels."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


class ResBlock(nn.Module):
    """Residual block whose second half is shifted by the timestep (DDPM; ADM if scale_shift).

    Attributes:
      resample: applied to the input, and to the residual branch before its first convolution.
      joined: channels of the first of the two tensors that the input is joined of, where the second
        is a skip; None: it is one tensor.
    """

    width: int
    num_groups: int
    epsilon: float
    scale_shift: bool
    dtype: jnp.dtype
    resample: Callable[[Array], Array] | None = None
    joined: int | None = None

    @property
    def joined_inputs(self) -> dict[str, int]:
        """Layers whose input is joined as that of the block is: {name: channels of the first}."""
        return {} if self.joined is None else dict.fromkeys(('conv1', 'conv_shortcut'), self.joined)

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], embedding: Float[Array, 'B E']
    ) -> Float[Array, 'B H W O']:
        """`x` (through a 1x1 convolution where the width changes) plus the residual branch."""

        def norm(name: str) -> Callable[[Array], Array]:
            return GroupNorm(self.num_groups, self.epsilon, self.dtype, name=name)

        h = nn.silu(norm('norm1')(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        enlarged = self.resample is upsampled
        h = conv3x3(self.width, 'conv1', self.dtype, enlarged=enlarged)(h)
        count = 2 * self.width if self.scale_shift else self.width
        shift = nn.Dense(count, dtype=self.dtype, name='time_proj')(nn.silu(embedding))
        shift = shift[:, None, None, :]
        if self.scale_shift:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = norm('norm2')(h) * (1 + scale) + shift
        else:
            h = norm('norm2')(h + shift)
        h = conv3x3(self.width, 'conv2', self.dtype)(nn.silu(h))
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name='conv_shortcut')(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the pixels, with a norm before and the input added after."""

    head_dim: int | None
    num_groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        """`x` plus what each pixel gathers from all pixels.

        Raises:
          ValueError: `head_dim` does not divide the channels.
        """
        b, height, width, c = x.shape
        head_dim = self.head_dim or c
        if c % head_dim:
            raise ValueError(f'head_dim={head_dim} does not divide {c} channels.')
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm')(x)
        h = h.reshape(b, height * width, c)

        def heads(name: str) -> Float[Array, 'B N L D']:
            projected = nn.Dense(c, dtype=self.dtype, name=name)(h)
            return projected.reshape(b, height * width, c // head_dim, head_dim).swapaxes(1, 2)

        q, k, v = heads('q'), heads('k'), heads('v')
        scores = Product(name='scores')(q, k) * (head_dim**-0.5)
        # float32: a softmax in bfloat16 loses the small weights of a large image.
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(self.dtype)
        h = Product(name='mix')(weights, v.swapaxes(2, 3))
        h = h.swapaxes(1, 2).reshape(b, height * width, c)
        h = nn.Dense(c, dtype=self.dtype, name='out')(h)
        return x + h.reshape(b, height, width, c)


class DownLevel(nn.Module):
    """The blocks of one resolution on the way down."""

    width: int
    num_blocks: int
    attention: bool
    downsample: bool
    padding: str
    num_groups: int
    epsilon: float
    scale_shift: bool
    head_dim: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> tuple[Array, list[Array]]:
        """The output, and every tensor the way up will want."""
        skips = []
        for j in range(self.num_blocks):
            x = ResBlock(
                self.width, self.num_groups, self.epsilon, self.scale_shift, self.dtype,
                name=f'block_{j}',
            )(x, embedding)  # fmt: skip
            if self.attention:
                x = Attention(
                    self.head_dim, self.num_groups, self.epsilon, self.dtype, name=f'attention_{j}'
                )(x)
            skips.append(x)
        if self.downsample:
            padding = ((0, 1), (0, 1)) if self.padding == 'asymmetric' else 1
            x = conv3x3(self.width, 'downsample', self.dtype, strides=2, padding=padding)(x)
            skips.append(x)
        return x, skips


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    width: int
    attention: bool
    num_groups: int
    epsilon: float
    scale_shift: bool
    head_dim: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, embedding: Array) -> Array:
        """The features that the way up starts from."""
        block = (self.width, self.num_groups, self.epsilon, self.scale_shift, self.dtype)
        x = ResBlock(*block, name='block_0')(x, embedding)
        if self.attention:
            x = Attention(
                self.head_dim, self.num_groups, self.epsilon, self.dtype, name='attention_0'
            )(x)
        return ResBlock(*block, name='block_1')(x, embedding)


class UpLevel(nn.Module):
    """The blocks of one resolution on the way up, each fed with one skip."""

    width: int
    num_blocks: int
    attention: bool
    upsample: bool
    num_groups: int
    epsilon: float
    scale_shift: bool
    head_dim: int | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], embedding: Array) -> Array:
        """`x` refined with `skips`, used from the last to the first."""
        for j in range(self.num_blocks):
            joined = x.shape[-1]
            x = jnp.concatenate([x, skips[-1 - j]], axis=-1)
            x = ResBlock(
                self.width, self.num_groups, self.epsilon, self.scale_shift, self.dtype,
                joined=joined, name=f'block_{j}',
            )(x, embedding)  # fmt: skip
            if self.attention:
                x = Attention(
                    self.head_dim, self.num_groups, self.epsilon, self.dtype, name=f'attention_{j}'
                )(x)
        if self.upsample:
            x = conv3x3(self.width, 'upsample', self.dtype, enlarged=True)(upsampled(x))
        return x
