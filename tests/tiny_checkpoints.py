"""Checkpoints of a few thousand random weights, in the very layouts and containers of others."""

import functools
import json

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from dmq_jax.models import (
    adm_weights,
    autoencoder_weights,
    ddpm_weights,
    dit_weights,
    ldm_weights,
    text_weights,
)
from dmq_jax.models.dit import position_features
from dmq_jax.models.torch_weights import write_tensors
from tests.files.test_tokenizer import ID, write_clip

# Flags of guided diffusion, `unet_config.params` of latent diffusion.
ADM = {
    'image_size': 8, 'num_channels': 32, 'channel_mult': '1', 'num_res_blocks': 1,
    'attention_resolutions': '8', 'num_head_channels': 16, 'class_cond': True,
    'learn_sigma': True, 'resblock_updown': True, 'noise_schedule': 'cosine',
}  # fmt: skip
LDM = {
    'image_size': 4, 'in_channels': 3, 'out_channels': 3, 'model_channels': 32,
    'attention_resolutions': [1], 'num_res_blocks': 1, 'channel_mult': [1], 'num_heads': 1,
    'use_spatial_transformer': True, 'context_dim': 8,
}  # fmt: skip
UNET2D = {
    'sample_size': 8, 'in_channels': 3, 'out_channels': 3, 'block_out_channels': [32],
    'layers_per_block': 1, 'down_block_types': ['AttnDownBlock2D'],
    'up_block_types': ['AttnUpBlock2D'], 'attention_head_dim': None,
    'norm_num_groups': 32, 'norm_eps': 1e-6, 'downsample_padding': 0,
    'flip_sin_to_cos': False, 'freq_shift': 1,
}  # fmt: skip
UNET2D_CONDITION = {
    'sample_size': 4, 'in_channels': 4, 'out_channels': 4, 'block_out_channels': [32],
    'layers_per_block': 1, 'down_block_types': ['CrossAttnDownBlock2D'],
    'up_block_types': ['CrossAttnUpBlock2D'], 'attention_head_dim': 2,
    'cross_attention_dim': 16,
}  # fmt: skip
KL = {
    'in_channels': 3, 'out_channels': 3, 'latent_channels': 4, 'block_out_channels': [32, 32],
    'down_block_types': ['DownEncoderBlock2D'] * 2, 'up_block_types': ['UpDecoderBlock2D'] * 2,
    'layers_per_block': 1, 'scaling_factor': 0.18215,
}  # fmt: skip
CLIP = {
    'architectures': ['CLIPTextModel'], 'hidden_size': 16, 'intermediate_size': 32,
    'num_attention_heads': 2, 'num_hidden_layers': 2, 'max_position_embeddings': 8,
    'vocab_size': len(ID), 'eos_token_id': ID['<|endoftext|>'], 'model_type': 'clip_text_model',
}  # fmt: skip
# As LDM-4 of bedrooms (heads of one width) and LDM-8 of churches (one number of heads, blocks that
# resize, shifts and scales), and their autoencoders, which shrink images by 4 and by 8.
BEDROOMS = {
    'image_size': 4, 'in_channels': 3, 'out_channels': 3, 'model_channels': 32,
    'attention_resolutions': [2], 'num_res_blocks': 1, 'channel_mult': [1, 2],
    'num_head_channels': 16,
}  # fmt: skip
CHURCHES = {
    'image_size': 4, 'in_channels': 4, 'out_channels': 4, 'model_channels': 32,
    'attention_resolutions': [1], 'num_res_blocks': 1, 'channel_mult': [1, 2], 'num_heads': 2,
    'use_scale_shift_norm': True, 'resblock_updown': True,
}  # fmt: skip
VQ = {
    'in_channels': 3, 'out_channels': 3, 'latent_channels': 3, 'block_out_channels': [32, 32],
    'down_block_types': ['DownEncoderBlock2D'] * 2, 'up_block_types': ['UpDecoderBlock2D'] * 2,
    'layers_per_block': 1, 'num_vq_embeddings': 8, 'vq_embed_dim': 3, 'scaling_factor': 1.0,
}  # fmt: skip
SCHEDULER = {
    'beta_schedule': 'linear', 'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02,
    'prediction_type': 'epsilon',
}  # fmt: skip


def random_like(shapes, seed=0):
    """Small random kernels, norms about one: activations neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
        numbers = 0.1 * rng.standard_normal(leaf.shape)
        flat[path] = (numbers + path.endswith('/scale')).astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep='/')


def save_torch(path, content, *, legacy=False):
    """`torch.save`, arrays as tensors."""
    import torch

    def tensors(value):
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        if isinstance(value, dict):
            return {name: tensors(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [tensors(entry) for entry in value]
        return value

    torch.save(tensors(content), path, _use_new_zipfile_serialization=not legacy)
    return path


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def ddpm_folder(folder, *, seed=0):
    """As google/ddpm-cifar10-32: everything at the root."""
    network = ddpm_weights.network_from_diffusers(UNET2D)
    tensors = ddpm_weights.diffusers_from_params(random_like(ddpm_shapes(network), seed))
    write_json(folder / 'config.json', {'_class_name': 'UNet2DModel', **UNET2D})
    write_json(folder / 'scheduler_config.json', SCHEDULER)
    write_json(folder / 'model_index.json', {'_class_name': 'DDPMPipeline'})
    save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
    return folder


def ddpm_shapes(network):
    """Shapes of the parameters of a `DDPMUNet`."""
    return ddpm_weights._shapes(network)


def ddim_tensors(seed=0):
    """The state dict of DDIM's network of `UNET2D`'s settings, in its own names."""
    network = ddpm_weights.network_from_diffusers(UNET2D)
    params = random_like(ddpm_shapes(network), seed)
    last = len(network.channels) - 1
    tensors = {}
    for name, array in write_tensors(
        params, functools.partial(ddpm_weights.ddim_source, last=last)
    ).items():
        is_attention = '.attn' in name and 'norm' not in name and array.ndim == 2
        tensors[name] = array[:, :, None, None] if is_attention else array
    return tensors


def adm_tensors(flags=ADM):
    """A state dict of guided diffusion."""
    network = adm_weights.network_from_adm(flags)
    source = functools.partial(adm_weights.adm_source, network=network, new_attention_order=False)
    tensors = write_tensors(random_like(adm_weights.adm_shapes(network)), source)
    return {
        name: array[:, :, None] if array.ndim == 2 and name.endswith(('qkv.weight',)) else array
        for name, array in tensors.items()
    }


def cin256_tensors():
    """A state dict of class-conditional latent diffusion with four classes and their null."""
    network = ldm_weights.network_from_compvis(LDM)
    source = functools.partial(ldm_weights.compvis_source, network=network)
    unet = write_tensors(random_like(ldm_weights.ldm_shapes(network)), source)
    autoencoder = autoencoder_weights.vq_from_diffusers(VQ)
    first = write_tensors(
        random_like(autoencoder_weights.autoencoder_shapes(autoencoder), seed=1),
        autoencoder_weights.ldm_autoencoder_source(autoencoder),
    )
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    return {
        'betas': betas.astype(np.float32),
        'alphas_cumprod': np.cumprod(1 - betas).astype(np.float32),
        'sqrt_alphas_cumprod': np.sqrt(np.cumprod(1 - betas)).astype(np.float32),
        **{f'model.diffusion_model.{name}': array for name, array in unet.items()},
        **{f'first_stage_model.{name}': array for name, array in first.items()},
        'cond_stage_model.embedding.weight': np.random.default_rng(2)
        .standard_normal((5, 8))
        .astype(np.float32),
    }


def lsun_checkpoint(config):
    """What latent diffusion's training of `BEDROOMS` or `CHURCHES` saved, Lightning's entries too.

    The moving average of the U-Net, its names without dots, is of another seed than its weights.
    """
    network = ldm_weights.network_from_compvis(config)
    source = functools.partial(ldm_weights.compvis_source, network=network)
    weights, average = (
        {
            # 1x1 convolutions of one axis, as the attention of ADM has them.
            name: array[:, :, None] if name.endswith(('qkv.weight', 'proj_out.weight')) else array
            for name, array in write_tensors(
                random_like(ldm_weights.ldm_shapes(network), seed), source
            ).items()
        }
        for seed in (0, 5)
    )
    levels = 3 if config is BEDROOMS else 4
    shared = {
        'block_out_channels': [32] * levels, 'down_block_types': ['DownEncoderBlock2D'] * levels,
        'up_block_types': ['UpDecoderBlock2D'] * levels,
    }  # fmt: skip
    if config is BEDROOMS:
        autoencoder = autoencoder_weights.vq_from_diffusers({**VQ, **shared})
    else:
        autoencoder = autoencoder_weights.kl_from_diffusers({**KL, **shared})
    first = write_tensors(
        random_like(autoencoder_weights.autoencoder_shapes(autoencoder), seed=1),
        autoencoder_weights.ldm_autoencoder_source(autoencoder),
    )
    last = 0.0195 if config is BEDROOMS else 0.0155
    betas = np.linspace(0.0015**0.5, last**0.5, 1000) ** 2
    tensors = {
        'betas': betas.astype(np.float32),
        'alphas_cumprod': np.cumprod(1 - betas).astype(np.float32),
        'posterior_variance': betas.astype(np.float32),
        'lvlb_weights': np.ones(1000, np.float32),
        **{f'model.diffusion_model.{name}': array for name, array in weights.items()},
        'model_ema.decay': np.full((), 0.9999, np.float32),
        'model_ema.num_updates': np.full((), 7, np.int32),
        **{
            f'model_ema.diffusion_model{name.replace(".", "")}': array
            for name, array in average.items()
        },
        **{f'first_stage_model.{name}': array for name, array in first.items()},
    }
    if config is CHURCHES:
        tensors['scale_factor'] = np.full((), 0.22, np.float32)
    return {
        'epoch': 4, 'global_step': 7, 'pytorch-lightning_version': '1.4.2', 'state_dict': tensors,
        'callbacks': {'best': 0.5}, 'lr_schedulers': [{'last_epoch': 7, 'base_lrs': [9.6e-5]}],
        'optimizer_states': [
            {
                'state': {0: {'step': 7, 'exp_avg': np.zeros((32, 3, 3, 3), np.float32)}},
                'param_groups': [{'lr': 9.6e-5, 'betas': (0.9, 0.999), 'params': [0]}],
            }
        ],
    }  # fmt: skip


def dit_tensors():
    """A state dict of the original DiT: one block, 32 channels, latents of 8 x 8, learnt sigma."""
    network = dit_weights.DiT(
        num_layers=1, num_heads=2, head_dim=16, patch_size=2, sample_size=8, num_classes=4
    )
    params = random_like(dit_weights._dit_shapes(network))
    positions = position_features((4, 4), 32, base_size=4, scale=1.0)
    return {
        **write_tensors(params, dit_weights.original_dit_source),
        'pos_embed': np.asarray(positions)[None],
    }


def kl_folder(folder):
    """A folder `vae/` of diffusers."""
    network = autoencoder_weights.kl_from_diffusers(KL)
    shapes = autoencoder_weights.autoencoder_shapes(network)
    tensors = autoencoder_weights.diffusers_from_autoencoder_params(random_like(shapes, seed=3))
    write_json(folder / 'vae/config.json', {'_class_name': 'AutoencoderKL', **KL})
    save_file(tensors, folder / 'vae/diffusion_pytorch_model.fp16.safetensors')
    return folder


def sd_folder(folder):
    """A folder of Stable Diffusion: U-Net, autoencoder, text encoder, tokenizer, scheduler."""
    kl_folder(folder)
    network = ldm_weights.network_from_diffusers(UNET2D_CONDITION)
    tensors = write_tensors(
        random_like(ldm_weights.ldm_shapes(network)), ldm_weights.diffusers_source
    )
    # Convolutions of 1 x 1 in Stable Diffusion 1, linear layers in 2.
    tensors = {
        name: array[:, :, None, None] if '.proj_' in name and array.ndim == 2 else array
        for name, array in tensors.items()
    }
    write_json(
        folder / 'unet/config.json', {'_class_name': 'UNet2DConditionModel', **UNET2D_CONDITION}
    )
    save_file(tensors, folder / 'unet/diffusion_pytorch_model.safetensors')
    text = text_weights.clip_from_transformers(CLIP)
    write_json(folder / 'text_encoder/config.json', CLIP)
    encoder = random_like(text_weights.text_shapes(text), seed=4)
    save_file(
        text_weights.transformers_from_clip_params(encoder),
        folder / 'text_encoder/model.safetensors',
    )
    (folder / 'tokenizer').mkdir()
    write_clip(folder / 'tokenizer')
    write_json(
        folder / 'scheduler/scheduler_config.json',
        {**SCHEDULER, 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012},
    )
    write_json(folder / 'model_index.json', {'_class_name': 'StableDiffusionPipeline'})
    return folder


def settings_file(folder, **content):
    """A file for `teacher.settings`."""
    return str(write_json(folder / 'settings.json', content))


def leaves(tree):
    """All numbers of a tree in one row."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])
