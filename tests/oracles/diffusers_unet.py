"""diffusers' UNet2DModel with random weights, in the layout of this project (NHWC, NumPy)."""

import numpy as np
import torch
from diffusers import UNet2DModel

# Settings of google/ddpm-cifar10-32.
CIFAR10 = {
    'sample_size': 32,
    'in_channels': 3,
    'out_channels': 3,
    'center_input_sample': False,
    'time_embedding_type': 'positional',
    'freq_shift': 1,
    'flip_sin_to_cos': False,
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'],
    'up_block_types': ['UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'],
    'block_out_channels': [128, 256, 256, 256],
    'layers_per_block': 2,
    'mid_block_scale_factor': 1,
    'downsample_padding': 0,
    'act_fn': 'silu',
    'attention_head_dim': None,
    'norm_num_groups': 32,
    'norm_eps': 1e-6,
}

# The same kind of network, small.
SMALL = {
    **CIFAR10,
    'sample_size': 8,
    'block_out_channels': [16, 32],
    'down_block_types': ['DownBlock2D', 'AttnDownBlock2D'],
    'up_block_types': ['AttnUpBlock2D', 'UpBlock2D'],
    'layers_per_block': 1,
    'norm_num_groups': 4,
}


def random_unet(config: dict, seed: int = 0) -> UNet2DModel:
    """A network whose norms have scales other than 1 and shifts other than 0, too."""
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    unet = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith('_')}).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if 'norm' in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return unet


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def predict(unet: UNet2DModel, x: np.ndarray, t: np.ndarray, y: np.ndarray | None) -> np.ndarray:
    labels = None if y is None else torch.from_numpy(y)
    with torch.no_grad():
        return from_torch(unet(to_torch(x), torch.from_numpy(t), class_labels=labels).sample)
