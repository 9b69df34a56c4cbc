import json

import pytest

from dmq_jax.checkpoints.components import find_component, find_weights, read_json

STEM = 'diffusion_pytorch_model'


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text('{}')
    return folder


@pytest.mark.parametrize(
    'names',
    [
        # Each before all that follow it.
        [
            f'{STEM}.safetensors', f'{STEM}.safetensors.index.json', 'model.safetensors',
            f'{STEM}.bin', f'{STEM}.bin.index.json', 'pytorch_model.bin',
        ],
        [f'{STEM}.safetensors', f'{STEM}.fp16.safetensors'],
        [f'{STEM}.fp16.safetensors', f'{STEM}.bin'],
        [f'{STEM}.safetensors.index.fp16.json', f'{STEM}.bin'],
        ['pytorch_model.bin', 'pytorch_model.fp16.bin'],
    ],
)  # fmt: skip
def test_full_precision_comes_before_variants_and_safetensors_before_torch(tmp_path, names):
    for i in reversed(range(len(names))):
        write(tmp_path, names[i])
        assert find_weights(tmp_path).name == names[i]


def test_a_shard_is_found_through_its_index_alone(tmp_path):
    write(tmp_path, f'{STEM}.fp16-00001-of-00002.safetensors')
    with pytest.raises(FileNotFoundError, match='copy the weights into it'):
        find_weights(tmp_path)


def test_a_component_is_the_first_subfolder_with_settings(tmp_path):
    assert find_component(tmp_path, 'unet', '') is None
    write(tmp_path, 'config.json')
    write(tmp_path / 'unet')
    assert find_component(tmp_path, 'unet', '').folder == tmp_path
    (write(tmp_path / 'unet') / 'config.json').write_text('{"_class_name": "UNet2DModel"}')
    found = find_component(tmp_path, 'unet', '')
    assert found.folder == tmp_path / 'unet' and found.class_name == 'UNet2DModel'


@pytest.mark.parametrize(
    'config, name',
    [({}, None), ({'architectures': ['CLIPTextModel']}, 'CLIPTextModel'),
     ({'architectures': None}, None)],
)  # fmt: skip
def test_the_class_is_named_in_the_words_of_either_library(tmp_path, config, name):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert find_component(tmp_path, '').class_name == name


@pytest.mark.parametrize('text, what', [('{', 'not a JSON file'), ('[]', 'expected a JSON object')])
def test_settings_that_are_none_are_refused(tmp_path, text, what):
    file = tmp_path / 'config.json'
    file.write_text(text)
    with pytest.raises(ValueError, match=f'config.json: {what}'):
        read_json(file)
