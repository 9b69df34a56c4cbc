"""Named shapes of real convolutions, shared by test and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """`x [B, H, W, C]` with `w [O, kernel, kernel, C]`; padding is the same on both image axes."""

    B: int
    H: int
    W: int
    C: int
    O: int  # noqa: E741
    kernel: int
    stride: int
    padding: tuple[int, int]


# Test-sized: ragged images and channels, uneven padding, kernels of even size and of 1x1.
SMALL = {
    'aligned': Shape(2, 6, 6, 8, 8, 3, 1, (1, 1)),
    'ragged': Shape(3, 5, 7, 3, 5, 3, 1, (1, 1)),
    'stride_2_pad_0_1': Shape(2, 6, 8, 5, 4, 3, 2, (0, 1)),
    'pointwise': Shape(2, 3, 3, 7, 6, 1, 1, (0, 0)),
    'pointwise_stride_2': Shape(1, 5, 5, 4, 3, 1, 2, (0, 0)),
    'few_outputs': Shape(2, 4, 5, 17, 3, 3, 1, (1, 1)),
    'many_channels': Shape(1, 4, 4, 33, 20, 3, 2, (1, 1)),
    'even_kernel': Shape(1, 4, 4, 2, 3, 2, 2, (1, 0)),
}

# The CIFAR-10 U-Net (128, 256, 256, 256 channels), then layers of smaller networks.
REAL = {
    'conv_32x32_128_b8': Shape(8, 32, 32, 128, 128, 3, 1, (1, 1)),
    'conv_32x32_128_b16': Shape(16, 32, 32, 128, 128, 3, 1, (1, 1)),
    'conv_16x16_256_b8': Shape(8, 16, 16, 256, 256, 3, 1, (1, 1)),
    'conv_8x8_256_b8': Shape(8, 8, 8, 256, 256, 3, 1, (1, 1)),
    'conv_4x4_256_b8': Shape(8, 4, 4, 256, 256, 3, 1, (1, 1)),
    'up_16x16_512_b8': Shape(8, 16, 16, 512, 256, 3, 1, (1, 1)),
    'skip_1x1_16x16_b8': Shape(8, 16, 16, 512, 256, 1, 1, (0, 0)),
    'down_32x32_128_b8': Shape(8, 32, 32, 128, 128, 3, 2, (0, 1)),
    'conv_in_b8': Shape(8, 32, 32, 3, 128, 3, 1, (1, 1)),
    'conv_out_b8': Shape(8, 32, 32, 128, 3, 3, 1, (1, 1)),
    'small_16x16_64_b100': Shape(100, 16, 16, 64, 64, 3, 1, (1, 1)),
    'small_8x8_128_b100': Shape(100, 8, 8, 128, 128, 3, 1, (1, 1)),
}
