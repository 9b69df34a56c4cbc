import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from dmq_jax import denoisers, networks
from dmq_jax.config import SamplerConfig
from dmq_jax.denoisers import DenoiserInfo, float_denoiser
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.files.safetensors import open_safetensors
from dmq_jax.models import ddpm_weights
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.runtime import mesh
from dmq_jax.teachers import load_teacher, save_teacher

NETWORK = DDPMUNet(
    channels=(8, 8), in_channels=1, out_channels=1, layers_per_block=1, num_groups=4,
    down_attention=(False, True), up_attention=(True, False), num_class_embeds=4,
)  # fmt: skip
INFO = DenoiserInfo(
    schedule=Schedule(kind='scaled_linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='v',
    image_shape=(4, 6, 1),
    num_classes=3,
)


def random_teacher():
    """A teacher whose weights are float16 numbers, so that saving loses nothing."""
    shapes = denoisers.param_shapes(NETWORK, INFO)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape).astype(np.float16), jnp.float32),
        shapes,
    )
    return float_denoiser(NETWORK, params, INFO)


def assert_same_tree(a, b):
    a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope='module')
def teacher():
    return random_teacher()


@pytest.fixture
def saved(teacher, tmp_path):
    path = tmp_path / 'teacher.safetensors'
    save_teacher(path, teacher, {'steps': 7})
    return path


def test_a_saved_teacher_comes_back_the_same(teacher, saved):
    loaded = load_teacher(saved)
    assert loaded.network == teacher.network
    assert loaded.info == teacher.info
    assert_same_tree(loaded.params, teacher.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}


def test_saved_weights_are_float16(saved):
    assert {tensor.dtype for tensor in load_file(saved).values()} == {np.dtype(np.float16)}


@pytest.fixture
def folder(teacher, tmp_path):
    path = tmp_path / 'teacher'
    save_teacher(path, teacher, {'steps': 7})
    return path


def test_a_teacher_in_the_format_of_orbax_comes_back_the_same(teacher, folder):
    loaded = load_teacher(folder)
    assert loaded.network == teacher.network and loaded.info == teacher.info
    assert_same_tree(loaded.params, teacher.params)
    kept = load_teacher(folder, kind='dmq_jax', dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(kept.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    'change, text',
    [
        ({'format': 'other'}, "format is 'other', expected 'dmq_jax.teacher.orbax.1'"),
        (
            {'network': json.dumps(networks.to_settings(NETWORK.clone(layers_per_block=2)))},
            'tensors missing, e.g.',
        ),
        ({'info': '[]'}, 'not what save_teacher wrote'),
    ],
)
def test_another_folder_of_orbax_is_refused(folder, change, text):
    file = folder / 'teacher.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=text):
        load_teacher(folder)


def test_weights_are_spread_while_they_are_read(teacher, saved):
    spread = mesh.make_mesh(1, 2, 2)
    loaded = load_teacher(saved, put=mesh.weight_placer(spread))
    assert_same_tree(loaded.params, teacher.params)
    wanted = mesh.shard_weights(spread, teacher.params)
    for mine, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        assert mine.sharding == theirs.sharding
    kernel = loaded.params['mid']['block_0']['conv1']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert mesh.weight_placer(mesh.make_mesh(4)) is None


def rewrite(path, change):
    """Applies `change` to the tensors of a saved teacher, keeping its metadata."""
    metadata = open_safetensors(path).metadata
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


NAME = 'mid/block_0/conv1/kernel'


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t, m: t.pop(NAME), f"1 tensors missing, e.g. '{NAME}'"),
        (lambda t, m: t.update({'mid/extra': t[NAME]}), "1 tensors unused, e.g. 'mid/extra'"),
        (
            lambda t, m: t.update({NAME: t[NAME][:2]}),
            f"'{NAME}' has shape \\(2, 3, 8, 8\\), expected \\(3, 3, 8, 8\\)",
        ),
        (lambda t, m: m.update(format='other'), "format is 'other', expected 'dmq_jax.teacher.1'"),
        (lambda t, m: m.clear(), 'format is None'),
    ],
)
def test_a_file_that_is_not_this_teacher_is_refused(saved, change, text):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=text):
        load_teacher(saved)


def test_a_teacher_that_is_cut_off_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(ValueError, match='not a complete safetensors file'):
        load_teacher(saved)


def test_no_such_teacher_lists_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected a bundled name'):
        load_teacher(tmp_path / 'absent')


def write_diffusers(folder, teacher, *, sharded=False, nested=True, model=None, scheduler=None):
    """A folder as `save_pretrained` of a diffusers pipeline leaves it; `None` drops a setting."""
    unet, process = (folder / 'unet', folder / 'scheduler') if nested else (folder, folder)
    unet.mkdir(exist_ok=True)
    process.mkdir(exist_ok=True)
    schedule = teacher.info.schedule
    settings = {
        '_class_name': 'DDPMScheduler',
        'num_train_timesteps': schedule.num_train_timesteps,
        'beta_schedule': schedule.kind,
        'beta_start': schedule.beta_start,
        'beta_end': schedule.beta_end,
        'prediction_type': 'v_prediction',
        'trained_betas': None,
        **(scheduler or {}),
    }
    (process / 'scheduler_config.json').write_text(json.dumps(settings))
    config = ddpm_weights.diffusers_from_network(teacher.network, teacher.info.image_shape[:2])
    (unet / 'config.json').write_text(json.dumps({**config, **(model or {})}))
    tensors = ddpm_weights.diffusers_from_params(teacher.params)
    name = 'diffusion_pytorch_model.safetensors'
    if not sharded:
        save_file(tensors, unet / name)
        return folder
    weight_map = {key: f'part-{i % 2}.safetensors' for i, key in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == shard}, unet / shard)
    (unet / f'{name}.index.json').write_text(json.dumps({'weight_map': weight_map}))
    return folder


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('sharded', [False, True])
def test_a_diffusers_folder_is_a_teacher(teacher, tmp_path, nested, sharded):
    loaded = load_teacher(write_diffusers(tmp_path, teacher, nested=nested, sharded=sharded))
    assert loaded.network == teacher.network
    assert_same_tree(loaded.params, teacher.params)
    assert loaded.info == DenoiserInfo(
        schedule=INFO.schedule, prediction='v', image_shape=(4, 6, 1), num_classes=4
    )


def test_what_diffusers_itself_saves_is_a_teacher_that_predicts_the_same(tmp_path):
    pytest.importorskip('torch', reason='torch is the oracle here')
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    from tests.oracles import diffusers_unet as oracle

    unet = oracle.random_unet(oracle.SMALL)
    unet.save_pretrained(tmp_path / 'unet')
    scheduler = diffusers.DDPMScheduler(beta_schedule='squaredcos_cap_v2')
    scheduler.save_pretrained(tmp_path / 'scheduler')
    loaded = load_teacher(tmp_path)
    assert loaded.info.schedule.kind == 'cosine'
    assert loaded.info.prediction == 'eps'
    assert loaded.info.image_shape == (8, 8, 3)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    t = np.array([3, 700], np.int32)
    reference = oracle.predict(unet, x, t, None)
    out = jax.jit(loaded.predict)(loaded.params, x, t)
    # Both round in float32, in their own order (see tests/models/test_ddpm_unet.py).
    error = np.linalg.norm(out - reference) / np.linalg.norm(reference)
    assert error < 1e-5, f'{error:.1e}'


@pytest.mark.parametrize(
    'model, scheduler, text',
    [
        ({'act_fn': 'gelu'}, {}, "act_fn='gelu'"),
        ({'sample_size': None}, {}, 'sample_size=None'),
        ({}, {'beta_schedule': 'sigmoid'}, "beta_schedule='sigmoid'"),
        ({}, {'prediction_type': 'sample'}, "prediction_type='sample'"),
        ({}, {'trained_betas': [0.1]}, '1 trained_betas.*expected 50'),
        ({}, {'beta_end': 2.0}, 'beta_end=2.0'),
        ({'block_out_channels': [8, 16]}, {}, 'tensors missing|has shape'),
    ],
)
def test_a_diffusers_folder_with_what_is_not_supported_is_refused(
    teacher, tmp_path, model, scheduler, text
):
    folder = write_diffusers(tmp_path, teacher, model=model, scheduler=scheduler)
    with pytest.raises(ValueError, match=text) as caught:
        load_teacher(folder)
    assert str(folder) in str(caught.value)


def test_trained_betas_and_a_terminal_snr_of_zero_are_the_schedule_of_a_folder(teacher, tmp_path):
    betas = np.linspace(0.01, 0.2, 50).tolist()
    settings = {'trained_betas': betas, 'rescale_betas_zero_snr': True}
    schedule = load_teacher(write_diffusers(tmp_path, teacher, scheduler=settings)).info.schedule
    assert schedule.kind == 'trained' and list(schedule.trained_betas) == betas
    assert schedule.rescale_betas_zero_snr


@pytest.mark.parametrize(
    'gone, text',
    [
        ('unet/config.json', "no config.json with '_class_name': 'UNet2DModel'"),
        ('scheduler/scheduler_config.json', 'no scheduler_config.json'),
        ('unet/diffusion_pytorch_model.safetensors', 'no diffusion_pytorch_model.safetensors'),
    ],
)
def test_a_diffusers_folder_that_lacks_a_part_is_refused(teacher, tmp_path, gone, text):
    folder = write_diffusers(tmp_path, teacher)
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=text):
        load_teacher(folder)


def test_the_rows_of_a_diffusers_class_table_beyond_num_classes_are_no_classes(teacher, tmp_path):
    folder = write_diffusers(tmp_path, teacher)
    assert load_teacher(folder, num_classes=3).info == INFO
    with pytest.raises(ValueError, match='num_classes=5.*class table of 4 rows'):
        load_teacher(folder, num_classes=5)


def test_guidance_needs_to_know_that_a_row_of_a_diffusers_folder_is_the_null_class(
    teacher, tmp_path
):
    folder = write_diffusers(tmp_path, teacher)
    sampler = SamplerConfig(num_steps=3, guidance_scale=2.0)
    with pytest.raises(ValueError, match='guidance_scale=2.0.*no null class.*num_classes=3'):
        denoisers.make_denoiser_sampler(load_teacher(folder), sampler)
    told = denoisers.make_denoiser_sampler(load_teacher(folder, num_classes=3), sampler)
    assert told.timesteps.shape == (3,)


def test_a_file_that_knows_its_classes_accepts_no_other_number(saved):
    assert load_teacher(saved, num_classes=3).info == INFO
    with pytest.raises(ValueError, match='num_classes=4.*says that it has 3'):
        load_teacher(saved, num_classes=4)
