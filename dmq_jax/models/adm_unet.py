"""The U-Net of ADM ("guided diffusion") in plain Flax, and the levels that LDM's shares with it.

Dhariwal and Nichol 2021 (arXiv:2105.05233), section 3 and appendix. With the same weights it
computes what the published code does; `adm_weights` knows its names and settings. Layout NHWC.
Blocks are a Python loop, so that every layer has a module path of its own, and queries, keys and
values are layers of their own although checkpoints store them as one.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmq_jax.models.convolution import upsampled
from dmq_jax.models.ddpm_unet import (
    GroupNorm,
    ResBlock,
    TimeEmbedding,
    averaged,
    conv3x3,
    timestep_features,
)
from dmq_jax.models.tap import Attend

# A factory of modules: `make(name=...)`, the settings that do not change bound before.
Make = Callable[..., nn.Module]


class ADMUNet(nn.Module):
    """Predicts eps, and with twice the channels also the variance, from a noisy image.

    Attributes:
      channels: width of each resolution level, finest first.
      in_channels: channels of the image.
      out_channels: of the output: twice the image's if the model also learnt the variance, eps
        first.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      attention: for each level, whether its blocks are followed by attention.
      num_heads: of attention, for each level; that of the last also in the middle.
      time_features: sinusoids of the timestep (`num_channels` of the original); the embedding is
        four times as wide. None: `channels[0]`.
      num_classes: rows of the class table; None is unconditional.
      low_res_channels: channels of the small image of an upsampler, which is enlarged and seen
        beside the noisy one; 0: not an upsampler.
      resblock_updown: change resolution within residual blocks instead of by a convolution.
      scale_shift: the timestep scales and shifts after the second norm instead of adding before.
      num_groups: groups of every GroupNorm.
      epsilon: added to the variance in GroupNorm.
      dtype: of the computation; parameters stay as they are.
    """

    channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 6
    num_blocks: int = 2
    attention: tuple[bool, ...] = ()
    num_heads: tuple[int, ...] = ()
    time_features: int | None = None
    num_classes: int | None = None
    low_res_channels: int = 0
    resblock_updown: bool = True
    scale_shift: bool = True
    num_groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def _check(self, x: Array, y: Array | None, low_res: Array | None) -> None:
        check_levels(
            x, self.channels, self.in_channels, attention=self.attention, num_heads=self.num_heads
        )
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                f'y is {"missing" if y is None else "given"} but num_classes={self.num_classes}.'
            )
        found = 0 if low_res is None else low_res.shape[3]
        if found != self.low_res_channels:
            raise ValueError(
                f'low_res has {found} channels: expected {self.low_res_channels} '
                f'(0: no low_res at all).'
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Int[Array, '*B'] | Float[Array, '*B'],
        y: Int[Array, 'B'] | None = None,
        low_res: Float[Array, 'B h w D'] | None = None,
    ) -> Float[Array, 'B H W O']:
        """The prediction for noisy images `x` at timesteps `t` (scalar or one per image).

        Raises:
          ValueError: sizes, channels, classes or a small image that the settings do not fit.
        """
        self._check(x, y, low_res)
        x = x.astype(self.dtype)
        if low_res is not None:
            large = jax.image.resize(
                low_res.astype(self.dtype), (*x.shape[:3], self.low_res_channels), 'bilinear'
            )
            x = jnp.concatenate([x, large], axis=-1)
        width = self.time_features or self.channels[0]
        t = jnp.broadcast_to(t, x.shape[:1])
        features = timestep_features(t, width, cos_first=True, frequency_shift=0)
        embedding = TimeEmbedding(4 * width, self.dtype, name='time_embed')(features)
        if self.num_classes is not None:
            table = nn.Embed(self.num_classes, 4 * width, dtype=self.dtype, name='class_embed')
            embedding = embedding + table(y)
        block = functools.partial(
            ResBlock, num_groups=self.num_groups, epsilon=self.epsilon,
            scale_shift=self.scale_shift, dtype=self.dtype,
        )  # fmt: skip
        attend = functools.partial(
            SelfAttention, num_groups=self.num_groups, epsilon=self.epsilon, dtype=self.dtype
        )
        levels = [
            functools.partial(attend, num_heads=heads) if attention else None
            for attention, heads in zip(self.attention, self.num_heads, strict=True)
        ]
        x = conv3x3(self.channels[0], 'conv_in', self.dtype)(x)
        x = down_and_up(
            x, embedding, None,
            channels=self.channels, num_blocks=self.num_blocks, block=block, attention=levels,
            mid_attention=functools.partial(attend, num_heads=self.num_heads[-1]),
            resblock_updown=self.resblock_updown, dtype=self.dtype,
        )  # fmt: skip
        x = GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm_out')(x)
        return conv3x3(self.out_channels, 'conv_out', self.dtype)(nn.silu(x))


def check_levels(
    x: Array, channels: Sequence[int], in_channels: int, **per_level: Sequence[object]
) -> None:
    """Refuses an image, or settings of levels, that a U-Net of these `channels` cannot take.

    Raises:
      ValueError: naming the setting, or the size.
    """
    for name, values in per_level.items():
        if len(values) != len(channels):
            raise ValueError(
                f'{name}={values}: expected {len(channels)} entries, one per entry of '
                f'channels={channels}.'
            )
    factor = 2 ** (len(channels) - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f'image of {x.shape[1]}x{x.shape[2]}: both sides must be multiples of {factor} '
            f'({len(channels)} levels).'
        )
    if x.shape[3] != in_channels:
        raise ValueError(f'image has {x.shape[3]} channels: expected {in_channels}.')


def down_and_up(
    x: Array,
    embedding: Array,
    context: Array | None,
    *,
    channels: Sequence[int],
    num_blocks: int,
    block: Make,
    attention: Sequence[Make | None],
    mid_attention: Make,
    resblock_updown: bool,
    dtype: jnp.dtype,
) -> Array:
    """The levels of a U-Net between its first convolution and its last norm.

    To be called within a compact module, of which `down_0`, ..., `mid`, `up_0`, ... become parts;
    `up_0` is the coarsest level.

    Args:
      x: output of the first convolution, which is a skip, too.
      embedding: of the timestep, for every block.
      context: what attention may look at besides the pixels.
      channels: width of each level, finest first.
      num_blocks: blocks of a level on the way down; one more on the way up.
      block: makes a residual block from its `width`, and maybe `resample` or `joined`.
      attention: makes what follows every block of a level; None: nothing does.
      mid_attention: makes the attention in the middle.
      resblock_updown: change resolution within residual blocks instead of by a convolution.
      dtype: of the computation.
    """
    skips = [x]
    last = len(channels) - 1
    settings = dict(block=block, resblock_updown=resblock_updown, dtype=dtype)
    for i, width in enumerate(channels):
        x, more = DownLevel(
            width=width, num_blocks=num_blocks, attention=attention[i], downsample=i < last,
            name=f'down_{i}', **settings,
        )(x, embedding, context)  # fmt: skip
        skips += more
    x = Middle(channels[-1], block, mid_attention, name='mid')(x, embedding, context)
    for i, width in enumerate(channels[::-1]):
        count = num_blocks + 1
        skips, used = skips[:-count], skips[-count:]
        x = UpLevel(
            width=width, num_blocks=count, attention=attention[last - i], upsample=i < last,
            name=f'up_{i}', **settings,
        )(x, used, embedding, context)  # fmt: skip
    return x


class SelfAttention(nn.Module):
    """Attention of the pixels to one another, with a norm before and the input added after."""

    num_heads: int
    num_groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C'], context: None = None) -> Float[Array, 'B H W C']:
        """`x` plus what each pixel gathers; there is no context to look at.

        Raises:
          ValueError: `num_heads` does not divide the channels.
        """
        b, height, width, c = x.shape
        if c % self.num_heads:
            raise ValueError(f'num_heads={self.num_heads} does not divide {c} channels.')
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm')(x)
        h = h.reshape(b, height * width, c)

        def heads(name: str) -> Float[Array, 'B L H D']:
            return nn.Dense(c, dtype=self.dtype, name=name)(h).reshape(
                *h.shape[:2], self.num_heads, -1
            )

        h = Attend(name='attend')(heads('q'), heads('k'), heads('v')).reshape(h.shape)
        h = nn.Dense(c, dtype=self.dtype, name='out')(h)
        return x + h.reshape(x.shape)


class DownLevel(nn.Module):
    """The blocks of one resolution on the way down."""

    width: int
    num_blocks: int
    block: Make
    attention: Make | None
    downsample: bool
    resblock_updown: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Array, embedding: Array, context: Array | None
    ) -> tuple[Array, list[Array]]:
        """The output, and every tensor the way up will want."""
        skips = []
        for j in range(self.num_blocks):
            x = self.block(width=self.width, name=f'block_{j}')(x, embedding)
            if self.attention is not None:
                x = self.attention(name=f'attention_{j}')(x, context)
            skips.append(x)
        if self.downsample:
            if self.resblock_updown:
                x = self.block(width=self.width, resample=averaged, name='downsample')(x, embedding)
            else:
                x = conv3x3(self.width, 'downsample', self.dtype, strides=2)(x)
            skips.append(x)
        return x, skips


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    width: int
    block: Make
    attention: Make

    @nn.compact
    def __call__(self, x: Array, embedding: Array, context: Array | None) -> Array:
        """The features that the way up starts from."""
        x = self.block(width=self.width, name='block_0')(x, embedding)
        x = self.attention(name='attention_0')(x, context)
        return self.block(width=self.width, name='block_1')(x, embedding)


class UpLevel(nn.Module):
    """The blocks of one resolution on the way up, each fed with one skip."""

    width: int
    num_blocks: int
    block: Make
    attention: Make | None
    upsample: bool
    resblock_updown: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Array, skips: Sequence[Array], embedding: Array, context: Array | None
    ) -> Array:
        """`x` refined with `skips`, used from the last to the first."""
        for j in range(self.num_blocks):
            joined = x.shape[-1]
            x = jnp.concatenate([x, skips[-1 - j]], axis=-1)
            x = self.block(width=self.width, joined=joined, name=f'block_{j}')(x, embedding)
            if self.attention is not None:
                x = self.attention(name=f'attention_{j}')(x, context)
        if not self.upsample:
            return x
        if self.resblock_updown:
            return self.block(width=self.width, resample=upsampled, name='upsample')(x, embedding)
        return conv3x3(self.width, 'upsample', self.dtype, enlarged=True)(upsampled(x))
