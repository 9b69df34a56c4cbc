"""Speed and memory of an evaluation: `python -m dmq_jax.metrics.bench [--num_features=50000]`.

One row for the feature network, with random weights, and one for each metric on made-up features
of Inception's widths. Prints a Markdown table; on a busy machine only ratios mean anything.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import Float

from dmq_jax.metrics import frechet, inception_score, kernel_distance, neighbours

# The last is not part of the default: on processors without float16 it is by far the slowest.
ROWS = ('features', 'statistics', 'frechet', 'inception_score', 'neighbours', 'kernel_distance',
        'neighbours_adm_fp16')  # fmt: skip
WIDTH = 2048
NUM_CLASSES = 1008
# Made-up features lie near a plane of so many dimensions, as real ones do, so that neighbours
# are much closer than most pairs.
LATENT_WIDTH = 64
GIGABYTE = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
      duration_s: seconds, compilation excluded.
      images_per_second: of one set.
      peak_rss_gb: the most memory the process has held so far, rows before this one included.
      result: what was computed.
    """

    duration_s: float
    images_per_second: float
    peak_rss_gb: float
    result: str


def made_up_features(num_features: int, seed: int, width: int = WIDTH) -> Float[np.ndarray, 'N D']:
    """Features that are float32 and not negative, as pooled ones behind a ReLU are."""
    basis = np.random.default_rng(0).normal(size=(LATENT_WIDTH, width)).astype(np.float32)
    rng = np.random.default_rng([seed, num_features])
    features = np.empty((num_features, width), np.float32)
    for rows in neighbours.blocks(num_features, 1000):
        values = rng.standard_normal((len(features[rows]), LATENT_WIDTH), np.float32) @ basis
        noise = rng.standard_normal(values.shape, np.float32)
        features[rows] = np.maximum(0.06 * values + 0.1 * noise + 0.2, 0)
    return features


def time_network(num_batches: int, batch_size: int, image_size: int) -> tuple[float, str]:
    """Seconds for one batch of the feature network, compilation excluded, and its device."""
    from dmq_jax.metrics import inception

    shape = (batch_size, image_size, image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    model = inception.InceptionV3()
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images[:1]))['params']
    network = inception.InceptionNetwork(model, params, 'random', Path('random'), 'random')
    extractor = inception.make_extractor(network)
    jax.block_until_ready(extractor(jax.device_put(images)))
    began = time.perf_counter()
    for _ in range(num_batches):
        jax.block_until_ready(extractor(jax.device_put(images)))
    return (time.perf_counter() - began) / num_batches, jax.devices()[0].device_kind


def measure(
    rows: tuple[str, ...], num_features: int, *, width: int = WIDTH
) -> Iterator[tuple[str, Row]]:
    """Times the metrics among `rows` on two sets of `num_features` made-up features.

    Yields:
      The name of a row and its measurement, as soon as it is there.
    """
    generated, reference = (made_up_features(num_features, seed, width) for seed in (1, 2))
    statistics = []

    def gaussians() -> str:
        statistics[:] = [
            frechet.gaussian_statistics(
                features[part] for part in neighbours.blocks(num_features, 64)
            )
            for features in (generated, reference)
        ]
        return f'{width} wide'

    def score() -> str:
        logits = (generated[part] @ head for part in neighbours.blocks(num_features, 512))
        probabilities = map(inception_score.softmax, logits)
        return f'{inception_score.inception_score(probabilities).mean:.4f}'

    def near(arithmetic: neighbours.Arithmetic) -> str:
        found = neighbours.measure_neighbours(generated, reference, arithmetic=arithmetic)
        return ', '.join(f'{name} {value:.4f}' for name, value in found._asdict().items())

    # Logits of standard deviation about 2.
    head = 0.1 * np.random.default_rng(1).standard_normal((width, NUM_CLASSES), np.float32)
    tasks: dict[str, Callable[[], str]] = {
        'statistics': gaussians,
        'frechet': lambda: f'{frechet.frechet_distance(*statistics):.4f}',
        'inception_score': score,
        'neighbours': lambda: near('exact'),
        'kernel_distance': lambda: (
            f'{kernel_distance.kernel_distance(generated, reference).mean:.3e}'
        ),
        'neighbours_adm_fp16': lambda: near('adm-fp16'),
    }
    if 'frechet' in rows and 'statistics' not in rows:
        gaussians()
    for name, task in tasks.items():
        if name in rows:
            began = time.perf_counter()
            result = task()
            yield name, make_row(time.perf_counter() - began, num_features, result)


def make_row(duration_s: float, num_images: int, result: str) -> Row:
    """A row of now: with the memory the process has held up to this call."""
    # In bytes on macOS, in units of 1024 elsewhere.
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIGABYTE
    return Row(
        duration_s=duration_s,
        images_per_second=num_images / duration_s,
        peak_rss_gb=peak,
        result=result,
    )


TABLE_HEAD = '| row | seconds | images/s | peak RSS GB | result |\n|---|---:|---:|---:|---|'


def table_line(name: str, row: Row) -> str:
    """One measurement as a line of a Markdown table under `TABLE_HEAD`."""
    return (
        f'| {name} | {row.duration_s:.2f} | {row.images_per_second:.1f} | '
        f'{row.peak_rss_gb:.2f} | {row.result} |'
    )


def report(rows: dict[str, Row], num_features: int) -> dict[str, Any]:
    """The measurements and where they were made, as JSON values."""
    return {
        'num_features': num_features,
        'rows': {name: dataclasses.asdict(row) for name, row in rows.items()},
        'num_cores': os.cpu_count(),
        'versions': {'jax': jax.__version__, 'numpy': np.__version__},
    }


def measure_all(options: flags.FlagValues) -> Iterator[tuple[str, Row]]:
    """Yields every row that was asked for."""
    if 'features' in options.rows:
        size = options.image_size
        seconds, device = time_network(options.num_batches, options.batch_size, size)
        result = f'batch {options.batch_size}, {size}x{size}, {device}'
        yield 'features', make_row(seconds, options.batch_size, result)
    if set(options.rows) - {'features'}:
        yield from measure(tuple(options.rows), options.num_features)


def _define_flags() -> None:
    # Not at import: dmq_jax.bench has flags of the same names.
    flags.DEFINE_integer('num_features', 10_000, 'Images per set.', lower_bound=1000)
    flags.DEFINE_integer('num_batches', 3, 'Timed calls of the network.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 64, 'Images per call of the network.', lower_bound=1)
    flags.DEFINE_integer('image_size', 256, 'Height and width of the images.', lower_bound=1)
    flags.DEFINE_list('rows', list(ROWS[:-1]), f'Which of {", ".join(ROWS)}.')
    flags.DEFINE_string('json', None, 'File that receives the same numbers.')


def _main(arguments: list[str]) -> None:
    options = flags.FLAGS
    if arguments[1:] or not set(options.rows) <= set(ROWS):
        raise app.UsageError(f'--rows={options.rows}: expected some of {", ".join(ROWS)}.')
    logging.set_verbosity(logging.WARNING)  # jax reports every back end it did not find
    print(f'{options.num_features} features per set, {os.cpu_count()} cores, jax {jax.__version__}')
    print(TABLE_HEAD, flush=True)
    rows = {}
    for name, row in measure_all(options):
        print(table_line(name, row), flush=True)
        rows[name] = row
    if options.json:
        text = json.dumps(report(rows, options.num_features), indent=2)
        Path(options.json).write_text(f'{text}\n')


if __name__ == '__main__':
    _define_flags()
    app.run(_main)
