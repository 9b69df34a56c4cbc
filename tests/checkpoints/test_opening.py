import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmq_jax.checkpoints.opening import KINDS, Tensors, check_kind, open_tensors, recognise
from tests import tiny_checkpoints as tiny

A, B = (np.full((2, 3), value, np.float32) for value in (1, 2))


def torch_file(folder, content):
    pytest.importorskip('torch', reason='writes the file that is read without it')
    return tiny.save_torch(folder / 'file.ckpt', content)


@pytest.mark.parametrize(
    'content, average, weights',
    [
        ({'x.w': A}, A, A),
        ({'state_dict': {'x.w': A}, 'epoch': 3}, A, A),
        ({'state_dict': {'x.w': A}, 'ema': {'x.w': B}}, B, A),
        ({'model': {'x.w': A}, 'ema_state_dict': {'x.w': B}, 'opt': {'lr': 0.1}}, B, A),
        ([{'module.x.w': A}, {'state': {}}, 5, 7, {'x.w': B}], B, A),
        ({'state_dict': {'module.x.w': A}}, A, A),
        ({'state_dict': {'_orig_mod.x.w': A}}, A, A),
    ],
)
def test_tensors_are_found_wherever_training_put_them(tmp_path, content, average, weights):
    file = torch_file(tmp_path, content)
    for ema, wanted in ((None, average), (True, average), (False, weights)):
        tensors = open_tensors(file, ema=ema)
        assert list(tensors) == ['x.w'] and len(tensors) == 1 and 'x.w' in tensors
        np.testing.assert_array_equal(tensors['x.w'], wanted)
        assert tensors.shape_of('x.w') == (2, 3)


def test_a_prefix_that_some_tensors_lack_is_part_of_their_names(tmp_path):
    file = tmp_path / 'x.safetensors'
    save_file({'module.a': A, 'b': B}, file)
    assert set(open_tensors(file)) == {'module.a', 'b'}


def test_tensors_may_be_left_out_by_prefix(tmp_path):
    tensors = Tensors(tmp_path, {'a.x': A, 'b.x': B}, {'a.x': 'a.x', 'b.x': 'b.x'})
    assert list(tensors.without('a.')) == ['b.x']


@pytest.mark.parametrize(
    'index, text',
    [
        ('{}', 'not an index of shards'),
        (json.dumps({'weight_map': {'x': '../evil.bin'}}), 'is not a plain file name'),
    ],
)
def test_what_is_no_index_of_shards_is_refused(tmp_path, index, text):
    file = tmp_path / 'pytorch_model.bin.index.json'
    file.write_text(index)
    with pytest.raises(ValueError, match=text):
        open_tensors(file)


def test_an_index_names_every_tensor_of_its_shards(tmp_path):
    torch_file(tmp_path, {'x.w': A}).rename(tmp_path / 'one.bin')
    file = tmp_path / 'pytorch_model.bin.index.json'
    file.write_text(json.dumps({'weight_map': {'x.w': 'one.bin', 'y.w': 'one.bin'}}))
    with pytest.raises(ValueError, match="disagree about 'y.w'"):
        open_tensors(file)


@pytest.mark.parametrize(
    'names, kind',
    [
        (['model.diffusion_model.input_blocks.0.0.weight'], 'compvis'),
        (['input_blocks.0.0.weight', 'middle_block.1.transformer_blocks.0.norm1.weight'],
         'compvis'),
        (['input_blocks.0.0.weight', 'time_embed.0.weight'], 'adm'),
        (['temb.dense.0.weight', 'conv_in.weight'], 'ddim'),
        (['x_embedder.proj.weight', 'y_embedder.y_proj.fc1.weight'], 'pixart'),
        (['x_embedder.proj.weight', 'y_embedder.embedding_table.weight'], 'dit'),
        (['time_embedding.linear_1.weight', 'conv_in.weight'], 'diffusers'),
    ],
)  # fmt: skip
def test_a_kind_is_told_by_names_and_refused_to_all_others(tmp_path, names, kind):
    tensors = dict.fromkeys(names)
    assert kind in KINDS and recognise(tensors, tmp_path) == kind
    check_kind(kind, tensors, tmp_path)
    if kind != 'ddim':
        with pytest.raises(ValueError, match=f"teacher.kind='ddim'.*those of kind '{kind}'"):
            check_kind('ddim', tensors, tmp_path)
