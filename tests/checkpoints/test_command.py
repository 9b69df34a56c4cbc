"""A checkpoint on the command line: described, sampled, in the files that others read."""

import numpy as np
import pytest

from dmq_jax import config as config_lib
from dmq_jax import pipeline
from tests import tiny_checkpoints as tiny


def make_config(path, **sample):
    return config_lib.from_config_dict(
        {
            'teacher': {'path': str(path)},
            'sampler': {'num_steps': 2},
            'sample': {'num_images': 2, 'batch_size': 2, **sample},
            'report': {'grid_size': 1},
            'mesh': {'data': 1},
        }
    )


def test_the_teacher_is_described_and_draws_without_students_or_a_reference(tmp_path, capsys):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    prompts = tmp_path / 'prompts.txt'
    prompts.write_text('a cat\n\n  a \n')
    folder = tmp_path / 'sd'
    folder.mkdir()
    config = make_config(tiny.sd_folder(folder), prompts=str(prompts))
    pipeline.run(config, tmp_path / 'run', ('teacher', 'sample'))
    out = capsys.readouterr().out
    assert 'network: ldm' in out and '2 classes' in out and 'with their decoder' in out
    samples = tmp_path / 'run/samples/teacher'
    with np.load(samples / 'images.npz') as arrays:
        assert arrays['arr_0'].shape == (2, 8, 8, 3) and arrays['arr_0'].dtype == np.uint8
        assert arrays['arr_1'].dtype == np.int64 and arrays['arr_1'].tolist() == [0, 1]
    assert (samples / 'grid.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'content, error, text',
    [(None, FileNotFoundError, 'no such file'), ('\n \n', ValueError, 'no prompt in this file')],
)
def test_prompts_that_are_not_there_are_named(tmp_path, content, error, text):
    file = tmp_path / 'prompts.txt'
    if content is not None:
        file.write_text(content)
    with pytest.raises(error, match=f'sample.prompts=.*{text}'):
        pipeline.load_teacher(make_config(tmp_path, prompts=str(file)))
