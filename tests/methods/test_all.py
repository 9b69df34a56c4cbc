"""What holds for every method, on a small U-Net: the one test a new method must pass."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax import denoisers, exporting, finetune, methods, networks
from dmq_jax.config import (
    AdaptiveSoftmaxConfig,
    BlockLearningConfig,
    ChannelFactorsConfig,
    EfficientDMConfig,
    FinetuneConfig,
    FullFinetuningConfig,
    LSQConfig,
    PTQDConfig,
    QDiffusionConfig,
    QLoRAConfig,
    RepQViTConfig,
    RoundToNearestConfig,
    SamplerConfig,
    SVDQuantConfig,
    TCAQDMConfig,
    TFMQDMConfig,
    TuneQDMConfig,
)
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods import base
from dmq_jax.models import ddpm_unet
from dmq_jax.quant.layers import collect_stats, observe_inputs
from dmq_jax.quant.plan import (
    LayerSpec,
    Rule,
    layer_at,
    make_plan,
    paper_rules,
    parts_by_layer,
    split_joined,
)
from dmq_jax.quant.tensor import QuantSpec
from tests import tiny

# Rates for 30 steps instead of thousands.
CONFIGS = [
    RoundToNearestConfig(),
    EfficientDMConfig(
        lora_rank=4, lora_rate_per_scale=0.03, weight_scale_learning_rate=5e-3,
        input_scale_learning_rate=1e-2, zero_point_learning_rate=5e-2,
    ),
    EfficientDMConfig(lora_rank=4, lora_rate_per_scale=0.03, channels=ChannelFactorsConfig()),
    EfficientDMConfig(lora_rank=4, lora_rate_per_scale=0.03, branch_rank=1),
    LSQConfig(rate_per_scale=0.03),
    PTQDConfig(
        learning=BlockLearningConfig(rounding_learning_rate=0.2, input_scale_learning_rate=2e-2)
    ),
    RepQViTConfig(),
    SVDQuantConfig(rank=2),
    QDiffusionConfig(
        learning=BlockLearningConfig(rounding_learning_rate=0.2, input_scale_learning_rate=2e-2)
    ),
    TCAQDMConfig(
        channels=ChannelFactorsConfig(limit=3.0), softmax=AdaptiveSoftmaxConfig(choice='powers'),
        learning=BlockLearningConfig(rounding_learning_rate=0.2, input_scale_learning_rate=2e-2),
    ),
    TFMQDMConfig(
        learning=BlockLearningConfig(rounding_learning_rate=0.2, input_scale_learning_rate=2e-2)
    ),
    TuneQDMConfig(learning_rate=2e-2),
    QLoRAConfig(rank=2, learning_rate=2e-2),
    FullFinetuningConfig(learning_rate=1e-2),
]  # fmt: skip
IDS = [config.name for config in CONFIGS]
LEARNABLE = [
    config
    for config in CONFIGS
    if not isinstance(config, RoundToNearestConfig | RepQViTConfig | SVDQuantConfig)
]
NUM_STEPS = 30


class Network(nn.Module):
    """The U-Net with no blocks on its way down and in its middle: what remains compiles quickly."""

    @nn.compact
    def __call__(self, x, t, y=None):
        del y
        dtype = jnp.float32
        features = ddpm_unet.timestep_features(jnp.broadcast_to(t, x.shape[:1]), 4, False, 1.0)
        embedding = ddpm_unet.TimeEmbedding(16, dtype, name='time_embed')(features)
        h = ddpm_unet.conv3x3(8, 'conv_in', dtype)(x)
        h = ddpm_unet.UpLevel(
            8, 1, True, False, num_groups=2, epsilon=1e-6, scale_shift=False, head_dim=None,
            dtype=dtype, name='up_0',
        )(h, [h], embedding)  # fmt: skip
        return ddpm_unet.conv3x3(1, 'conv_out', dtype)(nn.silu(h))


NETWORK = Network()
INFO = denoisers.DenoiserInfo(
    schedule=Schedule(
        kind='scaled_linear', num_train_timesteps=100, beta_start=1e-3, beta_end=0.05
    ),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=None,
)
SPLIT = 'up_0/block_0/conv1'
FLOAT = ['time_embed/dense_0', 'conv_out', '.*/(k|v|out)']
TIMESTEPS = np.array([90, 50, 10], np.int32)
FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time

# Integer and float sums round differently in the last bit (seen: 1.3e-7 of the norm). Where a
# value then falls on the other side of a rounding boundary, one activation moves by a step of its
# 4-bit grid, and that moves others: allowed for, so that the test does not depend on the machine.
MODE_TOLERANCE = 0.05


def spec(bits, **options):
    return LayerSpec(
        weight=QuantSpec(bits=bits, symmetric=True, per_channel=True, observer='minmax'),
        inputs=QuantSpec(bits=bits, symmetric=False, observer='minmax'),
        **options,
    )


@pytest.fixture(scope='module', autouse=True)
def known_network():
    """Exports name the family of their network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.FAMILIES, 'small', Network)
        yield


@pytest.fixture(scope='module')
def teacher():
    return tiny.random_denoiser(NETWORK, INFO, tiny.like_initial)


@pytest.fixture(scope='module')
def plan(teacher):
    """EfficientDM's coverage of a part, with one attention's products, and one layer in parts.

    Of layers of each kind some are enough, and some stay float: fewer to compile, eleven times.
    """
    edge = spec(8, per_timestep=False, trainable=False)
    softmax = QuantSpec(bits=8, symmetric=False, observer='minmax')
    products = [
        Rule(pattern='.*/scores', spec=spec(4)),
        Rule(pattern='.*/mix', spec=spec(4, lhs=softmax)),
    ]
    layers = denoisers.quantizable(teacher)
    plan = make_plan(layers, [*products, *paper_rules(spec(4), edge, FLOAT)])
    split = split_joined({SPLIT: plan.pop(SPLIT)}, layers)
    return plan | split


@pytest.fixture(scope='module')
def images():
    return jnp.asarray(np.random.default_rng(1).standard_normal((4, 4, 4, 1)).astype(np.float32))


@pytest.fixture(scope='module')
def stats(teacher, plan, images):
    def visit(_, t):
        with observe_inputs(plan, 64, channels=True):
            _, found = NETWORK.apply({'params': teacher.params}, images, t, mutable=['stats'])
        return None, collect_stats(plan, found['stats'])

    scan = jax.jit(lambda ts: jax.lax.scan(visit, None, ts)[1], compiler_options=FAST_COMPILE)
    return scan(jnp.asarray(TIMESTEPS))


class Trained:
    """A method before and after distillation."""

    def __init__(self, config, teacher, plan, stats, images):
        self.config = config
        self.method = methods.make(config, plan, INFO.schedule.num_train_timesteps)
        self.init = jax.jit(self.method.init, compiler_options=FAST_COMPILE)
        self.start = self.init(teacher.params, stats, jax.random.key(0))
        self.bind = jax.jit(self.method.bind, compiler_options=FAST_COMPILE)
        loss = finetune.make_loss(
            teacher, self.method, plan, TIMESTEPS, 'nearest',
            FinetuneConfig(sampler=SamplerConfig()),
        )  # fmt: skip
        optimizer = self.method.optimizer(self.start, lambda step: 1.0)

        @jax.jit(compiler_options=FAST_COMPILE)
        def step(state, moments, t):
            (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(
                state, teacher.params, images, t, None, jnp.ones(())
            )
            updates, moments = optimizer.update(gradients, moments, state)
            state = jax.tree.map(jnp.add, state, updates)
            return state, moments, value, gradients

        state, moments = self.start, optimizer.init(self.start)
        self.losses = []
        for i in range(NUM_STEPS):
            t = jnp.asarray(TIMESTEPS[i % 3])
            state, moments, value, gradients = step(state, moments, t)
            self.losses.append(float(value))
            if i == 3:  # an update that starts at zero has passed its first gradients on
                self.gradients = gradients
        self.state = state
        self.num_programs = step._cache_size()
        self.bound = self.bind(teacher.params, self.state)


@pytest.fixture(scope='module', params=CONFIGS, ids=IDS)
def trained(request, teacher, plan, stats, images):
    return Trained(request.param, teacher, plan, stats, images)


@functools.cache
def jitted(predict):
    """One program for all methods whose trees are alike: their students are the same value."""
    return jax.jit(predict, compiler_options=FAST_COMPILE)


def leaves(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def moved_layers(trained, first):
    """Layers with a weight of which anything that is bound has changed."""

    def parts(bound, path):
        beside = bound.tables, bound.channels, bound.branches
        return bound.weights[path], *(entries.get(path) for entries in beside)

    def same(path):
        pairs = zip(*(leaves(parts(b, path)).values() for b in (first, trained.bound)), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    return {path for path in first.weights if not same(path)}


def test_every_method_is_tested_here():
    assert {type(config) for config in CONFIGS} == set(methods.METHODS)


def test_init_and_bind_are_pure(trained, teacher, stats):
    again = trained.init(teacher.params, stats, jax.random.key(0))
    assert_same(again, trained.start)
    assert_same(trained.bind(teacher.params, trained.state), trained.bound)


def test_the_state_is_a_tree_of_floats_and_keeps_its_structure(trained):
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.start)} == {jnp.dtype('float32')}
    assert jax.tree.structure(trained.state) == jax.tree.structure(trained.start)


@pytest.mark.parametrize('config', CONFIGS, ids=IDS)
def test_of_a_teacher_kept_in_bfloat16_everything_is_learnt_and_bound_in_float32(
    config, teacher, plan, stats, images
):
    method = methods.make(config, plan, INFO.schedule.num_train_timesteps)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), teacher.params)
    start = jax.eval_shape(method.init, params, stats, jax.random.key(0))
    loss = finetune.make_loss(
        teacher, method, plan, TIMESTEPS, 'nearest', FinetuneConfig(sampler=SamplerConfig())
    )
    (value, _), gradients = jax.eval_shape(
        jax.value_and_grad(loss, has_aux=True), start, params, images, jnp.int32(50), None,
        jnp.ones(()),
    )  # fmt: skip
    bound = jax.eval_shape(method.bind, params, start)
    beside = bound.tables, bound.params, bound.channels
    scales = [(weight.scale, weight.zero_point) for weight in bound.weights.values()]
    for leaf in jax.tree.leaves((start, value, gradients, scales, beside)):
        assert leaf.dtype == jnp.float32


def test_one_program_serves_all_timesteps_and_steps(trained):
    assert trained.num_programs == 1


def test_everything_the_plan_names_is_bound_and_nothing_else(trained, plan):
    assert set(trained.bound.weights) == {p for p, s in plan.items() if s.weight is not None}
    assert set(trained.bound.tables) == {p for p, s in plan.items() if s.inputs is not None}
    for path, roles in trained.bound.tables.items():
        rows = 3 if plan[path].per_timestep else 1
        for table in roles.values():
            assert table['scale'].shape == table['zero_point'].shape == (rows,)


def test_codes_are_integers_on_their_grid_with_positive_scales(trained, plan):
    for path, weight in trained.bound.weights.items():
        codes, (qmin, qmax) = np.asarray(weight.codes), plan[path].weight.grid
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert qmin <= codes.min() and codes.max() <= qmax
        assert float(weight.scale.min()) > 0
    for path, roles in trained.bound.tables.items():
        for role, table in roles.items():
            qmin, qmax = plan[path].activation(role).grid
            zeros = np.asarray(table['zero_point'])
            np.testing.assert_array_equal(zeros, np.rint(zeros))
            assert qmin <= zeros.min() and zeros.max() <= qmax
            assert float(table['scale'].min()) > 0


def test_integers_that_stand_still_are_bound_from_the_state_alone(trained, teacher):
    if trained.method.beside is None:
        pytest.skip('the integers of this method change while it learns')
    first = trained.bind(teacher.params, trained.start)
    assert_same(trained.bound.weights, first.weights)
    beside = jax.jit(trained.method.beside)(trained.state)
    assert not beside.weights
    assert_same(beside._replace(weights=trained.bound.weights), trained.bound)


def test_float_parameters_are_untouched(trained, teacher):
    before = leaves(teacher.params)
    student = leaves(base.with_weights(teacher.params, trained.bound.weights))
    kernels = {
        jax.tree_util.keystr(tuple(map(jax.tree_util.DictKey, (*layer.split('/'), 'kernel'))))
        for layer in map(layer_at, trained.bound.weights)
    }
    assert kernels < before.keys()
    for name, leaf in before.items():
        same = np.array_equal(student[name], leaf)
        assert same != (name in kernels), name


def test_gradients_are_finite_and_reach_every_learnable_group(trained):
    for name, gradient in leaves(trained.gradients).items():
        assert np.isfinite(gradient).all(), name
    if trained.config in LEARNABLE:
        for group in trained.gradients.keys() - {'affine', 'calibrated'}:
            reached = [g.any() for g in leaves(trained.gradients[group]).values()]
            # At one timestep a zero point has a gradient only where something is clipped. A group
            # that an option leaves empty has nothing to reach.
            share = np.mean(reached) if reached else 1.0
            assert share > 0.5, f'{group}: {share:.0%} of the tensors have a gradient'


def test_what_is_not_trainable_does_not_move(trained, plan, teacher):
    first = trained.bind(teacher.params, trained.start)
    fixed = [path for path, layer in plan.items() if not layer.trainable]
    assert fixed
    for path in fixed:
        assert_same(first.weights[path], trained.bound.weights[path])
        assert_same(first.tables[path], trained.bound.tables[path])
    if trained.config in LEARNABLE:
        assert_same(trained.start['calibrated'], trained.state['calibrated'])
        assert moved_layers(trained, first) == set(first.weights) - set(fixed)
    else:
        assert_same(trained.start, trained.state)


def test_distillation_beats_round_to_nearest(trained):
    # The first loss at each of the three timesteps is that of rounding to nearest.
    first, last = np.mean(trained.losses[:3]), np.mean(trained.losses[-3:])
    if trained.config in LEARNABLE:
        assert last < 0.8 * first, f'{first:.4g} -> {last:.4g}'
    else:
        assert last == pytest.approx(first, rel=1e-6)


def test_an_export_predicts_what_the_student_predicts(trained, teacher, plan, images, tmp_path):
    student = denoisers.fake_student(teacher, plan, trained.bound, TIMESTEPS, 'nearest')
    made = exporting.make(teacher, plan, trained.bound, TIMESTEPS, 'nearest')
    exporting.save(tmp_path / 'export', made)
    loaded = exporting.load(tmp_path / 'export')
    fake, integer = (exporting.denoiser(loaded, mode) for mode in ('fake', 'integer'))
    assert fake.predict == student.predict

    # Given back as float32: the parameters, and so the predictions, are the very same numbers.
    assert_same(fake.params['tables'], student.params['tables'])
    assert_same(fake.params['channels'], student.params['channels'])
    assert_same(fake.params['branches'], student.params['branches'])
    assert parts_by_layer(trained.bound.weights).keys() == {SPLIT}
    for path in trained.bound.weights:
        got, want = (base.get_kernel(d.params['params'], path) for d in (fake, student))
        np.testing.assert_array_equal(got, want, err_msg=path)

    t = jnp.asarray([90, 90, 50, 10])
    want, got = (np.asarray(jitted(d.predict)(d.params, images, t)) for d in (fake, integer))
    distance = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert distance < MODE_TOLERANCE, f'{distance:.2e}'
    kept = traverse_util.flatten_dict(integer.params['params'], sep='/')
    assert not {f'{layer_at(path)}/kernel' for path in trained.bound.weights} & set(kept)
