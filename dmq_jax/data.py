"""Images of one's own as a student learns from them (`config.data`).

They are made as large as the teacher's, and encoded where it draws latents. Where it is conditioned
on texts, what they show becomes further rows of its table of conditions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from dmq_jax import denoisers, networks, sampling
from dmq_jax.config import DataConfig
from dmq_jax.files import image_sets
from dmq_jax.models.autoencoder import Moments

# In place of a path: images that the teacher draws.
TEACHER = 'teacher'
# The option that says what the images of another show.
_PROMPTS = {'path': 'prompt', 'class_path': 'class_prompt'}


class Images(NamedTuple):
    """Images as large as the teacher's.

    Attributes:
      pixels: of the images.
      conditions: the class of each, or what it shows; None iff the teacher is unconditional.
    """

    pixels: UInt8[np.ndarray, 'N H W C']
    conditions: Int[np.ndarray, 'N'] | tuple[str, ...] | None


class Examples(NamedTuple):
    """What a step of learning draws its batch from.

    Attributes:
      images: in [-1, 1]; of a teacher of latents these, or the Gaussians they are drawn from.
      labels: their classes, or rows of the teacher's table; None iff it is unconditional.
    """

    images: Float[np.ndarray, 'N H W C'] | Moments
    labels: Int[np.ndarray, 'N'] | None


def names(config: DataConfig) -> list[str]:
    """The options that name images, those to learn first."""
    return [name for name in _PROMPTS if getattr(config, name)]


def prompt(config: DataConfig, name: str) -> str | None:
    """What the images of an option show that have no text of their own.

    Args:
      config: of the images.
      name: of their option, 'path' or 'class_path'.
    """
    return getattr(config, _PROMPTS[name])


def load(teacher: denoisers.Denoiser, config: DataConfig, name: str) -> Images | None:
    """The images of one option, if the teacher could have drawn them; None where it is to do that.

    Args:
      teacher: of the students that learn from them.
      config: where they are, and what is true of all of them.
      name: of their option, 'path' or 'class_path'.

    Raises:
      FileNotFoundError: there are no images.
      ValueError: images or classes that the teacher cannot have, texts that are missing or not
        wanted, or a teacher that cannot learn from images.
    """
    info, path = teacher.info, getattr(config, name)
    where, text = f'data.{name}={path!r}', prompt(config, name)
    if networks.SMALL_IMAGES in networks.conditions(teacher.network):
        raise ValueError(
            f'{where}: this teacher makes large images of small ones, and cannot be adapted; adapt '
            f'the one that draws the small images.'
        )
    sampling.check_encoder(teacher)
    takes_texts = teacher.encode_prompts is not None
    if text is not None and not takes_texts:
        raise ValueError(
            f'data.{_PROMPTS[name]}={text!r}: this teacher is conditioned on no texts, or its text '
            f'encoder is not at hand; expected None.'
        )
    if path == TEACHER:
        # Its own prompts are mostly what is to be learnt.
        if takes_texts and text is None and name == 'class_path':
            raise ValueError(
                f'{where} without data.class_prompt: say what the teacher is to draw so that it is '
                f'not forgotten.'
            )
        return None
    try:
        fit = functools.partial(_fit, shape=denoisers.pixel_shape(teacher), how=config.fit)
        found = image_sets.load_images(path, fit=fit)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{where}: {error}') from error
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
    if takes_texts:
        return Images(found.images, _texts(found, text, where))
    if info.num_classes is None:
        return Images(found.images, None)
    labels = found.labels
    if labels is None:
        labels = np.full(len(found.images), config.label, np.int32)
    if labels.max() >= info.num_classes or labels.min() < 0:
        raise ValueError(
            f'{where}: classes {labels.min()} to {labels.max()}; expected 0 to '
            f'{info.num_classes - 1}, those of the teacher.'
        )
    return Images(found.images, labels)


def _fit(
    images: UInt8[np.ndarray, '*N H W C'], *, shape: tuple[int, int, int], how: str
) -> UInt8[np.ndarray, '*N h w c']:
    *size, channels = shape
    if images.shape[-1] == 1:
        images = np.repeat(images, channels, axis=-1)
    if images.shape[-1] != channels:
        raise ValueError(
            f'images of {images.shape[-1]} channels; expected {channels}, as the teacher draws.'
        )
    if how == 'crop':
        return image_sets.crop_images(images, tuple(size))
    try:
        return image_sets.pad_images(images, tuple(size))
    except ValueError as error:
        raise ValueError(f"{error} data.fit='crop' scales them.") from error


def _texts(found: image_sets.ImageSet, default: str | None, where: str) -> tuple[str, ...]:
    captions = found.captions or (None,) * len(found.images)
    texts = tuple(default if caption is None else caption for caption in captions)
    if None in texts:
        raise ValueError(
            f'{where}: {texts.count(None)} of {len(texts)} images have no text, and this teacher '
            f'is conditioned on one; say what they show in data.prompt (data.class_prompt), in '
            f'NAME.txt beside NAME.png, or in metadata.jsonl.'
        )
    return texts


def labelled(
    teacher: denoisers.Denoiser, *conditions: Int[np.ndarray, 'N'] | tuple[str, ...] | None
) -> tuple[Any, ...]:
    """A teacher that knows all the conditions, and for each of them labels that it knows.

    Texts become further rows of its table, one for each, however often it is named. They come after
    the null condition, so that this and the prompts that are drawn stay where they were.

    Args:
      teacher: of the students.
      *conditions: as in `Images`.
    """
    texts = dict.fromkeys(
        text for given in conditions if isinstance(given, tuple) for text in given
    )
    if not texts:
        return teacher, *conditions
    network, table = teacher.network, teacher.params[networks.TABLE]
    further = teacher.encode_prompts([*texts])
    table = {name: jnp.concatenate([rows, further[name]]) for name, rows in table.items()}
    row_of = {text: network.num_rows + i for i, text in enumerate(texts)}
    network = dataclasses.replace(network, num_rows=network.num_rows + len(texts))
    params = {**teacher.params, networks.TABLE: table}
    teacher = teacher._replace(
        predict=denoisers.FloatPredict(network), params=params, network=network
    )
    labels = [
        np.asarray([row_of[text] for text in given], np.int32)
        if isinstance(given, tuple)
        else given
        for given in conditions
    ]
    return teacher, *labels


def examples(
    teacher: denoisers.Denoiser, sets: Sequence[Images]
) -> tuple[denoisers.Denoiser, list[Examples]]:
    """Sets of images as the network takes them, and the teacher that knows what they show.

    Args:
      teacher: of the students.
      sets: from `load`, or drawn by the teacher.
    """
    teacher, *labels = labelled(teacher, *(images.conditions for images in sets))
    encoded = [sampling.encode(teacher, images.pixels) for images in sets]
    return teacher, [Examples(*pair) for pair in zip(encoded, labels, strict=True)]


def described(images: Images) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Images by what they are, for `artefacts.digest`: arrays, and texts."""
    if isinstance(images.conditions, tuple):
        return {'images': images.pixels}, [*images.conditions]
    labels = {} if images.conditions is None else {'labels': images.conditions}
    return {'images': images.pixels, **labels}, []
