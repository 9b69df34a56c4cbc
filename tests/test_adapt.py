import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from dmq_jax import adapt, denoisers, exporting, methods, scale_sets
from dmq_jax.config import (
    AdaptConfig,
    EfficientDMConfig,
    FullFinetuningConfig,
    QLoRAConfig,
    QuantConfig,
    TuneQDMConfig,
)
from dmq_jax.methods import base
from dmq_jax.models.autoencoder import Moments
from dmq_jax.runtime import hosts, log, mesh, programs
from tests import tiny, tiny_conditional

FAST_COMPILE = {'xla_backend_optimization_level': 0}  # tiny tensors: compiling is all the time
TIMESTEPS = np.array([75, 25], np.int32)  # of tables, which no method here has
CONFIG = AdaptConfig(num_iterations=24, batch_size=8, log_every=6)


@pytest.fixture(scope='module')
def plan():
    quant = QuantConfig(
        coverage='full', weight_bits=3, activation_bits=32, weight_observer='minmax'
    )
    return denoisers.make_plan(denoisers.quantizable(tiny_conditional.teacher()), quant)


def images():
    pixels, labels = tiny.real_images(side=4)
    return {'images': pixels.astype(np.float32) / 127.5 - 1, 'labels': labels}


class Adapted:
    def __init__(self, config, plan, folder):
        self.teacher, self.plan, self.folder = tiny_conditional.teacher(), plan, folder
        self.method = methods.make(config, plan, tiny_conditional.INFO.schedule.num_train_timesteps)
        self.start = jax.device_get(
            programs.call_once(self.method.init, self.teacher.params, {}, jax.random.key(0))
        )
        self.state = self.run().state

    def run(self, folder=None, sizes=(1,)):
        return adapt.run(
            self.teacher, self.method, self.start, self.plan, TIMESTEPS, 'nearest', CONFIG,
            sets=[tuple(images().values())], key=jax.random.key(1), workdir=folder or self.folder,
            device_mesh=mesh.make_mesh(*sizes), description='test',
        )  # fmt: skip

    def exported(self, state):
        bound = jax.jit(self.method.bind)(self.teacher.params, state)
        return exporting.make(self.teacher, self.plan, bound, TIMESTEPS, 'nearest')

    def loss(self, *options):
        return adapt.make_loss(self.teacher, self.method, self.plan, TIMESTEPS, 'nearest', *options)


@pytest.fixture(scope='module')
def adapted(plan, tmp_path_factory):
    config = TuneQDMConfig(learning_rate=0.02)
    return Adapted(config, plan, tmp_path_factory.mktemp('adapt'))


@pytest.fixture(scope='module')
def branched(plan, tmp_path_factory):
    config = QLoRAConfig(rank=2, learning_rate=0.02)
    return Adapted(config, plan, tmp_path_factory.mktemp('branched'))


@pytest.fixture(scope='module')
def tuned_float(tmp_path_factory):
    config = FullFinetuningConfig(learning_rate=0.005)
    return Adapted(config, {}, tmp_path_factory.mktemp('float'))


@pytest.mark.parametrize('name', ['adapted', 'branched', 'tuned_float'])
def test_the_denoising_loss_falls(name, request):
    losses = [row['loss'] for row in log.read_metrics(request.getfixturevalue(name).folder)]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0], losses


def test_no_float_kernel_is_among_the_constants_of_integers_that_stand_still(adapted, plan):
    constants = adapt.make_constants(adapted.teacher, adapted.method, adapted.start, plan)
    names = traverse_util.flatten_dict(constants.params, sep='/')
    assert not {f'{path}/kernel' for path in constants.weights} & set(names)
    for path, weight in constants.weights.items():
        kernel = base.get_kernel(adapted.teacher.params, path)
        # 3 bits are stored in 4; a channel of few inputs is filled up to whole bytes.
        assert weight.codes.nbytes <= max(kernel.size // 2, kernel.size // kernel.shape[-2] * 4)
        assert weight.codes.dtype == np.uint8


def test_a_float_network_that_is_tuned_is_exported_as_it_is(tuned_float):
    exported = tuned_float.exported(tuned_float.state)
    assert not exported.weights and not exported.plan
    flat = traverse_util.flatten_dict(exported.params, sep='/')
    assert flat.keys() == tuned_float.state['params'].keys()
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, tuned_float.state['params'][name])
        assert np.any(leaf != base.get_leaf(tuned_float.teacher.params, name)), name


def test_branches_are_switched_on_the_same_integers(branched, tmp_path):
    first, second = branched.exported(branched.start), branched.exported(branched.state)
    scale_sets.save(tmp_path / 'set.safetensors', second)
    switched = scale_sets.load(tmp_path / 'set.safetensors', first)
    jax.tree.map(np.testing.assert_array_equal, dict(switched.branches), dict(second.branches))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(branched.state['branch']))
    assert scale_sets.size_bytes(second) == 2 * numbers  # float16


def test_a_network_with_nothing_to_switch_has_no_set(tuned_float, tmp_path):
    with pytest.raises(ValueError, match='nothing to save'):
        scale_sets.save(tmp_path / 'set', tuned_float.exported(tuned_float.start))


@pytest.mark.parametrize(
    ('name', 'groups'),
    [('adapted', ('input', 'output')), ('branched', ('branch',)), ('tuned_float', ('params',))],
)
def test_the_numbers_trained_are_those_that_move(name, groups, request):
    run = request.getfixturevalue(name)
    trained = base.num_trained(run.start, [run.method.optimizer])
    leaves = jax.tree.leaves([run.start[group] for group in groups])
    assert trained == sum(leaf.size for leaf in leaves)
    assert base.num_trained(run.start, []) == 0


def test_scales_of_all_experts_learn_and_nothing_else(adapted):
    for end in ('input', 'output'):
        for path, leaf in adapted.state[end].items():
            moved = np.asarray(leaf) != np.asarray(adapted.start[end][path])
            assert moved.any(axis=1).all(), f'{end} {path}'
    jax.tree.map(
        np.testing.assert_array_equal, adapted.state['calibrated'], adapted.start['calibrated']
    )


def test_a_finished_run_is_not_repeated(adapted):
    jax.tree.map(np.testing.assert_array_equal, adapted.run().state, adapted.state)
    assert len(log.read_metrics(adapted.folder)) == 4


@pytest.mark.parametrize('sizes', [(8,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_a_run_stopped_and_continued_on_other_devices_has_the_same_losses(
    adapted, tmp_path, monkeypatch, sizes
):
    answers = iter([False] * 8 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(hosts, 'stop_requested', lambda: next(answers))
        with pytest.raises(SystemExit) as stopped:
            adapted.run(tmp_path, sizes)
    assert stopped.value.code == hosts.REQUEUE
    monkeypatch.setattr(hosts, 'stop_requested', lambda: False)
    adapted.run(tmp_path)
    # The line of the ninth step, where the run stopped, splits a mean of six.
    one, moved = (
        {row['step']: row['loss'] for row in log.read_metrics(folder)}
        for folder in (adapted.folder, tmp_path)
    )
    assert sorted(moved) == [6, 9, 12, 18, 24]
    mean = (moved[9] + moved[12]) / 2
    np.testing.assert_allclose(
        [moved[6], mean, moved[18], moved[24]], [one[s] for s in (6, 12, 18, 24)], rtol=1e-3
    )


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(adapted, tmp_path):
    with pytest.raises(ValueError, match='adapt.batch_size=8 is not divisible by 3 devices'):
        adapted.run(tmp_path, (3,))


@pytest.fixture(scope='module')
def constants(adapted):
    return adapt.make_constants(adapted.teacher, adapted.method, adapted.state, adapted.plan)


@pytest.fixture(scope='module')
def loss(adapted, constants):
    """The loss of images or of Gaussians, and labels, without dropout."""
    run = jax.jit(adapted.loss(0.0, ''), compiler_options=FAST_COMPILE)
    return lambda images, labels: float(
        run(adapted.state, constants, images, labels, jax.random.key(2))
    )


def test_gradients_do_not_depend_on_what_is_computed_again(adapted, constants):
    batch = {name: array[:2] for name, array in images().items()}

    def gradients(remat):
        slope = jax.jit(jax.grad(adapted.loss(0.1, remat)), compiler_options=FAST_COMPILE)
        return jax.device_get(slope(adapted.state, constants, *batch.values(), jax.random.key(2)))

    kept, again = gradients(''), gradients(CONFIG.remat)
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
    # The same operations, perhaps fused otherwise.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * size)
    jax.tree.map(close, kept, again)


def test_what_is_not_to_be_forgotten_has_a_loss_of_its_own_weight(adapted, constants, loss):
    batch = {name: array[:4] for name, array in images().items()}

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def value(prior_weight, state, constants):
        return adapted.loss(0.0, '', prior_weight)(
            state, constants, *batch.values(), jax.random.key(2)
        )

    # The loss is a mean, so that of all images is the mean of both halves.
    mean = loss(*batch.values())
    once, thrice = (float(value(weight, adapted.state, constants)) for weight in (1.0, 3.0))
    prior = (thrice - once) / 2
    assert once == pytest.approx(2 * mean, rel=1e-5)
    assert 0 < prior < once


def test_latents_are_drawn_anew_for_every_step_from_their_gaussians(loss):
    pixels, labels = (array[:4] for array in images().values())

    def value(log_variance):
        moments = Moments(pixels, np.full(pixels.shape, log_variance, np.float32))
        return loss(moments, labels)

    # Of a Gaussian without width the mean is drawn, of another its mean and noise of its own key.
    assert value(-60.0) == pytest.approx(loss(pixels, labels), rel=1e-6)
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(2), 3), pixels.shape))
    drawn = pixels + np.exp(np.float32(-1)) * noise
    assert value(-2.0) == pytest.approx(loss(drawn, labels), rel=1e-6)
    assert value(-2.0) != pytest.approx(value(-60.0), rel=1e-3)


def test_a_step_sees_a_batch_of_each_set_and_of_the_first_one_the_same_as_without_the_other():
    sets = [
        (np.arange(begin, begin + size, dtype=np.float32).reshape(-1, 1, 1, 1), np.arange(size))
        for begin, size in ((0, 20), (100, 30))
    ]

    def loss(state, constants, pixels, labels, key):
        del constants, key
        seen = jnp.concatenate([pixels.reshape(-1), labels.astype(jnp.float32)])
        return jnp.sum(state['weights'] * seen)

    def drawn(*sets):
        step = adapt.make_train_step(
            loss, optax.sgd(1.0), 4, jax.random.key(0), mesh.make_mesh(1), has_integers=False
        )
        state = {'weights': jnp.zeros(8 * len(sets))}
        train = adapt.TrainState(state, optax.sgd(1.0).init(state), jnp.zeros((), jnp.int32))
        # The gradient of each weight is what it was multiplied by.
        return -np.asarray(step(train, None, *sets)[0].state['weights'])

    alone, both = drawn(sets[0]).reshape(2, 4), drawn(*sets).reshape(2, 8)
    np.testing.assert_array_equal(both[:, :4], alone)
    np.testing.assert_array_equal(both[0, 4:], 100 + both[1, 4:])
    assert len(set(both[0, 4:])) > 1


def test_a_run_may_have_images_that_are_not_to_be_forgotten(adapted, tmp_path):
    class_images, labels = (array[:6] for array in images().values())
    config = dataclasses.replace(CONFIG, num_iterations=2, prior_weight=0.5)
    state = adapt.run(
        adapted.teacher, adapted.method, adapted.start, adapted.plan, TIMESTEPS, 'nearest',
        config, sets=[tuple(images().values()), (class_images, labels)], key=jax.random.key(1),
        workdir=tmp_path, device_mesh=mesh.make_mesh(1), description='test',
    ).state  # fmt: skip
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert any(
        np.any(a != b) for a, b in zip(
            jax.tree.leaves(state['output']), jax.tree.leaves(adapted.start['output']), strict=True
        )
    )  # fmt: skip


def test_a_loss_on_features_is_refused(plan, tmp_path):
    method = methods.make(EfficientDMConfig(loss='feature'), plan)
    with pytest.raises(ValueError, match="choose loss='output'"):
        adapt.run(
            tiny_conditional.teacher(), method, {}, plan, TIMESTEPS, 'nearest', CONFIG,
            sets=[tuple(images().values())], key=jax.random.key(0), workdir=tmp_path,
            device_mesh=mesh.make_mesh(1), description='test',
        )  # fmt: skip


def test_sets_of_scales_are_switched_on_the_same_integers(adapted, tmp_path):
    first, second = adapted.exported(adapted.start), adapted.exported(adapted.state)
    scale_sets.save(tmp_path / 'second.safetensors', second)
    switched = scale_sets.load(tmp_path / 'second.safetensors', first)
    x, t, y = jnp.ones((2, 4, 4, 1)), jnp.asarray([90, 3]), jnp.asarray([0, 1])

    @jax.jit
    def predict(params):
        return exporting.denoiser(first).predict(params, x, t, y)

    want, got, before = (
        np.asarray(predict(exporting.denoiser(e).params)) for e in (second, switched, first)
    )
    np.testing.assert_array_equal(got, want)
    assert np.any(got != before)


def test_a_file_of_scales_holds_scales_alone(adapted, tmp_path):
    exported = adapted.exported(adapted.state)
    path = tmp_path / 'set.safetensors'
    scale_sets.save(path, exported)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(dict(exported.channels)))
    # Two experts' numbers and their two timesteps in float32, and names.
    assert 4 * numbers < path.stat().st_size < 4 * numbers + 8 + 160 * 2 * len(adapted.plan)


def test_scales_of_other_integers_are_refused(adapted, tmp_path):
    exported = adapted.exported(adapted.state)
    scale_sets.save(tmp_path / 'set.safetensors', exported)
    path, weight = next(iter(exported.weights.items()))
    other = exported._replace(
        weights={**exported.weights, path: exporting.pack(
            np.zeros(weight.shape), weight.scale, weight.zero_point, spec=weight.spec
        )}
    )  # fmt: skip
    with pytest.raises(ValueError, match='other integers'):
        scale_sets.load(tmp_path / 'set.safetensors', other)
