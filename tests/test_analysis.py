import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax import analysis, denoisers
from dmq_jax.config import RuleConfig, SamplerConfig
from tests import tiny

SAMPLER = SamplerConfig(num_steps=5)
# The same float32 sums in another order.
TOLERANCE = 1e-5


def make_student(floating, **quant):
    """Layers whose path matches `floating` stay float: there is less to compile."""
    rule = RuleConfig(pattern=floating, weight_bits=32, activation_bits=32)
    plan, bound = tiny.rounded(per_timestep=False, rules=(rule,), **quant)
    return denoisers.fake_student(
        tiny.teacher(), plan, bound, tiny.calibration().timesteps, 'nearest'
    )


def measure(teacher, student):
    return analysis.run(teacher, student, SAMPLER, key=jax.random.key(3), num_images=4)


@pytest.fixture(scope='module')
def teacher():
    return tiny.teacher()


@pytest.fixture(scope='module')
def student():
    return make_student('(mid|up_0)/.*', weight_bits=3, activation_bits=4)


@pytest.fixture(scope='module')
def counted(teacher, student):
    """An analysis, and how often it traced a program."""
    traces = []

    def predict_mixed(*args):
        traces.append(len(args))
        return original(*args)

    original = analysis.predict_mixed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, 'predict_mixed', predict_mixed)
        return measure(teacher, student), len(traces)


@pytest.fixture(scope='module')
def result(counted):
    return counted[0]


# One program says both.
mix = jax.jit(analysis.predict_mixed, static_argnums=0)


@pytest.mark.parametrize('is_on', [False, True])
def test_all_gates_shut_is_the_teacher_and_all_open_the_student(teacher, student, is_on):
    x = jax.random.normal(jax.random.key(4), (3, *tiny.INFO.image_shape))
    t, y = jnp.array([40, 20, 1]), jnp.arange(3)
    gates = {path: jnp.asarray(is_on) for path, _ in student.predict.plan}
    mixed = mix(student.predict, teacher.params, student.params, gates, gates, x, t, y)
    network = student if is_on else teacher
    expected = jax.jit(network.predict)(network.params, x, t, y)
    np.testing.assert_allclose(mixed, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_layer_and_timestep_has_its_error(result, student):
    assert result['timesteps'] == sorted(result['timesteps'], reverse=True)
    assert list(result['layers']) == [path for path, _ in student.predict.plan]
    for errors in result['error'].values():
        assert len(errors) == SAMPLER.num_steps and all(e > 0 for e in errors)
    assert all(layer['sensitivity'] >= 0 for layer in result['layers'].values())
    assert json.loads(json.dumps(result)) == result


def test_kernel_errors_equal_their_definition(result, teacher, student):
    before, after = (
        traverse_util.flatten_dict(params, sep='/')
        for params in (teacher.params, student.params['params'])
    )
    with_kernel = 0
    for path, layer in result['layers'].items():
        if (name := f'{path}/kernel') not in before:
            assert layer['weight_error'] is None
            continue
        with_kernel += 1
        w, rounded = (np.asarray(tree[name], np.float64) for tree in (before, after))
        expected = ((w - rounded) ** 2).sum() / (w**2).sum()
        assert layer['weight_error'] == pytest.approx(expected, rel=1e-9)
    assert with_kernel > 5


def test_float_activations_leave_the_weights_to_blame(teacher):
    student = make_student('(?!conv_in).*', weight_bits=3, activation_bits=32)
    error = measure(teacher, student)['error']
    assert error['student'] == error['weights']
    assert max(error['activations']) == 0 < min(error['weights'])


def test_a_layer_alone_explains_a_student_that_quantizes_nothing_else(teacher, student, result):
    path = 'conv_in'
    plan = tuple(item for item in student.predict.plan if item[0] == path)
    flat = traverse_util.flatten_dict(teacher.params, sep='/')
    quantized = traverse_util.flatten_dict(student.params['params'], sep='/')
    flat[f'{path}/kernel'] = quantized[f'{path}/kernel']
    alone = student._replace(
        predict=denoisers.QuantizedPredict(tiny.NETWORK, plan, 'nearest', 'fake'),
        params={
            **student.params,
            'params': traverse_util.unflatten_dict(flat, sep='/'),
            'tables': {path: student.params['tables'][path]},
        },
    )
    found, expected = (r['layers'][path] for r in (measure(teacher, alone), result))
    assert found['sensitivity'] == pytest.approx(expected['sensitivity'], rel=TOLERANCE)


def test_one_program_answers_every_question(counted):
    assert counted[1] == 1


def test_an_error_is_relative_to_each_target():
    target = np.array([[3.0, 4.0], [0.0, 2.0]])
    value = np.array([[3.0, 9.0], [0.0, 1.0]])
    assert analysis.mean_error(value, target) == pytest.approx((25 / 25 + 1 / 4) / 2)
    assert analysis.mean_error(np.zeros((1, 2)), np.zeros((1, 2))) == 0
