import jax
import numpy as np
import pytest

from dmq_jax.checkpoints.decoders import decoder_from_compvis, decoder_from_folder, find_decoder
from dmq_jax.checkpoints.opening import Tensors
from dmq_jax.checkpoints.options import Options
from dmq_jax.models import autoencoder_weights
from dmq_jax.models.autoencoder import VQAutoencoder
from tests import tiny_checkpoints as tiny


def opened(tensors):
    return Tensors('model.ckpt', tensors, {name: name for name in tensors})


def test_the_decoding_half_alone_is_kept_and_decodes(tmp_path):
    decoder = find_decoder(tiny.kl_folder(tmp_path))
    assert set(decoder.params) == {'decoder', 'post_quant'}
    latents = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
    whole = tiny.random_like(autoencoder_weights.autoencoder_shapes(decoder.network), seed=3)
    images = [
        jax.jit(lambda p: decoder.network.apply({'params': p}, latents, method='decode'))(params)
        for params in (decoder.params, whole)
    ]
    np.testing.assert_array_equal(*images)


def test_a_folder_without_an_autoencoder_has_no_decoder(tmp_path):
    assert find_decoder(tmp_path) is None
    assert decoder_from_folder(Options()) is None
    with pytest.raises(FileNotFoundError, match='teacher.components=.*no vae/config.json'):
        decoder_from_folder(Options(components=str(tmp_path)))


def test_components_may_be_the_autoencoder_itself(tmp_path):
    folder = tiny.kl_folder(tmp_path) / 'vae'
    assert decoder_from_folder(Options(components=str(folder))) is not None


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    tiny.write_json(tmp_path / 'vae/config.json', {'_class_name': 'AutoencoderTiny'})
    with pytest.raises(ValueError, match="'AutoencoderTiny': expected one of AutoencoderKL, VQM"):
        find_decoder(tmp_path)


def test_the_encoder_is_checked_though_it_is_not_kept(tmp_path):
    from safetensors.numpy import load_file, save_file

    file = tiny.kl_folder(tmp_path) / 'vae/diffusion_pytorch_model.fp16.safetensors'
    tensors = load_file(file)
    del tensors['encoder.conv_in.weight']
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors missing, e.g. 'encoder.conv_in.weight'"):
        find_decoder(tmp_path)


def test_the_network_of_a_compvis_checkpoint_is_told_by_its_shapes():
    decoder = decoder_from_compvis(opened(tiny.cin256_tensors()), 1.5)
    wanted = autoencoder_weights.vq_from_diffusers(tiny.VQ)
    assert isinstance(decoder.network, VQAutoencoder)
    for name in ('channels', 'layers_per_block', 'codebook_size', 'latent_channels'):
        assert getattr(decoder.network, name) == getattr(wanted, name)
    assert decoder.network.scaling_factor == 1.5
    assert set(decoder.params) == {'codebook', 'decoder', 'post_quant'}


def test_a_checkpoint_without_first_stage_has_no_decoder():
    assert decoder_from_compvis(opened(tiny.dit_tensors()), 1.0) is None
