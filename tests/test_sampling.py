import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, sampling
from dmq_jax.config import SamplerConfig
from dmq_jax.models import autoencoder
from dmq_jax.runtime import mesh
from tests import tiny

# eta > 0: the noise of every step must follow the image as well.
SAMPLER = SamplerConfig(num_steps=3, eta=1.0)
NUM_IMAGES = 12
# Another batch size or device count is another program, whose float32 sums may run in another
# order; a value at the edge between two pixel values then falls on its other side.
ONE_STEP = 1


def draw(batch_size, *, begins=None, devices=None, num_images=NUM_IMAGES):
    labels = denoisers.balanced_labels(num_images, tiny.NUM_CLASSES)
    return list(
        sampling.batches(
            tiny.teacher(),
            SAMPLER,
            labels=labels,
            num_images=num_images,
            key=jax.random.key(4),
            batch_size=batch_size,
            begins=begins,
            device_mesh=None if devices is None else mesh.make_mesh(devices),
        )  # fmt: skip
    )


def images_of(batches):
    return np.concatenate([batch.images for batch in batches])


def assert_same_images(found, expected):
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= ONE_STEP
    # Rare, or it is not rounding: one pixel of a hundred is far above what rounding does.
    assert (difference > 0).mean() < 0.01


@pytest.fixture(scope='module')
def together():
    """All images as one batch."""
    return images_of(draw(NUM_IMAGES))


def test_pixels_survive_the_way_to_float_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = sampling.to_float(jnp.asarray(pixels))
    assert floats.dtype == jnp.float32
    assert float(floats.min()) == -1 and float(floats.max()) == 1
    np.testing.assert_array_equal(sampling.to_uint8(floats), pixels)


def test_values_beyond_the_range_are_clipped_and_the_rest_rounded_to_nearest():
    values = jnp.array([-7.0, -1.0, 1.0, 1.3, 0.0, (99.4 / 127.5) - 1, (99.6 / 127.5) - 1])
    # 0.0 lies half way between 127 and 128: half to even.
    assert sampling.to_uint8(values).tolist() == [0, 0, 255, 255, 128, 99, 100]


def test_images_differ_and_are_not_saturated(together):
    assert together.dtype == np.uint8 and together.shape == (NUM_IMAGES, 8, 8, 1)
    assert len({image.tobytes() for image in together}) == NUM_IMAGES
    assert 0.2 < ((together > 0) & (together < 255)).mean()


def test_an_image_does_not_depend_on_the_batch_size(together):
    batches = draw(5)
    assert [len(b.images) for b in batches] == [5, 5, 2]
    assert np.concatenate([b.indices for b in batches]).tolist() == list(range(NUM_IMAGES))
    assert_same_images(images_of(batches), together)


def test_an_image_does_not_depend_on_where_the_run_starts():
    whole, late = draw(5), draw(5, begins=[3, 8])
    # The same program on both sides: equality.
    np.testing.assert_array_equal(images_of(late), images_of(whole)[3:])
    assert [b.labels.tolist() for b in late] == [[0, 1, 2, 0, 1], [2, 0, 1, 2]]


def test_an_image_does_not_depend_on_the_number_of_devices(together):
    # 16 per batch: the last images are filling, cut off again.
    assert_same_images(images_of(draw(16, devices=8)), together)


def test_all_images_at_once_are_whole_whatever_the_devices(together):
    found = sampling.draw(
        tiny.teacher(), SAMPLER, labels=denoisers.balanced_labels(NUM_IMAGES, tiny.NUM_CLASSES),
        key=jax.random.key(4), batch_size=16, device_mesh=mesh.make_mesh(8),
    )  # fmt: skip
    assert_same_images(found, together)


def test_no_latents_are_decoded_to_no_images():
    network = autoencoder.AutoencoderKL(
        channels=(4, 4), in_channels=1, latent_channels=2, layers_per_block=1, num_groups=2
    )
    latents = np.zeros((3, 4, 4, 2), np.float32)
    init = functools.partial(network.init, method='decode')
    shapes = jax.eval_shape(init, jax.random.key(0), latents)['params']
    decoder = denoisers.Decoder(network, tiny.random_like(shapes))
    whole = sampling._decoded(decoder, latents)
    none = sampling._decoded(decoder, latents[:0])
    assert none.shape == (0, *whole.shape[1:]) and none.dtype == whole.dtype


def test_one_program_serves_all_batches_and_all_weights():
    draw(5)
    before = sampling.sample_batch.jitted()._cache_size()
    draw(5, num_images=8, begins=[1, 6])
    teacher = tiny.teacher()
    other = teacher._replace(params=jax.tree.map(lambda a: 2 * a, teacher.params))
    sampling.draw(other, SAMPLER, labels=np.zeros(5, np.int32), key=jax.random.key(0), batch_size=5)
    assert sampling.sample_batch.jitted()._cache_size() == before


def test_a_grid_reads_row_by_row_and_is_white_where_images_are_missing():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    grid = sampling.image_grid(images, columns=3)
    assert grid.shape == (4, 9, 1)
    assert grid[0, ::3, 0].tolist() == [0, 1, 2]
    assert grid[2, ::3, 0].tolist() == [3, 4, 255]
    np.testing.assert_array_equal(grid[:2, 3:6], images[1])


# The other splits a weight along both of its axes.
@pytest.mark.parametrize('sizes', [pytest.param((2, 4, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_an_image_does_not_depend_on_how_the_weights_are_split(together, sizes):
    batches = sampling.batches(
        tiny.teacher(), SAMPLER, labels=denoisers.balanced_labels(NUM_IMAGES, tiny.NUM_CLASSES),
        num_images=NUM_IMAGES, key=jax.random.key(4), batch_size=16,
        device_mesh=mesh.make_mesh(*sizes),
    )  # fmt: skip
    assert_same_images(images_of(batches), together)


def test_devices_that_split_the_batch_tell_one_another_nothing_while_sampling():
    teacher, device_mesh = tiny.teacher(), mesh.make_mesh(4)
    sampler = denoisers.make_denoiser_sampler(teacher, SAMPLER)
    keys, labels = mesh.shard_batch(
        device_mesh, (jax.random.split(jax.random.key(0), 8), np.zeros(8, np.int32))
    )
    params = mesh.shard_weights(device_mesh, teacher.params)
    program = sampling.sample_batch.jitted().lower(
        teacher.predict, teacher.info, 1.0, params, sampler, keys, labels
    )
    text = program.compile().as_text()
    for kind in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter'):
        assert kind not in text, kind
