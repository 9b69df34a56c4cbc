"""int8 convolutions (weights int8 or packed 2, 4, 8 bits) to int32, exact."""

from kernels.int_conv.api import choose, int_conv

__all__ = ['choose', 'int_conv']
