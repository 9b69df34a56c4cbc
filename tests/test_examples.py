"""What a block is shown, on a network of two blocks and the layers around them."""

import jax
import numpy as np
import pytest

from dmq_jax import blocks, denoisers, examples, methods, trajectories
from dmq_jax.config import QuantConfig, ReconstructConfig, RoundToNearestConfig, SamplerConfig
from dmq_jax.methods.base import JointBlock
from dmq_jax.quant.layers import recorded_calls
from dmq_jax.runtime import mesh
from tests import tiny_blocks

CONFIG = ReconstructConfig(
    num_timesteps=2, num_images=12, batch_size=8, sampler=SamplerConfig(num_steps=4)
)
JOINT = JointBlock('.*/time_proj', '.*/time_proj')
# The same floats, added in the order that another program chooses.
TOLERANCE = 1e-6


@pytest.fixture(scope='module')
def plan():
    quant = QuantConfig(
        weight_bits=4, activation_bits=8, coverage='full', weight_observer='minmax',
        activation_observer='minmax',
    )  # fmt: skip
    return denoisers.make_plan(denoisers.quantizable(tiny_blocks.teacher()), quant)


@pytest.fixture(scope='module')
def inputs():
    teacher = tiny_blocks.teacher()
    return trajectories.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8))


@pytest.fixture(scope='module')
def bound(plan, inputs):
    teacher = tiny_blocks.teacher()
    method = methods.make(RoundToNearestConfig(), plan, 50)
    stats = tiny_blocks.observe(teacher, plan, inputs)

    @jax.jit
    def bind(params, stats):
        return method.bind(params, method.init(params, stats, jax.random.key(0)))

    return bind(teacher.params, stats)


def seen(predict, params, inputs, is_wanted=bool):
    """Arguments and output of the wanted modules of a network, by path: of all but itself."""

    @jax.jit
    def run(params, inputs):
        with recorded_calls(is_wanted) as calls:
            predict(params, *inputs)
        return {path: (call.args, call.output) for path, call in calls.items()}

    return run(params, inputs)


def make_recorder(plan, inputs, found, device_mesh=None):
    teacher = tiny_blocks.teacher()
    return examples.Recorder(
        teacher, teacher.params, plan, tiny_blocks.visited(inputs), 'nearest', found,
        batch_size=CONFIG.batch_size, device_mesh=device_mesh or mesh.make_mesh(1),
    )  # fmt: skip


def all_examples(plan, inputs, bound, *, rounds_inputs=True):
    found = blocks.find_blocks(tiny_blocks.teacher(), plan, CONFIG.blocks, JOINT)
    recorder = make_recorder(plan, inputs, found)
    return {
        block.name: recorder.record(block, bound, inputs, rounds_inputs=rounds_inputs)
        for block in found
    }


def assert_close(got, wanted):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize('rounds_inputs', [True, False])
def test_inputs_are_of_the_quantized_network_and_targets_of_the_float_one(
    plan, inputs, bound, rounds_inputs
):
    teacher = tiny_blocks.teacher()
    got = all_examples(plan, inputs, bound, rounds_inputs=rounds_inputs)
    used = plan if rounds_inputs else blocks.without_inputs(plan)
    student = denoisers.fake_student(teacher, used, bound, tiny_blocks.visited(inputs), 'nearest')
    if not rounds_inputs:
        student.params['tables'] = {}
    floats = seen(teacher.predict, teacher.params, inputs)
    students = seen(student.predict, student.params, inputs)
    for path in ('conv_in', 'block_0', 'block_1', 'conv_out', 'time_embed/dense_1'):
        _, shown = got[path]
        jax.tree.map(assert_close, shown.args, students[path][0])
        assert_close(shown.target, floats[path][1])
        np.testing.assert_array_equal(shown.t, inputs.t)
    # The prefix is quantized: it makes a difference to what comes after, and to nothing before.
    error = np.abs(got['block_1'][1].args[0] - floats['block_1'][0][0]).max()
    assert error > 100 * TOLERANCE
    np.testing.assert_array_equal(got['conv_in'][1].args[0], inputs.x)


def test_the_module_of_a_block_runs_without_its_network(plan, inputs, bound):
    teacher = tiny_blocks.teacher()
    module, shown = all_examples(plan, inputs, bound)['block_1']
    floats = module.apply({'params': teacher.params['block_1']}, *shown.args, **shown.kwargs)
    assert floats.shape == shown.target.shape
    # Of the float block, but of the quantized prefix.
    assert 0 < np.abs(floats - shown.target).max() < 0.5 * np.abs(shown.target).max()


def test_a_joint_block_is_shown_the_inputs_of_the_network(plan, inputs, bound):
    network, shown = all_examples(plan, inputs, bound)['joint block']
    assert network == tiny_blocks.teacher().network
    np.testing.assert_array_equal(shown.args[0], inputs.x)
    teacher = tiny_blocks.teacher()
    floats = seen(teacher.predict, teacher.params, inputs, lambda path: path.endswith('time_proj'))
    assert shown.target.keys() == floats.keys() == {'block_0/time_proj', 'block_1/time_proj'}
    jax.tree.map(assert_close, shown.target, {p: said for p, (_, said) in floats.items()})


@pytest.fixture(scope='module')
def alone(plan, inputs, bound):
    """What each block is shown by a program of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, '_SEGMENT', 1)
        return all_examples(plan, inputs, bound)


@pytest.mark.parametrize('segment, num_programs', [(8, 1), (2, 3)])
def test_blocks_share_programs_and_see_what_each_alone_would_see(
    plan, inputs, bound, alone, monkeypatch, segment, num_programs
):
    monkeypatch.setattr(examples, '_SEGMENT', segment)
    programs, original = set(), examples.Recorder._program

    def program(self, *arguments):
        capture, modules = original(self, *arguments)
        programs.add(id(modules))
        kept.append(modules)  # or another one may get its id
        return capture, modules

    kept = []
    monkeypatch.setattr(examples.Recorder, '_program', program)
    together = all_examples(plan, inputs, bound)
    assert len(programs) == num_programs  # six blocks that are not joint
    for name, (module, shown) in together.items():
        assert module == alone[name][0]
        jax.tree.map(assert_close, shown, alone[name][1])


def test_what_is_shown_does_not_depend_on_the_number_of_devices(plan, inputs, bound):
    found = blocks.find_blocks(tiny_blocks.teacher(), plan, CONFIG.blocks)
    one, eight = (
        make_recorder(plan, inputs, found, mesh.make_mesh(count)).record(
            found[-1], bound, inputs, rounds_inputs=True
        )[1]
        for count in (1, 8)
    )
    jax.tree.map(assert_close, jax.device_get(eight), jax.device_get(one))
    assert len(eight.target.sharding.device_set) == 8
