"""Images per second of the FID network beside the torch oracle, in one process, turn by turn.

    python -m tests.oracles.bench_inception [--batch-size=16] [--rounds=5]

Both take the same 299x299 images and weights; torch with channels last and all cores. On a busy
machine the wall clock favours whoever waits less for other threads; what stays comparable there is
the processor time of a single core: `taskset -c 0 python -m tests.oracles.bench_inception`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch

from dmq_jax.metrics import inception
from tests.oracles import inception as oracle


def main() -> None:
    """Prints the median of each, and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=5)
    asked = parser.parse_args()
    state = oracle.random_state()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'weights.pth'
        torch.save(state, path)
        extractor = inception.make_extractor(inception.load_inception(path))
    shape = (asked.batch_size, 299, 299, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    x = torch.from_numpy((images.astype(np.float32) - 128) / 128).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    state = {
        name: leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf
        for name, leaf in state.items()
    }

    def ours() -> None:
        jax.block_until_ready(extractor(jax.device_put(images)))

    def theirs() -> None:
        with torch.inference_mode():
            oracle.network(state, x)

    times = {ours: [], theirs: []}
    for _ in range(asked.rounds + 1):  # the first compiles and warms up
        for run, durations in times.items():
            began = time.perf_counter(), time.process_time()
            run()
            ended = time.perf_counter(), time.process_time()
            durations.append(np.subtract(ended, began))
    print(f'{len(os.sched_getaffinity(0))} cores, batch {asked.batch_size}, jax {jax.__version__}')
    medians = [np.median(durations[1:], axis=0) for durations in times.values()]
    for index, clock in enumerate(('wall clock', 'processor time')):
        rates = [asked.batch_size / median[index] for median in medians]
        print(f'{clock}: ours {rates[0]:.2f} images/s, torch {rates[1]:.2f} images/s, '
              f'ours / torch {rates[0] / rates[1]:.2f}')  # fmt: skip


if __name__ == '__main__':
    main()
