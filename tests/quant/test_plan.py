import jax
import jax.numpy as jnp
import pytest

from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant.layers import quantizable_layers
from dmq_jax.quant.plan import (
    LayerSpec,
    Part,
    QuantizableLayer,
    Rule,
    full_rules,
    layer_at,
    make_plan,
    paper_rules,
    part_at,
    parts_by_layer,
    split_joined,
    split_layers,
)
from dmq_jax.quant.tensor import QuantSpec

DENSE = QuantizableLayer(kind='dense', weight_shape=(4, 4))
PRODUCT = QuantizableLayer(kind='product', weight_shape=None)


def layer_spec(bits, **options):
    return LayerSpec(
        weight=QuantSpec(bits=bits, symmetric=True, per_channel=True),
        inputs=QuantSpec(bits=bits, symmetric=False),
        **options,
    )


TARGET, EDGE = layer_spec(4), layer_spec(8, per_timestep=False, trainable=False)
LAYERS = {'a/q': DENSE, 'a/k': DENSE, 'b/q': DENSE}


def test_the_first_matching_rule_wins():
    rules = [Rule(pattern='a/q', spec=EDGE), Rule(pattern='.*q', spec=TARGET)]
    plan = make_plan(LAYERS, [*rules, Rule(pattern='.*', spec=None)])
    assert plan == {'a/q': EDGE, 'b/q': TARGET}


def test_a_pattern_must_match_the_whole_path():
    rules = [Rule(pattern='a', spec=EDGE, optional=True), Rule(pattern='.*', spec=TARGET)]
    assert set(make_plan(LAYERS, rules).values()) == {TARGET}


def test_a_layer_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="No rule matches layer 'b/q'; end the list"):
        make_plan(LAYERS, [Rule(pattern='a/.*', spec=TARGET)])


@pytest.mark.parametrize('pattern', ['c/.*', 'a/q'])
def test_a_rule_that_matches_nothing_first_is_refused(pattern):
    rules = [Rule(pattern='a/.*', spec=TARGET), Rule(pattern=pattern, spec=EDGE)]
    with pytest.raises(ValueError, match='Rules that match no layer') as error:
        make_plan(LAYERS, [*rules, Rule(pattern='.*', spec=None)])
    assert pattern in str(error.value)


def test_a_preset_rule_may_match_nothing():
    rules = [Rule(pattern='none', spec=EDGE, optional=True), Rule(pattern='.*', spec=TARGET)]
    assert set(make_plan(LAYERS, rules)) == set(LAYERS)


def test_a_plan_that_quantizes_nothing_is_refused():
    with pytest.raises(ValueError, match='leave every layer in floating point'):
        make_plan(LAYERS, [Rule(pattern='.*', spec=None)])


def test_a_layer_without_a_kernel_has_no_weight_spec():
    plan = make_plan({'p': PRODUCT, 'd': DENSE}, full_rules(TARGET))
    assert plan['p'].weight is None and plan['p'].inputs == TARGET.inputs
    assert plan['d'] == TARGET


def test_a_product_whose_inputs_stay_float_is_left_out():
    weights_only = LayerSpec(weight=TARGET.weight, inputs=None)
    assert list(make_plan({'p': PRODUCT, 'd': DENSE}, full_rules(weights_only))) == ['d']


@pytest.fixture(scope='module')
def layers():
    network = DDPMUNet(
        channels=(4, 8), in_channels=1, layers_per_block=1, num_groups=2,
        down_attention=(False, True), num_class_embeds=3,
    )  # fmt: skip
    inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros((), jnp.int32), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)['params']
    return quantizable_layers(network.apply, params, *inputs)


RES_BLOCK = ('conv1', 'time_proj', 'conv2')
ATTENTION = ('q', 'k', 'v', 'out')
EDGES = {'time_embed/dense_0', 'time_embed/dense_1', 'conv_in', 'conv_out'}
# 1x1 shortcuts where the width changes: 4 -> 8 down; every block on the way up, fed with a skip.
SHORTCUTS = {'down_1/block_0', 'up_0/block_0', 'up_0/block_1', 'up_1/block_0', 'up_1/block_1'}
BLOCKS = {'down_0/block_0', 'down_1/block_0', 'mid/block_0', 'mid/block_1'} | SHORTCUTS
ATTENTIONS = {'down_1/attention_0', 'mid/attention_0', 'up_0/attention_0', 'up_0/attention_1'}
FLOAT = {f'{block}/conv_shortcut' for block in SHORTCUTS} | {'down_0/downsample'}
PRODUCTS = {f'{block}/{name}' for block in ATTENTIONS for name in ('scores', 'mix')}
TUNED = (
    {f'{block}/{name}' for block in BLOCKS for name in RES_BLOCK}
    | {f'{block}/{name}' for block in ATTENTIONS for name in ATTENTION}
    | {'up_0/upsample'}
)


def test_every_layer_of_the_network_is_found_with_its_kind(layers):
    assert set(layers) == EDGES | FLOAT | PRODUCTS | TUNED
    kinds = {path: layer.kind for path, layer in layers.items()}
    assert {path for path, kind in kinds.items() if kind == 'product'} == PRODUCTS
    assert layers['conv_in'] == QuantizableLayer(kind='conv', weight_shape=(3, 3, 1, 4))
    assert layers['time_embed/dense_0'] == QuantizableLayer(kind='dense', weight_shape=(4, 16))
    assert list(layers)[:3] == ['time_embed/dense_0', 'time_embed/dense_1', 'conv_in']


def test_paper_coverage_is_that_of_the_authors_code(layers):
    plan = make_plan(layers, paper_rules(TARGET, EDGE))
    assert {path for path, spec in plan.items() if spec == EDGE} == EDGES
    assert {path for path, spec in plan.items() if spec == TARGET} == TUNED
    assert set(plan) == EDGES | TUNED


def test_full_coverage_exempts_nothing_and_includes_the_products(layers):
    plan = make_plan(layers, full_rules(TARGET))
    assert set(plan) == set(layers)
    assert {spec.inputs for spec in plan.values()} == {TARGET.inputs}
    assert {path for path, spec in plan.items() if spec.weight is None} == PRODUCTS


JOINED = QuantizableLayer(kind='conv', weight_shape=(3, 3, 6, 4), joined=2)


def test_parts_of_layers_are_named_by_the_channels_they_see():
    part = part_at('up/conv1/inputs_0_32')
    assert part == Part('up/conv1', 0, 32) and part.path == 'up/conv1/inputs_0_32'
    assert part_at('inputs_4_6').path == 'inputs_4_6'
    assert part_at('up/conv1') is None
    assert [layer_at(path) for path in ('a/b', 'a/b/inputs_0_2')] == ['a/b', 'a/b']


def test_only_layers_of_a_joined_input_are_split():
    layers = {'up/conv1': JOINED, 'up/conv2': DENSE}
    plan = split_joined(dict.fromkeys(layers, TARGET), layers)
    assert list(plan) == ['up/conv1/inputs_0_2', 'up/conv1/inputs_2_6', 'up/conv2']
    assert set(plan.values()) == {TARGET}
    parts = [part_at(path) for path in list(plan)[:2]]
    assert parts_by_layer(reversed(plan)) == {'up/conv1': tuple(parts)}
    split = split_layers(layers, plan)
    assert [layer.weight_shape for layer in split.values()] == [(3, 3, 2, 4), (3, 3, 4, 4), (4, 4)]


def test_blocks_fed_with_a_skip_say_where_their_input_is_joined(layers):
    joined = {path: layer.joined for path, layer in layers.items() if layer.joined is not None}
    ups = ('up_0/block_0', 'up_0/block_1', 'up_1/block_0', 'up_1/block_1')
    # From below come 8, 8, 8 and 4 channels; the skips have 8, 4, 4 and 4.
    want = dict(zip(ups, (8, 8, 8, 4), strict=True))
    assert joined == {
        f'{b}/{name}': n for b, n in want.items() for name in ('conv1', 'conv_shortcut')
    }
    assert layers['up_0/block_1/conv1'].weight_shape[-2] == 12
