import sys

import numpy as np
import pytest
from PIL import Image

from dmq_jax.files.images import load_images, pad_images


def random_images(count, height=4, width=5, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def write_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def test_an_npz_gives_the_images_and_labels_of_the_split(tmp_path):
    train, test = random_images(3), random_images(2, seed=1)
    np.savez(
        tmp_path / 'set.npz',
        train_images=train, train_labels=np.array([2, 0, 1], np.int64), test_images=test,
    )  # fmt: skip
    images, labels = load_images(tmp_path / 'set.npz')
    np.testing.assert_array_equal(images, train)
    np.testing.assert_array_equal(labels, [2, 0, 1])
    assert labels.dtype == np.int32
    images, labels = load_images(tmp_path / 'set.npz', 'test')
    np.testing.assert_array_equal(images, test)
    assert labels is None


def test_an_npz_of_samples_gives_arr_0_without_labels(tmp_path):
    samples = random_images(3)
    np.savez(tmp_path / 'samples.npz', samples)
    images, labels = load_images(str(tmp_path / 'samples.npz'))
    np.testing.assert_array_equal(images, samples)
    assert labels is None


def test_grey_images_without_a_channel_axis_get_one(tmp_path):
    np.savez(tmp_path / 'grey.npz', random_images(3)[..., 0])
    assert load_images(tmp_path / 'grey.npz').images.shape == (3, 4, 5, 1)


@pytest.mark.parametrize(
    'arrays, text',
    [
        ({'x': np.zeros(3)}, r"holds \['x'\]: expected train_images"),
        ({'train_images': np.zeros((2, 4, 4, 3), np.float32)}, 'images are float32'),
        ({'train_images': np.zeros((2, 4), np.uint8)}, r'uint8 \(2, 4\)'),
        (
            {'train_images': np.zeros((2, 4, 4, 3), np.uint8), 'train_labels': np.zeros(3, int)},
            '2 images but 3 labels',
        ),
    ],
)
def test_an_npz_without_the_arrays_is_refused(tmp_path, arrays, text):
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(ValueError, match=text):
        load_images(tmp_path / 'bad.npz')


@pytest.mark.parametrize('channels', [1, 3])
def test_a_flat_folder_gives_images_in_the_order_of_their_names(tmp_path, channels):
    wanted = random_images(3, channels=channels)
    for name, image in zip(('b.png', 'a.PNG', 'c.bmp'), wanted, strict=True):
        write_png(tmp_path / name, image)
    (tmp_path / 'notes.txt').write_text('not an image')
    images, labels = load_images(tmp_path)
    np.testing.assert_array_equal(images, wanted[[1, 0, 2]])
    assert labels is None


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    wanted = random_images(3)
    write_png(tmp_path / 'dog' / '0.png', wanted[1])
    write_png(tmp_path / 'dog' / '1.png', wanted[2])
    write_png(tmp_path / 'cat' / '9.png', wanted[0])
    images, labels = load_images(tmp_path)
    np.testing.assert_array_equal(images, wanted)
    np.testing.assert_array_equal(labels, [0, 1, 1])


def test_a_subfolder_named_like_the_split_is_entered_first(tmp_path):
    wanted = random_images(2)
    write_png(tmp_path / 'train' / 'cat' / '0.png', wanted[0])
    write_png(tmp_path / 'test' / 'cat' / '0.png', wanted[1])
    np.testing.assert_array_equal(load_images(tmp_path, 'train').images, wanted[:1])
    np.testing.assert_array_equal(load_images(tmp_path, 'test').images, wanted[1:])


def test_palette_images_become_rgb(tmp_path):
    image = np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 5, 3))
    Image.fromarray(image).quantize(2).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(load_images(tmp_path).images, image[None])


def test_images_of_two_sizes_are_refused_by_name(tmp_path):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    write_png(tmp_path / 'b.png', random_images(1, height=6)[0])
    with pytest.raises(ValueError, match=r'b.png is \(6, 5, 3\), .*a.png is \(4, 5, 3\)'):
        load_images(tmp_path)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='no images'):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file or folder'):
        load_images(tmp_path / 'absent')


def test_padding_centres_the_image_in_zeros():
    images = random_images(2, height=4, width=5)
    padded = pad_images(images, 8)
    assert padded.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(padded[:, 2:6, 1:6], images)
    assert padded.sum(dtype=np.int64) == images.sum(dtype=np.int64)
    with pytest.raises(ValueError, match='images of 4x5 do not fit in image_size=4'):
        pad_images(images, 4)


def test_tfds_gives_the_images_of_the_split():
    tfds = pytest.importorskip('tensorflow_datasets', reason='tfds: needs tensorflow-datasets')
    with tfds.testing.mock_data(num_examples=4):
        images, labels = load_images('tfds:cifar10', 'test')
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (4,) and labels.dtype == np.int32


def test_tfds_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(ModuleNotFoundError, match='tfds:cifar10 needs tensorflow-datasets'):
        load_images('tfds:cifar10')
