"""Text-conditional networks of every family, from folders and from single files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmq_jax.models import (
    autoencoder_weights,
    dit_weights,
    ldm_weights,
    text_weights,
)
from dmq_jax.models.torch_weights import write_tensors
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny
from tests.checkpoints.journey import last_latents
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


def write_text_encoder(folder, config, *, seed=0):
    if config is T5:
        network = text_weights.t5_from_transformers(config)
        params = tiny.random_like(text_weights.t5_shapes(network), seed)
        tensors = text_weights.transformers_from_t5_params(params)
    else:
        network = text_weights.clip_from_transformers(config)
        params = tiny.random_like(text_weights.clip_shapes(network), seed)
        tensors = text_weights.transformers_from_clip_params(params)
    tiny.write_json(folder / 'config.json', config)
    save_file(tensors, folder / 'model.safetensors')


def write_tokenizer(folder):
    folder.mkdir()
    write_clip(folder)


def test_a_folder_of_pixart_of_the_old_class_is_told_sizes_and_captions(tmp_path):
    tiny.kl_folder(tmp_path)
    known = {**PIXART, '_class_name': 'PixArtTransformer2DModel'}
    for name in ('only_cross_attention', 'num_vector_embeds'):
        del known[name]
    network = dit_weights.pixart_from_diffusers(known)
    params = tiny.random_like(dit_weights._pixart_shapes(network))
    tiny.write_json(tmp_path / 'transformer/config.json', PIXART)
    save_file(
        dit_weights.diffusers_from_pixart_params(params),
        tmp_path / 'transformer/diffusion_pytorch_model.safetensors',
    )
    write_text_encoder(tmp_path / 'text_encoder', T5)
    write_tokenizer(tmp_path / 'tokenizer')
    tiny.write_json(tmp_path / 'scheduler/scheduler_config.json', tiny.SCHEDULER)
    teacher = load_teacher(tmp_path, prompts=PROMPTS)
    table = teacher.params['conditions']
    assert {name: rows.shape for name, rows in table.items()} == {
        'text': (3, 120, 8), 'text_mask': (3, 120), 'resolution': (3, 2), 'aspect_ratio': (3,),
    }  # fmt: skip
    assert table['resolution'][0].tolist() == [8, 8]
    assert teacher.info.learned_variance and teacher.info.num_classes == 2
    said = last_latents(teacher)
    assert said.shape == (2, 4, 4, 8) and np.isfinite(said).all()


def test_a_folder_of_sdxl_joins_two_encoders_and_may_have_a_null_of_zeros(tmp_path):
    tiny.kl_folder(tmp_path)
    network = ldm_weights.network_from_diffusers(SDXL)
    tensors = write_tensors(
        tiny.random_like(ldm_weights.ldm_shapes(network)), ldm_weights.diffusers_source
    )
    tiny.write_json(tmp_path / 'unet/config.json', {'_class_name': 'UNet2DConditionModel', **SDXL})
    save_file(tensors, tmp_path / 'unet/diffusion_pytorch_model.safetensors')
    for i, config in enumerate((tiny.CLIP, SECOND_CLIP)):
        ending = '_2' if i else ''
        write_text_encoder(tmp_path / f'text_encoder{ending}', config, seed=i)
        write_tokenizer(tmp_path / f'tokenizer{ending}')
    tiny.write_json(tmp_path / 'scheduler/scheduler_config.json', tiny.SCHEDULER)
    tiny.write_json(tmp_path / 'model_index.json', {'force_zeros_for_empty_prompt': True})
    teacher = load_teacher(tmp_path, prompts=PROMPTS)
    table = teacher.params['conditions']
    assert {name: rows.shape for name, rows in table.items()} == {
        'context': (3, 8, 32), 'pooled': (3, 12), 'sizes': (3, 6),
    }  # fmt: skip
    assert not table['context'][2].any() and not table['pooled'][2].any()
    assert table['context'][0].any() and table['sizes'][2].tolist() == [8, 8, 0, 0, 8, 8]
    assert np.isfinite(last_latents(teacher)).all()
    negative = load_teacher(tmp_path, prompts=PROMPTS, negative_prompt='cat')
    assert negative.params['conditions']['context'][2].any()


@pytest.fixture
def single_file(tmp_path):
    """Stable Diffusion 1 in CompVis' layout, beside the folder that is the same in diffusers'."""
    folder = tmp_path / 'sd'
    folder.mkdir()
    tiny.sd_folder(folder)
    config = {
        'image_size': 4, 'in_channels': 4, 'out_channels': 4, 'model_channels': 32,
        'attention_resolutions': [1], 'num_res_blocks': 1, 'channel_mult': [1], 'num_heads': 2,
        'use_spatial_transformer': True, 'context_dim': 16, 'legacy': False,
    }  # fmt: skip
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
        tiny.random_like(text_weights.clip_shapes(text), seed=4)
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
