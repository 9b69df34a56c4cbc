"""Speed and memory of one network at its real size: `python -m dmq_jax.bench --network=sd15`.

A checkpoint of random weights, in the layout in which the model is published, is written to a
temporary file, read in a process of its own for its peak memory, compiled, and called. Where torch
and diffusers are installed and the tests are at hand, the same network of diffusers takes turns
with it, on the same cores and in whichever memory layout is faster for it.
"""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.checkpoints.opening import open_tensors
from dmq_jax.checkpoints.options import place
from dmq_jax.models import (
    adm_weights,
    autoencoder_weights,
    ddpm_weights,
    dit_weights,
    ldm_weights,
)
from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet
from dmq_jax.models.torch_weights import Source, expected_tensors, read_params
from dmq_jax.runtime import programs
from dmq_jax.runtime.memory import MEGABYTE, peak_rss_mb

ROOT = Path(__file__).parents[1]
CONTESTANT = 'tests.oracles.bench_networks'
CLIP_LENGTH, _T5_LENGTH = 77, 120
_BLOCK = 2**20


class Case(NamedTuple):
    """A network and how its file looks.

    Attributes:
      network: a Flax module.
      source: from the path of a parameter to its tensor in the file.
      side: of its input, pixels or latent pixels.
      method: of the module that is called.
      stored: dtype of the file.
    """

    network: Any
    source: Callable[[str], Source]
    side: int
    method: str = '__call__'
    stored: str = 'float32'


class Measured(NamedTuple):
    """One row of the table.

    Attributes:
      parameters: of the network.
      load_s: seconds to read the file.
      load_peak_ratio: most memory that reading took, relative to the parameters.
      compile_s: seconds of tracing and compilation.
      forward_s: seconds for one image, the fastest call.
      forward_cpu_s: seconds of all cores together in that which took fewest.
      program_mb: memory of the compiled program, parameters included.
      torch_load_s: seconds in which torch reads the tensors of the file.
      torch_forward_s: as `forward_s`; None without torch.
      torch_forward_cpu_s: as `forward_cpu_s`.
      torch_layout: the memory layout that was faster.
    """

    parameters: int
    load_s: float
    load_peak_ratio: float
    compile_s: float
    forward_s: float
    forward_cpu_s: float
    program_mb: float
    torch_load_s: float | None = None
    torch_forward_s: float | None = None
    torch_forward_cpu_s: float | None = None
    torch_layout: str | None = None


def _adm(name: str) -> Case:
    flags = adm_weights.PUBLISHED[name]
    network = adm_weights.network_from_adm(flags)
    source = functools.partial(
        adm_weights.adm_source, network=network,
        new_attention_order=bool(flags.get('use_new_attention_order')),
    )  # fmt: skip
    return Case(network, source, flags['image_size'])


def _compvis(name: str, side: int) -> Case:
    network = ldm_weights.network_from_compvis(ldm_weights.PUBLISHED[name])
    return Case(network, functools.partial(ldm_weights.compvis_source, network=network), side)


def _diffusers_ldm(name: str, side: int, stored: str = 'float32') -> Case:
    network = ldm_weights.network_from_compvis(ldm_weights.PUBLISHED[name])
    return Case(network, ldm_weights.diffusers_source, side, stored=stored)


def _decoder(network: AutoencoderKL | VQAutoencoder, side: int) -> Case:
    return Case(network, autoencoder_weights.diffusers_autoencoder_source, side, 'decode')


CASES: dict[str, Callable[[], Case]] = {
    'ddim_cifar10': lambda: Case(DDPMUNet(), ddpm_weights.diffusers_source, 32),
    'adm_imagenet64': lambda: _adm('64x64_diffusion'),
    'adm_imagenet256': lambda: _adm('256x256_diffusion'),
    'ldm_imagenet256': lambda: _compvis('cin256-v2', 64),
    'ldm_bedrooms': lambda: _compvis('lsun_bedrooms', 64),
    'sd15': lambda: _diffusers_ldm('sd-v1', 64),
    'sdxl': lambda: _diffusers_ldm('sdxl', 128, stored='float16'),
    'dit_imagenet256': lambda: Case(DiT(), dit_weights.original_dit_source, 32),
    'pixart': lambda: Case(PixArt(), dit_weights.diffusers_pixart_source, 128),
    'kl_f8_decode': lambda: _decoder(AutoencoderKL(), 64),
    'vq_f4_decode': lambda: _decoder(VQAutoencoder(), 64),
}


def make_case(name: str) -> Case:
    """The network called `name`.

    Raises:
      ValueError: unknown name.
    """
    if name not in CASES:
        raise ValueError(f'network={name!r}: expected one of {", ".join(CASES)}.')
    return CASES[name]()


def make_inputs(case: Case, batch_size: int) -> tuple[tuple, dict[str, Any]]:
    """What one call of the network takes besides its parameters."""
    network, b = case.network, batch_size
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((b, *shape), np.float32))

    if isinstance(network, AutoencoderKL | VQAutoencoder):
        return (normal(case.side, case.side, network.latent_channels),), {}
    inputs = (normal(case.side, case.side, network.in_channels), jnp.asarray(500, jnp.int32))
    named = {}
    if isinstance(network, DiT) or (isinstance(network, ADMUNet) and network.num_classes):
        named['y'] = jnp.zeros(b, jnp.int32)
    if isinstance(network, LDMUNet) and network.context_dim is not None:
        named['context'] = normal(CLIP_LENGTH, network.context_dim)
    if isinstance(network, LDMUNet) and network.added_dim is not None:
        named |= {'pooled': normal(network.pooled_dim), 'sizes': jnp.full((b, 6), 1024.0)}
    if isinstance(network, PixArt):
        named['text'] = normal(_T5_LENGTH, network.caption_channels)
        named['text_mask'] = jnp.ones((b, _T5_LENGTH), jnp.int32)
    return inputs, named


@functools.cache
def case_shapes(case: Case) -> PyTree:
    """Shapes of the parameters that a call needs."""
    inputs, named = jax.eval_shape(lambda: make_inputs(case, 1))
    init = functools.partial(case.network.init, method=case.method)
    return jax.eval_shape(
        lambda *a, **k: init(jax.random.key(0), *a, **k), *inputs, **named
    )['params']  # fmt: skip


def write_random(file: Path, expected: Mapping[str, tuple[int, ...]], stored: str) -> None:
    """A safetensors file of random tensors, never more than a few megabytes of it in memory.

    Kernels are small, norms one: activations neither vanish nor explode.

    Args:
      file: to write.
      expected: shape of every tensor.
      stored: its dtype, 'float32' or 'float16'.
    """
    dtype = np.dtype(stored)
    header, offset = {}, 0
    for name, shape in expected.items():
        size = int(np.prod(shape)) * dtype.itemsize
        kind = {'float32': 'F32', 'float16': 'F16'}[stored]
        entry = {'dtype': kind, 'shape': list(shape), 'data_offsets': [offset, offset + size]}
        header[name], offset = entry, offset + size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    block = (0.02 * np.random.default_rng(0).standard_normal(_BLOCK)).astype(dtype)
    with file.open('wb') as stream:
        stream.write(len(text).to_bytes(8, 'little') + text)
        for name, shape in expected.items():
            is_norm = len(shape) == 1 and name.endswith('weight')
            values = block + dtype.type(1) if is_norm else block
            left = int(np.prod(shape))
            while left > 0:
                stream.write(values[:left].tobytes())
                left -= min(left, _BLOCK)


def read_random(case: Case, file: Path, dtype: str) -> PyTree:
    """The parameters in the file, each on its device before the next is read."""
    return read_params(
        open_tensors(file), case_shapes(case), case.source, dtype=jnp.dtype(dtype), put=place
    )


def tree_bytes(tree: PyTree) -> int:
    """Memory of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure_load(name: str, file: Path, dtype: str) -> dict[str, float]:
    """Seconds to read the file in this process, and by what its memory grew."""
    case = make_case(name)
    jax.block_until_ready(jnp.zeros(1))
    before, began = peak_rss_mb(), time.perf_counter()
    params = read_random(case, file, dtype)
    seconds = time.perf_counter() - began
    grown = (peak_rss_mb() - before) * MEGABYTE
    return {'load_s': seconds, 'load_peak_ratio': grown / tree_bytes(params)}


def compile_forward(case: Case, params: PyTree, batch_size: int) -> tuple[Any, tuple, float]:
    """The compiled network, what to call it with, and the seconds of compilation."""
    inputs, named = make_inputs(case, batch_size)

    @programs.NetworkProgram
    def forward(params, inputs, named):
        return case.network.apply({'params': params}, *inputs, method=case.method, **named)

    began = time.perf_counter()
    compiled = forward.jitted().lower(params, inputs, named).compile()
    return compiled, (params, inputs, named), time.perf_counter() - began


class Contestant:
    """The same network in torch, a process that runs once whenever it is told to."""

    def __init__(self, python: str, name: str, file: Path, batch_size: int):
        command = [python, '-m', CONTESTANT, name, str(file), str(batch_size)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            # Threads that wait do not spin: on a busy machine they would hold up those that work.
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_WAIT_POLICY': 'PASSIVE'},
        )  # fmt: skip
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'{CONTESTANT} stopped with status {self._process.wait()}.')
        return json.loads(line)

    def run(self) -> tuple[float, float]:
        """Seconds of one call, and of all cores together."""
        self._process.stdin.write('run\n')
        self._process.stdin.flush()
        answer = self._answer()
        return answer['seconds'], answer['cpu_seconds']

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def has_contestant(python: str) -> bool:
    """Whether torch, diffusers and the tests are there."""
    script = f'import diffusers, torch, {CONTESTANT}'
    if not (ROOT / f'{CONTESTANT.replace(".", "/")}.py').is_file():
        return False
    done = subprocess.run([python, '-c', script], cwd=ROOT, capture_output=True)
    return done.returncode == 0


def available_bytes() -> float:
    """Memory that may be taken; unlimited where nothing tells."""
    info = Path('/proc/meminfo')
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return float('inf')


def measure(
    name: str,
    *,
    dtype: str = 'float32',
    batch_size: int = 1,
    num_rounds: int = 3,
    torch_python: str | None = None,
    folder: str | None = None,
) -> Measured:
    """Writes, loads, compiles and calls a network.

    Args:
      name: of `CASES`.
      dtype: of the parameters.
      batch_size: images of a call.
      num_rounds: timed calls; one more comes before.
      torch_python: interpreter of the contestant; None: there is none.
      folder: for the temporary checkpoint.
    """
    case = make_case(name)
    with tempfile.TemporaryDirectory(dir=folder) as at:
        file = Path(at) / 'random.safetensors'
        write_random(file, expected_tensors(case_shapes(case), case.source), case.stored)
        command = [sys.executable, '-m', 'dmq_jax.network_bench', name, str(file), dtype]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )  # fmt: skip
        loaded = json.loads(done.stdout.splitlines()[-1])
        params = read_random(case, file, dtype)
        compiled, arguments, compile_s = compile_forward(case, params, batch_size)
        memory = compiled.memory_analysis()
        size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        facts = {
            'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)), **loaded,
            'compile_s': compile_s, 'program_mb': size / MEGABYTE,
        }  # fmt: skip

        def ours() -> tuple[float, float]:
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled(*arguments))
            return time.perf_counter() - began[0], time.process_time() - began[1]

        def fewest(calls: list[tuple[float, float]]) -> Iterator[float]:
            # A busy machine only adds.
            return (min(seconds) / batch_size for seconds in zip(*calls, strict=True))

        ours()  # touches memory for the first time
        if torch_python is None:
            wall, cpu = fewest([ours() for _ in range(num_rounds)])
            return Measured(forward_s=wall, forward_cpu_s=cpu, **facts)
        # Two networks of float32 and their activations.
        side_by_side = available_bytes() > 1.5 * size
        times = [] if side_by_side else [ours() for _ in range(num_rounds)]
        if not side_by_side:
            del params, arguments, compiled
            gc.collect()
        with contextlib.closing(Contestant(torch_python, name, file, batch_size)) as other:
            theirs = []
            for _ in range(num_rounds):
                if side_by_side:
                    times.append(ours())
                theirs.append(other.run())
    (wall, cpu), (torch_wall, torch_cpu) = fewest(times), fewest(theirs)
    return Measured(
        forward_s=wall, forward_cpu_s=cpu, torch_load_s=other.facts['load_s'],
        torch_forward_s=torch_wall, torch_forward_cpu_s=torch_cpu,
        torch_layout=other.facts['layout'], **facts,
    )  # fmt: skip


HEADER = (
    '| network | parameters | load (torch) | peak, of its size | compile | forward, cores together '
    '| torch | ours / torch, cores together |',
    '|---|---|---|---|---|---|---|---|',
)


def markdown(name: str, row: Measured) -> str:
    """The row of a table whose head is `HEADER`."""
    load, theirs, ratio = f'{row.load_s:.1f} s', '–', '–'
    if row.torch_forward_s is not None:
        load += f' ({row.torch_load_s:.1f} s)'
        theirs = f'{row.torch_forward_s:.2f} s, {row.torch_forward_cpu_s:.2f} s, {row.torch_layout}'
        ratio = (
            f'{row.forward_s / row.torch_forward_s:.2f}, '
            f'{row.forward_cpu_s / row.torch_forward_cpu_s:.2f}'
        )
    return (
        f'| {name} | {row.parameters / 1e6:.1f} M | {load} | {row.load_peak_ratio:.2f} '
        f'| {row.compile_s:.0f} s | {row.forward_s:.2f} s, {row.forward_cpu_s:.2f} s | {theirs} '
        f'| {ratio} |'
    )


if __name__ == '__main__':
    print(json.dumps(measure_load(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
