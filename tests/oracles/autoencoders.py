"""Autoencoders of diffusers with random weights; images and latents in NHWC, NumPy."""

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel

KL = {
    'in_channels': 3,
    'out_channels': 3,
    'down_block_types': ['DownEncoderBlock2D', 'DownEncoderBlock2D'],
    'up_block_types': ['UpDecoderBlock2D', 'UpDecoderBlock2D'],
    'block_out_channels': [8, 16],
    'layers_per_block': 1,
    'norm_num_groups': 4,
    'latent_channels': 4,
    'sample_size': 16,
    'scaling_factor': 0.3,
}
VQ = {
    **{name: value for name, value in KL.items() if name != 'scaling_factor'},
    'latent_channels': 3,
    'num_vq_embeddings': 20,
    'vq_embed_dim': 4,
}


def random_autoencoder(kind: type, config: dict) -> AutoencoderKL | VQModel:
    """A network whose norms and codebook are unlike those at the start of training."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'norm' in name or 'quantize' in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


@torch.no_grad()
def encode(model: AutoencoderKL | VQModel, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """The latents; of `AutoencoderKL` mean and logarithm of the variance."""
    out = model.encode(to_torch(images))
    if isinstance(model, VQModel):
        return (from_torch(out.latents),)
    return from_torch(out.latent_dist.mean), from_torch(out.latent_dist.logvar)


@torch.no_grad()
def decode(model: AutoencoderKL | VQModel, latents: np.ndarray, **options) -> np.ndarray:
    return from_torch(model.decode(to_torch(latents), **options).sample)
