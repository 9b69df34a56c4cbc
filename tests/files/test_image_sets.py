import json
import sys

import numpy as np
import pytest
from PIL import Image

from dmq_jax.files.image_sets import crop_images, load_images, pad_images
from tests.files.test_images import random_images, write_png


def test_an_npz_gives_the_images_and_labels_of_the_split(tmp_path):
    train, test = random_images(3), random_images(2, seed=1)
    np.savez(
        tmp_path / 'set.npz',
        train_images=train, train_labels=np.array([2, 0, 1], np.int64), test_images=test,
    )  # fmt: skip
    images, labels, _ = load_images(tmp_path / 'set.npz')
    np.testing.assert_array_equal(images, train)
    np.testing.assert_array_equal(labels, [2, 0, 1])
    assert labels.dtype == np.int32
    images, labels, _ = load_images(tmp_path / 'set.npz', 'test')
    np.testing.assert_array_equal(images, test)
    assert labels is None


def test_an_npz_of_samples_gives_arr_0_without_labels(tmp_path):
    samples = random_images(3)
    np.savez(tmp_path / 'samples.npz', samples)
    images, labels, _ = load_images(str(tmp_path / 'samples.npz'))
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
        ({'arr_0': np.zeros((0, 4, 4, 3), np.uint8)}, 'bad.npz: no images in it'),
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
    images, labels, _ = load_images(tmp_path)
    np.testing.assert_array_equal(images, wanted[[1, 0, 2]])
    assert labels is None


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    wanted = random_images(3)
    write_png(tmp_path / 'dog' / '0.png', wanted[1])
    write_png(tmp_path / 'dog' / '1.png', wanted[2])
    write_png(tmp_path / 'cat' / '9.png', wanted[0])
    images, labels, _ = load_images(tmp_path)
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
    padded = pad_images(images, (8, 8))
    assert padded.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(padded[:, 2:6, 1:6], images)
    assert padded.sum(dtype=np.int64) == images.sum(dtype=np.int64)
    with pytest.raises(ValueError, match='images of 4x5 do not fit in 4x4'):
        pad_images(images, (4, 4))


def test_tfds_gives_the_images_of_the_split():
    tfds = pytest.importorskip('tensorflow_datasets', reason='tfds: needs tensorflow-datasets')
    with tfds.testing.mock_data(num_examples=4):
        images, labels, _ = load_images('tfds:cifar10', 'test')
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    assert labels.shape == (4,) and labels.dtype == np.int32


def test_tfds_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(ModuleNotFoundError, match='tfds:cifar10 needs tensorflow-datasets'):
        load_images('tfds:cifar10')


def test_padding_is_refused_for_images_one_pixel_too_large():
    with pytest.raises(ValueError, match='images of 4x5 do not fit in 6x4'):
        pad_images(random_images(1)[0], (6, 4))


@pytest.mark.parametrize('channels', [1, 3])
def test_a_crop_is_the_middle_of_what_just_covers_it(channels):
    # Columns of five shades, each four pixels wide: scaled by a quarter they are one pixel.
    shades = np.array([10, 60, 120, 180, 240], np.uint8)
    wide = np.broadcast_to(np.repeat(shades, 4)[None, :, None], (12, 20, channels))
    cropped = crop_images(wide, (3, 3))
    assert cropped.shape == (3, 3, channels) and cropped.dtype == np.uint8
    # Lanczos rings at edges: by less than a tenth of a step of 60.
    assert np.abs(cropped.astype(int) - shades[1:4][None, :, None]).max() < 6
    tall = crop_images(np.swapaxes(wide, 0, 1), (3, 3))
    np.testing.assert_array_equal(tall, np.swapaxes(cropped, 0, 1))


def test_a_crop_enlarges_what_is_small_and_leaves_what_fits():
    image = random_images(1, height=4, width=6)[0]
    assert crop_images(image, (8, 8)).shape == (8, 8, 3)
    np.testing.assert_array_equal(crop_images(image, (4, 6)), image)
    # The middle of what needs no scaling.
    np.testing.assert_array_equal(crop_images(image, (4, 4)), image[:, 1:5])


def test_images_of_any_size_are_fitted_as_they_are_read(tmp_path):
    for i, side in enumerate((4, 9)):
        write_png(tmp_path / f'{i}.png', random_images(1, height=side, width=7)[0])
    found = load_images(tmp_path, fit=lambda image: crop_images(image, (5, 5)))
    assert found.images.shape == (2, 5, 5, 3)
    np.savez(tmp_path / 'set.npz', random_images(3))
    found = load_images(tmp_path / 'set.npz', fit=lambda images: pad_images(images, (5, 6)))
    assert found.images.shape == (3, 5, 6, 3)
    many = random_images(3, height=7, width=9)
    one_by_one = [crop_images(image, (5, 5)) for image in many]
    np.testing.assert_array_equal(crop_images(many, (5, 5)), one_by_one)


def test_a_photograph_is_seen_as_its_camera_was_held(tmp_path):
    image = random_images(1, height=4, width=6)[0]
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter, clockwise
    Image.fromarray(image).save(tmp_path / 'a.png', exif=tags)
    np.testing.assert_array_equal(load_images(tmp_path).images[0], np.rot90(image, -1))


def test_a_damaged_image_is_named(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'a.png: no readable image'):
        load_images(tmp_path)


def test_texts_lie_beside_images_or_in_a_list(tmp_path):
    for name in ('a.png', 'b.jpg', 'c.png'):
        write_png(tmp_path / name, random_images(1)[0])
    assert load_images(tmp_path).captions is None
    (tmp_path / 'b.txt').write_text(' a dog\n')
    assert load_images(tmp_path).captions == (None, 'a dog', None)
    lines = [{'file_name': name, 'text': f'in the list: {name}'} for name in ('a.png', 'b.jpg')]
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
    # What lies beside an image is said of it alone.
    assert load_images(tmp_path).captions == ('in the list: a.png', 'a dog', None)


def test_texts_of_subfolders_may_stand_in_one_list(tmp_path):
    for name in ('cat/a.png', 'dog/b.png'):
        write_png(tmp_path / name, random_images(1)[0])
    lines = [{'file_name': 'cat/a.png', 'text': 'first'}]
    (tmp_path / 'metadata.jsonl').write_text(json.dumps(lines[0]))
    (tmp_path / 'dog/metadata.jsonl').write_text('{"file_name": "b.png", "text": "second"}')
    assert load_images(tmp_path).captions == ('first', 'second')


def test_an_empty_text_is_a_text(tmp_path):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    (tmp_path / 'a.txt').write_text('')
    assert load_images(tmp_path).captions == ('',)


def test_a_text_in_another_encoding_is_named(tmp_path):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    (tmp_path / 'a.txt').write_bytes('café'.encode('latin-1'))
    with pytest.raises(ValueError, match=r'a.txt: not a text in UTF-8'):
        load_images(tmp_path)


def test_a_text_of_an_image_that_is_not_there_is_named(tmp_path):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    (tmp_path / 'metadata.jsonl').write_text('{"file_name": "b.png", "text": "a cat"}')
    with pytest.raises(ValueError, match=r'line 1: there is no image .*b.png'):
        load_images(tmp_path)


@pytest.mark.parametrize(
    'line',
    [
        '{"file_name": "a.png"}', '["a.png", "text"]', 'a.png, a cat',
        '{"file_name": "a.png", "text": null}',
    ],
)  # fmt: skip
def test_a_line_that_says_nothing_of_an_image_is_named(tmp_path, line):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    (tmp_path / 'metadata.jsonl').write_text('\n' + line)
    with pytest.raises(ValueError, match=r'metadata.jsonl, line 2: .*expected an object'):
        load_images(tmp_path)
