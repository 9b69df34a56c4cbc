"""What a run of several processes computes, for `test_local.py`: loss, gradients, samples, ranges.

MODULE=tests.launch.measured bash launch/local.sh N --out=FILE.npz
"""

import jax
import numpy as np

from dmq_jax import calibrate, denoisers, finetune, sampling
from dmq_jax.runtime import mesh
from tests import test_finetune, tiny
from tests.launch.joining import parse_and_join

NUM_IMAGES = 16


def joined(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def measure(device_mesh):
    """Everything of one mesh, the whole of it in every process; images by their indices."""
    teacher, method, state, plan = test_finetune.make_problem()
    config = test_finetune.make_config()
    loss = finetune.make_loss(teacher, method, plan, test_finetune.TIMESTEPS, 'nearest', config)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, *teacher.info.image_shape)).astype(np.float32)
    t, y = np.arange(8, dtype=np.int32) * 12, np.arange(8, dtype=np.int32) % 3
    gain = np.linspace(0.5, 2.0, 8, dtype=np.float32)
    batch = mesh.shard_batch(device_mesh, (x, t, y, gain))
    weights = mesh.replicate(device_mesh, (state, teacher.params))
    (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*weights, *batch)
    value, gradients = mesh.fetch(device_mesh, (value, gradients))

    teacher = tiny.teacher()
    labels = denoisers.balanced_labels(NUM_IMAGES, tiny.NUM_CLASSES)
    images = np.zeros((NUM_IMAGES, *teacher.info.image_shape), np.uint8)
    for drawn in sampling.batches(
        teacher, tiny.SAMPLER, labels=labels, num_images=NUM_IMAGES, key=jax.random.key(4),
        batch_size=NUM_IMAGES, device_mesh=device_mesh,
    ):  # fmt: skip
        images[drawn.indices] = drawn.images
    drawn = sampling.draw(
        teacher, tiny.SAMPLER, labels=labels, num_images=NUM_IMAGES, key=jax.random.key(4),
        batch_size=NUM_IMAGES, device_mesh=device_mesh,
    )  # fmt: skip
    ranges = calibrate.run(
        teacher, tiny.observed(), tiny.CALIBRATE, key=jax.random.key(1), device_mesh=device_mesh
    )
    return {'loss': value, 'gradients': joined(gradients), 'images': images, 'drawn': drawn,
            'low': joined([[s.low for s in roles.values()] for roles in ranges.stats.values()]),
            'high': joined([[s.high for s in roles.values()] for roles in ranges.stats.values()]),
            }  # fmt: skip


def main():
    """Writes FILE.0.npz, FILE.1.npz, ... one of each process."""
    given = parse_and_join('--out')
    np.savez(f'{given.out}.{jax.process_index()}.npz', **measure(mesh.make_mesh()))


if __name__ == '__main__':
    main()
