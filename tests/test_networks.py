import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, networks
from dmq_jax.config import QuantConfig
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.models import ldm_weights
from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.networks import Conditioned
from tests import tiny

ADM = ADMUNet(
    channels=(8,), num_blocks=1, attention=(True,), num_heads=(2,), num_groups=4, num_classes=3
)
LDM = LDMUNet(
    channels=(8,), in_channels=3, out_channels=3, num_blocks=1, depth=(1,), num_heads=(2,),
    context_dim=6, num_groups=4,
)  # fmt: skip
PIXELS = LDM.clone(context_dim=None)
DIT = DiT(num_layers=1, num_heads=2, head_dim=4, sample_size=4, num_classes=3)
CONDITIONED = Conditioned(LDM, rows=(('context', (2, 6)),), num_rows=4)


def info_of(network, **changes):
    values = {
        'schedule': Schedule(), 'prediction': 'eps', 'num_classes': 3,
        'image_shape': (4, 4, networks.unwrapped(network).in_channels), **changes,
    }  # fmt: skip
    return denoisers.DenoiserInfo(**values)


@pytest.mark.parametrize(
    'network',
    [tiny.NETWORK, ADM, LDM, PIXELS, DIT, PixArt(num_layers=1), CONDITIONED, Conditioned(ADM),
     AutoencoderKL(), VQAutoencoder()],
    ids=lambda network: type(networks.unwrapped(network)).__name__,
)  # fmt: skip
def test_settings_survive_json(network):
    settings = json.loads(json.dumps(networks.to_settings(network)))
    assert networks.from_settings(settings) == network


def test_a_family_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="family='gan': expected one of ddpm, adm"):
        networks.from_settings({'family': 'gan'})


def test_settings_of_the_first_family_and_of_its_process_are_those_that_were_always_written():
    # Names of artefacts are digests of them: a new entry would orphan every folder of before.
    assert 'family' not in networks.to_settings(tiny.NETWORK)
    assert set(denoisers.info_settings(tiny.INFO)) == {
        'schedule', 'prediction', 'image_shape', 'num_classes'
    }  # fmt: skip
    assert set(denoisers.info_settings(tiny.INFO)['schedule']) == {
        'kind', 'num_train_timesteps', 'beta_start', 'beta_end'
    }  # fmt: skip


@pytest.mark.parametrize('changes', [{}, {'learned_variance': True, 'is_latent': True}])
def test_what_a_sampler_must_know_survives_json(changes):
    info = dataclasses.replace(tiny.INFO, **changes)
    assert denoisers.make_info(json.loads(json.dumps(denoisers.info_settings(info)))) == info


def test_a_label_stands_for_its_row_of_the_table():
    teacher = tiny.random_denoiser(CONDITIONED, info_of(CONDITIONED))
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    table = teacher.params[networks.TABLE]['context']
    t = np.int32(5)
    by_label = teacher.predict(teacher.params, x, t, np.array([2, 0]))
    by_rows = teacher.predict(teacher.params, x, t, {'context': table[np.array([2, 0])]})
    by_mapping = teacher.predict(teacher.params, x, t, {'label': np.array([2, 0])})
    np.testing.assert_array_equal(by_label, by_rows)
    np.testing.assert_array_equal(by_label, by_mapping)
    swapped = teacher.predict(teacher.params, x, t, np.array([0, 2]))
    assert (np.asarray(swapped) != np.asarray(by_label)).any()


def test_labels_of_a_network_without_a_table_are_refused():
    with pytest.raises(ValueError, match='no table of conditions'):
        Conditioned(LDM).apply({'params': {}}, jnp.zeros((1, 4, 4, 3)), 0, jnp.zeros(1, jnp.int32))


def doubled_channels(params, x, t, y):
    """Prediction and variance that depend on the class."""
    y = y.astype(jnp.float32)[:, None, None, None]
    return params * jnp.concatenate([x + y, 10 * x - y], axis=-1)


@pytest.mark.parametrize('scale', [1.0, 2.0])
@pytest.mark.parametrize('keeps', [False, True])
def test_guidance_leaves_the_variance_alone_and_drops_it_unless_it_is_kept(scale, keeps):
    info = dataclasses.replace(tiny.INFO, learned_variance=True)
    x = np.random.default_rng(0).integers(-4, 4, (2, 8, 8, 1)).astype(np.float32)
    y = np.array([2, 0], np.int32)
    guided = denoisers.guided(doubled_channels, info, scale, keep_variance=keeps)
    out = np.asarray(guided(jnp.float32(1), x, np.int32(0), y))
    labels = y.astype(np.float32)[:, None, None, None]
    null = np.float32(info.num_classes)
    expected = [x + null + scale * (labels - null), 10 * x - labels]
    # Small integers: exact in float32.
    np.testing.assert_array_equal(out, np.concatenate(expected[: 1 + keeps], axis=-1))


def test_guidance_of_a_mapping_nulls_its_label_and_keeps_the_rest():
    y = {'label': jnp.array([0, 1]), 'low_res': jnp.ones((2, 2, 2, 3))}
    null = denoisers.null_like(y, tiny.INFO)
    assert null['label'].tolist() == [3, 3] and null['low_res'] is y['low_res']
    with pytest.raises(ValueError, match="low_res alone: expected an entry 'label'"):
        denoisers.null_like({'low_res': y['low_res']}, tiny.INFO)


@pytest.mark.parametrize(
    'network, rows', [(tiny.NETWORK, 4), (ADM, 3), (DIT, 4), (CONDITIONED, 4), (PIXELS, 0)]
)
def test_rows_of_the_class_table_are_counted(network, rows):
    assert networks.class_rows(network) == rows


@functools.cache
def layers_of(network, **changes):
    """Both presets are tested with every network, which is traced once."""
    info = info_of(network, **changes)
    shapes = denoisers.param_shapes(network, info)
    return denoisers.quantizable(denoisers.float_denoiser(network, shapes, info))


def specs(network, coverage, **changes):
    """(layers, plan) of a network under a preset."""
    layers = layers_of(network, **changes)
    return layers, denoisers.make_plan(layers, QuantConfig(coverage=coverage), network)


@pytest.mark.parametrize(
    'network, changes',
    [(ADM, {}), (CONDITIONED, {}), (PIXELS, {'num_classes': None}), (DIT, {})],
    ids=['adm', 'ldm', 'ldm without context', 'dit'],
)
def test_full_coverage_leaves_nothing_out_in_any_family(network, changes):
    layers, plan = specs(network, 'full', **changes)
    assert plan.keys() == layers.keys()
    assert {'scores', 'mix'} <= {path.rpartition('/')[2] for path in plan}
    for path, layer in layers.items():
        assert (plan[path].weight is not None) == (layer.weight_shape is not None)


@pytest.mark.parametrize(
    'network, changes, edges, floats, targets',
    [
        (
            ADM, {},
            ['time_embed/dense_0', 'time_embed/dense_1', 'conv_in', 'conv_out'],
            ['down_0/attention_0/q', 'mid/attention_0/out', 'mid/attention_0/attend/scores'],
            ['mid/block_0/conv1', 'mid/block_0/time_proj'],
        ),
        (
            CONDITIONED, {},
            ['time_embed/dense_0', 'conv_in', 'conv_out'],
            ['mid/attention_0/block_0/attn1/attend/mix', 'up_0/block_0/conv_shortcut'],
            ['mid/attention_0/block_0/attn2/q', 'mid/attention_0/proj_in'],
        ),
        (
            PIXELS, {'num_classes': None},
            ['conv_in'], ['mid/attention_0/v', 'down_0/attention_0/out'], ['mid/block_0/conv2'],
        ),
        (
            DIT, {},
            ['embed/time/dense_0', 'patches/proj', 'out'],
            ['block_0/attention/attend/scores'],
            ['block_0/attention/q', 'block_0/modulation', 'modulation_out'],
        ),
    ],
    ids=['adm', 'ldm', 'ldm without context', 'dit'],
)  # fmt: skip
def test_the_papers_coverage_means_the_same_in_every_family(
    network, changes, edges, floats, targets
):
    layers, plan = specs(network, 'paper', **changes)
    assert {*edges, *floats, *targets} <= layers.keys()
    for path in edges:
        assert plan[path].weight.bits == 8 and not plan[path].trainable, path
    for path in floats:
        assert path not in plan
    for path in targets:
        assert plan[path].weight.bits == 4 and plan[path].trainable, path


@pytest.mark.parametrize(
    'name, count',
    [
        ('lsun_bedrooms', 73),
        pytest.param('lsun_churches', 109, marks=pytest.mark.slow),
        pytest.param('cin256-v2', 265, marks=pytest.mark.slow),
    ],
)
def test_the_papers_coverage_of_its_networks_has_as_many_layers_as_its_code(name, count):
    # The constants that EfficientDM's scripts have users write for each model.
    network = ldm_weights.network_from_compvis(ldm_weights.PUBLISHED[name])
    params, num_classes = ldm_weights.ldm_shapes(network), None
    if network.context_dim is not None:
        shape = (1, network.context_dim)
        table = jax.ShapeDtypeStruct((1001, *shape), jnp.float32)
        params, num_classes = {**params, networks.TABLE: {'context': table}}, 1000
        network = Conditioned(network, rows=(('context', shape),), num_rows=1001)
    info = info_of(network, image_shape=(64, 64, 3), num_classes=num_classes)
    if name == 'lsun_churches':
        info = dataclasses.replace(info, image_shape=(32, 32, 4))
    layers = denoisers.quantizable(denoisers.float_denoiser(network, params, info))
    assert len(denoisers.make_plan(layers, QuantConfig(coverage='paper'), network)) == count
