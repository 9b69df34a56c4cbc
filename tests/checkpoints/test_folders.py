import json
import shutil

import jax
import numpy as np
import pytest

import dmq_jax
from dmq_jax import sampling
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny
from tests.checkpoints.journey import last_latents, travel


@pytest.fixture(scope='module')
def stable_diffusion(tmp_path_factory):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    return tiny.sd_folder(tmp_path_factory.mktemp('sd'))


@pytest.mark.slow
def test_a_folder_of_stable_diffusion_goes_all_the_way(stable_diffusion, tmp_path):
    teacher = load_teacher(stable_diffusion, prompts=['a cat', 'a'], negative_prompt='cat!')
    assert teacher.info.num_classes == 2 and teacher.info.is_latent
    assert teacher.params['conditions']['context'].shape == (3, 8, 16)
    images = travel(teacher, tmp_path, guidance_scale=7.5)
    assert (images[0][0] != images[0][1]).any()


def test_the_rows_of_the_table_are_what_the_encoder_says_of_each_prompt(stable_diffusion):
    both = load_teacher(stable_diffusion, prompts=['a cat', 'a'])
    one = load_teacher(stable_diffusion, prompts=['a'])
    nothing = load_teacher(stable_diffusion)
    rows, single, empty = (
        np.asarray(t.params['conditions']['context']) for t in (both, one, nothing)
    )
    np.testing.assert_array_equal(rows[1], single[0])
    np.testing.assert_array_equal(rows[2], single[1])  # the empty text is the null
    np.testing.assert_array_equal(empty[0], empty[1])
    assert (rows[0] != rows[1]).any()


def test_other_prompts_seeds_and_timesteps_need_no_other_program(stable_diffusion):
    def draw(prompts, seed, **options):
        teacher = load_teacher(stable_diffusion, prompts=prompts)
        return dmq_jax.sample(
            teacher, num_images=2, batch_size=2, seed=seed, num_steps=2, guidance_scale=7.5,
            **options,
        )  # fmt: skip

    programs = (sampling.sample_latents.jitted(), sampling.decode.jitted())
    first = draw(['a cat', 'a'], 0)
    before = [program._cache_size() for program in programs]
    assert (draw(['cat', 'a a cat'], 1, spacing='trailing') != first).any()
    assert [program._cache_size() for program in programs] == before


def test_a_condition_may_be_given_in_place_of_a_label(stable_diffusion):
    teacher = load_teacher(stable_diffusion, prompts=['a cat', 'a'])
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    table = teacher.params['conditions']['context']
    y = np.array([1, 0], np.int32), {'context': table[np.array([1, 0])]}
    by_label, given = jax.jit(
        lambda params, y: [teacher.predict(params, x, np.int32(9), each) for each in y]
    )(teacher.params, y)
    np.testing.assert_array_equal(by_label, given)
    assert (given[0] != given[1]).any()


@pytest.mark.parametrize('variant', ['bin', 'fp16.bin', 'fp16.safetensors', 'sharded bin'])
def test_weights_are_found_by_every_name_that_diffusers_gives_them(tmp_path, variant):
    torch = pytest.importorskip('torch', reason='writes the files that are read without it')
    folder = tiny.ddpm_folder(tmp_path)
    wanted = load_teacher(folder)
    file = folder / 'diffusion_pytorch_model.safetensors'
    from safetensors.numpy import load_file

    tensors = load_file(file)
    if variant == 'fp16.safetensors':
        file.rename(folder / f'diffusion_pytorch_model.{variant}')
    else:
        file.unlink()
    if variant.endswith('sharded bin'):
        names = sorted(tensors)
        weight_map = {name: f'part-{i % 2}.bin' for i, name in enumerate(names)}
        for shard in ('part-0.bin', 'part-1.bin'):
            held = {n: torch.from_numpy(tensors[n]) for n in names if weight_map[n] == shard}
            torch.save(held, folder / shard)
        index = folder / 'diffusion_pytorch_model.bin.index.json'
        index.write_text(json.dumps({'weight_map': weight_map}))
    elif variant.endswith('bin'):
        tiny.save_torch(folder / f'diffusion_pytorch_model.{variant}', tensors)
    np.testing.assert_array_equal(
        tiny.leaves(load_teacher(folder).params), tiny.leaves(wanted.params)
    )


def test_the_weights_of_a_component_stand_for_its_folder(tmp_path):
    folder = tiny.ddpm_folder(tmp_path)
    file = folder / 'diffusion_pytorch_model.safetensors'
    wanted = load_teacher(folder)
    found = load_teacher(file)
    assert found.info == wanted.info
    np.testing.assert_array_equal(tiny.leaves(found.params), tiny.leaves(wanted.params))


@pytest.mark.parametrize(
    'gone, text',
    [
        ('tokenizer/merges.txt', 'no tokenizer; expected tokenizer.json'),
        ('text_encoder/config.json', 'teacher.components'),
        ('unet/config.json', "no config.json with '_class_name': 'UNet2DModel'"),
        ('vae/diffusion_pytorch_model.fp16.safetensors', 'no diffusion_pytorch_model.safetensors'),
    ],
)
def test_a_missing_part_is_named(stable_diffusion, tmp_path, gone, text):
    folder = shutil.copytree(stable_diffusion, tmp_path / 'copy')
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=text):
        load_teacher(folder)


def test_a_teacher_without_a_decoder_says_what_it_lacks_when_it_is_to_draw(
    stable_diffusion, tmp_path
):
    import dmq_jax

    folder = shutil.copytree(stable_diffusion, tmp_path / 'copy')
    shutil.rmtree(folder / 'vae')
    teacher = load_teacher(folder)
    assert np.isfinite(last_latents(teacher)).all()
    with pytest.raises(ValueError, match='draws latents.*teacher.components'):
        dmq_jax.sample(teacher, num_images=1, num_steps=2)
    drawn = load_teacher(folder, components=str(stable_diffusion))
    assert drawn.decoder is not None
