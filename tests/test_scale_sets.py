import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dmq_jax import scale_sets
from dmq_jax.exporting import Exported
from dmq_jax.quant.tensor import QuantizedTensor, QuantSpec

CHANNELS = {
    'block/conv': {'input': np.float32([[1, 2], [3, 4]]), 'output': np.float32([[5], [6]])},
    'dense': {'input': np.float32([[0.5], [0.25]])},
}


def exported(codes=(1, 2, 3), channels=CHANNELS, timesteps=(40.0, 3.0)):
    spec = QuantSpec(bits=8, symmetric=True, per_channel=True)
    one = np.ones((1, 1), np.float32)
    weight = QuantizedTensor(np.uint8([codes]), one, np.zeros((1, 1), np.int32), spec, (3, 1))
    return Exported(
        network=None, info=None, plan={}, lookup='nearest', timesteps=np.arange(2),
        weights={'dense': weight}, tables={}, params={}, channels=channels,
        channel_timesteps=None if timesteps is None else np.float32(timesteps),
    )  # fmt: skip


@pytest.mark.parametrize('timesteps', [(40.0, 3.0), None])
def test_a_set_comes_back_as_it_was_and_changes_nothing_else(tmp_path, timesteps):
    learnt = exported(timesteps=timesteps)
    scale_sets.save(tmp_path / 'set.safetensors', learnt)
    start = exported(channels={'dense': {'input': np.ones((2, 1), np.float32)}})
    switched = scale_sets.load(tmp_path / 'set.safetensors', start)
    assert switched.channels.keys() == CHANNELS.keys()
    for layer, ends in CHANNELS.items():
        assert switched.channels[layer].keys() == ends.keys()
        for end, factor in ends.items():
            np.testing.assert_array_equal(switched.channels[layer][end], factor)
    np.testing.assert_array_equal(switched.channel_timesteps, learnt.channel_timesteps)
    nothing = {'channels': None, 'channel_timesteps': None}
    assert switched._replace(**nothing) == start._replace(**nothing)


def test_the_fingerprint_is_of_the_integers_alone():
    name = scale_sets.fingerprint(exported())
    assert scale_sets.fingerprint(exported(channels={}, timesteps=None)) == name
    assert scale_sets.fingerprint(exported(codes=(1, 2, 4))) != name


def test_scales_of_other_integers_are_refused(tmp_path):
    scale_sets.save(tmp_path / 'set.safetensors', exported())
    with pytest.raises(ValueError, match='other integers'):
        scale_sets.load(tmp_path / 'set.safetensors', exported(codes=(3, 2, 1)))


def test_a_network_without_scales_of_channels_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match='nothing to save'):
        scale_sets.save(tmp_path / 'set.safetensors', exported(channels={}))
    assert not list(tmp_path.iterdir())


def test_another_file_of_tensors_is_refused(tmp_path):
    scale_sets.save(tmp_path / 'set.safetensors', exported())
    save_file(load_file(tmp_path / 'set.safetensors'), tmp_path / 'plain.safetensors')
    with pytest.raises(ValueError, match='format is None, expected'):
        scale_sets.load(tmp_path / 'plain.safetensors', exported())
