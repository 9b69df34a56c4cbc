"""Any denoiser -> images, one random key per image.

Image i depends on `fold_in(key, i)` and its label alone: not on the batch size, not on the number
of devices, not on how often the run was interrupted. The only place that converts between pixels
(uint8) and the range [-1, 1] that networks see.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from dmq_jax import denoisers
from dmq_jax.config import SamplerConfig
from dmq_jax.diffusion import samplers
from dmq_jax.models import autoencoder
from dmq_jax.runtime import hosts, mesh, programs

_AT_ONCE = 8


class Batch(NamedTuple):
    """Some of the images of a run.

    Attributes:
      indices: their place in the run.
      images: pixels.
      labels: the class each was conditioned on; None if unconditional.
    """

    indices: Int[np.ndarray, 'B']
    images: UInt8[np.ndarray, 'B H W C']
    labels: Int[np.ndarray, 'B'] | None


def to_float(images: UInt8[Array, '*shape']) -> Float[Array, '*shape']:
    """Pixels 0..255 -> [-1, 1], float32."""
    return images.astype(jnp.float32) * (2 / 255) - 1


def to_uint8(images: Float[Array, '*shape']) -> UInt8[Array, '*shape']:
    """[-1, 1] -> pixels 0..255, rounded to nearest; values beyond are clipped."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


_SETTINGS = {'static_argnames': ('predict', 'info', 'guidance_scale'), 'weights': 3}


@functools.partial(programs.NetworkProgram, **_SETTINGS)
def sample_batch(
    predict: denoisers.Predict,
    info: denoisers.DenoiserInfo,
    guidance_scale: float,
    params: PyTree,
    sampler: samplers.Sampler,
    keys: Key[Array, 'B'],
    labels: Int[Array, 'B'] | None,
) -> UInt8[Array, 'B H W C']:
    """Images of one batch: a single compiled program, whatever the timesteps."""
    return to_uint8(_sample(predict, info, guidance_scale, params, sampler, keys, labels))


def _sample(predict, info, guidance_scale, params, sampler, keys, labels):
    guided = denoisers.guided(predict, info, guidance_scale, keep_variance=sampler.learns_variance)

    def visit(x, t):
        return guided(params, x, t, labels), None

    x_T = samplers.initial_noise(keys, info.image_shape)
    x_0, _ = samplers.sample(visit, sampler, x_T, keys)
    return x_0


sample_latents = programs.NetworkProgram(_sample, **_SETTINGS)


@functools.partial(programs.NetworkProgram, static_argnames='network')
def decode(
    network: Any, params: PyTree, latents: Float[Array, 'B h w Z']
) -> UInt8[Array, 'B H W C']:
    """The images of the latents that a sampler ends at."""
    latents = autoencoder.unscale_latents(network, latents)
    return to_uint8(network.apply({'params': params}, latents, method='decode'))


def _decoded(decoder: denoisers.Decoder, latents: Array) -> UInt8[np.ndarray, 'B H W C']:
    count = len(latents)
    if not count:  # of a process whose devices repeat what others drew
        one = jax.ShapeDtypeStruct((1, *latents.shape[1:]), latents.dtype)
        shape = jax.eval_shape(
            functools.partial(decode.function, decoder.network), decoder.params, one
        )
        return np.zeros((0, *shape.shape[1:]), np.uint8)
    return _in_pieces(functools.partial(decode, decoder.network, decoder.params), latents)


def _in_pieces(function: Callable[[Array], PyTree], batch: Array) -> PyTree:
    """The result of a program that is run for a few images at a time.

    An autoencoder needs far more memory for an image than a denoiser. One program serves all: the
    last images are filled up with the first.
    """
    count = len(batch)
    size = min(_AT_ONCE, count)
    parts = [
        jax.device_get(function(batch[np.arange(start, start + size) % count]))
        for start in range(0, count, size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


@functools.partial(programs.NetworkProgram, static_argnames='network')
def _encode(network: Any, params: PyTree, images: UInt8[Array, 'B H W C']) -> Any:
    encoded = network.apply({'params': params}, to_float(images), method='encode')
    return autoencoder.scale_latents(network, encoded)


def encode(
    denoiser: denoisers.Denoiser, images: UInt8[np.ndarray, 'N H W C']
) -> Float[np.ndarray, 'N H W C'] | autoencoder.Moments:
    """What a network of such images is trained on: images in [-1, 1], or their latents.

    Args:
      denoiser: a teacher; the encoding half of its autoencoder is read, and dropped after.
      images: as large as those it draws.

    Returns:
      Of an autoencoder with Gaussian latents these Gaussians, scaled as the network takes them.

    Raises:
      ValueError: see `check_encoder`.
    """
    if not denoiser.info.is_latent:
        return np.asarray(to_float(images))
    check_encoder(denoiser)
    decoder = denoiser.decoder
    return _in_pieces(functools.partial(_encode, decoder.network, decoder.read_encoder()), images)


def batches(
    denoiser: denoisers.Denoiser,
    config: SamplerConfig,
    *,
    labels: Int[np.ndarray, 'N'] | None,
    num_images: int,
    key: Key[Array, ''],
    batch_size: int,
    begins: Sequence[int] | None = None,
    device_mesh: mesh.Mesh | None = None,
) -> Iterator[Batch]:
    """Yields the images of a run in order.

    Args:
      denoiser: teacher or student.
      config: the sampler.
      labels: class of each image; None if the denoiser is unconditional.
      num_images: images of the run.
      key: root key of the images.
      batch_size: images per call; the last batch is filled up and cut, so one program serves all.
      begins: index of the first image of each batch wanted; None: all batches.
      device_mesh: splits every batch over its devices; None uses the default device. Of several
        processes, each yields the images that its devices drew.
    """
    check_decoder(denoiser)
    sampler = denoisers.make_denoiser_sampler(denoiser, config)
    params, decoder, predict = denoiser.params, denoiser.decoder, denoiser.predict
    draw_batch = sample_batch if decoder is None else sample_latents
    if device_mesh is not None:
        params = mesh.shard_weights(device_mesh, params)
        predict = mesh.on_whole(device_mesh, predict)
    for begin in range(0, num_images, batch_size) if begins is None else begins:
        indices = np.arange(begin, min(begin + batch_size, num_images))
        padded = np.resize(indices, batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(padded, jnp.uint32))
        y = None if labels is None else jnp.asarray(labels[padded], jnp.int32)
        if device_mesh is not None:
            keys, y = mesh.shard_batch(device_mesh, (keys, y))
        images = draw_batch(predict, denoiser.info, config.guidance_scale, params, sampler, keys, y)
        rows, images = mesh.local_rows(images)
        if decoder is not None:
            images = _decoded(decoder, images)
        wanted = rows < len(indices)
        indices = indices[rows[wanted]]
        yield Batch(
            indices, np.asarray(images)[wanted], None if labels is None else labels[indices]
        )


def draw(
    denoiser: denoisers.Denoiser,
    config: SamplerConfig,
    *,
    labels: Int[np.ndarray, 'N'] | None,
    key: Key[Array, ''],
    batch_size: int,
    num_images: int | None = None,
    device_mesh: mesh.Mesh | None = None,
) -> UInt8[np.ndarray, 'N H W C']:
    """All images of a run at once, in every process; see `batches`."""
    num_images = len(labels) if num_images is None else num_images
    parts = batches(
        denoiser, config, labels=labels, num_images=num_images, key=key, batch_size=batch_size,
        device_mesh=device_mesh,
    )  # fmt: skip
    if device_mesh is None:
        return np.concatenate([batch.images for batch in parts])
    drawn = [(batch.indices, batch.images) for batch in parts]
    images = np.zeros((num_images, *drawn[0][1].shape[1:]), np.uint8)
    for indices, rows in drawn:
        images[indices] = rows
    # Every image is one process's, and 0 with the others.
    return np.sum([found for (found,) in hosts.gather((images,))], axis=0, dtype=np.uint8)


def check_decoder(denoiser: denoisers.Denoiser) -> None:
    """Refuses to draw images from a denoiser of latents whose decoder is not at hand.

    Raises:
      ValueError: it is not.
    """
    if denoiser.info.is_latent and denoiser.decoder is None:
        raise ValueError(
            'this teacher draws latents and its file has no decoder: name a diffusers folder with '
            'a vae/ as teacher.components, e.g. that of the autoencoder it was trained with.'
        )


def check_encoder(denoiser: denoisers.Denoiser) -> None:
    """Refuses to make latents of images for a denoiser whose autoencoder is not at hand.

    Raises:
      ValueError: it is not.
    """
    check_decoder(denoiser)
    if denoiser.info.is_latent and denoiser.decoder.read_encoder is None:
        raise ValueError(
            'this teacher draws latents, and of its autoencoder the decoding half alone is here; '
            'load it from the checkpoint it came in.'
        )


def image_grid(images: UInt8[np.ndarray, 'N H W C'], columns: int) -> UInt8[np.ndarray, 'h w C']:
    """The images as one picture, row by row, white where the last row is short."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, height, width, channels), 255, np.uint8)
    canvas[:count] = images
    canvas = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return canvas.reshape(rows * height, columns * width, channels)
