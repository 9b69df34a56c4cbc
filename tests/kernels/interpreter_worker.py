"""Runs Triton kernels in Triton's interpreter, in a process of its own.

The interpreter is chosen when a kernel is decorated, so a process interprets every kernel or none.
Requests come pickled on stdin: (module, kernel, operands, dtype and shape of the result, grid,
constants); the result, or the text of a kernel's error, goes back on stdout.
"""

import importlib
import os
import pickle
import sys
import traceback

import ml_dtypes
import numpy as np
from triton.runtime.errors import InterpreterError

DTYPES = {
    'float16': 'fp16', 'bfloat16': 'bf16', 'float32': 'fp32', 'int8': 'i8', 'int32': 'i32',
}  # fmt: skip


class HostTensor:
    """What the interpreter asks of a tensor, over a contiguous NumPy array."""

    def __init__(self, array):
        assert array.flags.c_contiguous
        self.array, self.dtype = array, DTYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *args, **kwargs):
        return HostTensor(self.array)

    def set_(self, *args):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other):
        pass


def interpret(module, kernel, arrays, dtype, shape, grid, constants):
    out = np.full(shape, 77, np.dtype(dtype) if dtype != 'bfloat16' else ml_dtypes.bfloat16)
    function = getattr(importlib.import_module(module), kernel)
    tensors = [HostTensor(np.ascontiguousarray(array)) for array in (*arrays, out)]
    function[grid](*tensors, **constants)
    return tensors[-1].array


def main():
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what kernels print must not reach the answers
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = interpret(*request)
        except InterpreterError:  # whatever a kernel raises
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == '__main__':
    main()
