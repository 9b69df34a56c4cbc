import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax.runtime import programs
from dmq_jax.runtime.programs import NetworkProgram, are_known, network_options


@pytest.fixture
def asked_anew():
    """The options are asked for once in a process."""
    found = programs._float_options, programs._ordering_options
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def inputs():
    rng = np.random.default_rng(0)
    shapes = (1, 16, 16, 32), (3, 3, 32, 32)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_options_are_given_to_those_that_know_them():
    assert are_known({'xla_cpu_multi_thread_eigen': True})
    assert not are_known({'xla_cpu_no_such_option': True})


@pytest.mark.skipif(network_options() is None, reason='this back end or its XLA has no such option')
def test_the_convolutions_of_a_network_are_not_given_to_another_library():
    texts = [
        jitted.lower(*inputs()).compile().as_text()
        for jitted in (jax.jit(convolution), NetworkProgram(convolution).jitted())
    ]
    told, as_ever = ('ynn' in text for text in texts[::-1])
    assert not told
    # Of a version that gives none away there is nothing to see.
    if not as_ever:
        pytest.skip('XLA keeps its convolutions untold')
    assert ' convolution(' in texts[1]


@pytest.mark.skipif(network_options() is None, reason='this back end or its XLA has no such option')
@pytest.mark.parametrize('has_direct', [False, True])
def test_steps_are_told_what_networks_are_but_where_they_have_convolutions_of_integers(
    has_direct, monkeypatch
):
    monkeypatch.setattr(programs, 'DIRECT_IS_FAST_ON_CPU', has_direct)
    told = programs.step_options(has_integers=False)
    assert network_options().items() <= told.items()
    integers = programs.step_options(has_integers=True) or {}
    without = told.keys() - network_options().keys()
    assert integers.keys() == (without if has_direct else told.keys())


def test_copies_are_arrays_of_their_own_where_the_others_lie():
    tree = {'a': jnp.arange(3.0), 'b': np.ones(2, np.float32)}
    copies = programs.copied(tree)
    jax.tree.map(np.testing.assert_array_equal, copies, tree)
    assert copies['a'].sharding == tree['a'].sharding
    assert copies['a'].unsafe_buffer_pointer() != tree['a'].unsafe_buffer_pointer()
    # Placed explicitly only what was: a step of both kinds would be compiled twice.
    placed = jax.device_put(np.ones(2), jax.devices()[-1])
    copies = programs.copied({'a': placed})
    assert copies['a'].committed and copies['a'].sharding == placed.sharding
    assert not programs.copied(tree)['a'].committed


def test_other_back_ends_are_told_nothing(asked_anew, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert network_options() is None
    assert programs.step_options(has_integers=False) is None


def test_an_xla_that_does_not_know_the_options_is_told_nothing(asked_anew, monkeypatch):
    monkeypatch.setattr(programs, 'are_known', lambda options: False)
    assert network_options() is None
    assert programs.step_options(has_integers=True) is None
    x, kernel = inputs()
    np.testing.assert_array_equal(
        NetworkProgram(convolution)(x, kernel), jax.jit(convolution)(x, kernel)
    )


def test_a_network_program_is_compiled_once_and_asks_for_nothing_before_its_first_call(
    asked_anew, monkeypatch
):
    program = NetworkProgram(convolution)
    assert programs._float_options.cache_info().misses == 0
    x, kernel = inputs()
    first, second = program(x, kernel), program(2 * x, kernel)
    assert program.jitted()._cache_size() == 1
    # Another order of 288 float32 products.
    np.testing.assert_allclose(first, convolution(x, kernel), rtol=0, atol=1e-4)
    np.testing.assert_allclose(second, 2 * first, rtol=0, atol=1e-4)


def test_static_arguments_and_the_function_within_other_programs():
    program = NetworkProgram(lambda count, x: count * x, static_argnums=0)
    assert float(program(3, jnp.ones(()))) == 3
    assert float(jax.jit(lambda x: program.function(2, x))(jnp.ones(()))) == 2


@pytest.mark.parametrize('dtype, is_told', [('int8', False), ('uint8', False), ('float32', True)])
def test_programs_of_integer_weights_are_told_nothing(dtype, is_told, monkeypatch):
    monkeypatch.setattr(programs, 'DIRECT_IS_FAST_ON_CPU', True)
    weights = {'kernel': jnp.ones((3, 3), dtype), 'bias': jnp.ones(3)}
    assert network_options(weights) == (network_options() if is_told else None)
    program = NetworkProgram(lambda x, weights: x @ weights['kernel'].astype('float32'), weights=1)
    np.testing.assert_array_equal(program(jnp.ones((1, 3)), weights), 3 * np.ones((1, 3)))
    assert program.jitted(weights)._cache_size() == 1
    if network_options() is not None:
        assert (program.jitted(weights) is program.jitted()) == is_told


def test_what_is_called_once_is_compiled_each_time_and_not_kept():
    traced = []

    def function(x):
        traced.append(x)
        return x + 1

    for _ in range(2):
        assert programs.call_once(function, jnp.zeros(())) == 1
    assert len(traced) == 2
    # Within another program it is part of that one, and nothing is computed.
    made = jax.eval_shape(lambda: programs.call_once(function, jnp.zeros(3)))
    assert made.shape == (3,) and isinstance(traced[-1], jax.core.Tracer)


def test_a_program_that_is_compiled_alone_runs_on_and_is_traced_anew_by_others():
    traced = []

    @jax.jit
    def function(x):
        traced.append(x)
        return 2 * x

    compiled = programs.compile_alone(function, jnp.ones(3))
    for _ in range(2):
        np.testing.assert_array_equal(compiled(jnp.ones(3)), [2, 2, 2])
    assert len(traced) == 1
    function(jnp.ones(3))
    assert len(traced) == 2
