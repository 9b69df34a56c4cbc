import hashlib
import sys
import threading
import time
import tracemalloc
import types

import numpy as np
import pytest
from PIL import Image

from dmq_jax.files.images import (
    ReferenceStatistics,
    _prefetched,
    open_images,
    write_reference,
)


def random_images(count, height=4, width=5, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def write_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def collect(stream, batch_size=3):
    return np.concatenate(list(stream.batches(batch_size)))


def random_statistics(width=6, spatial=5, seed=0):
    rng = np.random.default_rng(seed)
    return ReferenceStatistics(
        rng.normal(size=width), np.eye(width), rng.normal(size=spatial), np.eye(spatial)
    )


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('batch_size', [1, 3, 8, 100])
def test_a_stream_of_an_npz_is_its_images_in_order_every_time(tmp_path, save, batch_size):
    images = random_images(8)
    save(tmp_path / 'a.npz', images, np.arange(8))  # the labels of guided-diffusion: arr_1
    stream = open_images(tmp_path / 'a.npz')
    assert stream.num_images == 8 and stream.image_shape == (4, 5, 3)
    assert stream.statistics is None and 'a.npz' in stream.description
    for _ in range(2):
        np.testing.assert_array_equal(collect(stream, batch_size), images)
    assert all(len(b) == batch_size for b in list(stream.batches(batch_size))[:-1])


def test_a_folder_of_samples_gives_the_npz_in_it(tmp_path):
    images = random_images(4)
    np.savez_compressed(tmp_path / 'images.npz', arr_0=images, labels=np.arange(4))
    write_png(tmp_path / 'grid.png', images[0, :2])
    np.testing.assert_array_equal(collect(open_images(str(tmp_path))), images)


@pytest.mark.parametrize('batch_size', [1, 2, 9])
def test_a_stream_of_a_folder_follows_the_paths(tmp_path, batch_size):
    wanted = random_images(5)
    names = ('a/0.png', 'a/1.PNG', 'b.webp', 'c/d/2.bmp', 'z.png')
    for name, image in zip(names, wanted, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {'lossless': True} if path.suffix == '.webp' else {}
        Image.fromarray(image).save(path, **options)
    stream = open_images(tmp_path)
    assert stream.num_images == 5 and stream.image_shape == (4, 5, 3)
    np.testing.assert_array_equal(collect(stream, batch_size), wanted)


def test_palette_images_of_a_stream_become_rgb(tmp_path):
    image = np.broadcast_to(np.array([255, 0, 0], np.uint8), (4, 5, 3))
    Image.fromarray(image).quantize(2).save(tmp_path / 'a.png')
    np.testing.assert_array_equal(collect(open_images(tmp_path)), image[None])


@pytest.mark.parametrize(
    'mode, message', [('L', 'grey'), ('LA', 'grey'), ('RGBA', 'transparent'), ('1', 'grey')]
)
def test_images_that_are_not_rgb_are_refused_with_a_way_out(tmp_path, mode, message):
    write_png(tmp_path / 'a.png', random_images(1)[0])
    Image.fromarray(random_images(1)[0]).convert(mode).save(tmp_path / 'b.png')
    stream = open_images(tmp_path)
    with pytest.raises(ValueError, match=rf"b.png is {message} \(mode {mode}\).*convert\('RGB'\)"):
        collect(stream)


def test_damaged_images_and_other_sizes_are_refused_by_name(tmp_path):
    write_png(tmp_path / 'a.png', random_images(1, 64, 64)[0])
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:3000])
    with pytest.raises(ValueError, match='b.png: no readable image'):
        collect(open_images(tmp_path))
    write_png(tmp_path / 'b.png', random_images(1, 32, 64)[0])
    with pytest.raises(ValueError, match=r'b.png is \(32, 64, 3\), .*a.png is \(64, 64, 3\)'):
        collect(open_images(tmp_path))


@pytest.mark.parametrize(
    'array, message',
    [
        (np.zeros((2, 4, 4, 3), np.float32), r'arr_0 is float32 .*scale and round floats'),
        (np.zeros((2, 4, 4, 3), np.int64), r'arr_0 is int64 \(2, 4, 4, 3\): expected uint8'),
        (np.zeros((2, 4, 4), np.uint8), r'arr_0 is uint8 \(2, 4, 4\): expected uint8 \[N'),
        (np.zeros((2, 4, 4, 1), np.uint8), 'expected RGB.*np.repeat'),
        (np.zeros((2, 4, 4, 4), np.uint8), r'expected RGB.*images\[..., :3\]'),
        (np.zeros((0, 4, 4, 3), np.uint8), 'at least 1 image'),
        (np.asfortranarray(np.ones((2, 4, 4, 3), np.uint8)), 'Fortran order'),
        (np.array([[1], [2, 3]], object), 'Python objects'),
    ],
)
def test_an_npz_of_other_arrays_is_refused(tmp_path, array, message):
    np.savez(tmp_path / 'bad.npz', array)
    with pytest.raises(ValueError, match=f'bad.npz: .*{message}') as error:
        open_images(tmp_path / 'bad.npz')
    assert '\n' not in str(error.value)


def test_nothing_to_stream_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='no images'):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match='absent: no such file or folder'):
        open_images(tmp_path / 'absent')
    np.savez(tmp_path / 'bad.npz', mu=np.zeros(3))
    with pytest.raises(ValueError, match="bad.npz: no array 'arr_0'"):
        open_images(tmp_path / 'bad.npz')
    write_png(tmp_path / 'a.png', random_images(1)[0])
    with pytest.raises(ValueError, match='batch_size=0'):
        open_images(tmp_path).batches(0)


def test_fingerprints_name_the_content(tmp_path):
    images = random_images(3)
    for name, array in (('a', images), ('same', images), ('other', images[::-1])):
        np.savez(tmp_path / f'{name}.npz', array)
    a, same, other = (
        open_images(tmp_path / f'{n}.npz').fingerprint() for n in ('a', 'same', 'other')
    )
    assert a == hashlib.sha256((tmp_path / 'a.npz').read_bytes()).hexdigest()
    assert (a == same) == (
        (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'same.npz').read_bytes()
    )
    assert a != other
    write_png(tmp_path / 'x' / 'a.png', images[0])
    write_png(tmp_path / 'y' / 'a.png', images[0])
    write_png(tmp_path / 'z' / 'b.png', images[0])
    x, y, z = (open_images(tmp_path / n).fingerprint() for n in 'xyz')
    assert x == y != z


def test_memory_holds_a_few_batches_and_leaving_early_stops_the_reader(tmp_path):
    images = np.zeros((400, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / 'a.npz', images)
    tracemalloc.start()
    for _ in open_images(tmp_path / 'a.npz').batches(10):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One with the caller, one in the making, two waiting; zipfile holds about two more.
    assert peak < 8 * images[:10].nbytes
    before = threading.active_count()
    batches = open_images(tmp_path / 'a.npz').batches(10)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_slow_consumer_is_not_outrun():
    made = []

    def make():
        for index in range(10):
            made.append(index)
            yield index

    items = _prefetched(make(), 2)
    assert next(items) == 0
    time.sleep(0.1)  # ample for the reader to run ahead, if it did
    assert max(made) <= 3
    assert list(items) == list(range(1, 10))


def test_an_error_while_reading_ahead_reaches_the_caller():
    def make():
        yield 1
        raise ValueError('damaged')

    items = _prefetched(make(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match='damaged'):
        next(items)


@pytest.mark.parametrize('seed', [None, 3])
def test_a_reference_file_is_read_back_with_its_statistics(tmp_path, seed):
    images, statistics = random_images(700), random_statistics()
    np.savez(tmp_path / 'set.npz', images)
    path = tmp_path / 'reference.npz'
    write_reference(path, open_images(tmp_path / 'set.npz'), statistics, num_images=300, seed=seed)
    with np.load(path) as file:
        assert file.files == ['arr_0', 'mu', 'sigma', 'mu_s', 'sigma_s']
    stream = open_images(path, statistics_widths=(6, 5))
    for got, wanted in zip(stream.statistics, statistics, strict=True):
        np.testing.assert_array_equal(got, wanted)
    kept = collect(stream, 64)
    indices = [np.flatnonzero((images == k).all(axis=(1, 2, 3))).item() for k in kept]
    assert len(set(indices)) == 300 and indices == sorted(indices)
    if seed is None:
        assert set(np.diff(indices)) == {2, 3}
    with pytest.raises(ValueError, match=r'reference.npz: mu \(6,\) .*expected \(2048,\)'):
        open_images(path)


def test_a_reference_keeps_all_images_of_a_small_set(tmp_path):
    np.savez(tmp_path / 'set.npz', random_images(5))
    write_reference(tmp_path / 'r.npz', open_images(tmp_path / 'set.npz'), random_statistics())
    stream = open_images(tmp_path / 'r.npz', statistics_widths=(6, 5))
    np.testing.assert_array_equal(collect(stream), random_images(5))


def test_a_reference_is_written_whole_or_not_at_all(tmp_path):
    write_png(tmp_path / 'set' / 'a.png', random_images(1)[0])
    write_png(tmp_path / 'set' / 'b.png', random_images(1, height=6)[0])
    stream = open_images(tmp_path / 'set')
    with pytest.raises(ValueError, match='expected one size'):
        write_reference(tmp_path / 'r.npz', stream, random_statistics())
    broken = random_statistics()._replace(mu_s=np.full(5, np.nan))
    with pytest.raises(ValueError, match='mu_s is float64 with 5 values infinite or NaN'):
        write_reference(tmp_path / 'r.npz', stream, broken)
    with pytest.raises(ValueError, match=r'mu \(6,\) and sigma \(7, 7\), expected'):
        write_reference(tmp_path / 'r.npz', stream, random_statistics()._replace(sigma=np.eye(7)))
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_statistics_that_are_not_complete_are_refused(tmp_path):
    statistics = random_statistics()
    np.savez(tmp_path / 'a.npz', random_images(2), mu=statistics.mu, sigma=statistics.sigma)
    with pytest.raises(ValueError, match=r"a.npz has mu but lacks \['mu_s', 'sigma_s'\]"):
        open_images(tmp_path / 'a.npz')


def test_a_tfds_stream_gives_the_images_of_its_split():
    tfds = pytest.importorskip('tensorflow_datasets', reason='tfds: needs tensorflow-datasets')
    with tfds.testing.mock_data(num_examples=4):
        stream = open_images('tfds:cifar10:test')
        assert stream.num_images == 4 and stream.image_shape == (32, 32, 3)
        assert collect(stream).shape == (4, 32, 32, 3)


def test_tfds_streams_through_the_data_source_alone(monkeypatch):
    images = random_images(5)
    module = types.ModuleType('tensorflow_datasets')
    module.data_source = lambda name, split: {
        ('cifar10', 'train'): [{'image': image} for image in images],
        ('mnist', 'test'): [{'image': images[0, ..., :1]}],
    }[name, split]
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)
    stream = open_images('tfds:cifar10')
    np.testing.assert_array_equal(collect(stream, 2), images)
    assert stream.description == 'tfds:cifar10:train' and len(stream.fingerprint()) == 64
    with pytest.raises(ValueError, match=r'tfds:mnist:test: images are \(4, 5, 1\).*RGB'):
        open_images('tfds:mnist:test')


def test_a_tfds_stream_without_the_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(ModuleNotFoundError, match='tfds:cifar10 needs tensorflow-datasets'):
        open_images('tfds:cifar10')
