"""Images -> how close they are to the training images, and to the teacher's.

In-domain metrics: features and classes come from a small classifier of the same data set, so the
distance is called FD with the data set's name, never FID.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dmq_jax import assets
from dmq_jax.config import EvaluateConfig
from dmq_jax.denoisers import DenoiserInfo
from dmq_jax.metrics import classifier, frechet, neighbours, similarity


class Reference(NamedTuple):
    """What images are compared with.

    Attributes:
      network: the feature network.
      statistics: of the real images.
      name: of the distance, e.g. 'FD-FMNIST'.
    """

    network: classifier.FeatureNetwork
    statistics: classifier.Reference
    name: str


NEIGHBOURS = 3  # k of precision and recall (arXiv:1904.06991)
_NAMES = {'fashion_mnist': 'FD-FMNIST'}


def load_reference(config: EvaluateConfig) -> Reference:
    """The feature network and the statistics of the real images.

    Raises:
      FileNotFoundError: neither bundled names nor files.
      ValueError: files that do not belong together.
    """
    bundled = config.reference if config.features == 'bundled' else config.features
    network = classifier.load_classifier(assets.find(bundled, 'classifier.safetensors'))
    statistics = classifier.load_reference(assets.find(config.reference, 'reference.npz'), network)
    return Reference(network, statistics, _NAMES.get(config.reference, 'FD'))


def check(reference: Reference, info: DenoiserInfo, num_images: int) -> None:
    """Refuses, before anything is drawn, images that `run` could not measure.

    Args:
      reference: from `load_reference`.
      info: of the denoiser that will draw them.
      num_images: how many it will draw.

    Raises:
      ValueError: other channels or classes than the feature network's, or too few images.
    """
    channels = reference.network.params['stem']['kernel'].shape[2]
    if info.image_shape[2] != channels:
        raise ValueError(
            f'the teacher draws images of {info.image_shape[2]} channels, the feature network of '
            f'config.evaluate expects {channels}: name the one of this data set.'
        )
    classes = reference.network.model.num_classes
    if info.num_classes not in (None, classes):
        raise ValueError(
            f'the teacher has {info.num_classes} classes, the feature network of config.evaluate '
            f'{classes}: name the one of this data set.'
        )
    if num_images <= NEIGHBOURS:
        raise ValueError(
            f'sample.num_images={num_images}: precision and recall need more than {NEIGHBOURS}.'
        )


def run(
    images: UInt8[np.ndarray, 'N H W C'],
    labels: Int[np.ndarray, 'N'] | None,
    reference: Reference,
    teacher_images: UInt8[np.ndarray, 'N H W C'] | None = None,
) -> dict[str, float | None]:
    """Every metric of one set of images.

    Args:
      images: pixels.
      labels: the class each image was conditioned on.
      reference: from `load_reference`.
      teacher_images: the teacher's, from the same noise and classes.

    Returns:
      `fd`, `precision`, `recall`; `class_accuracy`, the share of images recognised as their class;
      `psnr_to_teacher` (dB, mean over images) and `ssim_to_teacher`. None where the labels or the
      teacher's images are, and for the SSIM of images smaller than its window.
    """
    features, probabilities = classifier.extract(reference.network, images)
    gaussian = frechet.gaussian_statistics(features)
    precision_recall = neighbours.precision_recall(
        features, reference.statistics.features, k=NEIGHBOURS
    )
    result: dict[str, float | None] = {
        'fd': frechet.frechet_distance(gaussian, reference.statistics.statistics),
        'precision': float(precision_recall.precision),
        'recall': float(precision_recall.recall),
        'class_accuracy': None,
        'psnr_to_teacher': None,
        'ssim_to_teacher': None,
    }
    if labels is not None:
        result['class_accuracy'] = float(np.mean(probabilities.argmax(axis=-1) == labels))
    if teacher_images is not None:
        psnr = similarity.compute_psnr(images, teacher_images)
        result['psnr_to_teacher'] = float(psnr.mean())
        if min(images.shape[1:3]) >= similarity.WINDOW_SIZE:
            ssim = similarity.compute_ssim(images, teacher_images)
            result['ssim_to_teacher'] = float(ssim.mean())
    return result
