"""Image sets to learn from, whole in memory: `.npz` files, folders and TensorFlow Datasets.

Images may be of any size where they are fitted as they are read. Sets to compare with, which may be
larger than memory, are read by `files/images.py`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dmq_jax.files.images import (
    IMAGE_SUFFIXES,
    check_size,
    no_images,
    tfds_source,
    unreadable,
)

# Of one image, or of many of one size.
Fit = Callable[[UInt8[np.ndarray, '*N H W C']], UInt8[np.ndarray, '*N h w c']]


class ImageSet(NamedTuple):
    """Images and their classes, in the order of the source.

    Attributes:
      images: raw pixels.
      labels: class of each image, or None where the source has none.
      captions: what each image shows, None for one of which nothing says it; None: of none.
    """

    images: UInt8[np.ndarray, 'N H W C']
    labels: Int[np.ndarray, 'N'] | None
    captions: tuple[str | None, ...] | None = None


def load_images(source: str | Path, split: str = 'train', *, fit: Fit | None = None) -> ImageSet:
    """All images of one split of `source`.

    A folder may say what its images show: NAME.txt beside NAME.png, or a `metadata.jsonl` of
    objects with `file_name` and `text`.

    Args:
      source: an `.npz` holding `{split}_images` and `{split}_labels` (or `arr_0` alone); a folder
        of images, or of one subfolder per class (a subfolder named `split` is entered first); or
        `tfds:NAME`.
      split: 'train' or 'test'.
      fit: makes every image of one size as soon as it is read; None: they are of one size.

    Raises:
      FileNotFoundError: no such file or folder, or a folder without images.
      ValueError: an `.npz` without the arrays, images of different sizes or none that can be read,
        or a `metadata.jsonl` that is none.
      ModuleNotFoundError: `tfds:` without tensorflow-datasets.
    """
    if str(source).startswith('tfds:'):
        return _from_tfds(str(source).removeprefix('tfds:'), split, fit)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path / split if (path / split).is_dir() else path, fit)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such file or folder; expected an .npz with {split}_images and '
            f'{split}_labels, a folder of images, or tfds:NAME.'
        )
    found = _from_npz(path, split)
    return found if fit is None else found._replace(images=fit(found.images))


def pad_images(
    images: UInt8[np.ndarray, '*N H W C'], size: tuple[int, int]
) -> UInt8[np.ndarray, '*N h w C']:
    """The images with zeros around them.

    Args:
      images: one or many.
      size: height and width of the result.

    Raises:
      ValueError: images larger than `size`.
    """
    sides = images.shape[-3:-1]
    room = [wanted - side for wanted, side in zip(size, sides, strict=True)]
    if min(room) < 0:
        raise ValueError(f'images of {sides[0]}x{sides[1]} do not fit in {size[0]}x{size[1]}.')
    around = [(space // 2, space - space // 2) for space in room]
    return np.pad(images, [(0, 0)] * (images.ndim - 3) + around + [(0, 0)])


def crop_images(
    images: UInt8[np.ndarray, '*N H W C'], size: tuple[int, int]
) -> UInt8[np.ndarray, '*N h w C']:
    """The images scaled until they just cover `size`, and of that the middle.

    Lanczos, which averages where an image becomes smaller. What has this size stays as it is.

    Args:
      images: grey or RGB, one or many.
      size: height and width of the result.
    """
    if images.shape[-3:-1] == size:
        return images
    if images.ndim > 3:
        return np.stack([crop_images(image, size) for image in images])
    return _crop(images, size)


def _crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    scale = max(wanted / side for wanted, side in zip(size, image.shape[:2], strict=True))
    sides = [round(scale * side) for side in image.shape[:2]]
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    scaled = np.asarray(picture.resize((sides[1], sides[0]), Image.Resampling.LANCZOS))
    top, left = ((side - wanted) // 2 for side, wanted in zip(sides, size, strict=True))
    return scaled.reshape(*sides, -1)[top : top + size[0], left : left + size[1]]


def _from_npz(path: Path, split: str) -> ImageSet:
    with np.load(path) as arrays:
        names = set(arrays.files)
        if f'{split}_images' in names:
            images = arrays[f'{split}_images']
            labels = arrays[f'{split}_labels'] if f'{split}_labels' in names else None
        elif 'arr_0' in names:
            images, labels = arrays['arr_0'], None
        else:
            raise ValueError(
                f'{path} holds {sorted(names)}: expected {split}_images (and {split}_labels), '
                f'or arr_0.'
            )
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f'{path}: images are {images.dtype} {images.shape}, expected uint8 [N, H, W, C].'
        )
    if not len(images):
        raise ValueError(f'{path}: no images in it.')
    if labels is not None and len(labels) != len(images):
        raise ValueError(f'{path}: {len(images)} images but {len(labels)} labels.')
    return ImageSet(images, None if labels is None else labels.astype(np.int32))


def _from_folder(path: Path, fit: Fit | None) -> ImageSet:
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    groups = classes or [path]
    files = [
        (file, label)
        for label, group in enumerate(groups)
        for file in sorted(group.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise no_images(path)
    images = []
    for file, _ in files:
        image = _decode(file)
        image = image if fit is None else fit(image)
        if images:
            check_size(file, image, files[0][0], images[0].shape)
        images.append(image)
    labels = np.array([label for _, label in files], np.int32) if classes else None
    listed = {
        name: text
        for group in dict.fromkeys([path, *groups])
        for name, text in _metadata(group).items()
    }
    captions = tuple(_caption(file, listed) for file, _ in files)
    has_any = any(caption is not None for caption in captions)
    return ImageSet(np.stack(images), labels, captions if has_any else None)


def _decode(file: Path) -> UInt8[np.ndarray, 'H W C']:
    """An image as it is meant to be seen, grey or RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            # Cameras say in a tag which side is up.
            upright = ImageOps.exif_transpose(opened)
            image = np.asarray(upright if upright.mode == 'L' else upright.convert('RGB'))
    except OSError as error:
        raise unreadable(file, error) from error
    return image[..., None] if image.ndim == 2 else image


def _caption(file: Path, listed: Mapping[Path, str]) -> str | None:
    beside = file.with_suffix('.txt')
    return _text(beside).strip() if beside.is_file() else listed.get(file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{file}: not a text in UTF-8 ({error.reason}).') from error


def _metadata(folder: Path) -> dict[Path, str]:
    """What the `metadata.jsonl` of a folder says of its images, as `datasets` reads it."""
    source = folder / 'metadata.jsonl'
    if not source.is_file():
        return {}
    found = {}
    for number, line in enumerate(_text(source).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, text = folder / entry['file_name'], entry['text']
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f'{source}, line {number}: {line:.60}: expected an object with "file_name" and '
                f'"text".'
            )
        if not file.is_file():
            raise ValueError(f'{source}, line {number}: there is no image {file}.')
        found[file] = text
    return found


def _from_tfds(name: str, split: str, fit: Fit | None) -> ImageSet:
    source = tfds_source(name, split)
    images = (np.asarray(example['image']) for example in source)
    images = np.stack([image if fit is None else fit(image) for image in images])
    labels = np.array([example['label'] for example in source], np.int32)
    return ImageSet(images, labels)
