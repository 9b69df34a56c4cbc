"""ADM's upsampler and the small images that it enlarges."""

import jax
import numpy as np
import pytest

import dmq_jax
from dmq_jax.networks import unwrapped
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny
from tests.checkpoints.journey import travel

pytest.importorskip('torch', reason='writes the files that are read without it')

UPSAMPLER = {**tiny.ADM, 'large_size': 8, 'image_size': 8}


def small_images(folder, *, classes=(3, 999, 0), size=2):
    file = folder / 'small.npz'
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    np.savez(file, arr_0=images, **({} if classes is None else {'arr_1': np.array(classes)}))
    return file, images


def upsampler(folder, **options):
    file = tiny.save_torch(folder / 'model.pt', tiny.adm_tensors(UPSAMPLER))
    settings = tiny.settings_file(folder, network=UPSAMPLER)
    return load_teacher(file, settings=settings, **options)


def test_an_upsampler_enlarges_the_small_images_of_a_file(tmp_path):
    file, images = small_images(tmp_path)
    teacher = upsampler(tmp_path, low_res=str(file))
    assert teacher.info.num_classes == 3 and teacher.info.image_shape == (8, 8, 3)
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    said = jax.jit(teacher.predict)(teacher.params, x, np.int32(9), np.array([2, 0], np.int32))
    params = {name: leaf for name, leaf in teacher.params.items() if name != 'conditions'}
    wanted = jax.jit(unwrapped(teacher.network).apply)(
        {'params': params}, x, np.int32(9), np.array([0, 3], np.int32),
        low_res=images[[2, 0]].astype(np.float32) / np.float32(127.5) - 1,
    )  # fmt: skip
    # Pixels of both sides differ by a rounding.
    np.testing.assert_allclose(said, wanted, rtol=1e-4, atol=1e-5)
    drawn = dmq_jax.sample(teacher, num_images=2, num_steps=2)
    assert drawn.shape == (2, 8, 8, 3) and (drawn[0] != drawn[1]).any()
    with pytest.raises(ValueError, match='no null class'):
        dmq_jax.sample(teacher, num_images=1, num_steps=1, guidance_scale=2.0)


@pytest.mark.slow
def test_an_upsampler_goes_all_the_way(tmp_path):
    file, _ = small_images(tmp_path)
    for images in travel(upsampler(tmp_path, low_res=str(file)), tmp_path):  # teacher, student
        assert images.shape == (2, 8, 8, 3) and (images[0] != images[1]).any()


@pytest.mark.parametrize(
    'change, text',
    [
        ({'classes': None}, 'no arr_1, the classes'),
        ({'classes': (0, 1, 1000)}, 'expected a class of 0 to 999 for each of 3 images'),
        ({'classes': (0, 1)}, 'expected a class of 0 to 999 for each of 3 images'),
        ({'size': 9}, 'images of 9x9, expected at most 8'),
    ],
)
def test_small_images_that_an_upsampler_cannot_take_are_refused(tmp_path, change, text):
    file, _ = small_images(tmp_path, **change)
    with pytest.raises(ValueError, match=f'teacher.low_res=.*{text}'):
        upsampler(tmp_path, low_res=str(file))


def test_small_images_are_asked_for_by_upsamplers_alone(tmp_path):
    with pytest.raises(ValueError, match='this is an upsampler: name the small images as teacher'):
        upsampler(tmp_path)
    with pytest.raises(FileNotFoundError, match="low_res='nowhere.npz': no such file"):
        upsampler(tmp_path, low_res='nowhere.npz')
    assert upsampler(tmp_path, shapes_only=True).network.rows == (('low_res', (2, 2, 3)), ('y', ()))
    file = tiny.save_torch(tmp_path / 'other.pt', tiny.adm_tensors())
    with pytest.raises(ValueError, match='enlarges nothing'):
        load_teacher(file, settings=tiny.settings_file(tmp_path, network=tiny.ADM), low_res='x.npz')
