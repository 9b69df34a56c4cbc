"""Labelled image sets from `.npz` files, image folders and TensorFlow Datasets."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


class ImageSet(NamedTuple):
    """Images and their classes, in the order of the source.

    Attributes:
      images: raw pixels.
      labels: class of each image, or None where the source has none.
    """

    images: UInt8[np.ndarray, 'N H W C']
    labels: Int[np.ndarray, 'N'] | None


def load_images(source: str | Path, split: str = 'train') -> ImageSet:
    """All images of one split of `source`.

    Args:
      source: an `.npz` holding `{split}_images` and `{split}_labels` (or `arr_0` alone); a folder
        of images, or of one subfolder per class (a subfolder named `split` is entered first); or
        `tfds:NAME`.
      split: 'train' or 'test'.

    Raises:
      FileNotFoundError: no such file or folder, or a folder without images.
      ValueError: an `.npz` without the arrays, or images of different sizes.
      ModuleNotFoundError: `tfds:` without tensorflow-datasets.
    """
    if str(source).startswith('tfds:'):
        return _from_tfds(str(source).removeprefix('tfds:'), split)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path / split if (path / split).is_dir() else path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such file or folder; expected an .npz with {split}_images and '
            f'{split}_labels, a folder of images, or tfds:NAME.'
        )
    return _from_npz(path, split)


def pad_images(images: UInt8[np.ndarray, 'N H W C'], size: int) -> UInt8[np.ndarray, 'N S S C']:
    """The images with zeros around them, `size` pixels high and wide.

    Raises:
      ValueError: images larger than `size`.
    """
    height, width = images.shape[1:3]
    if height > size or width > size:
        raise ValueError(f'images of {height}x{width} do not fit in image_size={size}.')
    top, left = (size - height) // 2, (size - width) // 2
    below, right = size - height - top, size - width - left
    return np.pad(images, ((0, 0), (top, below), (left, right), (0, 0)))


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
    if labels is not None and len(labels) != len(images):
        raise ValueError(f'{path}: {len(images)} images but {len(labels)} labels.')
    return ImageSet(images, None if labels is None else labels.astype(np.int32))


def _from_folder(path: Path) -> ImageSet:
    from PIL import Image

    classes = sorted(p for p in path.iterdir() if p.is_dir())
    groups = classes or [path]
    files = [
        (file, label)
        for label, group in enumerate(groups)
        for file in sorted(group.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f'{path}: no images ({", ".join(IMAGE_SUFFIXES)}) in it.')
    images = []
    for file, _ in files:
        with Image.open(file) as opened:
            image = np.asarray(opened if opened.mode == 'L' else opened.convert('RGB'))
        image = image[..., None] if image.ndim == 2 else image
        if images and image.shape != images[0].shape:
            raise ValueError(
                f'{file} is {image.shape}, {files[0][0]} is {images[0].shape}: expected one size.'
            )
        images.append(image)
    labels = np.array([label for _, label in files], np.int32) if classes else None
    return ImageSet(np.stack(images), labels)


def _from_tfds(name: str, split: str) -> ImageSet:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f'tfds:{name} needs tensorflow-datasets ({error}); install it, or give an .npz or a '
            f'folder of images.'
        ) from error
    source = tfds.data_source(name, split=split)
    images = np.stack([example['image'] for example in source])
    labels = np.array([example['label'] for example in source], np.int32)
    return ImageSet(images, labels)
