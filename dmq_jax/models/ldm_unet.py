"""The U-Net of latent diffusion in plain Flax: LDM, Stable Diffusion 1 and 2, SDXL.

Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E; Podell et al. 2023
(arXiv:2307.01952) for SDXL. With the same weights it computes what CompVis' code and diffusers'
`UNet2DConditionModel` do; `ldm_weights` knows their names and settings. The levels are those of
ADM's U-Net; what differs is the attention, which may look at a text or a class. Layout NHWC.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmq_jax.models.adm_unet import SelfAttention, check_levels, down_and_up
from dmq_jax.models.ddpm_unet import (
    GroupNorm,
    ResBlock,
    TimeEmbedding,
    conv3x3,
    timestep_features,
)
from dmq_jax.models.tap import Attend

# Original height and width, top and left of the crop, target height and width.
_SIZE_IDS = 6


class LDMUNet(nn.Module):
    """Predicts eps (or v) from a noisy latent, its timestep and a context.

    Attributes:
      channels: width of each resolution level, finest first.
      in_channels: channels of the latent.
      out_channels: channels of the output.
      num_blocks: residual blocks of a level on the way down; one more on the way up.
      depth: transformer blocks after every residual block of a level, 0 for no attention; without
        a context, attention is a single layer and the depth 0 or 1.
      mid_depth: the same in the middle.
      num_heads: of attention, for each level; that of the last also in the middle.
      context_dim: width of the tokens of the context; None: the network takes none.
      added_dim: width of the vector that SDXL adds to the timestep's: the pooled text and
        `size_features` sinusoids for each of six sizes; None: nothing is added.
      size_features: sinusoids of each of these sizes.
      resblock_updown: change resolution within residual blocks instead of by a convolution.
      scale_shift: the timestep scales and shifts after the second norm instead of adding before.
      num_groups: groups of every GroupNorm.
      epsilon: added to the variance in GroupNorm; a transformer's has 1e-6, whatever this is.
      cos_first: order of the halves of the timestep features.
      frequency_shift: 1 spaces their frequencies over `half - 1` (DDPM), 0 over `half`.
      dtype: of the computation; parameters stay as they are.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    in_channels: int = 4
    out_channels: int = 4
    num_blocks: int = 2
    depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int | None = 768
    added_dim: int | None = None
    size_features: int = 256
    resblock_updown: bool = False
    scale_shift: bool = False
    num_groups: int = 32
    epsilon: float = 1e-5
    cos_first: bool = True
    frequency_shift: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text embedding; None if the network takes none."""
        return None if self.added_dim is None else self.added_dim - _SIZE_IDS * self.size_features

    def _check(
        self, x: Array, context: Array | None, pooled: Array | None, sizes: Array | None
    ) -> None:
        check_levels(x, self.channels, self.in_channels, depth=self.depth, num_heads=self.num_heads)
        if self.context_dim is None and max(*self.depth, self.mid_depth) > 1:
            raise ValueError(
                f'depth={self.depth}, mid_depth={self.mid_depth}: without a context (context_dim='
                f'None) attention is a single layer; expected 0 or 1.'
            )
        for name, array, width in (
            ('context', context, self.context_dim),
            ('pooled', pooled, self.pooled_dim),
            ('sizes', sizes, None if self.added_dim is None else _SIZE_IDS),
        ):
            found = None if array is None else array.shape[-1]
            if found != width:
                raise ValueError(
                    f'{name} is {"missing" if found is None else f"{found} wide"}: expected '
                    f'{"none" if width is None else f"width {width}"}.'
                )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        t: Int[Array, '*B'] | Float[Array, '*B'],
        context: Float[Array, 'B L D'] | None = None,
        pooled: Float[Array, 'B P'] | None = None,
        sizes: Float[Array, 'B 6'] | Int[Array, 'B 6'] | None = None,
    ) -> Float[Array, 'B H W O']:
        """The prediction for noisy latents `x` at timesteps `t` (scalar or one per image).

        Args:
          x: noisy latents.
          t: timesteps.
          context: tokens of a text, or of a class (`ClassEmbedder`).
          pooled: SDXL: the embedding of the whole text.
          sizes: SDXL: original height and width, top and left of the crop, target height and
            width, in pixels (`time_ids` of diffusers).

        Raises:
          ValueError: sizes, channels or conditions that the settings do not fit.
        """
        self._check(x, context, pooled, sizes)
        x = x.astype(self.dtype)
        features = functools.partial(
            timestep_features, cos_first=self.cos_first, frequency_shift=self.frequency_shift
        )
        width = 4 * self.channels[0]
        t = jnp.broadcast_to(t, x.shape[:1])
        embedding = TimeEmbedding(width, self.dtype, name='time_embed')(
            features(t, self.channels[0])
        )
        if self.added_dim is not None:
            sinusoids = features(sizes.reshape(-1), self.size_features).reshape(x.shape[0], -1)
            added = jnp.concatenate([pooled.astype(jnp.float32), sinusoids], axis=-1)
            embedding = embedding + TimeEmbedding(width, self.dtype, name='added_embed')(added)
        if context is not None:
            context = context.astype(self.dtype)
        block = functools.partial(
            ResBlock, num_groups=self.num_groups, epsilon=self.epsilon,
            scale_shift=self.scale_shift, dtype=self.dtype,
        )  # fmt: skip

        def attention(depth: int, num_heads: int) -> functools.partial | None:
            if depth == 0:
                return None
            if self.context_dim is None:
                return functools.partial(
                    SelfAttention, num_heads=num_heads, num_groups=self.num_groups,
                    epsilon=self.epsilon, dtype=self.dtype,
                )  # fmt: skip
            return functools.partial(
                SpatialTransformer, depth=depth, num_heads=num_heads,
                num_groups=self.num_groups, dtype=self.dtype,
            )  # fmt: skip

        x = conv3x3(self.channels[0], 'conv_in', self.dtype)(x)
        x = down_and_up(
            x, embedding, context,
            channels=self.channels, num_blocks=self.num_blocks, block=block,
            attention=list(map(attention, self.depth, self.num_heads)),
            mid_attention=attention(self.mid_depth, self.num_heads[-1]),
            resblock_updown=self.resblock_updown, dtype=self.dtype,
        )  # fmt: skip
        x = GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm_out')(x)
        return conv3x3(self.out_channels, 'conv_out', self.dtype)(nn.silu(x))


class ClassEmbedder(nn.Module):
    """The condition of class-conditional LDM: one token for each class.

    Attributes:
      num_classes: rows of the table, the null class of guidance included, which is the last.
      width: of the token, the network's `context_dim`.
      dtype: of the token.
    """

    num_classes: int = 1001
    width: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, y: Int[Array, 'B']) -> Float[Array, 'B 1 D']:
        """The context of images of classes `y`."""
        table = nn.Embed(self.num_classes, self.width, dtype=self.dtype, name='class_embed')
        return table(y)[:, None, :]


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels as tokens, with a norm before and the input added after."""

    depth: int
    num_heads: int
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], context: Float[Array, 'B L D']
    ) -> Float[Array, 'B H W C']:
        """`x` plus what the blocks make of it."""
        b, height, width, c = x.shape
        # 1e-6 here, whatever the residual blocks have: so in CompVis' code and in diffusers.
        h = GroupNorm(self.num_groups, 1e-6, self.dtype, name='norm')(x)
        h = nn.Dense(c, dtype=self.dtype, name='proj_in')(h.reshape(b, height * width, c))
        for i in range(self.depth):
            h = TransformerBlock(self.num_heads, self.dtype, name=f'block_{i}')(h, context)
        h = nn.Dense(c, dtype=self.dtype, name='proj_out')(h)
        return x + h.reshape(x.shape)


class TransformerBlock(nn.Module):
    """Attention to itself, attention to the context, and a gated layer for each token."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B N C'], context: Float[Array, 'B L D']
    ) -> Float[Array, 'B N C']:
        """The refined tokens."""
        c = x.shape[-1]

        def norm(name: str) -> Float[Array, 'B N C']:
            normalized = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)
            # Parameters kept in bfloat16 are widened, which strict promotion takes for an accident.
            with jax.numpy_dtype_promotion('standard'):
                return normalized(x.astype(jnp.float32)).astype(self.dtype)

        h = norm('norm1')
        x = x + CrossAttention(self.num_heads, self.dtype, name='attn1')(h, h)
        x = x + CrossAttention(self.num_heads, self.dtype, name='attn2')(norm('norm2'), context)
        # GEGLU: the first half passes as far as the second lets it.
        h = nn.Dense(8 * c, dtype=self.dtype, name='ff_in')(norm('norm3'))
        h, gate = jnp.split(h, 2, axis=-1)
        h = h * jax.nn.gelu(gate, approximate=False)
        return x + nn.Dense(c, dtype=self.dtype, name='ff_out')(h)


class CrossAttention(nn.Module):
    """Attention of tokens to the tokens of a context."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B N C'], context: Float[Array, 'B L D']
    ) -> Float[Array, 'B N C']:
        """What each token of `x` gathers from `context`.

        Raises:
          ValueError: `num_heads` does not divide the channels.
        """
        c = x.shape[-1]
        if c % self.num_heads:
            raise ValueError(f'num_heads={self.num_heads} does not divide {c} channels.')

        def heads(name: str, tokens: Array) -> Float[Array, 'B L H D']:
            projected = nn.Dense(c, use_bias=False, dtype=self.dtype, name=name)(tokens)
            return projected.reshape(*tokens.shape[:2], self.num_heads, c // self.num_heads)

        h = Attend(name='attend')(heads('q', x), heads('k', context), heads('v', context))
        return nn.Dense(c, dtype=self.dtype, name='out')(h.reshape(x.shape))
