"""Odd files, as people have them: each is read right or refused with what to do."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmq_jax.checkpoints import strangers
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny

WEIGHTS = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def text_to_image(tmp_path_factory):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    return tiny.sd_folder(tmp_path_factory.mktemp('sd'))


@pytest.fixture
def folder(text_to_image, tmp_path):
    return shutil.copytree(text_to_image, tmp_path / 'sd')


def edit(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def described(path):
    """The teacher at `path`, every tensor of it read; no text encoder runs."""
    return load_teacher(path, prompts=['a cat'], shapes_only=True)


def named(folder, *names):
    file = folder / 'given.safetensors'
    save_file({name: np.zeros((4, 4), np.float32) for name in names}, file)
    return file


@pytest.mark.parametrize(
    'name, text',
    [
        ('lora_unet_down_blocks_0_attn1_to_q.lora_down.weight', 'a LoRA, .*; give the network'),
        ('unet.down_blocks.0.attn1.to_q.lora_A.weight', 'a LoRA'),
        ('unet.down_blocks.0.attn1.processor.to_q_lora.down.weight', 'a LoRA'),
        ('lora_te_text_model_encoder.hada_w1_a', 'a LoRA'),
        ('control_model.input_blocks.0.0.weight', 'a ControlNet'),
        ('controlnet_cond_embedding.conv_in.weight', 'a ControlNet'),
        (
            'transformer_blocks.0.attn.to_q.qweight',
            'a network that is quantized already; give the fl',
        ),
        ('decoder.conv_in.weight', 'an autoencoder alone; .*teacher.components'),
        ('first_stage_model.decoder.conv_in.weight', 'an autoencoder alone'),
        ('text_model.encoder.layers.0.mlp.fc1.weight', 'a text encoder; .*teacher.components'),
        ('encoder.block.0.layer.0.SelfAttention.q.weight', 'a text encoder'),
        ('double_blocks.0.img_attn.qkv.weight', 'Flux, a network that is not known here'),
        ('model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight', 'Stable Diffusion 3'),
        ('emb_params', 'a textual inversion'),
    ],
)
def test_a_file_that_is_no_teacher_is_called_what_it_is(tmp_path, name, text):
    with pytest.raises(ValueError, match=f'given.safetensors: this is {text}'):
        load_teacher(named(tmp_path, name, 'another.weight'))


@pytest.mark.parametrize(
    'content, text',
    [
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
            'a pointer of Git LFS .*run git lfs pull',
        ),
        (b'<!doctype html>', 'a web page; .*download the file again'),
        (b'GGUF\3\0\0\0', 'a GGUF file, .*give the float network'),
    ],
)
@pytest.mark.parametrize('name', ['model.ckpt', 'model.safetensors'])
def test_a_file_of_something_else_is_told_by_its_first_bytes(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{name}: this is {text}'):
        load_teacher(tmp_path / name)


def test_no_name_of_a_known_network_is_a_strangers():
    for make in (tiny.ddim_tensors, tiny.adm_tensors, tiny.dit_tensors):
        assert strangers.by_names(make()) is None


@pytest.mark.parametrize(
    'name, write',
    [
        ('model.ckpt', save_file),
        ('0123abcd', save_file),
        ('MODEL.SAFETENSORS', save_file),
        ('model.safetensors', None),
    ],
)
def test_the_content_says_what_wrote_a_file_whatever_it_is_called(tmp_path, name, write):
    tensors, file = tiny.ddim_tensors(), tmp_path / name
    if write is None:
        pytest.importorskip('torch', reason='writes the file that is read without it')
        tiny.save_torch(file, tensors)
    else:
        write(tensors, file)
    teacher = load_teacher(file, settings=tiny.settings_file(tmp_path, process={'image_size': 8}))
    assert teacher.info.image_shape == (8, 8, 3)


def test_weights_of_several_precisions_are_those_of_the_parameters(folder):
    file = folder / 'unet' / WEIGHTS
    kinds = (ml_dtypes.bfloat16, np.float16, np.float32)
    tensors = {
        name: array.astype(kinds[i % 3]) for i, (name, array) in enumerate(load_file(file).items())
    }
    wanted = tensors['conv_in.weight'].astype(np.float32)
    save_file(tensors, file)
    kernel = np.asarray(load_teacher(folder).params['conv_in']['kernel'])
    np.testing.assert_array_equal(kernel, wanted.transpose(2, 3, 1, 0))


def test_weights_that_are_integers_are_refused(folder):
    file = folder / 'unet' / WEIGHTS
    tensors = load_file(file)
    tensors['conv_in.weight'] = tensors['conv_in.weight'].astype(np.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="'conv_in.weight' is of dtype int8, expected floating"):
        load_teacher(folder)


def test_tensors_of_one_storage_are_read_each_in_its_place(folder):
    torch = pytest.importorskip('torch', reason='writes the file that is read without it')
    file = folder / 'unet' / WEIGHTS
    tensors = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    both = torch.cat([tensors['conv_in.bias'], tensors['conv_norm_out.weight']])
    tensors['conv_in.bias'], tensors['conv_norm_out.weight'] = both[:32], both[32:]
    wanted = load_teacher(folder).params
    file.unlink()
    torch.save(tensors, file.with_suffix('.bin'))
    np.testing.assert_array_equal(tiny.leaves(load_teacher(folder).params), tiny.leaves(wanted))


@pytest.mark.parametrize('given', ['snapshot', 'repository', 'without refs'])
def test_the_cache_of_the_hub_is_read_through_its_links(folder, tmp_path, given):
    repository = tmp_path / 'models--some--one'
    blobs, snapshot = repository / 'blobs', repository / 'snapshots' / 'abc123'
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.rglob('*'))):
        if file.is_file():
            shutil.copy(file, blobs / f'{i:040d}')
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blobs / f'{i:040d}', link.parent))
    if given != 'without refs':
        (repository / 'refs').mkdir()
        (repository / 'refs' / 'main').write_text('abc123')
    found, wanted = (
        described(path) for path in (snapshot if given == 'snapshot' else repository, folder)
    )
    assert found.info == wanted.info and found.network == wanted.network


def test_several_snapshots_have_to_be_told_apart(tmp_path):
    for name in 'ab':
        (tmp_path / 'snapshots' / name).mkdir(parents=True)
    with pytest.raises(ValueError, match='2 snapshots and no refs/main; expected one; name a'):
        load_teacher(tmp_path)


@pytest.mark.parametrize('part', ['unet', 'model_index.json', f'unet/{WEIGHTS}'])
def test_a_part_of_a_checkpoint_stands_for_it(folder, part):
    teacher = described(folder / part)
    assert teacher.info.num_classes == 1 and teacher.decoder is not None


def test_names_of_folders_may_have_spaces_and_any_letters_and_be_read_only(folder, tmp_path):
    moved = tmp_path / 'a b' / 'später 日本'
    moved.parent.mkdir()
    folder.rename(moved)
    places = [moved, *(path for path in moved.rglob('*') if path.is_dir())]
    for path in places:
        path.chmod(0o555)
    try:
        assert described(moved).info.num_classes == 1
    finally:
        for path in places:
            path.chmod(0o755)


@pytest.mark.parametrize('num_channels', [8, 9])
def test_a_network_that_is_given_an_image_besides_is_refused(folder, num_channels):
    edit(folder / 'unet/config.json', in_channels=num_channels)
    with pytest.raises(ValueError, match=rf'in_channels={num_channels}, .*\(inpainting, .*made fr'):
        load_teacher(folder)


@pytest.mark.parametrize(
    'file, settings, error, text',
    [
        ('unet', {'act_fn': 'relu6'}, ValueError, "act_fn='relu6'.*expected 'silu'"),
        ('vae', {'act_fn': 'relu6'}, ValueError, "act_fn='relu6'.*expected 'silu'"),
        ('text_encoder', {'hidden_act': 'relu6'}, ValueError, "hidden_act='relu6'"),
        ('unet', {'block_out_channels': None}, ValueError, 'config.json: a setting .* another ty'),
        ('vae', {'block_out_channels': 3}, ValueError, 'vae/config.json: a setting'),
        ('unet', {'quantization_config': {}}, ValueError, 'quantized already; give the float'),
        ('unet', {'_class_name': 'FluxTransformer2DModel'}, FileNotFoundError,
         'It holds FluxTransformer2DModel in unet/, AutoencoderKL in vae/'),
    ],
)  # fmt: skip
def test_settings_without_a_counterpart_are_named(folder, file, settings, error, text):
    edit(folder / file / 'config.json', **settings)
    with pytest.raises(error, match=text):
        load_teacher(folder, prompts=['a cat'])


@pytest.mark.parametrize(
    'settings, text',
    [
        ({'prediction_type': 'sample'}, "prediction_type='sample': expected one of epsilon, v_pr"),
        ({'beta_schedule': None}, 'flow matching is not supported'),
        ({'num_train_timesteps': '1000'}, 'scheduler_config.json: a setting has a value of anoth'),
        ({'num_train_timesteps': 0}, 'num_train_timesteps=0: expected at least 1'),
    ],
)
def test_processes_without_a_counterpart_are_named(folder, settings, text):
    edit(folder / 'scheduler/scheduler_config.json', **settings)
    with pytest.raises(ValueError, match=text):
        load_teacher(folder)


@pytest.mark.parametrize('count', [200, 4000])
def test_a_process_may_have_any_number_of_timesteps(folder, count):
    edit(
        folder / 'scheduler/scheduler_config.json', num_train_timesteps=count,
        prediction_type='v_prediction',
    )  # fmt: skip
    teacher = described(folder)
    assert teacher.info.prediction == 'v'
    assert teacher.info.schedule.num_train_timesteps == count


def test_the_refiner_of_sdxl_is_refused(folder):
    (folder / 'text_encoder').rename(folder / 'text_encoder_2')
    with pytest.raises(ValueError, match='the refiner of SDXL, .*give the base network'):
        load_teacher(folder)


def test_a_folder_of_one_file_says_to_name_the_file(tmp_path):
    named(tmp_path, 'unet.to_q.lora_A.weight')
    with pytest.raises(FileNotFoundError, match="If 'given.safetensors' is the checkpoint, name"):
        load_teacher(tmp_path)


@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_a_shard_that_is_not_there_is_named(folder, ending):
    (folder / 'unet' / WEIGHTS).unlink()
    index = folder / f'unet/diffusion_pytorch_model.{ending}.index.json'
    index.write_text(json.dumps({'weight_map': {'conv_in.bias': f'two.{ending}'}}))
    with pytest.raises(FileNotFoundError, match=f"shard 'two.{ending}' is missing beside it; down"):
        load_teacher(folder)
    for weight_map, text in (({'a': 3}, 'shard 3 is not a plain file'), (['a'], 'not an index')):
        index.write_text(json.dumps({'weight_map': weight_map}))
        with pytest.raises(ValueError, match=text):
            load_teacher(folder)
