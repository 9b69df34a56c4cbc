"""What the CPU here can do with int8, which decides between the algorithms of XLA's products."""

import functools
import platform
from pathlib import Path

# Words of /proc/cpuinfo for instructions that sum products of int8 into int32 directly.
_INT8_DOT = {'avx512_vnni', 'avx_vnni', 'avx_vnni_int8', 'amx_int8', 'asimddp', 'i8mm'}


@functools.cache
def has_int8_dot() -> bool:
    """Whether the CPU has such instructions; True where it does not say.

    Without them (AVX2 alone) codes are widened to 16 bits first, and an int8 product is at most
    about twice as fast as one of float32, however it is written.
    """
    try:
        words = set(Path('/proc/cpuinfo').read_text().split())
    except OSError:
        return True
    known = platform.machine() in ('x86_64', 'aarch64', 'AMD64')
    return not known or bool(words & _INT8_DOT)
