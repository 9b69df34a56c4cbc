import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmq_jax import denoisers, exporting, teachers
from dmq_jax.config import QuantConfig, RuleConfig
from dmq_jax.denoisers import DenoiserInfo, float_denoiser
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods.base import Bound, WeightCodes
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant.plan import INPUT_ROLES
from dmq_jax.quant.tensor import scale_shape, unpack
from tests import tiny

FLOAT = {'weight_bits': 32, 'activation_bits': 32}
# Every layer at 4 bits; otherwise some of each kind, which is less to compile.
DEEP = {'pattern': '(mid|up_0)/.*|.*/(conv2|k|v|dense_1)', **FLOAT}
VARIANTS = {
    'w4a4': {},
    'w2a8 asymmetric': {
        'weight_bits': 2, 'activation_bits': 8, 'weight_symmetric': False, 'rules': (DEEP,),
    },
    'w8a4 asymmetric, groups': {
        'weight_bits': 8, 'weight_symmetric': False, 'weight_group_size': 4,
        'rules': (DEEP, {'pattern': 'conv_in|time_embed/.*', **FLOAT}),
    },
    'w3a6 per run, symmetric': {
        'weight_bits': 3, 'activation_bits': 6, 'activation_symmetric': True,
        'per_timestep': False, 'rules': (DEEP,),
    },
}  # fmt: skip


@functools.cache
def export(variant='w4a4'):
    options = dict(VARIANTS[variant])
    options['rules'] = tuple(RuleConfig(**r) for r in options.get('rules', ()))
    plan, bound = tiny.rounded(**options)
    timesteps = tiny.calibration().timesteps
    return exporting.make(tiny.teacher(), plan, bound, timesteps, 'nearest'), bound


def inputs(batch_size=4):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((batch_size, *tiny.INFO.image_shape)), jnp.float32)
    return x, jnp.asarray([0, 17, 30, 49]), jnp.asarray([0, 1, 2, 3])


# Of networks that are quantized alike it compiles one program, wherever their numbers come from.
call = jax.jit(lambda predict, *arguments: predict(*arguments), static_argnums=0)


def predict(denoiser):
    return np.asarray(call(denoiser.predict, denoiser.params, *inputs()))


@functools.cache
def expected(mode, variant='w4a4'):
    return predict(exporting.denoiser(export(variant)[0], mode))


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_same_export(a, b):
    assert a._replace(weights=0, tables=0, params=0, timesteps=0) == b._replace(
        weights=0, tables=0, params=0, timesteps=0
    )
    assert jax.tree.structure(a[-4:]) == jax.tree.structure(b[-4:])
    jax.tree.map(np.testing.assert_array_equal, a[-4:], b[-4:])


@pytest.fixture
def saved(tmp_path):
    exporting.save(tmp_path / 'model', export()[0], {'finetune_seconds': 1.5})
    return tmp_path / 'model'


@pytest.mark.parametrize('variant', VARIANTS)
def test_packed_codes_are_those_of_the_method_exactly(variant):
    model, bound = export(variant)
    assert model.weights.keys() == bound.weights.keys() and model.weights
    for path, weight in bound.weights.items():
        codes = np.asarray(weight.codes).astype(np.int64)
        np.testing.assert_array_equal(np.asarray(unpack(model.weights[path])), codes)
        np.testing.assert_array_equal(model.weights[path].scale, weight.scale)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_parameter_is_exported_once(variant):
    model, bound = export(variant)
    kept = exporting.traverse_util.flatten_dict(model.params, sep='/')
    whole = exporting.traverse_util.flatten_dict(tiny.teacher().params, sep='/')
    assert kept.keys() ^ whole.keys() == {f'{path}/kernel' for path in bound.weights}
    for name, leaf in kept.items():
        np.testing.assert_array_equal(leaf, whole[name])


def test_float_parameters_that_a_method_trained_are_the_exported_ones():
    model, bound = export()
    params = exporting.traverse_util.flatten_dict(tiny.teacher().params, sep='/')
    name = next(name for name in sorted(params) if name.endswith('/bias'))
    trained = bound._replace(params={name: params[name] + 1})
    again = exporting.make(tiny.teacher(), model.plan, trained, model.timesteps, model.lookup)
    found = exporting.traverse_util.flatten_dict(again.params, sep='/')
    np.testing.assert_array_equal(found[name], params[name] + 1)
    student = denoisers.fake_student(
        tiny.teacher(), model.plan, trained, model.timesteps, model.lookup
    )
    assert relative_error(predict(exporting.denoiser(again, 'fake')), predict(student)) < 1e-6


@pytest.mark.parametrize('variant', VARIANTS)
def test_an_export_comes_back_the_same_from_either_file(variant, tmp_path):
    model, _ = export(variant)
    exporting.save(tmp_path, model)
    assert_same_export(exporting.load(tmp_path), model)
    (tmp_path / 'model.safetensors').unlink()
    assert_same_export(exporting.load(tmp_path), model)


# Integers are exact; scale times accumulator is one float32 rounding per layer, where the fake
# network rounds every product and sum. That may move a value over the edge of a bin, so the bound
# is not some eps but a small part of one step's effect; without such a move, 2e-7 at most was
# measured on these variants (CPU).
INTEGER_TOLERANCE = 1e-3


@pytest.mark.parametrize('variant', VARIANTS)
def test_multiplied_integers_give_what_the_simulation_gives(variant):
    error = relative_error(expected('integer', variant), expected('fake', variant))
    assert error < INTEGER_TOLERANCE, f'{error:.1e}'


def test_the_exported_network_is_the_student_that_was_trained():
    model, bound = export()
    student = denoisers.fake_student(
        tiny.teacher(), model.plan, bound, model.timesteps, model.lookup
    )
    # The same float operations on the same numbers, perhaps in another order.
    assert relative_error(expected('fake'), predict(student)) < 1e-6
    assert relative_error(expected('fake'), predict(tiny.teacher())) > 0.01


def test_a_loaded_export_needs_neither_method_nor_teacher(saved, monkeypatch):
    wanted = expected('integer')
    monkeypatch.setattr(teachers, 'load_teacher', None)
    monkeypatch.setattr(denoisers, 'init_params', None)
    monkeypatch.setattr('dmq_jax.methods.make', None)
    loaded = exporting.denoiser(exporting.load(saved))
    np.testing.assert_array_equal(predict(loaded), wanted)


def test_the_file_holds_packed_bytes_scales_and_float_rest(saved):
    model, tensors = export()[0], load_file(saved / 'model.safetensors')
    for path, weight in model.weights.items():
        *_, width, channels = weight.shape
        packed = tensors[f'weights/{path}/packed']
        taps = int(np.prod(weight.shape[:-2]))
        assert packed.dtype == np.uint8
        assert packed.size == channels * taps * -(-width // 2), path  # two codes per byte
        assert tensors[f'weights/{path}/scale'].size == channels
        assert f'weights/{path}/zero_point' not in tensors  # symmetric: there is none
        assert f'params/{path}/kernel' not in tensors
    for name, tensor in tensors.items():
        if name.startswith('tables/'):
            assert tensor.shape == (tiny.SAMPLER.num_steps,), name
            assert tensor.dtype == (np.uint8 if name.endswith('zero_point') else np.float32), name
    manifest = json.loads((saved / 'manifest.json').read_text())
    assert manifest['size_bytes'] == sum(t.nbytes for t in tensors.values())
    assert manifest['size_bytes'] == exporting.size_bytes(model)
    assert manifest['facts'] == {'finetune_seconds': 1.5}
    assert manifest['plan'].keys() == model.plan.keys()
    assert manifest['tensors'] == {n: list(t.shape) for n, t in tensors.items()}


def change_manifest(path, **changes):
    manifest = json.loads((path / 'manifest.json').read_text())
    (path / 'manifest.json').write_text(json.dumps(manifest | changes))


def cut(path):
    file = path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-10])


def drop(path, prefix):
    tensors = load_file(path / 'model.safetensors')
    name = next(n for n in sorted(tensors) if n.startswith(prefix))
    save_file({n: t for n, t in tensors.items() if n != name}, path / 'model.safetensors')


@pytest.mark.parametrize(
    'damage, error, text',
    [
        (lambda p: change_manifest(p, format='other'), ValueError, "format is 'other', expected"),
        (lambda p: (p / 'manifest.json').unlink(), FileNotFoundError, 'no manifest.json'),
        (cut, ValueError, 'not a complete safetensors file'),
        (lambda p: drop(p, 'weights/'), ValueError, 'the export is damaged'),
        (lambda p: drop(p, 'params/'), ValueError, 'the export is damaged'),
        (lambda p: drop(p, 'tables/'), ValueError, 'the export is damaged'),
        (lambda p: drop(p, 'timesteps'), ValueError, "tensor 'timesteps' has shape None"),
        (lambda p: shutil.rmtree(p), FileNotFoundError, 'no manifest.json'),
    ],
)
def test_a_damaged_export_is_refused(saved, damage, error, text):
    damage(saved)
    with pytest.raises(error, match=text):
        exporting.load(saved)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='int': expected 'integer' or 'fake'"):
        exporting.denoiser(export()[0], 'int')


def random_bound(layers, plan, num_rows):
    """Codes of any network, without calibration."""
    rng = np.random.default_rng(0)
    weights, tables = {}, {}
    for path, spec in plan.items():
        if spec.weight is not None:
            shape = layers[path].weight_shape
            low, high = spec.weight.grid
            scale = np.ones(scale_shape(shape, spec.weight), np.float32)
            codes = rng.integers(low, high + 1, shape, dtype=np.int8)
            weights[path] = WeightCodes(codes, scale, np.zeros_like(scale))
        if spec.inputs is not None:
            rows = num_rows if spec.per_timestep else 1
            table = {'scale': np.ones(rows, np.float32), 'zero_point': np.zeros(rows, np.float32)}
            tables[path] = {role: table for role in INPUT_ROLES[layers[path].kind]}
    return Bound(weights, tables)


@pytest.mark.parametrize('coverage, ratio', [('full', 7.0), ('paper', 5.0)])
def test_the_cifar_10_network_at_4_bits_is_several_times_smaller_on_disk(coverage, ratio, tmp_path):
    network = DDPMUNet()
    info = DenoiserInfo(
        schedule=Schedule(kind='linear'), prediction='eps', image_shape=(32, 32, 3),
        num_classes=None,
    )  # fmt: skip
    shapes = denoisers.param_shapes(network, info)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    teacher = float_denoiser(network, params, info)
    layers = denoisers.quantizable(teacher)
    plan = denoisers.make_plan(layers, QuantConfig(coverage=coverage))
    num_rows = 100
    model = exporting.make(
        teacher, plan, random_bound(layers, plan, num_rows),
        np.arange(num_rows)[::-1], 'nearest',
    )  # fmt: skip
    exporting.save(tmp_path, model)
    on_disk = (tmp_path / 'model.safetensors').stat().st_size
    float_size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert float_size > 140e6  # 35.7 million parameters
    print(f'{coverage}: {float_size / on_disk:.2f} times smaller, {on_disk / 1e6:.2f} MB')
    assert float_size / on_disk >= ratio
    assert model.weights['mid/block_0/conv1'].spec.bits == 4
