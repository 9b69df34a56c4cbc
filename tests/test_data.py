"""Images of one's own: fitted, encoded, and told to the teacher in texts."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dmq_jax
from dmq_jax import data, denoisers, networks, pipeline, sampling
from dmq_jax.artefacts import digest
from dmq_jax.config import DataConfig, from_config_dict
from dmq_jax.models import autoencoder, autoencoder_weights
from dmq_jax.networks import TABLE
from dmq_jax.runtime import log
from dmq_jax.teachers import load_teacher
from tests import test_configs, tiny
from tests import tiny_checkpoints as checkpoints
from tests.checkpoints.journey import compiled_quickly

FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time


def photos(folder, *, count=3, size=(20, 30), channels=3, seed=0):
    """A folder of photographs, each of another size."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (size[0] + i, size[1], channels), np.uint8)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def sd_folder(tmp_path_factory):
    """Stable Diffusion that hears of texts in its middle alone: there is less to compile."""
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    with pytest.MonkeyPatch.context() as patch:
        for way in ('down', 'up'):
            kinds = [f'{way.title()}Block2D']
            patch.setitem(checkpoints.UNET2D_CONDITION, f'{way}_block_types', kinds)
        return checkpoints.sd_folder(tmp_path_factory.mktemp('texts'))


@pytest.fixture(scope='module')
def texts(sd_folder):
    """A teacher of latents and texts."""
    return load_teacher(sd_folder, prompts=['a cat', 'a'])


@pytest.fixture(scope='module')
def classes(tmp_path_factory):
    """A teacher of latents and classes, in one file with an autoencoder that has a codebook."""
    pytest.importorskip('torch', reason='writes its checkpoint')
    folder = tmp_path_factory.mktemp('classes')
    file = checkpoints.save_torch(
        folder / 'model.ckpt', {'state_dict': checkpoints.cin256_tensors()}
    )
    settings = checkpoints.settings_file(folder, network=checkpoints.LDM)
    return load_teacher(file, settings=settings)


def test_photographs_become_as_large_as_what_the_teacher_draws(texts, tmp_path):
    assert denoisers.pixel_shape(texts) == (8, 8, 3)
    found = data.load(texts, DataConfig(path=str(photos(tmp_path / 'own')), prompt='a'), 'path')
    assert found.pixels.shape == (3, 8, 8, 3) and found.conditions == ('a', 'a', 'a')
    grey = photos(tmp_path / 'grey', channels=1)
    pixels = data.load(texts, DataConfig(path=str(grey), prompt='a'), 'path').pixels
    np.testing.assert_array_equal(pixels, np.repeat(pixels[..., :1], 3, axis=-1))


def test_small_images_are_padded_where_that_is_asked_for(tmp_path):
    np.savez(tmp_path / 'set.npz', arr_0=np.full((2, 6, 6, 1), 9, np.uint8))
    config = DataConfig(path=str(tmp_path / 'set.npz'), fit='pad', label=2)
    pixels, labels = data.load(tiny.teacher(), config, 'path')
    assert pixels.shape == (2, 8, 8, 1) and not pixels[:, 0].any() and (pixels[:, 1, 1] == 9).all()
    np.testing.assert_array_equal(labels, [2, 2])
    covered = data.load(tiny.teacher(), dataclasses.replace(config, fit='crop'), 'path').pixels
    assert (covered == 9).all()


def test_images_that_have_classes_keep_them(tmp_path):
    pixels, labels = tiny.real_images(6)
    np.savez(tmp_path / 'set.npz', train_images=pixels, train_labels=labels)
    found = data.load(tiny.teacher(), DataConfig(path=str(tmp_path / 'set.npz')), 'path')
    np.testing.assert_array_equal(found.pixels, pixels)
    np.testing.assert_array_equal(found.conditions, labels)


def test_an_image_may_have_a_text_of_its_own(texts, tmp_path):
    own = photos(tmp_path / 'own')
    (own / '1.txt').write_text('a cat')
    config = DataConfig(path=str(own), prompt='')
    assert data.load(texts, config, 'path').conditions == ('', 'a cat', '')
    with pytest.raises(
        ValueError, match=r"data.path='.*own': 2 of 3 images have no text.*data.pro"
    ):
        data.load(texts, dataclasses.replace(config, prompt=None), 'path')


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'prompt': 'a cat'}, "data.prompt='a cat': this teacher is conditioned on no texts"),
        ({'label': 3}, r'data.path=.*: classes 3 to 3; expected 0 to 2'),
        ({'fit': 'pad'}, r"images of 20x30 do not fit in 8x8. data.fit='crop' scales them"),
    ],
)
def test_what_a_teacher_cannot_have_is_named(options, text, tmp_path):
    config = DataConfig(path=str(photos(tmp_path / 'own', channels=1)), **options)
    with pytest.raises(ValueError, match=text):
        data.load(tiny.teacher(), config, 'path')


def test_colours_for_a_grey_teacher_are_refused_by_the_option_that_names_them(tmp_path):
    config = DataConfig(path='teacher', class_path=str(photos(tmp_path / 'own')))
    assert data.load(tiny.teacher(), config, 'path') is None
    with pytest.raises(ValueError, match=r'data.class_path=.*images of 3 channels; expected 1'):
        data.load(tiny.teacher(), config, 'class_path')


def test_images_that_are_not_there_are_named_by_their_option(tmp_path):
    config = DataConfig(path=str(tmp_path / 'photographs'))
    with pytest.raises(FileNotFoundError, match=r"data.path='.*photographs': .*no such file"):
        data.load(tiny.teacher(), config, 'path')


def test_a_teacher_of_latents_needs_the_encoder(texts):
    config = DataConfig(path='teacher')
    with pytest.raises(ValueError, match='teacher.components'):
        data.load(texts._replace(decoder=None), config, 'path')
    half = texts._replace(decoder=texts.decoder._replace(read_encoder=None))
    with pytest.raises(ValueError, match='the decoding half alone is here'):
        data.load(half, config, 'path')


def test_what_makes_large_images_of_small_ones_is_refused():
    teacher = tiny.teacher()
    network = networks.Conditioned(teacher.network, (('low_res', (4, 4, 1)),), 3)
    with pytest.raises(ValueError, match='makes large images of small ones'):
        data.load(teacher._replace(network=network), DataConfig(path='teacher'), 'path')


def test_class_images_that_the_teacher_draws_need_a_text_of_their_own(texts):
    config = DataConfig(path='teacher', prompt='a', class_path='teacher')
    assert data.load(texts, config, 'path') is None
    with pytest.raises(ValueError, match="data.class_path='teacher' without data.class_prompt"):
        data.load(texts, config, 'class_path')


def test_further_texts_leave_the_prompts_and_the_null_condition_where_they_are(texts):
    known, labels = data.labelled(texts, ('cat', 'a', 'cat'))
    np.testing.assert_array_equal(labels, [3, 4, 3])
    before, after = texts.params[TABLE]['context'], known.params[TABLE]['context']
    np.testing.assert_array_equal(after[:3], before)
    # 'a' is a prompt as well, and is told the same; the text encoders say it of each by itself.
    np.testing.assert_allclose(after[4], before[1], atol=1e-6)
    assert known.network.num_rows == 5 and known.info == texts.info
    x, t = jnp.ones((2, 4, 4, 4)), jnp.asarray([3, 900])

    def said(teacher, y):
        apply = jax.jit(teacher.predict, compiler_options=FAST_COMPILE)
        return np.asarray(apply(teacher.params, x, t, jnp.asarray(y)))

    np.testing.assert_allclose(said(known, [4, 4]), said(texts, [1, 1]), atol=1e-5)
    assert np.abs(said(known, [3, 3]) - said(texts, [1, 1])).max() > 1e-3


def test_without_texts_a_teacher_stays_what_it_is():
    teacher, first, second = data.labelled(tiny.teacher(), np.arange(3), None)
    assert teacher is tiny.teacher() and second is None
    np.testing.assert_array_equal(first, [0, 1, 2])


def test_latents_are_those_of_the_whole_autoencoder(texts):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    teacher, (examples,) = data.examples(texts, [data.Images(pixels, ('a',) * 11)])
    network = texts.decoder.network
    shapes = autoencoder_weights.autoencoder_shapes(network)
    params = checkpoints.random_like(shapes, seed=3)  # the seed of `kl_folder`

    @jax.jit
    def encode(params):
        images = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        return network.apply({'params': params}, images, method='encode')

    wanted = encode(params)
    scale = checkpoints.KL['scaling_factor']
    np.testing.assert_allclose(examples.images.mean, scale * wanted.mean, atol=1e-6)
    deviation = np.exp(0.5 * examples.images.log_variance)
    np.testing.assert_allclose(deviation, scale * np.exp(0.5 * wanted.log_variance), rtol=1e-5)
    assert teacher.info.num_classes == 2 and (examples.labels == 3).all()


def test_latents_with_a_codebook_are_not_rounded_to_it(classes):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    _, (examples,) = data.examples(classes, [data.Images(pixels, np.asarray([1, 3]))])
    assert not isinstance(examples.images, autoencoder.Moments)
    assert examples.images.shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(examples.labels, [1, 3])
    decoder = classes.decoder
    shapes = autoencoder_weights.autoencoder_shapes(decoder.network)
    params = checkpoints.random_like(shapes, seed=1)

    @jax.jit
    def encode(params):
        images = sampling.to_float(jnp.asarray(pixels))
        return decoder.network.apply({'params': params}, images, method='encode')

    wanted = encode(params)
    np.testing.assert_allclose(examples.images, wanted, atol=1e-5)


def test_images_are_named_by_pixels_classes_and_texts():
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    sets = [
        data.Images(pixels, None), data.Images(pixels, np.asarray([0, 1])),
        data.Images(pixels, np.asarray([1, 0])), data.Images(pixels, ('a', 'b')),
        data.Images(pixels, ('b', 'a')), data.Images(pixels + 1, None),
    ]  # fmt: skip
    assert len({digest(*data.described(images)) for images in sets}) == len(sets)


SAMPLER = {'num_steps': 2, 'guidance_scale': 2.0}
CALIBRATE = {'num_images': 2, 'batch_size': 2, 'values_per_tensor': 16}
# Few layers: there is less to compile.
RULES = (
    {'pattern': 'down_0/block.*', 'weight_bits': 4, 'activation_bits': 32},
    {'pattern': '.*', 'weight_bits': 32, 'activation_bits': 32},
)


def test_the_config_of_a_subject_goes_all_the_way(sd_folder, tmp_path, monkeypatch):
    file = Path(__file__).parents[1] / 'configs/tuneqdm_sd15.py'
    config = test_configs.load(file).get_config()
    config.teacher.path = str(sd_folder)
    config.data.update(
        {'path': str(photos(tmp_path / 'own')), 'prompt': 'a cat', 'class_path': 'teacher',
         'class_prompt': 'cat', 'num_images': 2}
    )  # fmt: skip
    for sampler in (config.sampler, config.calibrate.sampler):
        sampler.update(SAMPLER)
    config.mesh.data = 1
    config.calibrate.update(CALIBRATE)
    config.sample.update({'num_images': 2, 'batch_size': 2})
    config.report.grid_size = 1
    del config.students['peqa']
    student = config.students.tuneqdm
    student.quant.update({'coverage': 'rules', 'rules': RULES})
    student.adapt.update({'num_iterations': 3, 'batch_size': 2, 'log_every': 1})
    student.method.learning_rate = 0.01
    loaded, load = [], pipeline.load_teacher
    monkeypatch.setattr(
        pipeline, 'load_teacher', lambda *options: loaded.append(load(*options)) or loaded[-1]
    )
    with compiled_quickly():
        pipeline.run(from_config_dict(config), tmp_path / 'run', ('finetune', 'export', 'sample'))
    folder = tmp_path / 'run/students/tuneqdm'
    rows = log.read_metrics(folder / 'adapt')
    assert len(rows) == 3 and all(np.isfinite(row['loss']) for row in rows)
    # What the teacher drew of the class, as images.
    (drawn,) = (tmp_path / 'run/adapt_images').rglob('images.npz')
    assert pipeline.read_arrays(drawn)['arr_0'].shape == (2, 8, 8, 3)
    # Drawn is what the images show; texts of images are no further prompts of the student.
    model = dmq_jax.load(folder / 'export')
    assert model.info.num_classes == 1 and model.network.num_rows == 2
    (teacher,) = loaded
    np.testing.assert_array_equal(model.params[TABLE]['context'], teacher.params[TABLE]['context'])
    moved = [np.any(table['output'] != 1) for table in model.channels.values()]
    assert moved and all(moved)
    assert (folder / 'export/set.safetensors').is_file()
    images = pipeline.read_samples(tmp_path / 'run/samples/tuneqdm')['arr_0']
    assert images.shape == (2, 8, 8, 3)


@pytest.mark.slow
def test_what_a_network_is_told_is_not_learnt_with_all_of_it(texts, tmp_path):
    model = dmq_jax.quantize(
        texts, 'full_finetuning', num_iterations=2, method_options={'learning_rate': 0.01},
        calibrate_options=CALIBRATE | {'sampler': SAMPLER}, adapt_options={'batch_size': 2},
        data_options={'path': str(photos(tmp_path / 'own')), 'prompt': 'cat'},
        weight_bits=32, activation_bits=32,
    )  # fmt: skip
    np.testing.assert_array_equal(model.params[TABLE]['context'], texts.params[TABLE]['context'])
    assert model.network.num_rows == 3
    assert np.any(model.params['conv_in']['kernel'] != texts.params['conv_in']['kernel'])
