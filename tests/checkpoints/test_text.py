"""Text-conditional networks of every family, from folders and from single files."""

import functools

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmq_jax.checkpoints import text
from dmq_jax.models import (
    autoencoder_weights,
    dit_weights,
    ldm_weights,
    text_weights,
)
from dmq_jax.models.dit import position_features
from dmq_jax.models.torch_weights import write_tensors
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny
from tests.checkpoints.journey import last_latents, travel
from tests.files.test_tokenizer import ID, write_clip

pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')

PROMPTS = ['a cat', 'a']
T5 = {
    'architectures': ['T5EncoderModel'], 'model_type': 't5', 'd_model': 8, 'd_kv': 4, 'd_ff': 16,
    'num_layers': 1, 'num_heads': 2, 'vocab_size': len(ID), 'feed_forward_proj': 'gated-gelu',
}  # fmt: skip
PIXART = {
    '_class_name': 'Transformer2DModel', 'norm_type': 'ada_norm_single', 'num_layers': 1,
    'num_attention_heads': 2, 'attention_head_dim': 12, 'cross_attention_dim': 24,
    'sample_size': 4, 'patch_size': 2, 'in_channels': 4, 'out_channels': 8, 'norm_eps': 1e-6,
    'caption_channels': 8, 'num_embeds_ada_norm': 1000, 'interpolation_scale': 1.0,
    'use_additional_conditions': True, 'only_cross_attention': False, 'num_vector_embeds': None,
    'attention_bias': True, 'activation_fn': 'gelu-approximate',
}  # fmt: skip
SECOND_CLIP = {**tiny.CLIP, 'architectures': ['CLIPTextModelWithProjection'], 'projection_dim': 12}
SDXL = {
    **tiny.UNET2D_CONDITION, 'cross_attention_dim': 32, 'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 4, 'projection_class_embeddings_input_dim': 12 + 6 * 4,
    'use_linear_projection': True,
}  # fmt: skip


# `unet_config.params` of Stable Diffusion 1.
COMPVIS = {
    'image_size': 4, 'in_channels': 4, 'out_channels': 4, 'model_channels': 32,
    'attention_resolutions': [1], 'num_res_blocks': 1, 'channel_mult': [1], 'num_heads': 2,
    'use_spatial_transformer': True, 'context_dim': 16, 'legacy': False,
}  # fmt: skip


def write_text_encoder(folder, config, *, seed=0):
    if config is T5:
        network = text_weights.t5_from_transformers(config)
        params = tiny.random_like(text_weights.text_shapes(network), seed)
        tensors = text_weights.transformers_from_t5_params(params)
    else:
        network = text_weights.clip_from_transformers(config)
        params = tiny.random_like(text_weights.text_shapes(network), seed)
        tensors = text_weights.transformers_from_clip_params(params)
    tiny.write_json(folder / 'config.json', config)
    save_file(tensors, folder / 'model.safetensors')


def write_tokenizer(folder):
    folder.mkdir()
    write_clip(folder)


def pixart_folder(folder):
    """PixArt-alpha, which is told the size of its images, as diffusers first saved it."""
    tiny.kl_folder(folder)
    known = {**PIXART, '_class_name': 'PixArtTransformer2DModel'}
    for name in ('only_cross_attention', 'num_vector_embeds'):
        del known[name]
    network = dit_weights.pixart_from_diffusers(known)
    params = tiny.random_like(dit_weights._pixart_shapes(network))
    tiny.write_json(folder / 'transformer/config.json', PIXART)
    save_file(
        dit_weights.diffusers_from_pixart_params(params),
        folder / 'transformer/diffusion_pytorch_model.safetensors',
    )
    write_text_encoder(folder / 'text_encoder', T5)
    write_tokenizer(folder / 'tokenizer')
    tiny.write_json(folder / 'scheduler/scheduler_config.json', tiny.SCHEDULER)
    return params


def assert_encodes_like_its_table(teacher):
    """Texts that come later are told as the prompts were, in every input."""
    rows, table = teacher.encode_prompts(PROMPTS), teacher.params['conditions']
    assert rows.keys() == table.keys()
    for name, row in rows.items():
        assert row.dtype == table[name].dtype
        np.testing.assert_allclose(row, table[name][: len(PROMPTS)], rtol=1e-5, atol=1e-6)


def test_a_text_is_encoded_once_however_often_it_is_asked_for(tmp_path, monkeypatch):
    sdxl_folder(tmp_path)
    teacher = load_teacher(tmp_path, prompts=PROMPTS)
    first = teacher.encode_prompts(['cat', 'a', 'cat'])
    assert all((row[0] == row[2]).all() for row in first.values())
    monkeypatch.setattr(text, '_table', None)
    again = teacher.encode_prompts(['a', 'cat'])
    for name, row in again.items():
        np.testing.assert_array_equal(row, first[name][1:])


def test_a_folder_of_pixart_of_the_old_class_is_told_sizes_and_captions(tmp_path):
    pixart_folder(tmp_path)
    teacher = load_teacher(tmp_path, prompts=PROMPTS)
    table = teacher.params['conditions']
    assert {name: rows.shape for name, rows in table.items()} == {
        'text': (3, 120, 8), 'text_mask': (3, 120), 'resolution': (3, 2), 'aspect_ratio': (3,),
    }  # fmt: skip
    assert table['resolution'][0].tolist() == [8, 8]
    assert teacher.info.learned_variance and teacher.info.num_classes == 2
    assert_encodes_like_its_table(teacher)
    said = last_latents(teacher)
    assert said.shape == (2, 4, 4, 8) and np.isfinite(said).all()


def sdxl_folder(folder):
    """Stable Diffusion XL."""
    tiny.kl_folder(folder)
    network = ldm_weights.network_from_diffusers(SDXL)
    tensors = write_tensors(
        tiny.random_like(ldm_weights.ldm_shapes(network)), ldm_weights.diffusers_source
    )
    tiny.write_json(folder / 'unet/config.json', {'_class_name': 'UNet2DConditionModel', **SDXL})
    save_file(tensors, folder / 'unet/diffusion_pytorch_model.safetensors')
    for i, config in enumerate((tiny.CLIP, SECOND_CLIP)):
        ending = '_2' if i else ''
        write_text_encoder(folder / f'text_encoder{ending}', config, seed=i)
        write_tokenizer(folder / f'tokenizer{ending}')
    tiny.write_json(folder / 'scheduler/scheduler_config.json', tiny.SCHEDULER)
    tiny.write_json(folder / 'model_index.json', {'force_zeros_for_empty_prompt': True})
    return folder


def test_a_folder_of_sdxl_joins_two_encoders_and_may_have_a_null_of_zeros(tmp_path):
    sdxl_folder(tmp_path)
    teacher = load_teacher(tmp_path, prompts=PROMPTS)
    table = teacher.params['conditions']
    assert {name: rows.shape for name, rows in table.items()} == {
        'context': (3, 8, 32), 'pooled': (3, 12), 'sizes': (3, 6),
    }  # fmt: skip
    assert not table['context'][2].any() and not table['pooled'][2].any()
    assert table['context'][0].any() and table['sizes'][2].tolist() == [8, 8, 0, 0, 8, 8]
    assert np.isfinite(last_latents(teacher)).all()
    assert_encodes_like_its_table(teacher)
    negative = load_teacher(tmp_path, prompts=PROMPTS, negative_prompt='cat')
    assert negative.params['conditions']['context'][2].any()


def test_a_prompt_that_is_too_long_is_named(tmp_path):
    pixart_folder(tmp_path)
    with pytest.warns(UserWarning, match=r"'a cat a cat.*longer than the \d+ tokens"):
        load_teacher(tmp_path, prompts=['a cat ' * 200, 'a'])


@pytest.mark.slow
@pytest.mark.parametrize('make', [sdxl_folder, pixart_folder])
def test_a_folder_with_prompts_goes_all_the_way(tmp_path, make):
    make(tmp_path)
    images = travel(load_teacher(tmp_path, prompts=PROMPTS), tmp_path, guidance_scale=5.0)
    assert (images[0][0] != images[0][1]).any()


@pytest.mark.parametrize('make', [pixart_folder, pytest.param(sdxl_folder, marks=pytest.mark.slow)])
def test_a_folder_with_prompts_may_be_kept_in_bfloat16(tmp_path, make):
    make(tmp_path)
    kept = load_teacher(tmp_path, prompts=PROMPTS, dtype='bfloat16')
    whole = load_teacher(tmp_path, prompts=PROMPTS)
    said, wanted = last_latents(kept), last_latents(whole)
    assert np.isfinite(said).all()
    # bfloat16 keeps 8 bits of a weight; errors of many weights add up as the root of their number.
    assert np.linalg.norm(said - wanted) < 0.05 * np.linalg.norm(wanted)


def original_pixart(params, *, scale, length):
    """A state dict of PixArt's own code, its positions and null caption among it."""
    positions = position_features((2, 2), 24, base_size=2, scale=scale)
    return {
        **write_tensors(params, dit_weights.original_pixart_source),
        'pos_embed': np.asarray(positions)[None],
        'y_embedder.y_embedding': np.ones((length, 8), np.float32),
    }


def test_a_file_of_pixart_is_the_folder_of_the_same_weights(tmp_path):
    params = pixart_folder(tmp_path)
    tensors = original_pixart(params, scale=1.0, length=120)
    file = tiny.save_torch(tmp_path / 'PixArt.pth', {'state_dict': tensors, 'epoch': 3})
    settings = tiny.settings_file(tmp_path, network={'head_dim': 12})
    one = load_teacher(file, settings=settings, components=str(tmp_path), prompts=PROMPTS)
    many = load_teacher(tmp_path, prompts=PROMPTS)
    assert one.info == many.info and one.network == many.network
    assert one.decoder.network == many.decoder.network
    np.testing.assert_array_equal(tiny.leaves(one.params), tiny.leaves(many.params))


@pytest.mark.parametrize('scale, length', [(0.5, 300), (2.0, 7)])
def test_the_positions_and_the_null_caption_of_pixart_tell_its_sizes(tmp_path, scale, length):
    tensors = original_pixart(pixart_folder(tmp_path), scale=scale, length=length)
    file = tiny.save_torch(tmp_path / 'PixArt.pth', {'state_dict': tensors})
    settings = tiny.settings_file(tmp_path, network={'head_dim': 12})
    teacher = load_teacher(file, settings=settings, components=str(tmp_path), prompts=PROMPTS)
    network = teacher.network.network
    assert (network.sample_size, network.position_scale) == (4, scale)
    assert teacher.params['conditions']['text'].shape == (3, length, 8)


@pytest.mark.parametrize('change', ['no positions', 'positions of no published scale'])
def test_a_file_of_pixart_that_does_not_tell_its_positions_has_to_be_told_them(tmp_path, change):
    tensors = original_pixart(pixart_folder(tmp_path), scale=3.0, length=120)
    if change == 'no positions':
        del tensors['pos_embed']
    file = tiny.save_torch(tmp_path / 'PixArt.pth', {'state_dict': tensors})
    with pytest.raises(ValueError, match="'sample_size' and 'position_scale'.*teacher.settings"):
        load_teacher(file, components=str(tmp_path), prompts=PROMPTS)


@pytest.fixture
def single_file(tmp_path):
    """Stable Diffusion 1 in CompVis' layout, beside the folder that is the same in diffusers'."""
    folder = tmp_path / 'sd'
    folder.mkdir()
    tiny.sd_folder(folder)
    config = COMPVIS
    network = ldm_weights.network_from_compvis(config)
    assert network == ldm_weights.network_from_diffusers(tiny.UNET2D_CONDITION)

    def source(path):
        return ldm_weights.compvis_source(path, network=network)

    unet = write_tensors(tiny.random_like(ldm_weights.ldm_shapes(network)), source)
    autoencoder = autoencoder_weights.kl_from_diffusers(tiny.KL)
    shapes = autoencoder_weights.autoencoder_shapes(autoencoder)
    first = write_tensors(
        tiny.random_like(shapes, seed=3), autoencoder_weights.ldm_autoencoder_source(autoencoder)
    )
    text = text_weights.clip_from_transformers({**tiny.CLIP, 'num_attention_heads': 1})
    encoder = text_weights.transformers_from_clip_params(
        tiny.random_like(text_weights.text_shapes(text), seed=4)
    )
    tensors = {
        **{f'model.diffusion_model.{name}': array for name, array in unet.items()},
        **{f'first_stage_model.{name}': array for name, array in first.items()},
        **{f'cond_stage_model.transformer.{name}': array for name, array in encoder.items()},
        # Stable Diffusion is sampled from its weights, though many files have an average.
        'model_ema.decay': np.float32([0.9]),
    }
    file = tmp_path / 'v1-5.safetensors'
    save_file(tensors, file)
    process = {
        **tiny.SCHEDULER, 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085,
        'beta_end': 0.012, 'scaling_factor': 0.18215,
    }  # fmt: skip
    return file, folder, tiny.settings_file(tmp_path, network=config, process=process)


def test_a_single_file_of_stable_diffusion_is_the_folder_of_the_same_weights(single_file):
    file, folder, settings = single_file
    one = load_teacher(file, settings=settings, components=str(folder), prompts=PROMPTS)
    many = load_teacher(folder, prompts=PROMPTS)
    assert one.info == many.info and one.network == many.network
    assert one.decoder.network == many.decoder.network
    for part in ('conv_in', 'mid', 'down_0', 'up_0'):
        np.testing.assert_array_equal(
            tiny.leaves(one.params[part]), tiny.leaves(many.params[part]), err_msg=part
        )
    np.testing.assert_array_equal(tiny.leaves(one.decoder.params), tiny.leaves(many.decoder.params))
    assert one.params['conditions']['context'].shape == (3, 8, 16)


def test_a_single_file_without_a_tokenizer_says_where_to_put_one(single_file):
    file, _, settings = single_file
    with pytest.raises(FileNotFoundError, match='lacks the tokenizer.*teacher.components'):
        load_teacher(file, settings=settings, prompts=PROMPTS)


def compvis_parts(config):
    """The U-Net and the autoencoder of a single file."""
    network = ldm_weights.network_from_compvis(config)
    source = functools.partial(ldm_weights.compvis_source, network=network)
    autoencoder = autoencoder_weights.kl_from_diffusers(tiny.KL)
    shapes = autoencoder_weights.autoencoder_shapes(autoencoder)
    parts = {
        'model.diffusion_model.': write_tensors(
            tiny.random_like(ldm_weights.ldm_shapes(network)), source
        ),
        'first_stage_model.': write_tensors(
            tiny.random_like(shapes, seed=3),
            autoencoder_weights.ldm_autoencoder_source(autoencoder),
        ),
    }
    return {f'{prefix}{n}': array for prefix, part in parts.items() for n, array in part.items()}


def open_clip(prefix, config, *, more_layers, seed):
    """A text encoder in open_clip's layout, which has a projection, and maybe a block more."""
    network = text_weights.clip_from_transformers(config)
    network = network.clone(num_layers=network.num_layers + more_layers, projection=12)
    params = tiny.random_like(text_weights.text_shapes(network), seed)
    tensors = write_tensors(params, text_weights.open_clip_source)
    tensors |= {'logit_scale': np.ones((), np.float32), 'attn_mask': np.zeros((8, 8), np.float32)}
    return params, {f'{prefix}{name}': array for name, array in tensors.items()}


def assert_same_teacher(file, folder, settings):
    one = load_teacher(file, settings=settings, components=str(folder), prompts=PROMPTS)
    many = load_teacher(folder, prompts=PROMPTS)
    assert one.info == many.info and one.network == many.network
    assert one.decoder.network == many.decoder.network
    np.testing.assert_array_equal(tiny.leaves(one.params), tiny.leaves(many.params))
    np.testing.assert_array_equal(tiny.leaves(one.decoder.params), tiny.leaves(many.decoder.params))
    assert np.isfinite(last_latents(one)).all()


def process(**changes):
    return {**tiny.SCHEDULER, 'scaling_factor': 0.18215, **changes}


def test_a_single_file_of_stable_diffusion_2_is_the_folder_of_the_same_weights(tmp_path):
    folder = tiny.sd_folder(tmp_path)
    clip = {**tiny.CLIP, 'hidden_act': 'gelu', 'num_attention_heads': 1}
    params, encoder = open_clip('cond_stage_model.model.', clip, more_layers=1, seed=4)
    kept = {name: leaf for name, leaf in params.items() if name not in ('block_2', 'projection')}
    tiny.write_json(folder / 'text_encoder/config.json', clip)
    save_file(
        text_weights.transformers_from_clip_params(kept), folder / 'text_encoder/model.safetensors'
    )
    unet = {**tiny.UNET2D_CONDITION, 'use_linear_projection': True}
    tiny.write_json(folder / 'unet/config.json', {'_class_name': 'UNet2DConditionModel', **unet})
    scheduler = {**tiny.SCHEDULER, 'prediction_type': 'v_prediction'}
    tiny.write_json(folder / 'scheduler/scheduler_config.json', scheduler)
    config = {**COMPVIS, 'num_head_channels': 16, 'use_linear_in_transformer': True}
    del config['num_heads']
    file = tmp_path / 'v2-1.safetensors'
    save_file({**compvis_parts(config), **encoder}, file)
    settings = tiny.settings_file(
        tmp_path, network=config, process=process(prediction_type='v_prediction')
    )
    assert_same_teacher(file, folder, settings)


def test_a_single_file_of_sdxl_is_the_folder_of_the_same_weights(tmp_path):
    folder = sdxl_folder(tmp_path)
    clips = [
        {**tiny.CLIP, 'num_attention_heads': 1},
        {**SECOND_CLIP, 'num_attention_heads': 1, 'hidden_act': 'gelu'},
    ]
    for ending, clip in zip(('', '_2'), clips, strict=True):
        tiny.write_json(folder / f'text_encoder{ending}/config.json', clip)
    params, second = open_clip('conditioner.embedders.1.model.', clips[1], more_layers=0, seed=1)
    save_file(
        text_weights.transformers_from_clip_params(params),
        folder / 'text_encoder_2/model.safetensors',
    )
    first = load_file(folder / 'text_encoder/model.safetensors')
    # As many sinusoids of each size as the original code has.
    added = 12 + 6 * 256
    unet = {
        **SDXL, 'addition_time_embed_dim': 256, 'projection_class_embeddings_input_dim': added
    }  # fmt: skip
    tiny.write_json(folder / 'unet/config.json', {'_class_name': 'UNet2DConditionModel', **unet})
    network = ldm_weights.network_from_diffusers(unet)
    save_file(
        write_tensors(
            tiny.random_like(ldm_weights.ldm_shapes(network)), ldm_weights.diffusers_source
        ),
        folder / 'unet/diffusion_pytorch_model.safetensors',
    )
    config = {
        **COMPVIS, 'context_dim': 32, 'num_classes': 'sequential', 'adm_in_channels': added,
        'use_linear_in_transformer': True,
    }  # fmt: skip
    file = tmp_path / 'sd_xl_base.safetensors'
    embedder = 'conditioner.embedders.0.transformer.'
    save_file(
        {
            **compvis_parts(config), **second, 'denoiser.sigmas': np.zeros(1000, np.float32),
            **{f'{embedder}{name}': array for name, array in first.items()},
        },
        file,
    )  # fmt: skip
    assert_same_teacher(
        file, folder, tiny.settings_file(tmp_path, network=config, process=process())
    )
