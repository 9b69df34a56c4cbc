"""Unpacks mosaics of Fashion-MNIST into the `.npz` that the teacher's config reads.

    python configs/prepare_fashion_mnist.py MOSAIC_FOLDER data/fashion_mnist.npz

MOSAIC_FOLDER holds `train_0.png` ... and `test_0.png`, each 100 x 100 images of 28 x 28 pixels in
row-major order, and `train_labels.npy`, `test_labels.npy`. Images are padded with zeros to 32x32.
"""

import pathlib
import sys

import numpy as np
from PIL import Image


def unpack(folder: pathlib.Path, split: str) -> np.ndarray:
    """All images of a split: uint8 [N, 32, 32, 1]."""
    files = sorted(folder.glob(f'{split}_*.png'))
    if not files:
        raise FileNotFoundError(f'{folder} has no {split}_*.png')
    mosaics = [np.asarray(Image.open(file).convert('L')) for file in files]
    images = [m.reshape(100, 28, 100, 28).swapaxes(1, 2).reshape(-1, 28, 28) for m in mosaics]
    return np.pad(np.concatenate(images), ((0, 0), (2, 2), (2, 2)))[..., None]


if __name__ == '__main__':
    source, target = map(pathlib.Path, sys.argv[1:3])
    target.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split in ('train', 'test'):
        arrays[f'{split}_images'] = unpack(source, split)
        arrays[f'{split}_labels'] = np.load(source / f'{split}_labels.npy')
    np.savez_compressed(target, **arrays)
    print({name: array.shape for name, array in arrays.items()})
