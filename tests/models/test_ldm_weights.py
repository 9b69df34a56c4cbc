import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.models.ldm_weights import (
    PUBLISHED,
    class_embedder_from_compvis,
    compvis_source,
    diffusers_source,
    ldm_shapes,
    network_from_compvis,
    network_from_diffusers,
    params_from_compvis,
    params_from_diffusers,
)
from dmq_jax.models.torch_weights import expected_tensors, write_tensors
from tests.models.comparison import random_like
from tests.models.listings import listing, name_map, without_ones

PREFIX = 'model.diffusion_model.'
TINY = LDMUNet(
    channels=(8, 16), num_blocks=1, depth=(0, 2), mid_depth=2, num_heads=(1, 2), context_dim=6,
    num_groups=4, added_dim=53, size_features=8,
)  # fmt: skip

# config.json of the U-Nets, what differs from the defaults of UNet2DConditionModel.
SD15 = {'_class_name': 'UNet2DConditionModel', 'cross_attention_dim': 768, 'sample_size': 64}
SD2 = {
    'cross_attention_dim': 1024,
    'attention_head_dim': [5, 10, 20, 20],
    'use_linear_projection': True,
}
SDXL = {
    'block_out_channels': [320, 640, 1280],
    'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
    'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
    'cross_attention_dim': 2048,
    'attention_head_dim': [5, 10, 20],
    'transformer_layers_per_block': [1, 2, 10],
    'use_linear_projection': True,
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 256,
    'projection_class_embeddings_input_dim': 2816,
}


@pytest.mark.parametrize('name', ['cin256-v2', 'lsun_bedrooms', 'lsun_churches', 'sd-v1'])
def test_the_network_takes_exactly_the_published_tensors_of_compvis(name):
    network = network_from_compvis(PUBLISHED[name])
    expected = expected_tensors(
        ldm_shapes(network), functools.partial(compvis_source, network=network)
    )
    published = {k.removeprefix(PREFIX): v for k, v in listing(f'ldm_unet_{name}').items()}
    assert without_ones(expected) == without_ones(published)


@pytest.mark.parametrize('config, name', [(SD15, 'sd15'), (SDXL, 'sdxl')], ids=['sd15', 'sdxl'])
def test_the_network_takes_exactly_the_published_tensors_of_diffusers(config, name):
    network = network_from_diffusers(config)
    expected = expected_tensors(ldm_shapes(network), diffusers_source)
    published = listing(f'diffusers_UNet2DConditionModel_{name}')
    assert without_ones(expected) == without_ones(published)


@pytest.mark.parametrize(
    'name, config', [('sd-v1', SD15), ('sd-v2', SD2), ('sdxl', SDXL)], ids=['1', '2', 'XL']
)
def test_compvis_and_diffusers_describe_the_same_network(name, config):
    assert network_from_compvis(PUBLISHED[name]) == network_from_diffusers(config)


def test_both_layouts_of_class_conditional_ldm_are_the_published_ones_name_for_name():
    network = network_from_compvis(PUBLISHED['cin256-v2'])
    paths = traverse_util.flatten_dict(ldm_shapes(network), sep='/')
    ours = {
        diffusers_source(path).name: PREFIX + compvis_source(path, network=network).name
        for path in paths
    }
    assert ours == name_map('map_ldm_cin256v2_unet_to_diffusers')


@functools.cache
def random_params(network=TINY):
    return random_like(ldm_shapes(network))


def compvis_tensors(params, network=TINY, prefix=PREFIX):
    tensors = write_tensors(params, functools.partial(compvis_source, network=network))
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


SETTINGS = {
    'SDXL-like': {},
    'attention without context': {'context_dim': None, 'depth': (1, 0), 'mid_depth': 1},
    'resampling blocks': {'resblock_updown': True, 'scale_shift': True, 'added_dim': None},
}


@pytest.mark.parametrize('changes', SETTINGS.values(), ids=SETTINGS)
def test_to_compvis_and_back_changes_no_weight(changes):
    network = TINY.clone(**changes)
    params = random_params(network)
    assert_same_tree(params_from_compvis(compvis_tensors(params, network), network), params)


def test_to_diffusers_and_back_changes_no_weight():
    params = random_params()
    assert_same_tree(params_from_diffusers(write_tensors(params, diffusers_source), TINY), params)


def test_the_rest_of_a_compvis_checkpoint_is_passed_over():
    params = random_params()
    tensors = {
        'betas': np.zeros(5, np.float32),
        'first_stage_model.encoder.conv_in.bias': np.zeros(5, np.float32),
        **compvis_tensors(params),
    }
    assert_same_tree(params_from_compvis(tensors, TINY), params)


def test_the_tensors_of_the_unet_alone_need_no_prefix():
    params = random_params()
    assert_same_tree(params_from_compvis(compvis_tensors(params, prefix=''), TINY), params)


def ema_tensors(params):
    flat = {
        f'model_ema.{name.removeprefix("model.").replace(".", "")}': tensor
        for name, tensor in compvis_tensors(params).items()
    }
    assert 'model_ema.diffusion_modeltime_embed0weight' in flat
    return flat | {'model_ema.decay': np.float32(0), 'model_ema.num_updates': np.int32(3)}


def test_the_moving_average_is_read_where_it_is_asked_for():
    params, average = random_params(), jax.tree.map(lambda leaf: leaf + 1, random_params())
    tensors = compvis_tensors(params) | ema_tensors(average)
    assert_same_tree(params_from_compvis(tensors, TINY), params)
    assert_same_tree(params_from_compvis(tensors, TINY, ema=True), average)


@pytest.mark.parametrize(
    'change, text',
    [
        (
            lambda t: t.pop('model_ema.diffusion_modelout0bias'),
            "1 tensors missing, e.g. 'out.0.bias'",
        ),
        (lambda t: t.update({'model_ema.odd': 0}), "1 tensors unused, e.g. 'model_ema.odd'"),
    ],
)
def test_a_moving_average_is_complete_or_refused(change, text):
    tensors = ema_tensors(random_params())
    change(tensors)
    with pytest.raises(ValueError, match=text):
        params_from_compvis(tensors, TINY, ema=True)


def test_the_class_condition_is_read_with_its_size():
    table = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    tensors = {'cond_stage_model.embedding.weight': table, 'other': table}
    embedder, params = class_embedder_from_compvis(tensors)
    assert (embedder.num_classes, embedder.width) == (4, 6)
    out = embedder.apply({'params': params}, np.array([2, 0]))
    np.testing.assert_array_equal(out, table[[2, 0], None].astype(np.float32))


def test_a_model_without_classes_has_no_class_condition():
    with pytest.raises(ValueError, match="no tensor 'cond_stage_model.embedding.weight'"):
        class_embedder_from_compvis({})


KEY = f'{PREFIX}middle_block.1.transformer_blocks.1.attn2.to_k.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (
            lambda t: t.update({KEY.replace('to_k', 'k'): t.pop(KEY)}),
            f"'{KEY.removeprefix(PREFIX)}' \\(nearest: '{KEY.replace('to_k', 'k')}'\\)",
        ),
        (
            lambda t: t.update({KEY.replace('blocks.1', 'blocks.2'): t[KEY]}),
            f"1 tensors unused, e.g. '{KEY.replace('blocks.1', 'blocks.2')}'",
        ),
        (
            lambda t: t.update({KEY: t[KEY][:, :3]}),
            f"'{KEY}' has shape \\(16, 3\\), expected \\(16, 6\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    tensors = compvis_tensors(random_params())
    change(tensors)
    with pytest.raises(ValueError, match=text):
        params_from_compvis(tensors, TINY)


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'dims': 3}, 'dims=3 of the LDM UNetModel is not supported'),
        ({'num_classes': 1000}, 'num_classes=1000'),
        ({'context_dim': None}, 'context_dim=None'),
        ({'use_spatial_transformer': False}, 'context_dim=768'),
        ({'num_heads': -1}, 'num_heads and num_head_channels of the LDM UNetModel are both -1'),
        ({'model_channels': None}, 'model_channels of the LDM UNetModel is missing'),
        ({'transformer_depth': [1, 2]}, r'transformer_depth=\[1, 2\]'),
        ({'num_res_blocks': [1, 2, 2, 2]}, r'num_res_blocks=\[1, 2, 2, 2\]'),
        ({'unheard_of': 1}, 'unheard_of=1: not a setting of the LDM UNetModel'),
    ],
)
def test_an_unsupported_setting_of_compvis_is_refused_by_name(changes, text):
    with pytest.raises(ValueError, match=text):
        network_from_compvis({**PUBLISHED['sd-v1'], **changes})


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'_class_name': 'UNet2DModel'}, "_class_name='UNet2DModel'"),
        ({'down_block_types': ['AttnDownBlock2D']}, "down_block_types='AttnDownBlock2D'"),
        ({'up_block_types': 4 * ['UpBlock2D']}, 'up_block_types='),
        ({'mid_block_type': 'UNetMidBlock2D'}, "mid_block_type='UNetMidBlock2D'"),
        ({'class_embed_type': 'projection'}, "class_embed_type='projection'"),
        ({'addition_embed_type': 'image'}, "addition_embed_type='image'"),
        ({'addition_embed_type': 'text_time'}, 'projection_class_embeddings_input_dim=None'),
        ({'addition_time_embed_dim': 256}, 'addition_time_embed_dim=256'),
        ({'time_cond_proj_dim': 256}, 'time_cond_proj_dim=256'),
        ({'time_embedding_dim': 17}, 'time_embedding_dim=17'),
        ({'layers_per_block': [2, 2, 2, 3]}, 'layers_per_block='),
        ({'cross_attention_dim': [768, 1024]}, 'cross_attention_dim='),
        ({'attention_head_dim': [8, 8]}, 'attention_head_dim='),
        ({'transformer_layers_per_block': [[1, 2], 1, 1, 1]}, 'transformer_layers_per_block='),
        ({'conv_in_kernel': 1}, 'conv_in_kernel=1'),
        ({'unheard_of': 1}, 'unheard_of=1: not a setting of UNet2DConditionModel'),
    ],
)
def test_an_unsupported_setting_of_diffusers_is_refused_by_name(changes, text):
    with pytest.raises(ValueError, match=text):
        network_from_diffusers({**SD15, **changes})


def test_absent_settings_are_those_of_diffusers():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    import inspect

    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ('self', 'kwargs')}
    assert network_from_diffusers({}) == network_from_diffusers(defaults)
