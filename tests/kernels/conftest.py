"""A GPU that is not there: the whole path to a Triton kernel, which its interpreter then runs."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kernels import gpu, triton_shim

ROOT = Path(__file__).parents[2]


class Interpreter:
    """Stands in for `triton_shim.launch`: the kernel runs on the host, under jit too."""

    def __init__(self):
        environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('interpreter_worker.py'))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        )  # fmt: skip
        self.calls = []

    def launch(self, kernel, arrays, out, *, grid, tile, constants):
        # Small tiles: the interpreter's time goes with their number and size alike.
        sizes = {'BM': min(tile.BM, 32), 'BN': min(tile.BN, 32), 'BK': 32, 'GROUP': 2}
        # There are no instructions here: nibbles are multiplied as on GPUs without 4-bit ones.
        constants = {**constants, 'ASM': False, 'NATIVE': False}
        name = kernel.fn.__name__
        self.calls.append((name, constants))
        module = kernel.fn.__module__

        def run(*arrays):
            arrays = [np.asarray(array) for array in arrays]
            request = (
                module, name, arrays, np.dtype(out.dtype).name, out.shape, grid(sizes),
                {**constants, **sizes},
            )  # fmt: skip
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
            if isinstance(answer, str):
                raise RuntimeError(answer)
            return answer

        return jax.pure_callback(run, out, *arrays, vmap_method=None)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope='session')
def interpreter():
    pytest.importorskip('triton', reason='the kernels are interpreted by Triton')
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture
def interpreted(interpreter, monkeypatch):
    """`implementation='triton'` runs, in the interpreter, as on a GPU of capability 8.6."""
    monkeypatch.setattr(triton_shim, '_missing_packages', lambda: None)
    monkeypatch.setattr(triton_shim, 'launch', interpreter.launch)
    interpreter.calls.clear()
    with gpu.targeting(86):
        yield interpreter
