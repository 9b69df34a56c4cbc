"""Images for evaluation, in sets larger than memory: `.npz`, folders and TensorFlow Datasets.

`open_images` hands out RGB images in batches. Its `.npz` layout is that of guided-diffusion
(Dhariwal and Nichol 2021, arXiv:2105.05233): `arr_0` holds the images, and a reference file also
has the `mu`, `sigma`, `mu_s` and `sigma_s` of a whole data set. Sets to learn from are read by
`files/image_sets.py`.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from dmq_jax.files import npz

T = TypeVar('T')

IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')
# Widths of Inception's pooled and spatial features, those of every guided-diffusion reference.
STATISTICS_WIDTHS = (2048, 2023)
DECODING_THREADS = 4
PREFETCHED_BATCHES = 2
HASHED_BYTES = 1 << 20


class ReferenceStatistics(NamedTuple):
    """Gaussians of the features of a data set, named as in a reference file.

    Attributes:
      mu: mean of the pooled features.
      sigma: their covariance.
      mu_s: mean of the spatial features.
      sigma_s: their covariance.
    """

    mu: Float[np.ndarray, 'D']
    sigma: Float[np.ndarray, 'D D']
    mu_s: Float[np.ndarray, 'S']
    sigma_s: Float[np.ndarray, 'S S']


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageStream:
    """RGB images of one size, read as they are needed; made by `open_images`.

    Attributes:
      description: where they come from, for messages.
      num_images: how many.
      image_shape: height, width and 3.
      statistics: those the file carries of a whole data set; None if it carries none.
      read: batch size -> the images in order, read when asked for.
      contents: yields the bytes that name the content.
    """

    description: str
    num_images: int
    image_shape: tuple[int, int, int]
    statistics: ReferenceStatistics | None
    read: Callable[[int], Iterator[UInt8[np.ndarray, 'b H W 3']]]
    contents: Callable[[], Iterator[bytes]]

    def batches(self, batch_size: int) -> Iterator[UInt8[np.ndarray, 'b H W 3']]:
        """Yields all images in order, the last batch possibly shorter; may be called again.

        The next `PREFETCHED_BATCHES` batches are read by a thread meanwhile.

        Raises:
          ValueError: naming the file, where images are damaged or of other sizes or channels, or
            batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size}: expected at least 1.')
        return _prefetched(self.read(batch_size), PREFETCHED_BATCHES)

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content, which is read whole for it.

        Of the file for an `.npz`, of names and files for a folder, of pixels for TensorFlow
        Datasets: equal fingerprints have equal images.
        """
        digest = hashlib.sha256()
        for part in self.contents():
            digest.update(part)
        return digest.hexdigest()


def open_images(
    source: str | Path, *, statistics_widths: tuple[int, int] = STATISTICS_WIDTHS
) -> ImageStream:
    """The images of `source`, of which only headers are read now.

    Args:
      source: an `.npz` with `arr_0` (a reference or samples of guided-diffusion); a folder with an
        `images.npz` (the samples of a run); a folder of images, subfolders included, in the order
        of their paths; or `tfds:NAME` or `tfds:NAME:SPLIT` (default split: train).
      statistics_widths: widths of `mu` and `mu_s` that a file must have if it carries them.

    Raises:
      FileNotFoundError: no such file or folder, or a folder without images.
      ValueError: one line that names the file, what it holds and what was expected.
      ModuleNotFoundError: `tfds:` without tensorflow-datasets.
    """
    if str(source).startswith('tfds:'):
        name, _, split = str(source).removeprefix('tfds:').partition(':')
        return _open_tfds(name, split or 'train')
    path = Path(source)
    if path.is_dir():
        samples = path / 'images.npz'
        return _open_npz(samples, statistics_widths) if samples.is_file() else _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: no such file or folder; expected an .npz with arr_0, a folder of images, or '
            'tfds:NAME.'
        )
    return _open_npz(path, statistics_widths)


def array_stream(images: UInt8[np.ndarray, 'N H W 3'], description: str) -> ImageStream:
    """Images that are in memory already.

    Raises:
      ValueError: not uint8 [N, H, W, 3].
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f'{description}: {images.dtype} {images.shape}, expected uint8 [N, H, W, 3].'
        )

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    return ImageStream(
        description=description, num_images=len(images), image_shape=images.shape[1:],
        statistics=None, read=read, contents=lambda: iter([np.ascontiguousarray(images).data]),
    )  # fmt: skip


def write_reference(
    path: str | Path,
    stream: ImageStream,
    statistics: ReferenceStatistics,
    *,
    num_images: int = 10_000,
    seed: int | None = None,
) -> None:
    """Writes a reference file in the layout of guided-diffusion, whole or not at all.

    Args:
      path: the `.npz`, replaced if it exists; its folder must exist.
      stream: the data set.
      statistics: of all its images.
      num_images: images kept, for precision and recall; all if there are fewer.
      seed: of the choice of images; None takes evenly spaced ones, which keeps the shares of
        classes that are stored one after another.

    Raises:
      ValueError: statistics that do not fit together, or as `ImageStream.batches`.
    """
    check_statistics(statistics, f'statistics for {path}')
    num_kept = min(num_images, stream.num_images)
    if seed is None:
        kept = np.arange(num_kept) * stream.num_images // num_kept
    else:
        rng = np.random.default_rng(seed)
        kept = np.sort(rng.choice(stream.num_images, num_kept, replace=False))

    def parts() -> Iterator[np.ndarray]:
        start = 0
        for images in stream.batches(256):
            end = start + len(images)
            yield images[kept[(kept >= start) & (kept < end)] - start]
            start = end

    header = npz.ArrayHeader(np.dtype(np.uint8), (num_kept, *stream.image_shape), False)
    npz.write_arrays(path, {'arr_0': (header, parts), **statistics._asdict()})


def check_statistics(
    statistics: ReferenceStatistics, where: str, widths: tuple[int, int] | None = None
) -> None:
    """Raises a ValueError unless shapes fit together, to `widths` if given, and all is finite."""
    for name, cov_name, index in (('mu', 'sigma', 0), ('mu_s', 'sigma_s', 1)):
        mean, cov = getattr(statistics, name), getattr(statistics, cov_name)
        width = widths[index] if widths else (mean.shape or ('D',))[0]
        if mean.shape != (width,) or cov.shape != (width, width):
            raise ValueError(
                f'{where}: {name} {mean.shape} and {cov_name} {cov.shape}, expected ({width},) '
                f'and ({width}, {width}). Use statistics of the same feature network.'
            )
        for part, values in ((name, mean), (cov_name, cov)):
            if values.dtype.kind != 'f' or not np.isfinite(values).all():
                raise ValueError(
                    f'{where}: {part} is {values.dtype} with '
                    f'{_count_not_finite(values)} values infinite or NaN: expected finite floats.'
                )


def tfds_source(name: str, split: str) -> Any:
    """A data set of TensorFlow Datasets, by index.

    Raises:
      ModuleNotFoundError: tensorflow-datasets is not there.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ModuleNotFoundError(
            f'tfds:{name} needs tensorflow-datasets ({error}); install it, or give an .npz or a '
            f'folder of images.'
        ) from error
    return tfds.data_source(name, split=split)


def _open_npz(path: Path, widths: tuple[int, int]) -> ImageStream:
    header = npz.read_header(path, 'arr_0')
    found = f'{path}: arr_0 is {header.dtype} {header.shape}'
    if header.dtype.hasobject:
        raise ValueError(f'{found}: expected uint8 [N, H, W, 3]; Python objects are not unpickled.')
    if header.dtype.kind == 'f':
        raise ValueError(
            f'{found}: expected uint8 [N, H, W, 3] of 0..255; scale and round floats before saving '
            'them.'
        )
    if header.dtype != np.uint8 or len(header.shape) != 4:
        raise ValueError(f'{found}: expected uint8 [N, H, W, 3] of 0..255.')
    if header.fortran_order:
        raise ValueError(f'{found} in Fortran order: expected C order; save ascontiguousarray.')
    _check_channels(header.shape[1:], found)
    if not header.shape[0]:
        raise ValueError(f'{found}: expected at least 1 image.')
    return ImageStream(
        description=str(path),
        num_images=header.shape[0],
        image_shape=header.shape[1:],
        statistics=_read_statistics(path, widths),
        read=lambda batch_size: npz.iterate_rows(path, 'arr_0', batch_size),
        contents=lambda: _file_parts(path),
    )


def _read_statistics(path: Path, widths: tuple[int, int]) -> ReferenceStatistics | None:
    names = npz.array_names(path)
    fields = ReferenceStatistics._fields
    if 'mu' not in names:  # what guided-diffusion asks
        return None
    if missing := [name for name in fields if name not in names]:
        raise ValueError(f'{path} has mu but lacks {missing}: expected {list(fields)} or none.')
    statistics = ReferenceStatistics(*(npz.read_array(path, name) for name in fields))
    check_statistics(statistics, str(path), widths)
    return statistics


def _open_folder(path: Path) -> ImageStream:
    files = sorted(f for f in path.rglob('*') if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise no_images(path)
    shape = _decode_rgb(files[0]).shape

    def decode(file: Path) -> np.ndarray:
        image = _decode_rgb(file)
        check_size(file, image, files[0], shape)
        return image

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for start in range(0, len(files), batch_size):
                yield np.stack(list(pool.map(decode, files[start : start + batch_size])))

    def contents() -> Iterator[bytes]:
        for file in files:
            yield f'{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0'.encode()
            yield from _file_parts(file)

    return ImageStream(
        description=f'{path} ({len(files)} files)',
        num_images=len(files),
        image_shape=shape,
        statistics=None,
        read=read,
        contents=contents,
    )


def _open_tfds(name: str, split: str) -> ImageStream:
    source = tfds_source(name, split)
    where = f'tfds:{name}:{split}'
    shape = source[0]['image'].shape
    _check_channels(shape, f'{where}: images are {shape}')

    def image(index: int) -> np.ndarray:
        pixels = np.asarray(source[index]['image'])
        check_size(f'{where}[{index}]', pixels, f'{where}[0]', shape)
        return pixels

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            yield np.stack([image(index) for index in indices])

    def contents() -> Iterator[bytes]:
        yield f'{len(source)} {shape}'.encode()
        for images in read(1):
            yield images.tobytes()

    return ImageStream(
        description=where,
        num_images=len(source),
        image_shape=shape,
        statistics=None,
        read=read,
        contents=contents,
    )


def _decode_rgb(file: Path) -> UInt8[np.ndarray, 'H W 3']:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            mode = opened.mode
            opaque_palette = mode == 'P' and 'transparency' not in opened.info
            if mode == 'RGB' or opaque_palette:
                return np.asarray(opened.convert('RGB'))
    except OSError as error:
        raise unreadable(file, error) from error
    kinds = {'1': 'grey', 'L': 'grey', 'I;16': 'grey', 'I': 'grey', 'F': 'grey', 'LA': 'grey',
             'RGBA': 'transparent', 'P': 'transparent', 'PA': 'transparent'}  # fmt: skip
    raise ValueError(
        f'{file} is {kinds.get(mode, "not RGB")} (mode {mode}): expected RGB; convert it with '
        "PIL.Image.open(file).convert('RGB')."
    )


def _check_channels(shape: tuple[int, ...], found: str) -> None:
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(
            f'{found}: expected RGB, 3 channels last; repeat a grey channel with '
            'np.repeat(images, 3, axis=-1), drop an alpha channel with images[..., :3].'
        )


def check_size(
    file: str | Path, image: np.ndarray, first_file: str | Path, shape: tuple[int, ...]
) -> None:
    """Refuses an image of another shape than the first one.

    Raises:
      ValueError: it is; names both.
    """
    if image.shape != shape:
        raise ValueError(f'{file} is {image.shape}, {first_file} is {shape}: expected one size.')


def no_images(path: Path) -> FileNotFoundError:
    """The error for a folder without images."""
    return FileNotFoundError(f'{path}: no images ({", ".join(IMAGE_SUFFIXES)}) in it.')


def unreadable(file: Path, error: OSError) -> ValueError:
    """The error for a file that is no image, or a damaged one."""
    return ValueError(f'{file}: no readable image ({error}). Copy or make it again.')


def _count_not_finite(values: np.ndarray) -> int:
    return int(values.size - np.isfinite(values).sum()) if values.dtype.kind == 'f' else 0


def _file_parts(path: str | os.PathLike) -> Iterator[bytes]:
    with open(path, 'rb') as file:
        while part := file.read(HASHED_BYTES):
            yield part


def _prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """The items of a generator, the next `depth` of which a thread makes meanwhile."""
    end = object()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = collections.deque(pool.submit(next, items, end) for _ in range(depth))
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item
    finally:
        items.close()
