import jax
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models import text_weights as weights
from dmq_jax.models.clip_text import CLIPText
from dmq_jax.models.t5_text import T5Encoder
from dmq_jax.models.torch_weights import expected_tensors, write_tensors

# text_encoder/config.json of Stable Diffusion 1.5, of 2.1, and of SDXL (its second).
SD1 = {
    '_name_or_path': 'openai/clip-vit-large-patch14',
    'architectures': ['CLIPTextModel'],
    'attention_dropout': 0.0,
    'bos_token_id': 0,
    'dropout': 0.0,
    'eos_token_id': 2,
    'hidden_act': 'quick_gelu',
    'hidden_size': 768,
    'initializer_factor': 1.0,
    'initializer_range': 0.02,
    'intermediate_size': 3072,
    'layer_norm_eps': 1e-05,
    'max_position_embeddings': 77,
    'model_type': 'clip_text_model',
    'num_attention_heads': 12,
    'num_hidden_layers': 12,
    'pad_token_id': 1,
    'projection_dim': 768,
    'torch_dtype': 'float32',
    'transformers_version': '4.22.0.dev0',
    'vocab_size': 49408,
}
SD2 = {
    **SD1,
    'hidden_act': 'gelu',
    'hidden_size': 1024,
    'intermediate_size': 4096,
    'num_attention_heads': 16,
    'num_hidden_layers': 23,
    'projection_dim': 512,
}
SDXL = {
    **SD1,
    'architectures': ['CLIPTextModelWithProjection'],
    'hidden_act': 'gelu',
    'hidden_size': 1280,
    'intermediate_size': 5120,
    'num_attention_heads': 20,
    'num_hidden_layers': 32,
    'projection_dim': 1280,
}
# text_encoder/config.json of PixArt.
T5_XXL = {
    '_name_or_path': 'DeepFloyd/t5-v1_1-xxl',
    'architectures': ['T5EncoderModel'],
    'd_ff': 10240,
    'd_kv': 64,
    'd_model': 4096,
    'decoder_start_token_id': 0,
    'dense_act_fn': 'gelu_new',
    'dropout_rate': 0.1,
    'eos_token_id': 1,
    'feed_forward_proj': 'gated-gelu',
    'initializer_factor': 1.0,
    'is_encoder_decoder': True,
    'is_gated_act': True,
    'layer_norm_epsilon': 1e-06,
    'model_type': 't5',
    'num_decoder_layers': 24,
    'num_heads': 64,
    'num_layers': 24,
    'output_past': True,
    'pad_token_id': 0,
    'relative_attention_max_distance': 128,
    'relative_attention_num_buckets': 32,
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
    'transformers_version': '4.21.1',
    'use_cache': True,
    'vocab_size': 32128,
}


def size(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    'config, changes, num_tensors, num_params',
    [
        (SD1, {}, 196, 123_060_480),
        (SD2, {'width': 1024, 'hidden': 4096, 'num_heads': 16, 'num_layers': 23}, 372, 340_387_840),
        (
            SDXL,
            {'width': 1280, 'hidden': 5120, 'num_heads': 20, 'num_layers': 32, 'projection': 1280},
            517,
            694_659_840,
        ),
    ],
    ids=['SD1', 'SD2', 'SDXL'],
)
def test_the_published_text_encoders_have_their_size(config, changes, num_tensors, num_params):
    network = weights.clip_from_transformers(config)
    assert network == CLIPText(activation=config['hidden_act'], **changes)
    shapes = weights.text_shapes(network)
    expected = expected_tensors(shapes, weights.clip_source)
    assert (len(expected), size(shapes)) == (num_tensors, num_params)
    width, layer = network.width, f'text_model.encoder.layers.{network.num_layers - 1}.'
    published = {
        'text_model.embeddings.position_embedding.weight': (77, width),
        'text_model.embeddings.token_embedding.weight': (49408, width),
        f'{layer}self_attn.k_proj.bias': (width,),
        f'{layer}self_attn.out_proj.weight': (width, width),
        f'{layer}layer_norm2.weight': (width,),
        f'{layer}mlp.fc1.weight': (4 * width, width),
        f'{layer}mlp.fc2.weight': (width, 4 * width),
        'text_model.final_layer_norm.bias': (width,),
    }
    assert {name: expected[name] for name in published} == published
    assert ('text_projection.weight' in expected) == (network.projection is not None)


def test_the_published_open_clip_has_its_names():
    network = weights.clip_from_transformers(SDXL)
    expected = expected_tensors(weights.text_shapes(network), weights.open_clip_source)
    published = {
        'positional_embedding': (77, 1280),
        'text_projection': (1280, 1280),
        'token_embedding.weight': (49408, 1280),
        'transformer.resblocks.31.attn.in_proj_weight': (3840, 1280),
        'transformer.resblocks.31.attn.in_proj_bias': (3840,),
        'transformer.resblocks.31.attn.out_proj.weight': (1280, 1280),
        'transformer.resblocks.31.ln_1.weight': (1280,),
        'transformer.resblocks.31.mlp.c_fc.weight': (5120, 1280),
        'transformer.resblocks.31.mlp.c_proj.bias': (1280,),
        'ln_final.weight': (1280,),
    }
    assert {name: expected[name] for name in published} == published
    assert len(expected) == 32 * 12 + 5
    hollow = {
        f'conditioner.embedders.1.model.{name}': np.broadcast_to(np.float32(0), shape)
        for name, shape in expected.items()
    }
    again = weights.clip_from_open_clip(hollow, prefix='conditioner.embedders.1.model.')
    assert again == network


def test_the_published_t5_has_its_size():
    network = weights.t5_from_transformers(T5_XXL)
    assert network == T5Encoder()
    shapes = weights.text_shapes(network)
    expected = expected_tensors(shapes, weights.t5_source)
    assert (len(expected), size(shapes)) == (219, 4_762_310_656)
    published = {
        'shared.weight': (32128, 4096),
        'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (32, 64),
        'encoder.block.23.layer.0.SelfAttention.o.weight': (4096, 4096),
        'encoder.block.23.layer.0.layer_norm.weight': (4096,),
        'encoder.block.23.layer.1.DenseReluDense.wi_1.weight': (10240, 4096),
        'encoder.block.23.layer.1.DenseReluDense.wo.weight': (4096, 10240),
        'encoder.final_layer_norm.weight': (4096,),
    }
    assert {name: expected[name] for name in published} == published


SMALL = CLIPText(
    vocabulary_size=30, width=8, hidden=12, num_layers=2, num_heads=2, max_length=9, projection=6
)
SMALL_T5 = T5Encoder(vocabulary_size=30, width=12, head_dim=8, num_heads=2, hidden=20, num_layers=2)


def random(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def assert_same_tree(a, b):
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize('prefix', ['', 'cond_stage_model.transformer.'])
@pytest.mark.parametrize('short', [False, True])
def test_transformers_and_back_changes_nothing_whatever_the_prefix(prefix, short):
    params = random(weights.text_shapes(SMALL))
    tensors = weights.transformers_from_clip_params(params)
    tensors['text_model.embeddings.position_ids'] = np.arange(9)[None]
    if short:
        tensors = {name.removeprefix('text_model.'): x for name, x in tensors.items()}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix:
        tensors['first_stage_model.x'] = np.zeros(1)
    read = weights.clip_params_from_transformers(tensors, SMALL, prefix=prefix)
    assert_same_tree(read, params)


def test_open_clip_stores_the_projection_as_it_is_multiplied():
    params = random(weights.text_shapes(SMALL))
    tensors = write_tensors(params, weights.open_clip_source)
    np.testing.assert_array_equal(tensors['text_projection'], params['projection']['kernel'])
    fused = tensors['transformer.resblocks.1.attn.in_proj_weight']
    for i, name in enumerate('qkv'):
        kernel = params['block_1'][name]['kernel']
        np.testing.assert_array_equal(fused[8 * i : 8 * (i + 1)], kernel.T)
    tensors['logit_scale'] = np.zeros(())
    prefix = 'cond_stage_model.model.'
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    read = weights.clip_params_from_open_clip(tensors, SMALL, prefix=prefix)
    assert_same_tree(read, params)


def test_stable_diffusion_2_leaves_the_last_block_and_nothing_else():
    params = random(weights.text_shapes(SMALL))
    tensors = write_tensors(params, weights.open_clip_source)
    network = SMALL.clone(num_layers=1, projection=None)
    read = weights.clip_params_from_open_clip(tensors, network)
    del params['block_1'], params['projection']
    assert_same_tree(read, params)
    tensors['transformer.resblocks.2.ln_1.weight'] = np.zeros(8)
    with pytest.raises(ValueError, match=r"unused, e.g. 'transformer.resblocks.2.ln_1.weight'"):
        weights.clip_params_from_open_clip(tensors, network)


def test_the_decoder_and_the_second_name_of_the_table_are_passed_over():
    params = random(weights.text_shapes(SMALL_T5))
    tensors = weights.transformers_from_t5_params(params)
    more = {
        **tensors,
        'encoder.embed_tokens.weight': tensors['shared.weight'],
        'decoder.block.0.layer.0.layer_norm.weight': np.zeros(3),
        'lm_head.weight': np.zeros(3),
    }
    assert_same_tree(weights.t5_params_from_transformers(more, SMALL_T5), params)
    del more['shared.weight']
    assert_same_tree(weights.t5_params_from_transformers(more, SMALL_T5), params)


NAME = 'text_model.encoder.layers.1.mlp.fc1.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop(NAME), "1 tensors missing, e.g. 'encoder.layers.1.mlp.fc1.weight'"),
        (
            lambda t: t.update({'text_model.encoder.layers.1.mlp.fd1.weight': t.pop(NAME)}),
            r"\(nearest: 'text_model.encoder.layers.1.mlp.fd1.weight'\)",
        ),
        (
            lambda t: t.update({'text_model.encoder.layers.7.mlp.fc1.weight': t[NAME]}),
            "1 tensors unused, e.g. 'text_model.encoder.layers.7.mlp.fc1.weight' ",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :3]}),
            f"'{NAME}' has shape \\(12, 3\\), expected \\(12, 8\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    tensors = weights.transformers_from_clip_params(random(weights.text_shapes(SMALL)))
    change(tensors)
    with pytest.raises(ValueError, match=text):
        weights.clip_params_from_transformers(tensors, SMALL)


def test_another_layout_is_refused():
    with pytest.raises(ValueError, match="'token_embedding.weight': is this the layout of open"):
        weights.clip_from_open_clip({'x': np.zeros(1)})
    with pytest.raises(ValueError, match="no tensor begins with 'a.' among 1, e.g. 'x'"):
        weights.clip_params_from_transformers({'x': np.zeros(1)}, SMALL, prefix='a.')


@pytest.mark.parametrize(
    'read, config, text',
    [
        (weights.clip_from_transformers, {**SD1, 'hidden_act': 'relu'}, "hidden_act='relu'"),
        (weights.clip_from_transformers, {**SD1, 'architectures': ['CLIPModel']}, "'CLIPModel'"),
        (weights.clip_from_transformers, {**SD1, 'quantization_config': {}}, 'quantization_config'),
        (weights.t5_from_transformers, {**T5_XXL, 'feed_forward_proj': 'relu'}, "proj='relu'"),
        (weights.t5_from_transformers, {}, "feed_forward_proj='relu'"),
        (weights.t5_from_transformers, {**T5_XXL, 'is_gated_act': False}, 'is_gated_act=False'),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(read, config, text):
    with pytest.raises(ValueError, match=text):
        read(config)


def test_a_config_of_today_names_the_end_token():
    network = weights.clip_from_transformers({**SD1, 'eos_token_id': 49407})
    assert network == CLIPText(end_token=49407)


@pytest.mark.parametrize(
    'read, name, needed',
    [
        (weights.clip_from_transformers, 'CLIPTextConfig', {}),
        (weights.t5_from_transformers, 'T5Config', {'feed_forward_proj': 'gated-gelu'}),
    ],
)
def test_absent_settings_are_those_of_transformers(read, name, needed):
    pytest.importorskip('torch', reason='torch is the oracle here')
    transformers = pytest.importorskip('transformers', reason='transformers is the oracle here')
    defaults = getattr(transformers, name)(**needed).to_dict()
    assert read(needed) == read(defaults)
