"""int8 times int8 (or packed 2, 4, 8 bits) to int32, exact."""

from kernels.int_matmul.api import choose, int_matmul

__all__ = ['choose', 'int_matmul']
