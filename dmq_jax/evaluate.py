"""Images -> how close they are to real ones, and to the teacher's: the stage, and a command.

    python -m dmq_jax.evaluate REF SAMPLES [--metrics=fid,sfid,is,pr,kid,dc]
    python -m dmq_jax.evaluate --make-reference OUT.npz DATA

A run is measured in one of two feature spaces. 'bundled': a small classifier of the same data set,
whose distance is called FD with the data set's name, never FID. 'inception': the network and the
protocol of ADM, see `dmq_jax.adm`, which is also what the command computes.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from dmq_jax import adm, assets, command_line, features
from dmq_jax.config import EvaluateConfig
from dmq_jax.denoisers import DenoiserInfo
from dmq_jax.files.images import array_stream, open_images
from dmq_jax.metrics import classifier, frechet, inception, neighbours, similarity
from dmq_jax.runtime import log, mesh

NEIGHBOURS = 3  # k of precision and recall (arXiv:1904.06991)
_NAMES = {'fashion_mnist': 'FD-FMNIST'}


class Reference(NamedTuple):
    """What images are compared with.

    Attributes:
      name: of the distance, e.g. 'FD-FMNIST' or 'FID'.
      num_images: real images behind the statistics; None where a file does not say.
      channels: that images must have.
      num_classes: that labels must have; None if labels are not looked at.
      compare: images, labels and a mesh (or None: one device, or for Inception all) -> metrics.
      protocol: what the metrics depend on.
      batch_size: images per call of the feature network, where the user sets it.
    """

    name: str
    num_images: int | None
    channels: int
    num_classes: int | None
    compare: Callable[..., dict[str, float | None]]
    protocol: dict[str, Any]
    batch_size: int | None = None


def load_reference(config: EvaluateConfig) -> Reference:
    """The feature network and the real images or their statistics.

    Raises:
      FileNotFoundError: neither bundled names nor files.
      ValueError: files that do not belong together.
    """
    if config.features == 'inception':
        return inception_reference(config)
    bundled = config.reference if config.features == 'bundled' else config.features
    network = classifier.load_classifier(assets.find(bundled, 'classifier.safetensors'))
    statistics = classifier.load_reference(assets.find(config.reference, 'reference.npz'), network)
    return bundled_reference(network, statistics, _NAMES.get(config.reference, 'FD'))


def bundled_reference(
    network: classifier.FeatureNetwork, statistics: classifier.Reference, name: str
) -> Reference:
    """Distances between the features of a classifier of the same data set."""

    def compare(images, labels, device_mesh):
        found, probabilities = _extract(network, images, device_mesh)
        workers = features.all_processes()
        near = neighbours.precision_recall(found, statistics.features, NEIGHBOURS, workers=workers)
        gaussian = frechet.gaussian_statistics(found, workers)
        accuracy = None
        if labels is not None:
            accuracy = float(np.mean(probabilities.argmax(axis=-1) == labels))
        return {
            'fd': frechet.frechet_distance(gaussian, statistics.statistics),
            'precision': near.precision,
            'recall': near.recall,
            'class_accuracy': accuracy,
        }

    return Reference(
        name=name,
        num_images=statistics.statistics.count,
        channels=network.params['stem']['kernel'].shape[2],
        num_classes=network.model.num_classes,
        compare=compare,
        protocol={},
    )


def _extract(network, images, device_mesh):
    if device_mesh is None:
        return classifier.extract(network, images)
    count = mesh.batch_parts(device_mesh)
    return classifier.extract(
        dataclasses.replace(network, params=mesh.replicate(device_mesh, network.params)), images,
        -(-classifier.BATCH_SIZE // count) * count,
        put=lambda batch: mesh.shard_batch(device_mesh, batch),
        fetch=lambda found: mesh.fetch(device_mesh, found),
    )  # fmt: skip


def inception_reference(config: EvaluateConfig) -> Reference:
    """ADM's metrics against `config.reference`.

    Raises:
      FileNotFoundError: no weights, or no such reference.
      ValueError: damaged files, or the name of a bundled reference.
    """
    if config.reference in _NAMES:
        raise ValueError(
            f'evaluate.reference={config.reference!r} has features of its own classifier; with '
            f"features='inception' name an .npz, a folder of images or tfds:NAME."
        )
    network = inception.load_inception(config.inception_weights or None)
    stream = open_images(config.reference)
    options = adm.Options(batch_size=config.batch_size)

    @functools.cache  # once for all networks of a run, and not before there is one to compare
    def real(device_mesh: mesh.Mesh | None) -> adm.ImageSet:
        return adm.read_set(network, stream, options._replace(device_mesh=device_mesh))

    def compare(images, labels, device_mesh):
        del labels
        on_mesh = options._replace(device_mesh=device_mesh)
        drawn = adm.read_set(network, array_stream(images, 'samples'), on_mesh)
        found = adm.compare(real(device_mesh), drawn, on_mesh)
        return {
            'fd': found['fid'], 'precision': found['precision'], 'recall': found['recall'],
            'class_accuracy': None, 'sfid': found['sfid'],
            'inception_score': found['inception_score'],
        }  # fmt: skip

    protocol = adm.describe_network(network) | {'reference_source': stream.description}
    num_images = stream.num_images if stream.statistics is None else None
    return Reference('FID', num_images, 3, None, compare, protocol, config.batch_size)


def check(reference: Reference, info: DenoiserInfo, num_images: int) -> None:
    """Refuses, before anything is drawn, images that `run` could not measure.

    Args:
      reference: from `load_reference`.
      info: of the denoiser that will draw them.
      num_images: how many it will draw.

    Raises:
      ValueError: other channels or classes than the feature network's, or too few images.
    """
    if info.image_shape[2] != reference.channels:
        raise ValueError(
            f'the teacher draws images of {info.image_shape[2]} channels, the feature network of '
            f'config.evaluate expects {reference.channels}: name the one of this data set.'
        )
    if reference.num_classes is not None and info.num_classes not in (None, reference.num_classes):
        raise ValueError(
            f'the teacher has {info.num_classes} classes, the feature network of config.evaluate '
            f'{reference.num_classes}: name the one of this data set.'
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
    *,
    device_mesh: mesh.Mesh | None = None,
) -> dict[str, float | None]:
    """Every metric of one set of images.

    Args:
      images: pixels.
      labels: the class each image was conditioned on.
      reference: from `load_reference`.
      teacher_images: the teacher's, from the same noise and classes.
      device_mesh: features are computed on its devices; see `Reference.compare`.

    Returns:
      `fd`, `precision`, `recall`; `class_accuracy`, the share of images recognised as their class;
      `psnr_to_teacher` (dB, mean over images) and `ssim_to_teacher`; with Inception features also
      `sfid` and `inception_score`. None where the labels or the teacher's images are, and for the
      SSIM of images smaller than its window.
    """
    result = reference.compare(images, labels, device_mesh)
    if teacher_images is None:
        return result | {'psnr_to_teacher': None, 'ssim_to_teacher': None}
    similar = similarity.compare_images(images, teacher_images, features.all_processes())
    return result | {'psnr_to_teacher': similar.mean_psnr, 'ssim_to_teacher': similar.mean_ssim}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dmq_jax.evaluate',
        description='FID, sFID, IS, precision and recall by the protocol of guided-diffusion.',
        epilog='REF and SAMPLES: an .npz with arr_0 (mu, sigma, mu_s, sigma_s, if there, win), '
        'a folder of PNG, JPEG or WebP images, a samples folder of a run, or tfds:NAME[:SPLIT].',
    )  # fmt: skip
    parser.add_argument('sets', nargs='+', metavar='REF SAMPLES', help='reference, then samples')
    parser.add_argument('--make-reference', metavar='OUT.npz', type=Path,
                        help='write a reference file of the one set named')  # fmt: skip
    parser.add_argument('--inception-weights', metavar='PATH',
                        help='default: the file DMQ_INCEPTION_WEIGHTS names')  # fmt: skip
    parser.add_argument('--metrics', default=','.join(adm.ADM_METRICS),
                        help=f'some of {",".join(adm.METRICS)} (default: %(default)s)')  # fmt: skip
    parser.add_argument('--json', metavar='OUT', type=Path, help='numbers and protocol')
    parser.add_argument('--batch-size', type=int, default=adm.DEFAULTS.batch_size)
    parser.add_argument('--pr-dtype', choices=list(adm.PR_DTYPES), default='float32')
    parser.add_argument('--bootstrap', metavar='N', type=int, default=0,
                        help='resamples for a confidence interval of FID')  # fmt: skip
    parser.add_argument('--workdir', type=Path, default=Path('runs/evaluate'),
                        help='where features are kept (default: %(default)s)')  # fmt: skip
    found = parser.parse_args(arguments)
    wanted = 1 if found.make_reference else 2
    if len(found.sets) != wanted:
        names = 'DATA' if found.make_reference else 'REF SAMPLES'
        parser.error(f'{len(found.sets)} sets of images given, expected {wanted}: {names}.')
    return found


def command(arguments: list[str] | None = None) -> None:
    """What `python -m dmq_jax.evaluate` does; see the module's docstring.

    Raises:
      ValueError, OSError: as `adm.run` and the readers.
    """
    asked = _parse(arguments)
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        raise FileNotFoundError(f'{asked.json.parent}: no such folder; make it first.')
    if asked.json is not None and asked.json.is_dir():
        raise IsADirectoryError(f'{asked.json} is a folder; expected a file to write.')
    options = adm.Options(
        metrics=tuple(asked.metrics.split(',')), pr_dtype=asked.pr_dtype,
        batch_size=asked.batch_size, num_resamples=asked.bootstrap,
        kept_in=asked.workdir / 'features',
    )  # fmt: skip
    streams = [open_images(source) for source in asked.sets]
    if not asked.make_reference:
        adm.check(*streams, options)
    network = inception.load_inception(asked.inception_weights)
    if asked.make_reference:
        adm.make_reference(network, streams[0], asked.make_reference, options)
        print(f'reference: {asked.make_reference}')
        return
    print('Computing evaluations...')
    evaluation = adm.run(network, *streams, options)
    for line in adm.lines(evaluation.metrics):
        print(line)
    if asked.json is not None:
        log.write_json(asked.json, evaluation._asdict())


if __name__ == '__main__':
    sys.exit(command_line.exit_status(command))
