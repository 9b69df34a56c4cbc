import functools

import jax
import numpy as np
import pytest

from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.adm_weights import (
    PUBLISHED,
    adm_shapes,
    adm_source,
    network_from_adm,
    params_from_adm,
)
from dmq_jax.models.torch_weights import expected_tensors, write_tensors
from tests.models.comparison import random_like
from tests.models.listings import listing, without_ones

TINY = ADMUNet(
    channels=(8, 16), num_blocks=1, attention=(False, True), num_heads=(1, 4), num_groups=4,
    num_classes=3,
)  # fmt: skip


def source(network, new_attention_order=False):
    return functools.partial(adm_source, network=network, new_attention_order=new_attention_order)


@functools.cache
def random_params(network=TINY):
    return random_like(adm_shapes(network))


@pytest.mark.parametrize(
    'published, name',
    [('256x256_diffusion', 'adm_imagenet256_cond'), ('64x64_diffusion', 'adm_imagenet64_cond')],
)
def test_the_network_takes_exactly_the_published_tensors(published, name):
    network = network_from_adm(PUBLISHED[published])
    expected = expected_tensors(adm_shapes(network), source(network))
    assert without_ones(expected) == without_ones(listing(name))


# Millions of parameters, from the tables of hyperparameters of arXiv:2105.05233.
MILLIONS = {
    '64x64_diffusion': 296,
    '128x128_diffusion': 422,
    '256x256_diffusion': 554,
    '512x512_diffusion': 559,
    '64_256_upsampler': 312,
    '128_512_upsampler': 309,
}


@pytest.mark.parametrize('name, millions', MILLIONS.items())
def test_published_networks_have_the_published_size(name, millions):
    leaves = jax.tree.leaves(adm_shapes(network_from_adm(PUBLISHED[name])))
    assert round(sum(leaf.size for leaf in leaves) / 1e6) == millions


def test_absent_flags_are_those_of_the_scripts():
    network = network_from_adm({'image_size': 64})
    assert network == ADMUNet(
        channels=(128, 256, 384, 512),
        out_channels=3,
        attention=(False, False, True, True),
        num_heads=(4, 4, 4, 4),
        time_features=128,
        resblock_updown=False,
    )


def test_an_upsampler_sees_the_small_image_too():
    network = network_from_adm(PUBLISHED['64_256_upsampler'])
    assert network.low_res_channels == 3
    kernel = adm_shapes(network)['conv_in']['kernel']
    assert kernel.shape == (3, 3, 6, 192)


def test_queries_keys_and_values_are_cut_out_of_the_fused_tensor_by_either_order():
    tensors = write_tensors(random_params(), source(TINY))
    rows = np.arange(48, dtype=np.float32)
    tensors['middle_block.1.qkv.bias'] = rows
    # Four heads of four channels.
    legacy = rows.reshape(4, 3, 4)
    new = rows.reshape(3, 16)
    for i, name in enumerate('qkv'):
        for order, wanted in ((False, legacy[:, i].reshape(-1)), (True, new[i])):
            params = params_from_adm(tensors, TINY, new_attention_order=order)
            np.testing.assert_array_equal(params['mid']['attention_0'][name]['bias'], wanted)


@pytest.mark.parametrize('new_attention_order', [False, True])
@pytest.mark.parametrize('changes', [{}, {'resblock_updown': False, 'attention': (True, False)}])
def test_to_the_original_and_back_changes_no_weight(changes, new_attention_order):
    network = TINY.clone(**changes)
    params = random_params(network)
    tensors = write_tensors(params, source(network, new_attention_order))
    back = params_from_adm(tensors, network, new_attention_order=new_attention_order)
    jax.tree.map(np.testing.assert_array_equal, back, params)


QKV = 'output_blocks.1.1.qkv.weight'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop('label_emb.weight'), "1 tensors missing, e.g. 'label_emb.weight'"),
        (
            lambda t: t.update({'output_blocks.1.1.qvk.weight': t.pop(QKV)}),
            f"'{QKV}' \\(nearest: 'output_blocks.1.1.qvk.weight'\\)",
        ),
        (
            lambda t: t.update({QKV.replace('.1.1', '.1.2'): t[QKV]}),
            r"1 tensors unused, e.g. 'output_blocks.1.2.qkv.weight' \(nearest: 'output_blocks",
        ),
        (
            lambda t: t.update({QKV: t[QKV][:47]}),
            f"'{QKV}' has shape \\(47, 16\\), expected \\(48, 16\\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(change, text):
    tensors = write_tensors(random_params(), source(TINY))
    change(tensors)
    with pytest.raises(ValueError, match=text):
        params_from_adm(tensors, TINY, new_attention_order=False)


@pytest.mark.parametrize(
    'flags, text',
    [
        ({'image_size': 96}, 'image_size=96 of guided diffusion is not supported; expected 512 or'),
        ({'large_size': 128}, 'large_size=128 of guided diffusion is not supported'),
        ({'num_heads_upsample': 2}, 'num_heads_upsample=2'),
        ({'classifier_depth': 2}, 'classifier_depth=2: not a setting of guided diffusion'),
    ],
)
def test_an_unsupported_flag_is_refused_by_name(flags, text):
    with pytest.raises(ValueError, match=text):
        network_from_adm(flags)
