import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models import dit_weights
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.torch_weights import expected_tensors, parameter_shapes, write_tensors
from tests.models.comparison import random_like
from tests.models.listings import listing


def shapes_of(network):
    side = network.patch_size
    x = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    if isinstance(network, DiT):
        return parameter_shapes(network, x, number, number)
    text = jax.ShapeDtypeStruct((1, 1, network.caption_channels), jnp.float32)
    sizes = {}
    if network.size_conditions:
        sizes['resolution'] = jax.ShapeDtypeStruct((1, 2), jnp.float32)
        sizes['aspect_ratio'] = jax.ShapeDtypeStruct((1,), jnp.float32)
    return parameter_shapes(network, x, number, text, **sizes)


def random_params(network):
    return random_like(shapes_of(network))


def assert_same_tree(a, b):
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# config.json of facebook/DiT-XL-2-256 and of PixArt-alpha/PixArt-XL-2-1024-MS.
DIT_XL = {
    '_class_name': 'Transformer2DModel',
    '_diffusers_version': '0.12.0.dev0',
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 72,
    'cross_attention_dim': None,
    'dropout': 0.0,
    'in_channels': 4,
    'norm_elementwise_affine': False,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_zero',
    'num_attention_heads': 16,
    'num_embeds_ada_norm': 1000,
    'num_layers': 28,
    'num_vector_embeds': None,
    'only_cross_attention': False,
    'out_channels': 8,
    'patch_size': 2,
    'sample_size': 32,
    'upcast_attention': False,
    'use_linear_projection': False,
}
PIXART_XL = {
    '_class_name': 'Transformer2DModel',
    'activation_fn': 'gelu-approximate',
    'attention_bias': True,
    'attention_head_dim': 72,
    'attention_type': 'default',
    'caption_channels': 4096,
    'cross_attention_dim': 1152,
    'double_self_attention': False,
    'in_channels': 4,
    'norm_elementwise_affine': False,
    'norm_eps': 1e-06,
    'norm_num_groups': 32,
    'norm_type': 'ada_norm_single',
    'num_attention_heads': 16,
    'num_embeds_ada_norm': 1000,
    'num_layers': 28,
    'out_channels': 8,
    'patch_size': 2,
    'sample_size': 128,
}


def test_the_published_dit_of_diffusers_is_read_tensor_for_tensor():
    published = listing('diffusers_DiTTransformer2DModel_DiT-XL-2-256')
    network = dit_weights.dit_from_diffusers(DIT_XL)
    assert network == DiT(frequency_shift=1.0, mlp_epsilon=1e-5)
    each = shapes_of(network.clone(embedding_per_block=True))
    assert expected_tensors(each, dit_weights.diffusers_dit_source) == published
    # With one embedding, what is not read is exactly the copies.
    one = expected_tensors(shapes_of(network), dit_weights.diffusers_dit_source)
    copies = {
        name
        for name in published
        if '.norm1.emb.' in name and not name.startswith('transformer_blocks.0.')
    }
    assert len(copies) == 27 * 5
    assert one == {name: shape for name, shape in published.items() if name not in copies}


def test_the_published_original_dit_is_read_tensor_for_tensor():
    published = listing('facebookresearch_DiT-XL-2-256x256')
    hollow = {name: np.broadcast_to(np.float32(0), shape) for name, shape in published.items()}
    network = dit_weights.dit_from_original(hollow)
    assert network == DiT()
    expected = expected_tensors(shapes_of(network), dit_weights.original_dit_source)
    assert published.pop('pos_embed') == (1, 256, 1152)
    assert expected == published


def test_the_published_pixart_is_read_tensor_for_tensor():
    network = dit_weights.pixart_from_diffusers(PIXART_XL)
    assert network == PixArt(size_conditions=True)
    expected = expected_tensors(shapes_of(network), dit_weights.diffusers_pixart_source)
    assert expected == listing('diffusers_PixArtTransformer2DModel_XL-2-1024')


def test_the_class_of_today_and_the_one_it_was_mean_the_same():
    for read, config, name in [
        (dit_weights.dit_from_diffusers, DIT_XL, 'DiTTransformer2DModel'),
        (dit_weights.pixart_from_diffusers, PIXART_XL, 'PixArtTransformer2DModel'),
    ]:
        assert read({**config, '_class_name': name}) == read(config)


def test_the_512_pixel_dit_differs_in_its_positions_only():
    network = dit_weights.dit_from_diffusers({**DIT_XL, 'sample_size': 64})
    assert network == DiT(frequency_shift=1.0, mlp_epsilon=1e-5, sample_size=64)


def test_pixart_sigma_has_no_sizes():
    config = {**PIXART_XL, 'use_additional_conditions': False, 'interpolation_scale': 2}
    assert dit_weights.pixart_from_diffusers(config) == PixArt()
    small = {**PIXART_XL, 'sample_size': 64}
    assert dit_weights.pixart_from_diffusers(small) == PixArt(sample_size=64, position_scale=1.0)


SMALL_DIT = DiT(
    in_channels=3, out_channels=6, num_layers=3, num_heads=2, head_dim=4, sample_size=4,
    num_classes=5,
)  # fmt: skip
SMALL_PIXART = PixArt(
    in_channels=3, num_layers=2, num_heads=2, head_dim=12, caption_channels=10,
    size_conditions=True,
)  # fmt: skip


def dit_tensors(source=dit_weights.original_dit_source):
    params = random_params(SMALL_DIT)
    return params, write_tensors(params, source)


def test_to_diffusers_and_back_changes_nothing():
    params = random_params(SMALL_DIT)
    tensors = dit_weights.diffusers_from_dit_params(params)
    name = 'transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight'
    for i in range(3):
        np.testing.assert_array_equal(tensors[name.format(i)], tensors[name.format(0)])
    assert_same_tree(dit_weights.dit_params_from_diffusers(tensors, SMALL_DIT), params)
    each = SMALL_DIT.clone(embedding_per_block=True)
    again = dit_weights.dit_params_from_diffusers(tensors, each)
    assert dit_weights.diffusers_from_dit_params(again).keys() == tensors.keys()

    params = random_params(SMALL_PIXART)
    tensors = dit_weights.diffusers_from_pixart_params(params)
    assert_same_tree(dit_weights.pixart_params_from_diffusers(tensors, SMALL_PIXART), params)


def test_fused_tensors_are_split_in_thirds_and_halves():
    params = random_params(SMALL_PIXART)
    tensors = write_tensors(params, dit_weights.original_pixart_source)
    attention = params['block_1']['attention']
    fused = tensors['blocks.1.attn.qkv.weight']
    assert fused.shape == (72, 24)
    for i, name in enumerate('qkv'):
        np.testing.assert_array_equal(attention[name]['kernel'].T, fused[24 * i : 24 * (i + 1)])
    cross = params['block_1']['cross_attention']
    fused = tensors['blocks.1.cross_attn.kv_linear.bias']
    np.testing.assert_array_equal(np.r_[cross['k']['bias'], cross['v']['bias']], fused)
    assert_same_tree(dit_weights.pixart_params_from_original(tensors, SMALL_PIXART), params)


def test_embeddings_that_were_trained_apart_are_refused_by_name():
    tensors = dit_weights.diffusers_from_dit_params(random_params(SMALL_DIT))
    name = 'transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias'
    tensors[name] = tensors[name] + 1
    with pytest.raises(ValueError, match=f"'{name}' is no copy of .*embedding_per_block=True"):
        dit_weights.dit_params_from_diffusers(tensors, SMALL_DIT)


def test_other_positions_are_refused():
    params, tensors = dit_tensors()
    tensors['pos_embed'] = np.zeros((1, 4, 8), np.float16)
    with pytest.raises(ValueError, match="'pos_embed' differs by 1 "):
        dit_weights.dit_params_from_original(tensors, SMALL_DIT)
    tensors['pos_embed'] = np.zeros((1, 5, 8), np.float16)
    with pytest.raises(ValueError, match=r"'pos_embed' has shape \(1, 5, 8\), expected \(1, 4, 8"):
        dit_weights.dit_params_from_original(tensors, SMALL_DIT)
    del tensors['pos_embed']
    assert_same_tree(dit_weights.dit_params_from_original(tensors, SMALL_DIT), params)


NAME = 'blocks.1.attn.qkv.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop(NAME), f"1 tensors missing, e.g. '{NAME}'"),
        (
            lambda t: t.update({'blocks.1.attn.qkw.weight': t.pop(NAME)}),
            f"missing, e.g. '{NAME}' \\(nearest: 'blocks.1.attn.qkw.weight'\\)",
        ),
        (
            lambda t: t.update({'blocks.7.attn.qkv.weight': t[NAME]}),
            "1 tensors unused, e.g. 'blocks.7.attn.qkv.weight' \\(nearest: 'blocks",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :3]}),
            f"'{NAME}' has shape \\(24, 3\\), expected \\(24, 8\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    _, tensors = dit_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=text):
        dit_weights.dit_params_from_original(tensors, SMALL_DIT)


def test_another_layout_is_refused_before_its_settings_are_guessed():
    _, tensors = dit_tensors()
    with pytest.raises(ValueError, match="'pos_embed': is this the original layout"):
        dit_weights.dit_from_original(tensors)
    tensors['pos_embed'] = np.zeros((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match='head_dim=72 does not divide the width 8'):
        dit_weights.dit_from_original(tensors)
    with pytest.raises(ValueError, match="'y_embedder.y_embedding'"):
        dit_weights.null_caption(tensors)
    with pytest.raises(ValueError, match='embedding_per_block=True'):
        dit_weights.dit_params_from_original(tensors, SMALL_DIT.clone(embedding_per_block=True))


@pytest.mark.parametrize(
    'read, config, changes, text',
    [
        (dit_weights.dit_from_diffusers, DIT_XL, {'norm_type': 'ada_norm'}, "type='ada_norm'"),
        (dit_weights.dit_from_diffusers, DIT_XL, {'attention_bias': False}, 'attention_bias=False'),
        (dit_weights.dit_from_diffusers, DIT_XL, {'activation_fn': 'geglu'}, "_fn='geglu'"),
        (dit_weights.dit_from_diffusers, DIT_XL, {'num_embeds_ada_norm': None}, 'ada_norm=None'),
        (dit_weights.dit_from_diffusers, DIT_XL, {'depth': 3}, 'depth=3: not a setting'),
        (dit_weights.dit_from_diffusers, PIXART_XL, {}, "norm_type='ada_norm_single'"),
        (dit_weights.pixart_from_diffusers, DIT_XL, {}, "norm_type='ada_norm_zero'"),
        (dit_weights.dit_from_diffusers, DIT_XL, {'num_vector_embeds': 8}, 'vector_embeds=8'),
        (
            dit_weights.dit_from_diffusers,
            DIT_XL,
            {'_class_name': 'PixArtTransformer2DModel'},
            "_class_name='PixArtTransformer2DModel'",
        ),
        (dit_weights.pixart_from_diffusers, PIXART_XL, {'norm_eps': 1e-5}, 'norm_eps=1e-05'),
        (dit_weights.pixart_from_diffusers, PIXART_XL, {'cross_attention_dim': 64}, 'dim=64'),
        (dit_weights.pixart_from_diffusers, PIXART_XL, {'attention_type': 'gated'}, "'gated'"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(read, config, changes, text):
    with pytest.raises(ValueError, match=text):
        read({**config, **changes})


@pytest.mark.parametrize(
    'read, name',
    [
        (dit_weights.dit_from_diffusers, 'DiTTransformer2DModel'),
        (dit_weights.pixart_from_diffusers, 'PixArtTransformer2DModel'),
    ],
)
def test_absent_settings_are_those_of_diffusers(read, name):
    pytest.importorskip('torch', reason='torch is the oracle here')
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    import inspect

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ('self', 'kwargs')}
    assert read({}) == read(defaults)
