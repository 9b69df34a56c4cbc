import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models import ddpm_weights
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.ddpm_weights import (
    diffusers_from_network,
    diffusers_from_params,
    network_from_diffusers,
    params_from_ddim,
    params_from_diffusers,
)
from dmq_jax.models.torch_weights import expected_tensors
from tests.models.listings import listing, name_map, without_ones

NETWORK = DDPMUNet(
    channels=(8, 16), out_channels=3, layers_per_block=1, num_groups=4,
    down_attention=(False, True), up_attention=(True, False),
)  # fmt: skip


def random_params(network=NETWORK):
    side = 2 ** (len(network.channels) - 1)
    y = None if network.num_class_embeds is None else jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(
        network.init,
        jax.random.key(0),
        jnp.zeros((1, side, side, network.in_channels)),
        jnp.zeros(1, jnp.int32),
        y,
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes['params']
    )


def assert_same_tree(a, b):
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


SETTINGS = {
    'plain': {},
    'conditional': {'num_class_embeds': 4, 'head_dim': 8},
    'ADM-like': {'scale_shift': True, 'cos_first': True, 'frequency_shift': 0, 'epsilon': 1e-5},
    'symmetric': {'pad_downsample': 'symmetric', 'mid_attention': False, 'in_channels': 1},
    'three levels': {
        'channels': (8, 16, 16),
        'down_attention': (False, True, False),
        'up_attention': (True, True, False),
        'layers_per_block': 2,
    },
}


@pytest.mark.parametrize('changes', SETTINGS.values(), ids=SETTINGS)
def test_to_diffusers_and_back_changes_neither_weights_nor_settings(changes):
    network = NETWORK.clone(**changes)
    params = random_params(network)
    tensors = diffusers_from_params(params)
    assert_same_tree(params_from_diffusers(tensors, network), params)
    assert network_from_diffusers(diffusers_from_network(network, (8, 8))) == network


def test_diffusers_loads_what_is_written_for_it():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from tests.oracles import diffusers_unet as oracle

    network = NETWORK.clone(num_class_embeds=4, head_dim=8)
    config = diffusers_from_network(network, (8, 12))
    assert config['sample_size'] == [8, 12]
    unet = oracle.random_unet(config)
    tensors = diffusers_from_params(random_params(network))
    result = unet.load_state_dict({k: oracle.torch.from_numpy(v) for k, v in tensors.items()})
    assert not result.missing_keys and not result.unexpected_keys


def test_patches_have_no_counterpart_in_diffusers():
    with pytest.raises(ValueError, match='patch_size=2'):
        diffusers_from_network(NETWORK.clone(patch_size=2), (8, 8))


def test_kernels_are_transposed_and_vectors_are_not():
    tensors = diffusers_from_params(random_params())
    params = params_from_diffusers(tensors, NETWORK)
    conv = tensors['down_blocks.1.resnets.0.conv1.weight']
    assert params['down_1']['block_0']['conv1']['kernel'][2, 1, 5, 7] == conv[7, 5, 2, 1]
    dense = tensors['mid_block.attentions.0.to_q.weight']
    assert params['mid']['attention_0']['q']['kernel'][3, 4] == dense[4, 3]
    norm = tensors['conv_norm_out.weight']
    np.testing.assert_array_equal(params['norm_out']['scale'], norm)


def test_float16_checkpoints_become_float32_parameters():
    tensors = {k: v.astype(np.float16) for k, v in diffusers_from_params(random_params()).items()}
    leaves = jax.tree.leaves(params_from_diffusers(tensors, NETWORK))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_the_old_names_of_attention_are_accepted():
    params = random_params()
    old = {'.to_q.': '.query.', '.to_k.': '.key.', '.to_v.': '.value.', '.to_out.0.': '.proj_attn.'}
    tensors = {}
    for name, tensor in diffusers_from_params(params).items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        tensors[name] = tensor
    assert 'mid_block.attentions.0.proj_attn.weight' in tensors
    assert_same_tree(params_from_diffusers(tensors, NETWORK), params)


def ddim_tensors(params, levels):
    """The names of the DDIM code, written out by hand for one residual block and attention each."""
    kernel = {'conv1', 'conv2', 'conv_in', 'conv_out', 'upsample', 'downsample', 'conv_shortcut'}
    attention = {'q': 'q', 'k': 'k', 'v': 'v', 'out': 'proj_out', 'norm': 'norm'}
    block = {'time_proj': 'temb_proj', 'conv_shortcut': 'nin_shortcut'}
    tensors = {}
    for path, array in traverse_util.flatten_dict(params).items():
        *where, layer, leaf = path
        suffix = 'bias' if leaf == 'bias' else 'weight'
        if leaf == 'kernel' and layer in kernel:
            array = np.moveaxis(array, (3, 2), (0, 1))
        elif leaf == 'kernel' and where and where[-1].startswith('attention'):
            array = array.T[:, :, None, None]
        elif leaf == 'kernel':
            array = array.T
        if not where:
            name = layer
        elif where == ['time_embed']:
            name = f'temb.dense.{layer[-1]}'
        elif where[0] == 'mid' and where[1] == 'attention_0':
            name = f'mid.attn_1.{attention[layer]}'
        elif where[0] == 'mid':
            name = f'mid.block_{int(where[1][-1]) + 1}.{block.get(layer, layer)}'
        else:
            way, level = where[0].split('_')
            # Stored under its resolution: the first level used on the way up is the last one.
            level = int(level) if way == 'down' else levels - 1 - int(level)
            if len(where) == 1:
                name = f'{way}.{level}.{layer}.conv'
            else:
                kind, j = where[1].split('_')
                renamed = block.get(layer, layer) if kind == 'block' else attention[layer]
                name = f'{way}.{level}.{"block" if kind == "block" else "attn"}.{j}.{renamed}'
        tensors[f'{name}.{suffix}'] = array
    return tensors


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('name', ['plain', 'three levels'])
def test_ddim_checkpoints_are_read(name, prefix):
    network = NETWORK.clone(**SETTINGS[name])
    params = random_params(network)
    tensors = ddim_tensors(params, len(network.channels))
    assert f'up.{len(network.channels) - 1}.upsample.conv.weight' in tensors
    assert 'up.0.upsample.conv.weight' not in tensors
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    assert_same_tree(params_from_ddim(tensors, network), params)


def test_ddim_names_of_the_cifar10_network_are_the_published_ones():
    # Shapes alone: the 35.7 million numbers do not matter here.
    network = DDPMUNet()
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1, jnp.int32)
    )
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes['params'])
    tensors = ddim_tensors(params, 4)
    assert len(tensors) == 328
    # pesser/pytorch_diffusion, diffusion_cifar10_model.
    published = {
        'temb.dense.1.weight': (512, 512),
        'down.1.attn.0.q.weight': (256, 256, 1, 1),
        'down.0.downsample.conv.weight': (128, 128, 3, 3),
        'mid.block_2.temb_proj.weight': (256, 512),
        'up.0.block.0.nin_shortcut.weight': (128, 384, 1, 1),
        'up.1.attn.2.proj_out.weight': (256, 256, 1, 1),
        'up.3.upsample.conv.weight': (256, 256, 3, 3),
        'norm_out.weight': (128,),
    }
    assert {name: tensors[name].shape for name in published} == published
    assert len(jax.tree.leaves(params_from_ddim(tensors, network))) == 328


def test_both_layouts_of_the_cifar10_network_are_the_published_ones_name_for_name():
    shapes = ddpm_weights._shapes(DDPMUNet())
    ddim_source = functools.partial(ddpm_weights.ddim_source, last=3)
    for name, source in (
        ('ermongroup_ddim_cifar10', ddim_source),
        ('diffusers_UNet2DModel_ddpm-cifar10-32', ddpm_weights.diffusers_source),
    ):
        expected = expected_tensors(shapes, source)
        assert without_ones(expected) == without_ones(listing(name))
    published = name_map('map_ddim_to_diffusers_cifar10')
    paths = traverse_util.flatten_dict(shapes, sep='/')
    ours = {ddpm_weights.diffusers_source(p).name: ddim_source(p).name for p in paths}
    assert ours == published


def test_ddim_has_no_classes():
    with pytest.raises(ValueError, match='num_class_embeds=4'):
        params_from_ddim({}, NETWORK.clone(num_class_embeds=4))


NAME = 'mid_block.resnets.0.conv1.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop(NAME), f"1 tensors missing, e.g. '{NAME}'."),
        (
            lambda t: t.update({'mid_block.resnets.0.konv1.weight': t.pop(NAME)}),
            f"'{NAME}' \\(nearest: 'mid_block.resnets.0.konv1.weight'\\)",
        ),
        (
            lambda t: t.update({'mid_block.resnets.2.conv1.weight': t[NAME]}),
            "1 tensors unused, e.g. 'mid_block.resnets.2.conv1.weight' \\(nearest: 'mid_block",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :3]}),
            f"'{NAME}' has shape \\(16, 3, 3, 3\\), expected \\(16, 16, 3, 3\\)",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:, :, 0]}),
            f"'{NAME}' has shape \\(16, 16, 3\\), expected \\(16, 16, 3, 3\\)",
        ),
        (
            lambda t: t.update({'conv_in.bias': t['conv_in.bias'][:4]}),
            "'conv_in.bias' has shape \\(4,\\), expected \\(8,\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    tensors = diffusers_from_params(random_params())
    change(tensors)
    with pytest.raises(ValueError, match=text):
        params_from_diffusers(tensors, NETWORK)


@pytest.mark.parametrize(
    'changes, text',
    [
        ({'time_embedding_type': 'fourier'}, "time_embedding_type='fourier'"),
        ({'downsample_type': 'resnet'}, "downsample_type='resnet'"),
        ({'upsample_type': 'resnet'}, "upsample_type='resnet'"),
        ({'act_fn': 'gelu'}, "act_fn='gelu'"),
        ({'center_input_sample': True}, 'center_input_sample=True'),
        ({'mid_block_type': None}, 'mid_block_type=None'),
        ({'mid_block_scale_factor': 2.0}, 'mid_block_scale_factor=2.0'),
        ({'class_embed_type': 'timestep'}, "class_embed_type='timestep'"),
        ({'down_block_types': ['DownBlock2D', 'SkipDownBlock2D']}, "'SkipDownBlock2D'"),
        ({'up_block_types': ['UpBlock2D', 'AttnSkipUpBlock2D']}, "'AttnSkipUpBlock2D'"),
        ({'downsample_padding': 2}, 'downsample_padding=2'),
        ({'resnet_time_scale_shift': 'spatial'}, "resnet_time_scale_shift='spatial'"),
        ({'norm_num_groups': None}, 'norm_num_groups=None'),
        ({'attn_norm_num_groups': 2}, 'attn_norm_num_groups=2'),
        (
            {'resnet_time_scale_shift': 'scale_shift', 'attn_norm_num_groups': None},
            'attn_norm_num_groups=None',
        ),
        ({'time_embedding_dim': 17}, 'time_embedding_dim=17'),
        ({'cross_attention_dim': 768}, 'cross_attention_dim=768'),
        ({'_class_name': 'UNet2DConditionModel'}, "_class_name='UNet2DConditionModel'"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(changes, text):
    with pytest.raises(ValueError, match=text):
        network_from_diffusers({**diffusers_from_network(NETWORK, (8, 8)), **changes})


def test_absent_settings_are_those_of_diffusers():
    pytest.importorskip('torch', reason='torch is the oracle here')
    pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    import inspect

    from diffusers import UNet2DModel

    parameters = inspect.signature(UNet2DModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ('self', 'kwargs')}
    assert network_from_diffusers({}) == network_from_diffusers(defaults)


def test_the_oldest_block_names_mean_the_same():
    config = diffusers_from_network(NETWORK, (8, 8))
    old = {
        **config,
        'down_block_types': [f'UNetRes{kind}' for kind in config['down_block_types']],
        'up_block_types': [f'UNetRes{kind}' for kind in config['up_block_types']],
    }
    assert network_from_diffusers(old) == NETWORK
