"""Small images as rows of a table of conditions, for a network that makes large ones of them.

What a prompt is to a text-conditional network, a small image and its class are to ADM's upsampler
(arXiv:2105.05233, section 4.2): image i of a run is made of small image i, and again from the
first. The samples folder of a class-conditional run of this project holds such a file.
"""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from dmq_jax.checkpoints.options import Options, place
from dmq_jax.files import npz
from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.networks import SMALL_IMAGES, TABLE, Conditioned

# Where nothing but shapes is asked for: of the published upsamplers.
_FACTOR = 4


def with_small_images(
    network: ADMUNet, params: PyTree, options: Options, *, side: int
) -> tuple[Conditioned, PyTree, int]:
    """The upsampler behind a table of the small images of `options`; its parameters; their number.

    Args:
      network: takes `low_res`.
      params: its parameters.
      options: of which `low_res`.
      side: of the large images.

    Raises:
      FileNotFoundError: no file of small images.
      ValueError: none is named, or one that this network cannot take.
    """
    if options.low_res is None:
        if not options.shapes_only:
            raise ValueError(
                'this is an upsampler: name the small images as teacher.low_res, an .npz with '
                'arr_0, uint8 [N, H, W, 3], and for one that is class-conditional arr_1, their '
                'classes.'
            )
        small = side // _FACTOR
        shapes = {SMALL_IMAGES: (1, small, small, network.low_res_channels)}
        if network.num_classes is not None:
            shapes['y'] = (1,)
        table = {name: jax.ShapeDtypeStruct(s, np.float32) for name, s in shapes.items()}
    else:
        table = _read(Path(options.low_res), network, side)
        if options.shapes_only:
            table = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in table.items()}
        else:
            table = {name: place(name, array) for name, array in table.items()}
    rows = tuple((name, array.shape[1:]) for name, array in table.items())
    count = table[SMALL_IMAGES].shape[0]
    return Conditioned(network, rows, count), {**params, TABLE: table}, count


def _read(file: Path, network: ADMUNet, side: int) -> dict[str, np.ndarray]:
    where = f'teacher.low_res={str(file)!r}'
    if not file.is_file():
        raise FileNotFoundError(f'{where}: no such file.')
    names = npz.array_names(file)
    if 'arr_0' not in names:
        raise ValueError(f'{where}: no arr_0; expected the layout of ADM.')
    images = npz.read_array(file, 'arr_0')
    if images.dtype != np.uint8 or images.shape[3:] != (network.low_res_channels,):
        raise ValueError(
            f'{where}: arr_0 is {images.dtype} {images.shape}, expected uint8 '
            f'[N, H, W, {network.low_res_channels}].'
        )
    if max(images.shape[1:3]) > side:
        raise ValueError(
            f'{where}: images of {images.shape[1]}x{images.shape[2]}, expected at most {side}, '
            f'the side of those that are made of them.'
        )
    table = {SMALL_IMAGES: images.astype(np.float32) * np.float32(2 / 255) - np.float32(1)}
    if network.num_classes is not None:
        if 'arr_1' not in names:
            raise ValueError(f'{where}: no arr_1, the classes of the images, which it is told.')
        classes = npz.read_array(file, 'arr_1')
        if (
            classes.shape != images.shape[:1]
            or not np.issubdtype(classes.dtype, np.integer)
            or classes.min() < 0
            or classes.max() >= network.num_classes
        ):
            raise ValueError(
                f'{where}: arr_1 is {classes.dtype} {classes.shape}, expected a class of 0 to '
                f'{network.num_classes - 1} for each of {len(images)} images.'
            )
        table['y'] = classes.astype(np.float32)
    return table
