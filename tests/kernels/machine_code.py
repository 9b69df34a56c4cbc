"""What the Triton kernels become: compiled for GPUs that are not here, and taken apart.

Triton brings its own assembler and disassembler, so neither a GPU nor CUDA is needed.
"""

import collections
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from kernels import gpu, triton_ptx, triton_shim

_POINTERS = {'int8': '*i8', 'int32': '*i32', 'float32': '*fp32', 'float16': '*fp16',
             'bfloat16': '*bf16'}  # fmt: skip
INTEGER_PRODUCTS = ('IMMA', 'IGMMA')
_LINE = re.compile(r'/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);')
_LABEL = re.compile(r'\s*\.?(L_x_\d+):')


class MachineCode(NamedTuple):
    ptx: str
    name: str
    products: collections.Counter  # tensor core instructions of the main loop, by name
    loop: collections.Counter  # its instructions, by the part of the name before the first dot
    registers: int
    stack_bytes: int
    shared_bytes: int


def compile_kernel(function, *arguments, capability, tile=None) -> MachineCode:
    """What `function(*arguments)`, which calls one kernel, would launch on a GPU.

    Args:
      function: of arrays.
      arguments: shapes and dtypes suffice.
      capability: 86 for 8.6.
      tile: another than the table's.
    """
    launched = []

    def record(kernel, arrays, out, *, grid, tile, constants):
        launched.append((kernel, [a.dtype.name for a in (*arrays, out)], tile, constants))
        return jax.numpy.zeros(out.shape, out.dtype)

    with (
        mock.patch.object(triton_shim, 'launch', record),
        mock.patch.object(triton_shim, '_missing_packages', lambda: None),
        gpu.targeting(capability),
    ):
        jax.eval_shape(function, *arguments)
    ((kernel, dtypes, chosen, constants),) = launched
    return _compile(kernel, dtypes, tile or chosen, constants, capability)


def _compile(kernel, dtypes, tile, constants, capability) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton_ptx.install()
    constants = {**constants, **{n: getattr(tile, n) for n in ('BM', 'BN', 'BK', 'GROUP')}}
    names = kernel.arg_names
    assert set(names[len(dtypes) :]) == set(constants)
    signature = {name: _POINTERS[np.dtype(d).name] for name, d in zip(names, dtypes, strict=False)}
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, 'constexpr')},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [['tt.divisibility', 16]] for index in range(len(dtypes))},
    )
    options = {
        'num_warps': tile.num_warps, 'num_stages': tile.num_stages, 'enable_fp_fusion': False,
    }  # fmt: skip
    # A cache of its own: jax-triton turns Triton's off, which Triton alone does not survive.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    binaries = Path(triton.__file__).parent / 'backends/nvidia/bin'
    sass = _run(binaries / 'nvdisasm', '-c', cubin=compiled.asm['cubin'])
    usage = _run(binaries / 'cuobjdump', '-res-usage', cubin=compiled.asm['cubin'])
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    loop = main_loop(sass)
    return MachineCode(
        ptx=compiled.asm['ptx'],
        name=compiled.metadata.name,
        products=collections.Counter(n for n in loop if n.startswith(INTEGER_PRODUCTS)),
        loop=collections.Counter(name.partition('.')[0] for name in loop),
        registers=int(registers),
        stack_bytes=int(stack),
        shared_bytes=compiled.metadata.shared,
    )


def _run(program, option, *, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def main_loop(sass: str) -> list[str]:
    """Names of the instructions of the shortest loop that multiplies integers."""
    labels, instructions, loops = {}, [], []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif instruction := _LINE.search(line):
            name, operands = instruction.groups()
            instructions.append(name)
            target = re.search(r'(L_x_\d+)', operands)
            if name.startswith('BRA') and target and target.group(1) in labels:
                loops.append(instructions[labels[target.group(1)] :])
    loops = [loop for loop in loops if any(name.startswith(INTEGER_PRODUCTS) for name in loop)]
    return min(loops, key=len, default=[])
