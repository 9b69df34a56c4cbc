"""The autoencoders of latent diffusion in plain Flax: images to latents and back.

Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models
(arXiv:2112.10752, section 3.1): `AutoencoderKL` with a Gaussian latent (Stable Diffusion 1, 2, XL,
DiT, PixArt) and `VQAutoencoder` with a codebook (VQ-f4, VQ-f8), both with what diffusers'
`AutoencoderKL` and `VQModel` compute. Images are NHWC in [-1, 1]. Blocks are a Python loop, so that
every layer has a module path of its own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dmq_jax.models.convolution import upsampled
from dmq_jax.models.ddpm_unet import GroupNorm, conv3x3
from dmq_jax.models.tap import Attend

_EPSILON = 1e-6


class Moments(NamedTuple):
    """The Gaussian that an image is encoded to, pixel by pixel of the latent.

    Attributes:
      mean: which is also the latent to take where nothing is to be drawn.
      log_variance: natural logarithm, in [-30, 20].
    """

    mean: Float[Array, 'B h w Z']
    log_variance: Float[Array, 'B h w Z']


class AutoencoderKL(nn.Module):
    """Images to Gaussian latents and back.

    A diffusion network works on `scale_latents(self, latent)`, which has about unit variance.

    Attributes:
      channels: width of each resolution level, finest first; every level but one halves the sides.
      in_channels: channels of the image; the decoder gives as many unless `out_channels` is given.
      out_channels: channels of a decoded image.
      latent_channels: channels of the latent.
      layers_per_block: residual blocks of a level of the encoder; one more in the decoder.
      attention: for each level, whether its blocks are followed by attention; None: nowhere.
      mid_attention: attention between encoder and decoder.
      num_groups: groups of every GroupNorm.
      quant_conv: a 1x1 convolution after the encoder.
      post_quant_conv: one before the decoder.
      scaling_factor: see `scale_latents`.
      shift_factor: see `scale_latents`.
      dtype: of the computation; parameters stay float32.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    in_channels: int = 3
    out_channels: int | None = None
    latent_channels: int = 4
    layers_per_block: int = 2
    attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    num_groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Names the two halves."""
        self.encoder, self.decoder = _halves(self, 2 * self.latent_channels)
        if self.quant_conv:
            self.quant = conv1x1(2 * self.latent_channels, self.dtype)
        if self.post_quant_conv:
            self.post_quant = conv1x1(self.latent_channels, self.dtype)

    def __call__(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B H W O']:
        """The images after a way through the mean of the latent."""
        return self.decode(self.encode(images).mean)

    def encode(self, images: Float[Array, 'B H W C']) -> Moments:
        """The Gaussian of each image, before scaling.

        Raises:
          ValueError: sides that the levels do not divide, or other channels.
        """
        h = self.encoder(images)
        h = self.quant(h) if self.quant_conv else h
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: Float[Array, 'B h w Z']) -> Float[Array, 'B H W O']:
        """The images of latents without scaling (`unscale_latents`).

        Raises:
          ValueError: latents with other channels.
        """
        _check_channels('latents', latents, self.latent_channels)
        h = latents.astype(self.dtype)
        return self.decoder(self.post_quant(h) if self.post_quant_conv else h)


class VQAutoencoder(nn.Module):
    """Images to vectors of a codebook and back.

    Attributes:
      channels: width of each resolution level, finest first; every level but one halves the sides.
      in_channels: channels of the image; the decoder gives as many unless `out_channels` is given.
      out_channels: channels of a decoded image.
      latent_channels: channels between encoder and codebook, and between codebook and decoder.
      codebook_size: vectors of the codebook.
      codebook_channels: length of a vector; None: `latent_channels`.
      layers_per_block: residual blocks of a level of the encoder; one more in the decoder.
      attention: for each level, whether its blocks are followed by attention; None: nowhere.
      mid_attention: attention between encoder and decoder.
      num_groups: groups of every GroupNorm.
      scaling_factor: see `scale_latents`; 1 in the original code.
      shift_factor: see `scale_latents`.
      dtype: of the computation; parameters stay float32.
    """

    channels: tuple[int, ...] = (128, 256, 512)
    in_channels: int = 3
    out_channels: int | None = None
    latent_channels: int = 3
    codebook_size: int = 8192
    codebook_channels: int | None = None
    layers_per_block: int = 2
    attention: tuple[bool, ...] | None = None
    mid_attention: bool = True
    num_groups: int = 32
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Names the two halves and what lies between."""
        width = self.codebook_channels or self.latent_channels
        self.encoder, self.decoder = _halves(self, self.latent_channels)
        self.quant = conv1x1(width, self.dtype)
        self.post_quant = conv1x1(self.latent_channels, self.dtype)
        self.codebook = nn.Embed(self.codebook_size, width, dtype=self.dtype)

    def __call__(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B H W O']:
        """The images after a way through the codebook."""
        return self.decode(self.encode(images))

    def encode(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B h w Z']:
        """The latents, not rounded to the codebook: what a diffusion network works on.

        Raises:
          ValueError: sides that the levels do not divide, or other channels.
        """
        return self.quant(self.encoder(images))

    def nearest(self, latents: Float[Array, 'B h w Z']) -> Int[Array, 'B h w']:
        """The row of the codebook nearest to every latent pixel."""
        # |z - e|^2 without |z|^2, in float32: a product of bfloat16 picks other rows.
        table = self.codebook.embedding.astype(jnp.float32)
        product = jnp.einsum(
            'bhwz,nz->bhwn', latents.astype(jnp.float32), table, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.argmin(
            jnp.sum(table**2, axis=-1)[None, None, None] - 2 * product, axis=-1
        ).astype(jnp.int32)

    def decode(
        self, latents: Float[Array, 'B h w Z'], *, force_not_quantize: bool = False
    ) -> Float[Array, 'B H W O']:
        """The images of latents without scaling (`unscale_latents`).

        Args:
          latents: of any values.
          force_not_quantize: take the latents as they are, not the nearest rows of the codebook.

        Raises:
          ValueError: latents with other channels.
        """
        _check_channels('latents', latents, self.codebook_channels or self.latent_channels)
        h = latents.astype(self.dtype)
        h = h if force_not_quantize else self.codebook(self.nearest(latents))
        return self.decoder(self.post_quant(h))


def scale_latents(
    network: AutoencoderKL | VQAutoencoder, latents: Array | Moments
) -> Array | Moments:
    """Latents of the encoder as a diffusion network takes them: (z - shift) * scale."""
    if isinstance(latents, Moments):
        log_variance = latents.log_variance + 2 * math.log(network.scaling_factor)
        return Moments(scale_latents(network, latents.mean), log_variance)
    return (latents - network.shift_factor) * network.scaling_factor


def unscale_latents(network: AutoencoderKL | VQAutoencoder, latents: Array) -> Array:
    """Latents of a diffusion network as the decoder takes them: the inverse of scaling."""
    return latents / network.scaling_factor + network.shift_factor


def sample_latents(moments: Moments, key: Key[Array, '']) -> Float[Array, 'B h w Z']:
    """A latent drawn from the Gaussian of each image."""
    noise = jax.random.normal(key, moments.mean.shape, moments.mean.dtype)
    return moments.mean + jnp.exp(0.5 * moments.log_variance) * noise


def tiled_decode(
    decode: Callable[[Float[Array, 'B h w Z']], Float[Array, 'B H W O']],
    latents: Float[Array, 'B h w Z'],
    *,
    tile_size: int = 64,
    overlap: int = 16,
) -> Float[Array, 'B H W O']:
    """Images decoded tile by tile, so that memory is that of one tile whatever the image.

    Tiles overlap and fade into one another. Where one tile covers the image, this is
    `decode`. Otherwise norms and attention see a tile, not the image, so that the result differs
    from `decode` by a smooth function; a decoder that works pixel by pixel gives the same.

    Args:
      decode: latents to images larger by a whole factor, e.g. `autoencoder.apply` with parameters.
      latents: of any size.
      tile_size: side of a tile in pixels of the latent.
      overlap: of neighbours, likewise; a quarter of the tile hides the seams.

    Raises:
      ValueError: an overlap that is negative or larger than half a tile.
    """
    if tile_size < 1 or not 0 <= 2 * overlap <= tile_size:
        raise ValueError(
            f'overlap={overlap}: expected 0 to {tile_size // 2}, half of tile_size={tile_size}.'
        )
    batch, *sides, depth = latents.shape
    tile = [min(tile_size, side) for side in sides]
    if tile == sides:
        return decode(latents)
    starts = [_tile_starts(side, size, overlap) for side, size in zip(sides, tile, strict=True)]
    one = jax.eval_shape(decode, jax.ShapeDtypeStruct((batch, *tile, depth), latents.dtype))
    factor = one.shape[1] // tile[0]
    fades = [_fade(size * factor, overlap * factor) for size in tile]
    fade = jnp.asarray(fades[0][:, None] * fades[1][None, :])[None, :, :, None]

    def add_tile(
        carry: tuple[Array, Array], start: Int[Array, '2']
    ) -> tuple[tuple[Array, Array], None]:
        total, weight = carry
        zero = jnp.zeros((), start.dtype)
        part = jax.lax.dynamic_slice(
            latents, (zero, start[0], start[1], zero), (batch, *tile, depth)
        )
        place = (zero, factor * start[0], factor * start[1], zero)
        return (
            _add_at(total, decode(part).astype(jnp.float32) * fade, place),
            _add_at(weight, fade, place),
        ), None

    size = [factor * side for side in sides]
    empty = (
        jnp.zeros((batch, *size, one.shape[-1]), jnp.float32),
        jnp.zeros((1, *size, 1), jnp.float32),
    )
    places = np.array([(i, j) for i in starts[0] for j in starts[1]], np.int32)
    (total, weight), _ = jax.lax.scan(add_tile, empty, jnp.asarray(places))
    return (total / weight).astype(one.dtype)


def conv1x1(width: int, dtype: jnp.dtype) -> nn.Conv:
    """A dense layer on the channels of every pixel."""
    return nn.Conv(width, (1, 1), dtype=dtype)


class ResBlock(nn.Module):
    """Residual block of two convolutions."""

    width: int
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W O']:
        """`x` (through a 1x1 convolution where the width changes) plus the residual branch."""
        h = x
        for i in (1, 2):
            h = GroupNorm(self.num_groups, _EPSILON, self.dtype, name=f'norm{i}')(h)
            h = conv3x3(self.width, f'conv{i}', self.dtype)(nn.silu(h))
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name='conv_shortcut')(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the pixels; one head, in every published checkpoint."""

    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B H W C']:
        """`x` plus what each pixel gathers from all pixels."""
        batch, *_, c = x.shape
        h = GroupNorm(self.num_groups, _EPSILON, self.dtype, name='norm')(x)
        h = h.reshape(batch, -1, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(h)[:, :, None] for name in 'qkv')
        h = Attend(name='attend')(q, k, v)[:, :, 0]
        return x + nn.Dense(c, dtype=self.dtype, name='out')(h).reshape(x.shape)


class Level(nn.Module):
    """Residual blocks of one width, with attention between and after them if asked for.

    Attributes:
      width: channels.
      num_blocks: residual blocks.
      num_attentions: of the blocks, the first so many are followed by attention.
      num_groups: groups of every GroupNorm.
      resample: 'down' halves the sides at the end, 'up' doubles them; None.
      dtype: of the computation.
    """

    width: int
    num_blocks: int
    num_attentions: int
    num_groups: int
    resample: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W C']) -> Float[Array, 'B h w O']:
        """The features of the next level."""
        for i in range(self.num_blocks):
            x = ResBlock(self.width, self.num_groups, self.dtype, name=f'block_{i}')(x)
            if i < self.num_attentions:
                x = Attention(self.num_groups, self.dtype, name=f'attention_{i}')(x)
        if self.resample == 'down':
            # One row and column after the image only, as in DDPM.
            padding = ((0, 1), (0, 1))
            x = conv3x3(self.width, 'downsample', self.dtype, strides=2, padding=padding)(x)
        elif self.resample == 'up':
            x = conv3x3(self.width, 'upsample', self.dtype, enlarged=True)(upsampled(x))
        return x


class Encoder(nn.Module):
    """Images to features of the coarsest level."""

    channels: tuple[int, ...]
    in_channels: int
    out_channels: int
    layers_per_block: int
    attention: tuple[bool, ...]
    mid_attention: bool
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, 'B H W C']) -> Float[Array, 'B h w Z']:
        """What the encoder says of each patch."""
        _check_channels('images', images, self.in_channels)
        last = len(self.channels) - 1
        if images.shape[1] % 2**last or images.shape[2] % 2**last:
            raise ValueError(
                f'images of {images.shape[1]}x{images.shape[2]}: both sides must be multiples of '
                f'{2**last} ({last + 1} levels).'
            )
        x = conv3x3(self.channels[0], 'conv_in', self.dtype)(images.astype(self.dtype))
        for i, (width, attention) in enumerate(zip(self.channels, self.attention, strict=True)):
            x = Level(
                width, self.layers_per_block, attention * self.layers_per_block, self.num_groups,
                'down' if i < last else None, self.dtype, name=f'down_{i}',
            )(x)  # fmt: skip
        x = _middle(self)(x)
        x = GroupNorm(self.num_groups, _EPSILON, self.dtype, name='norm_out')(x)
        return conv3x3(self.out_channels, 'conv_out', self.dtype)(nn.silu(x))


class Decoder(nn.Module):
    """Features of the coarsest level to images."""

    channels: tuple[int, ...]
    out_channels: int
    layers_per_block: int
    attention: tuple[bool, ...]
    mid_attention: bool
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, 'B h w Z']) -> Float[Array, 'B H W O']:
        """The images."""
        last, count = len(self.channels) - 1, self.layers_per_block + 1
        x = conv3x3(self.channels[-1], 'conv_in', self.dtype)(x)
        x = _middle(self)(x)
        for i, (width, attention) in enumerate(
            zip(self.channels[::-1], self.attention[::-1], strict=True)
        ):
            x = Level(
                width, count, attention * count, self.num_groups,
                'up' if i < last else None, self.dtype, name=f'up_{i}',
            )(x)  # fmt: skip
        x = GroupNorm(self.num_groups, _EPSILON, self.dtype, name='norm_out')(x)
        return conv3x3(self.out_channels, 'conv_out', self.dtype)(nn.silu(x))


def _middle(half: Encoder | Decoder) -> Level:
    settings = (int(half.mid_attention), half.num_groups, None, half.dtype)
    return Level(half.channels[-1], 2, *settings, name='mid')


def _halves(network: AutoencoderKL | VQAutoencoder, encoded: int) -> tuple[Encoder, Decoder]:
    levels = len(network.channels)
    attention = network.attention or (False,) * levels
    if len(attention) != levels:
        raise ValueError(
            f'attention={network.attention}: expected {levels} entries, one per entry of '
            f'channels={network.channels}.'
        )
    settings = dict(
        channels=network.channels, layers_per_block=network.layers_per_block, attention=attention,
        mid_attention=network.mid_attention, num_groups=network.num_groups, dtype=network.dtype,
    )  # fmt: skip
    return (
        Encoder(in_channels=network.in_channels, out_channels=encoded, **settings),
        Decoder(out_channels=network.out_channels or network.in_channels, **settings),
    )


def _check_channels(what: str, x: Array, wanted: int) -> None:
    if x.shape[-1] != wanted:
        raise ValueError(f'{what} have {x.shape[-1]} channels: expected {wanted}.')


def _tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: `overlap` or more apart from the end of the one before."""
    count = 1 + max(0, -(-(side - tile) // (tile - overlap)))
    return [min(i * (tile - overlap), side - tile) for i in range(count)]


def _fade(size: int, overlap: int) -> np.ndarray:
    """Weight of each pixel of a tile along a side.

    Of the overlap, the outer quarter of a tile does not count, since the zeros beyond its border
    reach there; then it fades in. At the border of the image there is no other tile: hence not 0.
    """
    distance = np.minimum(np.arange(size) + 0.5, size - 0.5 - np.arange(size))
    rising = (distance - overlap / 4) / (overlap / 2) if overlap else np.ones(size)
    return np.clip(rising, 1e-4, 1.0).astype(np.float32)


def _add_at(canvas: Array, part: Array, place: tuple[Array, ...]) -> Array:
    there = jax.lax.dynamic_slice(canvas, place, part.shape)
    return jax.lax.dynamic_update_slice(canvas, there + part, place)
