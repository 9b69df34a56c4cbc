"""4-bit tensor core instructions from a kernel written over bytes.

Triton has no 4-bit dot. But `mma.m16n8k64` on 4-bit codes takes its operands in the registers, and
within them in the bytes, in which `mma.m16n8k32` on 8-bit codes takes them (PTX ISA, fragments of
mma.m16n8k32 and mma.m16n8k64), so a product over bytes that hold two codes each becomes a product
of the codes by renaming the instruction. GPUs of capability 8.x have it; later ones emulate it,
slower than two instructions on 8 bits.
"""

import re

# In the name of a kernel: its 8-bit instructions are meant as 4-bit ones.
MARK = 's4mma'

_INSTRUCTION = re.compile(
    r'mma\.sync\.aligned\.m16n8k32\.row\.col(?P<saturate>\.satfinite)?\.s32\.s8\.s8\.s32'
)


def has_int4_instructions(capability: int) -> bool:
    """Whether a GPU, 86 for 8.6, multiplies 4-bit integers in one instruction."""
    return 80 <= capability < 90


def rewrite(ptx: str, name: str, capability: int) -> str:
    """The PTX of a kernel, with 4-bit instructions if its name asks for them.

    Args:
      ptx: of one kernel.
      name: of the kernel; without `MARK` the text comes back as it is.
      capability: the GPU that it was compiled for.

    Raises:
      RuntimeError: if the GPU has no such instructions, or the text holds none to replace, or
        others on 8 bits: the result would be wrong, silently.
    """
    if MARK not in name:
        return ptx
    if not has_int4_instructions(capability):
        raise RuntimeError(
            f'{name} asks for 4-bit instructions, which capability {capability / 10} does not '
            'have: expected 8.0 to 8.9.'
        )
    ptx, count = _INSTRUCTION.subn(
        r'mma.sync.aligned.m16n8k64.row.col\g<saturate>.s32.s4.s4.s32', ptx
    )
    if count == 0 or '.s8.s8.' in ptx:
        raise RuntimeError(
            f'{name}: {count} instructions replaced, '
            f'{"others on 8 bits remain" if count else "none found"}. The installed Triton writes '
            'products of int8 in another way; pass the codes unpacked.'
        )
    return ptx


def install() -> None:
    """Makes Triton's compiler apply `rewrite`; once per process, harmless for other kernels."""
    from triton.backends.nvidia.compiler import CUDABackend

    if hasattr(CUDABackend, 'rewrites_int4'):
        return
    compile_ptx = CUDABackend.make_ptx

    def make_ptx(self, src, metadata, opt, capability):
        ptx = compile_ptx(self, src, metadata, opt, capability)
        return rewrite(ptx, metadata['name'], capability)

    CUDABackend.make_ptx = make_ptx
    CUDABackend.rewrites_int4 = True
