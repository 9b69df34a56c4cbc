"""A network of diffusers at its real size that runs once for every line it reads.

    python -m tests.oracles.bench_networks NAME FILE BATCH_SIZE

The other side of `python -m dmq_jax.bench --network=NAME`, which starts it. Prints JSON lines: what
it found, then the seconds of each call. Weights are random; FILE is only read for its duration.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import safe_open

from tests.oracles.diffusers_unet import CIFAR10

_CROSS, _PLAIN = 'CrossAttnDownBlock2D', 'DownBlock2D'
_UP = {
    'DownBlock2D': 'UpBlock2D', 'AttnDownBlock2D': 'AttnUpBlock2D',
    'ResnetDownsampleBlock2D': 'ResnetUpsampleBlock2D',
}  # fmt: skip


def unet2d(channels: list[int], attention: list[int], **settings) -> UNet2DModel:
    """Guided diffusion's and latent diffusion's U-Net in the words of diffusers."""
    plain = 'ResnetDownsampleBlock2D' if settings.get('downsample_type') == 'resnet' else _PLAIN
    down = ['AttnDownBlock2D' if i in attention else plain for i in range(len(channels))]
    up = [_UP[name] for name in down[::-1]]
    return UNet2DModel(
        block_out_channels=channels, down_block_types=down, up_block_types=up, **settings
    )


def adm(channels: list[int], attention: list[int], size: int, layers: int) -> UNet2DModel:
    return unet2d(
        channels, attention, sample_size=size, in_channels=3, out_channels=6,
        layers_per_block=layers, attention_head_dim=64, resnet_time_scale_shift='scale_shift',
        downsample_type='resnet', upsample_type='resnet', num_class_embeds=1000,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    'ddim_cifar10': lambda: UNet2DModel(**CIFAR10),
    'adm_imagenet64': lambda: adm([192, 384, 576, 768], [1, 2, 3], 64, 3),
    'adm_imagenet256': lambda: adm([256, 256, 512, 512, 1024, 1024], [3, 4, 5], 256, 2),
    'ldm_imagenet256': lambda: UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=[192, 384, 576, 960],
        down_block_types=[_PLAIN, _CROSS, _CROSS, _CROSS],
        up_block_types=['CrossAttnUpBlock2D'] * 3 + ['UpBlock2D'],
        cross_attention_dim=512, attention_head_dim=1,
    ),
    'ldm_bedrooms': lambda: unet2d(
        [224, 448, 672, 896], [1, 2, 3], sample_size=64, in_channels=3, out_channels=3,
        layers_per_block=2, attention_head_dim=32,
    ),
    'sd15': lambda: UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    ),
    'sdxl': lambda: UNet2DConditionModel(
        sample_size=128, block_out_channels=[320, 640, 1280],
        down_block_types=[_PLAIN, _CROSS, _CROSS],
        up_block_types=['CrossAttnUpBlock2D'] * 2 + ['UpBlock2D'],
        cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
        addition_embed_type='text_time', addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    'dit_imagenet256': lambda: DiTTransformer2DModel(out_channels=8, num_layers=28),
    'pixart': lambda: PixArtTransformer2DModel(
        caption_channels=4096, use_additional_conditions=False, interpolation_scale=2
    ),
    'kl_f8_decode': lambda: AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4, layers_per_block=2,
    ),
    'vq_f4_decode': lambda: VQModel(
        block_out_channels=[128, 256, 512], down_block_types=['DownEncoderBlock2D'] * 3,
        up_block_types=['UpDecoderBlock2D'] * 3, layers_per_block=2, latent_channels=3,
        num_vq_embeddings=8192,
    ),
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    """The network; the initialisation of its own would take minutes."""
    with torch.device('meta'):
        made = NETWORKS[name]()
    network = made.to_empty(device='cpu').eval().requires_grad_(False)
    block = 0.02 * torch.randn(2**20)
    for parameter_name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        flat = parameter.view(-1)
        if not flat.is_floating_point():
            continue
        for start in range(0, flat.numel(), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
        if parameter.ndim == 1 and parameter_name.endswith('weight'):
            parameter += 1
    return network


def call(name: str, network: torch.nn.Module, b: int) -> Callable[[], object]:
    """One forward pass on inputs like those of the other side."""
    if name.endswith('_decode'):
        z = torch.randn(b, network.config.latent_channels, 64, 64)
        return lambda: network.decode(z)
    config = network.config
    x = torch.randn(b, config.in_channels, config.sample_size, config.sample_size)
    t = torch.full((b,), 500)
    named = {}
    if isinstance(network, DiTTransformer2DModel):
        named['class_labels'] = torch.zeros(b, dtype=torch.long)
    elif isinstance(network, PixArtTransformer2DModel):
        named['encoder_hidden_states'] = torch.randn(b, 120, 4096)
        named['encoder_attention_mask'] = torch.ones(b, 120)
        named['added_cond_kwargs'] = {'resolution': None, 'aspect_ratio': None}
    elif isinstance(network, UNet2DConditionModel):
        named['encoder_hidden_states'] = torch.randn(b, 77, config.cross_attention_dim)
        if config.addition_embed_type:
            named['added_cond_kwargs'] = {
                'text_embeds': torch.randn(b, 1280), 'time_ids': torch.full((b, 6), 1024.0)
            }  # fmt: skip
    elif config.num_class_embeds:
        named['class_labels'] = torch.zeros(b, dtype=torch.long)
    if isinstance(network, DiTTransformer2DModel | PixArtTransformer2DModel):
        return lambda: network(x, timestep=t, **named)
    return lambda: network(x, t, **named)


def seconds(run: Callable[[], object]) -> dict[str, float]:
    """Of one call, and of all cores together."""
    began = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        run()
    return {
        'seconds': time.perf_counter() - began[0], 'cpu_seconds': time.process_time() - began[1]
    }  # fmt: skip


def read(file: str) -> float:
    """Seconds in which torch reads all tensors of a file as float32."""
    began = time.perf_counter()
    with safe_open(file, 'pt') as tensors:
        held = [tensors.get_tensor(name).to(torch.float32, copy=True) for name in tensors.keys()]
    assert held
    return time.perf_counter() - began


def main(name: str, file: str, batch_size: int) -> None:
    """Says what it found, then answers every line."""
    load_s = read(file)
    network = build(name)
    layouts = {'contiguous': torch.contiguous_format}
    has_convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) > 1
    if has_convolutions:
        layouts['channels last'] = torch.channels_last
    spent = {}
    for layout, memory_format in layouts.items():
        network = network.to(memory_format=memory_format)
        run = call(name, network, batch_size)
        seconds(run)
        spent[layout] = seconds(run)['cpu_seconds']
    layout = min(spent, key=spent.get)
    network = network.to(memory_format=layouts[layout])
    run = call(name, network, batch_size)
    parameters = sum(p.numel() for p in network.parameters())
    print(json.dumps({'load_s': load_s, 'layout': layout, 'parameters': parameters}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(seconds(run)), flush=True)


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
