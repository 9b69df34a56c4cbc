import json

import jax
import numpy as np
import pytest

import dmq_jax
from dmq_jax.checkpoints import opening, single
from dmq_jax.checkpoints.options import Options
from dmq_jax.networks import unwrapped
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny
from tests.checkpoints.journey import last_latents, travel
from tests.models.listings import listing

pytest.importorskip('torch', reason='writes the files that are read without it')


def ddim_settings(folder):
    return tiny.settings_file(folder, process={'image_size': 8})


@pytest.mark.slow
def test_a_legacy_ddim_checkpoint_goes_all_the_way(tmp_path):
    weights = {f'module.{name}': array for name, array in tiny.ddim_tensors(seed=1).items()}
    average = tiny.ddim_tensors(seed=0)
    file = tiny.save_torch(
        tmp_path / 'model-790000.ckpt', [weights, {'step': 3}, 5, 7, average], legacy=True
    )
    options = {'settings': ddim_settings(tmp_path)}
    teacher = load_teacher(file, **options)
    folder = tmp_path / 'ddpm'
    folder.mkdir()
    diffusers = load_teacher(tiny.ddpm_folder(folder))
    assert unwrapped(teacher.network) == unwrapped(diffusers.network)
    np.testing.assert_array_equal(tiny.leaves(teacher.params), tiny.leaves(diffusers.params))
    without = load_teacher(file, ema=False, **options)
    assert (tiny.leaves(without.params) != tiny.leaves(teacher.params)).any()
    travel(teacher, tmp_path)


@pytest.mark.slow
def test_an_adm_checkpoint_goes_all_the_way(tmp_path):
    file = tiny.save_torch(tmp_path / 'model.pt', tiny.adm_tensors())
    settings = tiny.settings_file(tmp_path, network=tiny.ADM)
    teacher = load_teacher(file, settings=settings)
    assert teacher.info.learned_variance and teacher.info.num_classes == 1000
    assert teacher.info.schedule.kind == 'cosine'
    travel(teacher, tmp_path)
    ancestral = {'name': 'ddpm', 'num_steps': 2, 'spacing': 'adm', 'clip_sample': 1.0}
    learned, fixed = (
        dmq_jax.sample(teacher, num_images=2, variance=variance, **ancestral)
        for variance in ('learned_range', 'fixed_small')
    )
    assert (learned != fixed).any()


@pytest.mark.slow
def test_a_compvis_checkpoint_goes_all_the_way(tmp_path):
    file = tiny.save_torch(
        tmp_path / 'model.ckpt',
        {'state_dict': tiny.cin256_tensors(), 'global_step': 3, 'callbacks': {'best': 0.5}},
    )
    teacher = load_teacher(file, settings=tiny.settings_file(tmp_path, network=tiny.LDM))
    assert teacher.info.num_classes == 4 and teacher.info.is_latent
    assert teacher.info.schedule.kind == 'scaled_linear'
    assert (teacher.info.schedule.beta_start, teacher.info.schedule.beta_end) == (0.0015, 0.0195)
    travel(teacher, tmp_path, guidance_scale=3.0)


def lsun(folder, config):
    file = tiny.save_torch(folder / 'model.ckpt', tiny.lsun_checkpoint(config))
    return file, tiny.settings_file(folder, network=config)


@pytest.mark.parametrize(
    'config, last_beta, factor, scaling',
    [(tiny.BEDROOMS, 0.0195, 4, 1.0), (tiny.CHURCHES, 0.0155, 8, 0.22)],
    ids=['bedrooms', 'churches'],
)
def test_an_unconditional_compvis_checkpoint_is_its_average_and_its_first_stage(
    tmp_path, config, last_beta, factor, scaling
):
    file, settings = lsun(tmp_path, config)
    teacher = load_teacher(file, settings=settings)
    assert teacher.info.num_classes is None and teacher.info.is_latent
    assert (teacher.info.schedule.kind, teacher.info.schedule.beta_end) == (
        'scaled_linear', last_beta,
    )  # fmt: skip
    network = teacher.decoder.network
    assert 2 ** (len(network.channels) - 1) == factor
    assert network.scaling_factor == pytest.approx(scaling)
    shapes = jax.tree.map(lambda leaf: leaf, teacher.params)
    np.testing.assert_array_equal(
        tiny.leaves(teacher.params), tiny.leaves(tiny.random_like(shapes, seed=5))
    )
    without = load_teacher(file, settings=settings, ema=False)
    np.testing.assert_array_equal(
        tiny.leaves(without.params), tiny.leaves(tiny.random_like(shapes, seed=0))
    )
    assert np.isfinite(last_latents(teacher)).all()


@pytest.mark.slow
@pytest.mark.parametrize('config', [tiny.BEDROOMS, tiny.CHURCHES], ids=['bedrooms', 'churches'])
def test_an_unconditional_compvis_checkpoint_goes_all_the_way(tmp_path, config):
    file, settings = lsun(tmp_path, config)
    travel(load_teacher(file, settings=settings), tmp_path)


@pytest.mark.slow  # a minute of compiling
def test_a_dit_checkpoint_goes_all_the_way(tmp_path):
    file = tiny.save_torch(tmp_path / 'DiT.pt', tiny.dit_tensors())
    settings = tiny.settings_file(tmp_path, network={'head_dim': 16})
    teacher = load_teacher(file, settings=settings, components=tiny.kl_folder(tmp_path))
    assert teacher.info.learned_variance and teacher.info.num_classes == 4
    travel(teacher, tmp_path, guidance_scale=4.0)


def test_every_kind_is_told_by_its_tensors_whatever_the_file_is_called(tmp_path):
    for kind, tensors in {
        'ddim': tiny.ddim_tensors(),
        'adm': tiny.adm_tensors(),
        'compvis': tiny.cin256_tensors(),
        'dit': tiny.dit_tensors(),
    }.items():
        assert opening.recognise(tensors, tmp_path) == kind
        opening.check_kind(kind, tensors, tmp_path)
        for other in {'ddim', 'adm', 'compvis', 'dit'} - {kind}:
            with pytest.raises(ValueError, match=f'teacher.kind={other!r}.*kind {kind!r}'):
                opening.check_kind(other, tensors, tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    file = tiny.save_torch(tmp_path / 'resnet.pt', {'fc.weight': np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="not a checkpoint that is known here.*'fc.weight'"):
        load_teacher(file)
    empty = tiny.save_torch(tmp_path / 'empty.pt', {'epoch': 3})
    with pytest.raises(ValueError, match='no tensors in it'):
        load_teacher(empty)


@pytest.mark.parametrize(
    'tensors, settings, words',
    [
        (tiny.adm_tensors, tiny.ADM, {'num_channels': 32, 'num_head_channels': 64}),
        (tiny.cin256_tensors, tiny.LDM, {'model_channels': 32, 'num_heads': 1}),
    ],
)
def test_a_network_that_was_never_published_is_described_as_the_error_says(
    tmp_path, tensors, settings, words
):
    file = tiny.save_torch(tmp_path / 'model.pt', tensors())
    with pytest.raises(ValueError, match='a JSON file') as caught:
        load_teacher(file)
    text = str(caught.value)
    example = json.loads(text[text.index('such as ') + 8 : text.index(' with its own values')])
    assert words.items() <= example['network'].items()
    # The same tensors with other heads are another network; only the settings tell.
    heads = {'num_heads': 4, 'num_head_channels': -1}
    one, other = (
        load_teacher(file, settings=tiny.settings_file(tmp_path, network={**settings, **more}))
        for more in ({}, heads)
    )
    assert unwrapped(other.network).num_heads[0] == 4 != unwrapped(one.network).num_heads[0]
    assert np.isfinite(last_latents(other)).all()
    assert np.abs(last_latents(other) - last_latents(one)).max() > 0
    wrong = tiny.settings_file(tmp_path, network={**settings, 'num_headz': 4})
    with pytest.raises(ValueError, match='num_headz=4: not a setting of .* that is known here'):
        load_teacher(file, settings=wrong)


def test_a_kind_that_the_file_is_not_is_refused(tmp_path):
    file = tiny.save_torch(tmp_path / 'model.pt', tiny.dit_tensors())
    with pytest.raises(ValueError, match="teacher.kind='adm', but there is no tensor.*'dit'"):
        load_teacher(file, kind='adm')


@pytest.mark.parametrize(
    'tensors, text',
    [
        (tiny.adm_tensors, 'no published network has these tensors.*teacher.settings'),
        (tiny.cin256_tensors, 'no published network has these tensors.*teacher.settings'),
        (tiny.dit_tensors, "width of 32.*'head_dim'.*teacher.settings"),
    ],
)
def test_what_the_file_does_not_tell_has_to_be_given(tmp_path, tensors, text):
    file = tiny.save_torch(tmp_path / 'model.pt', tensors())
    with pytest.raises(ValueError, match=text):
        load_teacher(file)


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop('mid.block_1.conv1.weight'), '1 tensors missing, e.g.'),
        (
            lambda t: t.update({'mid.extra': np.zeros(1, np.float32)}),
            "1 tensors unused.*'mid.extra'",
        ),
        (
            lambda t: t.update({'mid.block_1.conv1.weight': np.zeros((3, 3), np.float32)}),
            "'mid.block_1.conv1.weight' has shape",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, text):
    tensors = tiny.ddim_tensors()
    change(tensors)
    file = tiny.save_torch(tmp_path / 'model.ckpt', tensors)
    with pytest.raises(ValueError, match=text) as caught:
        load_teacher(file, settings=ddim_settings(tmp_path))
    assert str(file) in str(caught.value)


def test_a_tensor_of_no_part_of_a_compvis_checkpoint_is_named(tmp_path):
    tensors = {**tiny.cin256_tensors(), 'discriminator.weight': np.zeros(1, np.float32)}
    file = tiny.save_torch(tmp_path / 'model.ckpt', {'state_dict': tensors})
    settings = tiny.settings_file(tmp_path, network=tiny.LDM)
    with pytest.raises(ValueError, match="1 tensors unused, e.g. 'discriminator.weight'"):
        load_teacher(file, settings=settings)


def test_the_moving_average_is_read_by_default_as_the_scripts_of_latent_diffusion_do(tmp_path):
    tensors = tiny.cin256_tensors()
    average = averaged(tensors)
    counters = {'model_ema.decay': np.float32([0.9]), 'model_ema.num_updates': np.int32([7])}
    file = tiny.save_torch(tmp_path / 'm.ckpt', {'state_dict': {**tensors, **average, **counters}})
    options = {'settings': tiny.settings_file(tmp_path, network=tiny.LDM)}
    weights = load_teacher(file, ema=False, **options).params['conv_in']['bias']
    for ema in (None, True):
        chosen = load_teacher(file, ema=ema, **options).params['conv_in']['bias']
        np.testing.assert_array_equal(chosen, weights + 1)


def averaged(tensors):
    """The entries of a moving average of the weights among `tensors`, one more than they are."""
    return {
        'model_ema.' + name.removeprefix('model.').replace('.', ''): array + 1
        for name, array in tensors.items()
        if name.startswith('model.')
    }


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda average: average.pop(sorted(average)[0]), '1 tensors missing'),
        (
            lambda average: average.update(
                {'model_ema.diffusion_modelmore': np.zeros(1, np.float32)}
            ),
            "1 tensors unused, e.g. 'model_ema.diffusion_modelmore'",
        ),
    ],
)
def test_an_average_of_other_tensors_is_refused_and_may_be_left(tmp_path, change, text):
    tensors = tiny.cin256_tensors()
    average = averaged(tensors)
    change(average)
    file = tiny.save_torch(tmp_path / 'm.ckpt', {'state_dict': {**tensors, **average}})
    options = {'settings': tiny.settings_file(tmp_path, network=tiny.LDM)}
    with pytest.raises(ValueError, match=rf'average.*\(teacher.ema=False takes.*: {text}'):
        load_teacher(file, **options)
    assert load_teacher(file, ema=False, **options).info.num_classes == 4


def test_an_average_without_its_weights_is_the_network(tmp_path):
    tensors = tiny.cin256_tensors()
    rest = {name: array for name, array in tensors.items() if not name.startswith('model.')}
    file = tiny.save_torch(tmp_path / 'm.ckpt', {'state_dict': {**rest, **averaged(tensors)}})
    options = {'settings': tiny.settings_file(tmp_path, network=tiny.LDM)}
    found = load_teacher(file, **options).params['conv_in']['bias']
    np.testing.assert_array_equal(found, tensors['model.diffusion_model.input_blocks.0.0.bias'] + 1)
    with pytest.raises(ValueError, match='teacher.ema=False, but .* the moving average alone'):
        load_teacher(file, ema=False, **options)


@pytest.mark.slow
def test_a_published_network_is_found_by_its_average_alone():
    prefix = 'model.diffusion_model.'
    tensors = {
        name.removeprefix(prefix).replace('.', ''): shape
        for name, shape in listing('ldm_unet_lsun_churches').items()
    }
    found = single.find_published(Listed(tensors), 'compvis', without_dots=True)
    assert found[0] == 'lsun_churches'


@pytest.mark.parametrize('prediction', ['sample', 'flow'])
def test_a_prediction_without_a_counterpart_is_refused(tmp_path, prediction):
    file = tiny.save_torch(tmp_path / 'm.ckpt', {'state_dict': tiny.cin256_tensors()})
    settings = tiny.settings_file(
        tmp_path, network=tiny.LDM, process={'prediction_type': prediction}
    )
    with pytest.raises(ValueError, match=f"teacher.settings: prediction_type='{prediction}': exp"):
        load_teacher(file, settings=settings)


@pytest.mark.parametrize('has_settings', [True, False])
def test_a_file_of_a_network_that_is_given_an_image_besides_is_refused(tmp_path, has_settings):
    tensors = tiny.cin256_tensors()
    name = 'model.diffusion_model.input_blocks.0.0.weight'
    tensors[name] = np.concatenate([tensors[name]] * 3, axis=1)
    file = tiny.save_torch(tmp_path / 'inpainting.ckpt', {'state_dict': tensors})
    settings = tiny.settings_file(tmp_path, network={**tiny.LDM, 'in_channels': 9})
    with pytest.raises(ValueError, match=r'in_channels=9, out_channels=3: .*\(inpainting'):
        load_teacher(file, settings=settings if has_settings else None)


def test_a_file_of_the_refiner_of_sdxl_is_refused(tmp_path):
    tensors = {
        **tiny.cin256_tensors(),
        'conditioner.embedders.0.model.ln_final.bias': np.zeros(2, np.float32),
    }
    file = tiny.save_torch(tmp_path / 'refiner.ckpt', {'state_dict': tensors})
    with pytest.raises(ValueError, match='the refiner of SDXL, .*give the base network'):
        load_teacher(file, settings=tiny.settings_file(tmp_path, network=tiny.LDM))


def test_parameters_may_be_kept_in_bfloat16(tmp_path):
    file = tiny.save_torch(tmp_path / 'DiT.pt', tiny.dit_tensors())
    settings = tiny.settings_file(tmp_path, network={'head_dim': 16})
    teacher = load_teacher(file, settings=settings, dtype='bfloat16')
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher.params)} == {'bfloat16'}
    assert np.isfinite(last_latents(teacher)).all()


@pytest.mark.parametrize(
    'name, published',
    [
        ('adm_imagenet64_cond', '64x64_diffusion'),
        pytest.param('adm_imagenet256_cond', '256x256_diffusion', marks=pytest.mark.slow),
    ],
)
def test_published_networks_of_guided_diffusion_are_found_by_their_tensors(name, published):
    tensors = Listed(listing(name))
    assert single.find_published(tensors, 'adm')[0] == published


@pytest.mark.parametrize(
    'name',
    [
        'lsun_churches',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('cin256-v2', 'lsun_bedrooms', 'sd-v1')
        ),
    ],
)
def test_published_networks_of_latent_diffusion_are_found_by_their_tensors(name):
    prefix = 'model.diffusion_model.'
    listed = listing(f'ldm_unet_{name}')
    tensors = Listed({n.removeprefix(prefix): shape for n, shape in listed.items()})
    assert single.find_published(tensors, 'compvis')[0] == name


@pytest.mark.parametrize(
    'name, side', [('cifar10', 32), ('celeba', 64), ('bedroom', 256), ('church', 256)]
)
def test_published_networks_of_ddim_are_told_by_their_tensors(name, side, tmp_path):
    shapes = listing(f'ermongroup_ddim_{name}')
    # Zeros that take no memory.
    arrays = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    tensors = opening.Tensors(tmp_path / 'model.ckpt', arrays, {n: n for n in arrays})
    teacher = single.load('ddim', tensors, Options(shapes_only=True))
    assert teacher.info.image_shape == (side, side, 3)
    count = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
    assert count == sum(array.size for array in arrays.values())


class Listed(dict):
    """Names and shapes in place of tensors."""

    path = 'listed.ckpt'

    def shape_of(self, name):
        return self[name]


def test_every_kind_is_a_denoiser_that_says_something_of_noise(tmp_path):
    # The long way of each of them is among the slow tests.
    for name, tensors, settings in (
        ('ddim', tiny.ddim_tensors, {'process': {'image_size': 8}}),
        ('adm', tiny.adm_tensors, {'network': tiny.ADM}),
        ('compvis', tiny.cin256_tensors, {'network': tiny.LDM}),
    ):
        file = tiny.save_torch(tmp_path / name, tensors())
        teacher = load_teacher(file, settings=tiny.settings_file(tmp_path, **settings))
        said = last_latents(teacher)
        height, width, channels = teacher.info.image_shape
        factor = 2 if teacher.info.learned_variance else 1
        assert said.shape == (2, height, width, factor * channels)
        assert np.isfinite(said).all() and np.std(said) > 0
