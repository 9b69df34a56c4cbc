"""The layers of real networks that take most of their time, for one image.

Taken from the networks of `dmq_jax.models` by tracing them: the twelve layers of each with the most
products, largest first, and how often each occurs. A convolution is 3x3 with a padding of one pixel
or 1x1 without; the strided ones pad below and to the right.
"""

from typing import NamedTuple


class Conv(NamedTuple):
    """[H, W, C] with `kernel` x `kernel` taps to O channels."""

    H: int
    W: int
    C: int
    O: int  # noqa: E741
    kernel: int
    stride: int


class Product(NamedTuple):
    """[*batch, M, K] times [*batch, N, K]; a Dense layer where `batch` is ()."""

    batch: tuple[int, ...]
    M: int
    N: int
    K: int


class Layer(NamedTuple):
    """A named shape.

    Attributes:
      name: unique within its network.
      count: how often the network has it.
      shape: for one image.
    """

    name: str
    count: int
    shape: Conv | Product


class Network(NamedTuple):
    """Layers of a network, with the share of all its products (`multiply-adds`) they make up."""

    title: str
    share: float
    layers: tuple[Layer, ...]


NETWORKS = {
    'cifar10': Network('CIFAR-10 U-Net (DDPM), 32x32', 0.92, (
        Layer('conv_32x32_128_128_k3', 7, Conv(32, 32, 128, 128, 3, 1)),
        Layer('conv_16x16_256_256_k3', 7, Conv(16, 16, 256, 256, 3, 1)),
        Layer('conv_16x16_512_256_k3', 2, Conv(16, 16, 512, 256, 3, 1)),
        Layer('conv_32x32_256_256_k3', 1, Conv(32, 32, 256, 256, 3, 1)),
        Layer('conv_32x32_256_128_k3', 2, Conv(32, 32, 256, 128, 3, 1)),
        Layer('conv_32x32_384_128_k3', 1, Conv(32, 32, 384, 128, 3, 1)),
        Layer('dense_256_256_256', 20, Product((), 256, 256, 256)),
        Layer('conv_8x8_256_256_k3', 8, Conv(8, 8, 256, 256, 3, 1)),
        Layer('conv_8x8_512_256_k3', 3, Conv(8, 8, 512, 256, 3, 1)),
        Layer('conv_16x16_384_256_k3', 1, Conv(16, 16, 384, 256, 3, 1)),
        Layer('attention_1_256_256_256', 10, Product((1,), 256, 256, 256)),
        Layer('conv_4x4_256_256_k3', 11, Conv(4, 4, 256, 256, 3, 1)),
    )),
    'ldm4': Network('LDM-4 (ImageNet), latents 64x64', 0.62, (
        Layer('conv_64x64_192_192_k3', 7, Conv(64, 64, 192, 192, 3, 1)),
        Layer('conv_32x32_384_384_k3', 6, Conv(32, 32, 384, 384, 3, 1)),
        Layer('dense_1024_384_384', 40, Product((), 1024, 384, 384)),
        Layer('dense_1024_384_3072', 5, Product((), 1024, 3072, 384)),
        Layer('conv_64x64_384_384_k3', 1, Conv(64, 64, 384, 384, 3, 1)),
        Layer('conv_64x64_384_192_k3', 2, Conv(64, 64, 384, 192, 3, 1)),
        Layer('conv_8x8_960_960_k3', 10, Conv(8, 8, 960, 960, 3, 1)),
        Layer('conv_16x16_576_576_k3', 6, Conv(16, 16, 576, 576, 3, 1)),
        Layer('conv_64x64_576_192_k3', 1, Conv(64, 64, 576, 192, 3, 1)),
        Layer('dense_256_576_576', 40, Product((), 256, 576, 576)),
        Layer('dense_256_576_4608', 5, Product((), 256, 4608, 576)),
        Layer('conv_32x32_960_384_k3', 1, Conv(32, 32, 960, 384, 3, 1)),
    )),
    'sd15': Network('Stable Diffusion 1.5, latents 64x64', 0.61, (
        Layer('attention_8_4096_40_4096', 5, Product((8,), 4096, 4096, 40)),
        Layer('attention_8_4096_4096_40', 5, Product((8,), 4096, 40, 4096)),
        Layer('conv_64x64_320_320_k3', 7, Conv(64, 64, 320, 320, 3, 1)),
        Layer('conv_16x16_1280_1280_k3', 7, Conv(16, 16, 1280, 1280, 3, 1)),
        Layer('conv_32x32_640_640_k3', 6, Conv(32, 32, 640, 640, 3, 1)),
        Layer('dense_4096_320_320', 40, Product((), 4096, 320, 320)),
        Layer('dense_4096_320_2560', 5, Product((), 4096, 2560, 320)),
        Layer('dense_1024_640_640', 40, Product((), 1024, 640, 640)),
        Layer('dense_1024_640_5120', 5, Product((), 1024, 5120, 640)),
        Layer('dense_256_1280_1280', 40, Product((), 256, 1280, 1280)),
        Layer('dense_256_1280_10240', 5, Product((), 256, 10240, 1280)),
        Layer('conv_16x16_2560_1280_k3', 2, Conv(16, 16, 2560, 1280, 3, 1)),
    )),
    'sdxl': Network('SDXL, latents 128x128', 0.83, (
        Layer('dense_1024_1280_10240', 60, Product((), 1024, 10240, 1280)),
        Layer('dense_1024_1280_1280', 372, Product((), 1024, 1280, 1280)),
        Layer('dense_1024_5120_1280', 60, Product((), 1024, 1280, 5120)),
        Layer('conv_32x32_1280_1280_k3', 10, Conv(32, 32, 1280, 1280, 3, 1)),
        Layer('dense_4096_640_5120', 10, Product((), 4096, 5120, 640)),
        Layer('dense_4096_640_640', 70, Product((), 4096, 640, 640)),
        Layer('attention_10_4096_64_4096', 10, Product((10,), 4096, 4096, 64)),
        Layer('attention_10_4096_4096_64', 10, Product((10,), 4096, 64, 4096)),
        Layer('conv_128x128_320_320_k3', 7, Conv(128, 128, 320, 320, 3, 1)),
        Layer('conv_64x64_640_640_k3', 6, Conv(64, 64, 640, 640, 3, 1)),
        Layer('attention_20_1024_64_1024', 60, Product((20,), 1024, 1024, 64)),
        Layer('attention_20_1024_1024_64', 60, Product((20,), 1024, 64, 1024)),
    )),
    'dit_xl_2': Network('DiT-XL/2, latents 32x32', 1.00, (
        Layer('dense_256_1152_1152', 112, Product((), 256, 1152, 1152)),
        Layer('dense_256_1152_4608', 28, Product((), 256, 4608, 1152)),
        Layer('dense_256_4608_1152', 28, Product((), 256, 1152, 4608)),
        Layer('attention_16_256_72_256', 28, Product((16,), 256, 256, 72)),
        Layer('attention_16_256_256_72', 28, Product((16,), 256, 72, 256)),
        Layer('dense_1_1152_6912', 28, Product((), 1, 6912, 1152)),
        Layer('dense_256_1152_32', 1, Product((), 256, 32, 1152)),
        Layer('conv_32x32_4_1152_k2_s2', 1, Conv(32, 32, 4, 1152, 2, 2)),
        Layer('dense_1_1152_2304', 1, Product((), 1, 2304, 1152)),
        Layer('dense_1_1152_1152', 1, Product((), 1, 1152, 1152)),
        Layer('dense_1_256_1152', 1, Product((), 1, 1152, 256)),
    )),
    'squares': Network('square products', 1.0, (
        Layer('square_1024', 1, Product((), 1024, 1024, 1024)),
        Layer('square_2048', 1, Product((), 2048, 2048, 2048)),
        Layer('square_4096', 1, Product((), 4096, 4096, 4096)),
    )),
}  # fmt: skip
