import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models import autoencoder_weights as weights
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder
from dmq_jax.models.torch_weights import expected_tensors
from tests.models.comparison import random_like
from tests.models.listings import listing, name_map, without_ones


def random_params(network):
    return random_like(weights.autoencoder_shapes(network))


def assert_same_tree(a, b):
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


# config.json of the autoencoder of Stable Diffusion 1.5.
SD = {
    '_class_name': 'AutoencoderKL',
    '_diffusers_version': '0.6.0',
    'act_fn': 'silu',
    'block_out_channels': [128, 256, 512, 512],
    'down_block_types': 4 * ['DownEncoderBlock2D'],
    'in_channels': 3,
    'latent_channels': 4,
    'layers_per_block': 2,
    'norm_num_groups': 32,
    'out_channels': 3,
    'sample_size': 512,
    'up_block_types': 4 * ['UpDecoderBlock2D'],
}
VQ_F4 = {
    **SD,
    '_class_name': 'VQModel',
    'block_out_channels': [128, 256, 512],
    'down_block_types': 3 * ['DownEncoderBlock2D'],
    'up_block_types': 3 * ['UpDecoderBlock2D'],
    'latent_channels': 3,
    'num_vq_embeddings': 8192,
    'scaling_factor': 1.0,
}
# first_stage_config of latent-diffusion's cin256-v2, of its VQ-f8, and of Stable Diffusion 1.
LDM_VQ_F4 = {
    'target': 'ldm.models.autoencoder.VQModelInterface',
    'params': {
        'embed_dim': 3,
        'n_embed': 8192,
        'ddconfig': {
            'double_z': False,
            'z_channels': 3,
            'resolution': 256,
            'in_channels': 3,
            'out_ch': 3,
            'ch': 128,
            'ch_mult': [1, 2, 4],
            'num_res_blocks': 2,
            'attn_resolutions': [],
            'dropout': 0.0,
        },
        'lossconfig': {'target': 'torch.nn.Identity'},
    },
}
LDM_VQ_F8 = {
    'target': 'ldm.models.autoencoder.VQModel',
    'params': {
        **LDM_VQ_F4['params'],
        'embed_dim': 4,
        'n_embed': 16384,
        'ddconfig': {
            **LDM_VQ_F4['params']['ddconfig'],
            'z_channels': 4,
            'ch_mult': [1, 2, 2, 4],
            'attn_resolutions': [32],
        },
    },
}
LDM_KL = {
    'target': 'ldm.models.autoencoder.AutoencoderKL',
    'params': {
        'embed_dim': 4,
        'ddconfig': {
            **LDM_VQ_F4['params']['ddconfig'],
            'double_z': True,
            'z_channels': 4,
            'ch_mult': [1, 2, 4, 4],
            'attn_type': 'vanilla-xformers',
        },
    },
}


def with_ddconfig(config, **changes):
    params = config['params']
    return {**config, 'params': {**params, 'ddconfig': {**params['ddconfig'], **changes}}}


def test_the_autoencoder_of_stable_diffusion_is_read_tensor_for_tensor():
    network = weights.kl_from_diffusers(SD)
    assert network.clone(out_channels=None, attention=None) == AutoencoderKL()
    expected = expected_tensors(
        weights.autoencoder_shapes(network), weights.diffusers_autoencoder_source
    )
    published = listing('diffusers_AutoencoderKL_sd15')
    assert without_ones(expected) == without_ones(published)
    again = weights.autoencoder_from_ldm(LDM_KL, scaling_factor=0.18215)
    assert again == network


def test_the_published_vq_f4_is_read_tensor_for_tensor_in_both_layouts():
    network = weights.vq_from_diffusers(VQ_F4)
    assert network.clone(out_channels=None, attention=None) == VQAutoencoder()
    shapes = weights.autoencoder_shapes(network)
    expected = expected_tensors(shapes, weights.diffusers_autoencoder_source)
    published = listing('diffusers_VQModel_ldm-vq-f4')
    assert without_ones(expected) == without_ones(published)

    original = weights.autoencoder_from_ldm(LDM_VQ_F4)
    assert original == network.clone(codebook_channels=3)
    published = {
        name.removeprefix('first_stage_model.'): shape
        for name, shape in listing('ldm_first_stage_vq-f4').items()
    }
    expected = expected_tensors(shapes, weights.ldm_autoencoder_source(original))
    assert without_ones(expected) == without_ones(published)


def test_vq_f8_has_attention_at_its_coarsest_level():
    network = weights.autoencoder_from_ldm(LDM_VQ_F8)
    assert network.attention == (False, False, False, True)
    assert (network.codebook_size, network.codebook_channels) == (16384, 4)
    expected = expected_tensors(
        weights.autoencoder_shapes(network), weights.ldm_autoencoder_source(network)
    )
    published_names = {
        'encoder.down.3.attn.1.proj_out.weight': (512, 512),
        'decoder.up.3.attn.2.q.weight': (512, 512),
        'decoder.up.3.attn.0.norm.weight': (512,),
        'decoder.up.0.block.0.nin_shortcut.weight': (128, 256, 1, 1),
        'quantize.embedding.weight': (16384, 4),
    }
    assert {name: expected[name] for name in published_names} == published_names


SMALL = VQAutoencoder(
    channels=(4, 8, 12), latent_channels=3, codebook_size=9, num_groups=2,
    attention=(False, False, False), out_channels=3,
)  # fmt: skip
SMALL_KL = AutoencoderKL(channels=(4, 8), layers_per_block=1, num_groups=2)


def ldm_tensors(params, prefix='first_stage_model.'):
    """The checkpoint that an independent map of names makes of diffusers' names."""
    names = name_map('map_ldm_vqf4_to_diffusers')
    tensors = weights.diffusers_from_autoencoder_params(params)
    assert names.keys() == tensors.keys()
    renamed = {}
    for name, tensor in tensors.items():
        is_attention = '.attentions.' in name and tensor.ndim == 2
        tensor = tensor[:, :, None, None] if is_attention else tensor
        renamed[prefix + names[name]] = tensor
    return renamed


@pytest.mark.parametrize('prefix', ['first_stage_model.', ''])
def test_the_layout_of_latent_diffusion_is_read_by_an_independent_map(prefix):
    params = random_params(SMALL)
    tensors = ldm_tensors(params, prefix)
    assert f'{prefix}decoder.up.2.upsample.conv.weight' in tensors
    assert tensors[f'{prefix}decoder.mid.attn_1.q.weight'].shape == (12, 12, 1, 1)
    tensors['model_ema.decay' if not prefix else 'model.x'] = np.zeros(())
    if not prefix:
        tensors['loss.logvar'] = np.zeros(())
    read = weights.autoencoder_params_from_ldm(tensors, SMALL, prefix=prefix)
    assert_same_tree(read, params)


@pytest.mark.parametrize('network', [SMALL, SMALL_KL], ids=['VQ', 'KL'])
def test_to_diffusers_and_back_changes_nothing(network):
    params = random_params(network)
    tensors = weights.diffusers_from_autoencoder_params(params)
    assert_same_tree(weights.autoencoder_params_from_diffusers(tensors, network), params)


def test_diffusers_loads_what_is_written_for_it():
    torch = pytest.importorskip('torch', reason='torch is the oracle here')
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    model = diffusers.AutoencoderKL(
        block_out_channels=[4, 8], down_block_types=2 * ['DownEncoderBlock2D'],
        up_block_types=2 * ['UpDecoderBlock2D'], norm_num_groups=2,
    )  # fmt: skip
    tensors = weights.diffusers_from_autoencoder_params(random_params(SMALL_KL))
    result = model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    assert not result.missing_keys and not result.unexpected_keys


@pytest.mark.parametrize('ones', [(), (1, 1)])
def test_the_old_names_of_attention_are_accepted(ones):
    params = random_params(SMALL_KL)
    old = {'.to_q.': '.query.', '.to_k.': '.key.', '.to_v.': '.value.', '.to_out.0.': '.proj_attn.'}
    tensors = {}
    for name, tensor in weights.diffusers_from_autoencoder_params(params).items():
        if '.attentions.' in name and tensor.ndim == 2:
            tensor = tensor.reshape(*tensor.shape, *ones)
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        tensors[name] = tensor
    assert 'encoder.mid_block.attentions.0.proj_attn.weight' in tensors
    assert_same_tree(weights.autoencoder_params_from_diffusers(tensors, SMALL_KL), params)


NAME = 'encoder.mid_block.resnets.0.conv1.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop(NAME), f"1 tensors missing, e.g. '{NAME}'."),
        (
            lambda t: t.update({'encoder.mid_block.resnets.0.konv1.weight': t.pop(NAME)}),
            f"'{NAME}' \\(nearest: 'encoder.mid_block.resnets.0.konv1.weight'\\)",
        ),
        (
            lambda t: t.update({'encoder.mid_block.resnets.2.conv1.weight': t[NAME]}),
            "1 tensors unused, e.g. 'encoder.mid_block.resnets.2.conv1.weight' \\(nearest: 'enc",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :3]}),
            f"'{NAME}' has shape \\(8, 3, 3, 3\\), expected \\(8, 8, 3, 3\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    tensors = weights.diffusers_from_autoencoder_params(random_params(SMALL_KL))
    change(tensors)
    with pytest.raises(ValueError, match=text):
        weights.autoencoder_params_from_diffusers(tensors, SMALL_KL)


def test_a_prefix_that_no_tensor_has_is_refused():
    with pytest.raises(ValueError, match="no tensor begins with 'first_stage_model.'.*'vae.x'"):
        weights.autoencoder_params_from_ldm({'vae.x': np.zeros(1)}, SMALL)


@pytest.mark.parametrize(
    'read, config, text',
    [
        (weights.kl_from_diffusers, {**SD, 'act_fn': 'gelu'}, "act_fn='gelu'"),
        (weights.kl_from_diffusers, {**SD, 'latents_mean': [0.0]}, 'latents_mean='),
        (weights.kl_from_diffusers, {**SD, 'num_vq_embeddings': 4}, 'num_vq_embeddings=4: not a'),
        (weights.kl_from_diffusers, {**SD, '_class_name': 'VQModel'}, "_class_name='VQModel'"),
        (
            weights.kl_from_diffusers,
            {**SD, 'up_block_types': ['AttnUpDecoderBlock2D', *3 * ['UpDecoderBlock2D']]},
            'up_block_types=.* is not supported',
        ),
        (
            weights.kl_from_diffusers,
            {**SD, 'block_out_channels': [8]},
            '4 down_block_types, but 1 block_out_channels',
        ),
        (weights.vq_from_diffusers, {**VQ_F4, 'norm_type': 'spatial'}, "norm_type='spatial'"),
        (weights.vq_from_diffusers, {**VQ_F4, 'lookup_from_codebook': True}, 'codebook=True'),
        (
            weights.vq_from_diffusers,
            {**VQ_F4, 'down_block_types': 3 * ['DownBlock2D']},
            "down_block_types='DownBlock2D'",
        ),
        (weights.autoencoder_from_ldm, {**LDM_KL, 'target': 'a.VQGAN'}, "target='VQGAN'"),
        (weights.autoencoder_from_ldm, with_ddconfig(LDM_KL, double_z=False), 'double_z=False'),
        (weights.autoencoder_from_ldm, with_ddconfig(LDM_KL, attn_type='linear'), "'linear'"),
        (weights.autoencoder_from_ldm, with_ddconfig(LDM_KL, ch=None), 'says nothing of ch'),
        (
            weights.autoencoder_from_ldm,
            {**LDM_KL, 'params': {**LDM_KL['params'], 'embed_dim': 5}},
            'embed_dim=5',
        ),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(read, config, text):
    with pytest.raises(ValueError, match=text):
        read(config)


@pytest.mark.parametrize(
    'read, name',
    [(weights.kl_from_diffusers, 'AutoencoderKL'), (weights.vq_from_diffusers, 'VQModel')],
)
def test_absent_settings_are_those_of_diffusers(read, name):
    pytest.importorskip('torch', reason='torch is the oracle here')
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    import inspect

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ('self', 'kwargs')}
    assert read({}) == read(defaults)
