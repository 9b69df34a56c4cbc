"""Speed and memory of fine-tuning and sampling: `python -m dmq_jax.bench [--model=cifar10]`.

With `--network=NAME` it is one network of `network_bench` at its real size, beside diffusers'; with
`--methods=all`, or some of `method_bench.CASES`, what each method costs.

Five rows: the teacher's forward pass, which is one float step of a sampler; one fine-tuning step
(EfficientDM: teacher forward, student forward and backward, update); one integer step; sampling in
float; sampling on integers, W4A4 unless `--weight_bits` and `--activation_bits` say otherwise. On a
busy machine only ratios mean anything, so all rows take turns in one process and the same round is
compared. Scales are made up, which changes no duration; the U-Nets of CIFAR-10 and of Stable
Diffusion 1.5 have random weights. `--dtype=bfloat16` is what integers compete with on a GPU:

  python -m dmq_jax.bench --model=sd15 --dtype=bfloat16 --weight_bits=8 --activation_bits=8
      --rows=step_integer,sample_float,sample_integer
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import PyTree

from dmq_jax import (
    denoisers,
    exporting,
    method_bench,
    methods,
    network_bench,
    networks,
    sampling,
    teachers,
)
from dmq_jax.config import (
    EfficientDMConfig,
    QuantConfig,
    RoundToNearestConfig,
    SamplerConfig,
)
from dmq_jax.diffusion import samplers
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.runtime import log, memory
from dmq_jax.runtime import programs as programs_lib
from dmq_jax.runtime.memory import MEGABYTE, peak_rss_mb

MODELS = ('cifar10', 'bundled', 'sd15')
ROWS = ('teacher', 'finetune', 'step_integer', 'sample_float', 'sample_integer')

_MODEL = flags.DEFINE_enum(
    'model', 'cifar10', MODELS, 'U-Net of CIFAR-10 or of Stable Diffusion, random, or our teacher.'
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', None, 'Images per call; 8, with --network 1.', lower_bound=1
)
_NUM_STEPS = flags.DEFINE_integer('num_steps', 2, 'DDIM steps of the sampling rows.', lower_bound=1)
_NUM_ROUNDS = flags.DEFINE_integer('num_rounds', 7, 'Timed calls of each row.', lower_bound=1)
_ROWS = flags.DEFINE_list('rows', list(ROWS), f'Which of {", ".join(ROWS)}.')
_JSON = flags.DEFINE_string('json', None, 'File that receives the same numbers.')
_NETWORK = flags.DEFINE_enum(
    'network', None, list(network_bench.CASES), 'Measure this network alone, at its real size.'
)
_METHODS = flags.DEFINE_list(
    'methods', None, f'Measure these instead: all, or some of {", ".join(method_bench.CASES)}.'
)
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'],
    'Of parameters, and of what lies between layers; integers stay integers.',
)  # fmt: skip
_WEIGHT_BITS = flags.DEFINE_integer('weight_bits', 4, 'Of the integer rows.', 2, 8)
_ACTIVATION_BITS = flags.DEFINE_integer('activation_bits', 4, 'Of the integer rows.', 2, 8)
_COVERAGE = flags.DEFINE_enum(
    'coverage', 'paper', ['paper', 'full'], 'Which layers of the integer rows are integers.'
)
_TORCH_PYTHON = flags.DEFINE_string(
    'torch_python', sys.executable, "Interpreter with torch and diffusers for --network; '': none."
)
_FOLDER = flags.DEFINE_string('folder', None, 'For the temporary checkpoint of --network.')
_MEMORY = flags.DEFINE_bool('memory', True, 'Run each row once more, alone, for its memory.')
_ALONE = flags.DEFINE_bool('alone', False, 'Print the memory of one row as JSON, and that is all.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
      batch_size: images per call.
      num_steps: network evaluations of a sampling call.
      num_rounds: timed calls of each row; two more come before them.
      dtype: of the networks, see `load_model`.
      weight_bits: of the integer rows, as the next ones.
      activation_bits: of every input of a quantized layer.
      coverage: which layers are quantized, 'paper' or 'full'.
    """

    batch_size: int = 8
    num_steps: int = 2
    num_rounds: int = 7
    dtype: str = 'float32'
    weight_bits: int = 4
    activation_bits: int = 4
    coverage: str = 'paper'


class Program(NamedTuple):
    """One row: a compiled program and its next arguments.

    Attributes:
      compiled: what is called.
      arguments: of the next call.
      advance: (arguments, results) -> arguments of the call after, for donated ones.
      compile_s: seconds spent compiling.
      peak_bytes: arguments, results and temporaries.
    """

    compiled: Callable[..., Any]
    arguments: tuple
    advance: Callable[[tuple, Any], tuple]
    compile_s: float
    peak_bytes: int


class Row(NamedTuple):
    """The measurements of one program.

    Attributes:
      median_s: of the calls, seconds.
      min_s: of the fastest call.
      ratio: median over rounds of the time relative to the teacher's forward pass in that round.
      images_per_second: at the median.
      compile_s: seconds of compilation.
      program_mb: memory of the compiled program: arguments, results and temporaries.
      running_mb: the most that a process with this row alone holds while it runs; None if not
        measured.
      peak_rss_mb: the most it ever holds, mostly while compiling; None if not measured.
    """

    median_s: float
    min_s: float
    ratio: float
    images_per_second: float
    compile_s: float
    program_mb: float
    running_mb: float | None = None
    peak_rss_mb: float | None = None


def load_model(name: str, dtype: str = 'float32') -> denoisers.Denoiser:
    """The float network of a benchmark, its parameters in float32.

    Args:
      name: of `MODELS`.
      dtype: in which it computes, whatever its parameters.

    Raises:
      ValueError: unknown name.
    """
    if name == 'bundled':
        teacher = teachers.load_teacher('fashion_mnist')
        network = teacher.network.clone(dtype=jnp.dtype(dtype))
        return denoisers.float_denoiser(network, teacher.params, teacher.info)
    if name == 'cifar10':
        network, image_shape, num_classes = DDPMUNet(), (32, 32, 3), None
    elif name == 'sd15':
        network, image_shape, num_classes = network_bench.make_case(name).network, (64, 64, 4), 2
    else:
        raise ValueError(f'model={name!r}: expected one of {", ".join(MODELS)}.')
    network = network.clone(dtype=jnp.dtype(dtype))
    if name == 'sd15':  # two prompts and the empty one, as random as the weights
        rows = (('context', (network_bench.CLIP_LENGTH, network.context_dim)),)
        network = networks.Conditioned(network, rows, num_classes + 1)
    info = denoisers.DenoiserInfo(
        schedule=Schedule(kind='linear'), prediction='eps', image_shape=image_shape,
        num_classes=num_classes,
    )  # fmt: skip
    shapes = denoisers.param_shapes(network, info)
    return denoisers.float_denoiser(network, random_params(shapes), info)


def random_params(shapes: PyTree) -> PyTree:
    """Weights of the size of Flax's own, drawn without a program that would have to be compiled."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim < 2:
            return np.full(leaf.shape, path[-1].key == 'scale', np.float32)
        numbers = rng.standard_normal(leaf.shape, np.float32)
        return numbers / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))

    # `jnp.asarray` would compile a program for every shape.
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def stored_as(params: PyTree, dtype: str) -> PyTree:
    """Parameters whose kernels are `dtype`; norms and biases stay float32."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


def make_programs(
    teacher: denoisers.Denoiser, config: BenchConfig, rows: Iterable[str]
) -> dict[str, Program]:
    """The compiled programs of `rows`."""
    quant = QuantConfig(
        weight_bits=config.weight_bits, activation_bits=config.activation_bits,
        coverage=config.coverage,
        # Min-max ranges: a search would take longer than the benchmark.
        weight_observer='minmax', activation_observer='minmax',
    )  # fmt: skip
    timesteps = np.linspace(990, 0, method_bench.TABLE_STEPS).astype(np.int32)
    key = jax.random.key(0)
    float_teacher = teacher._replace(params=stored_as(teacher.params, config.dtype))
    keys = jax.random.split(key, config.batch_size)
    labels = denoisers.balanced_labels(config.batch_size, teacher.info.num_classes)
    x = samplers.initial_noise(keys, teacher.info.image_shape)

    def repeat(arguments, results):
        del results
        return arguments

    def compile_program(function, arguments, *static):
        began = time.perf_counter()
        compiled = programs_lib.compile_alone(function, *static, *arguments)
        compile_s = time.perf_counter() - began
        return Program(compiled, arguments, repeat, compile_s, programs_lib.peak_bytes(compiled))

    def draw(denoiser):
        sampler = denoisers.make_denoiser_sampler(
            denoiser, SamplerConfig(num_steps=config.num_steps)
        )
        return compile_program(
            sampling.sample_batch.jitted(denoiser.params), (denoiser.params, sampler, keys, labels),
            denoiser.predict, denoiser.info, 1.0,
        )  # fmt: skip

    def step(denoiser):
        t = jnp.asarray(500, jnp.int32)
        predict = jax.jit(
            denoiser.predict, compiler_options=programs_lib.network_options(denoiser.params)
        )
        return compile_program(predict, (denoiser.params, x, t, labels))

    @functools.cache
    def quantized():
        layers = denoisers.quantizable(teacher)
        return layers, denoisers.make_plan(layers, quant, teacher.network)

    def begin(options):
        layers, plan = quantized()
        method = methods.make(options, plan)
        stats = method_bench.made_up_stats(plan, layers)
        return plan, method, programs_lib.call_once(method.init, teacher.params, stats, key)

    def finetuning():
        plan, method, state = begin(EfficientDMConfig())
        train_step, arguments = method_bench.finetuning_step(
            teacher, method, plan, timesteps, state, config.batch_size
        )
        began = time.perf_counter()
        compiled = train_step.compiled(*arguments)
        return Program(
            compiled, arguments, lambda arguments, results: (results[0], *arguments[1:]),
            time.perf_counter() - began, compiled.peak_bytes(*arguments),
        )  # fmt: skip

    @functools.cache
    def student():
        plan, method, state = begin(RoundToNearestConfig())
        bound = programs_lib.call_once(method.bind, teacher.params, state)
        exported = exporting.make(teacher, plan, bound, timesteps, 'nearest')
        exported = exported._replace(params=stored_as(exported.params, config.dtype))
        return exporting.denoiser(exported, 'integer')

    makers = {
        'teacher': lambda: step(float_teacher),
        'finetune': finetuning,
        'step_integer': lambda: step(student()),
        'sample_float': lambda: draw(float_teacher),
        'sample_integer': lambda: draw(student()),
    }
    return {name: makers[name]() for name in ROWS if name in rows}


def call(program: Program) -> tuple[Program, float]:
    """Runs a program once; the program with its next arguments, and the seconds."""
    began = time.perf_counter()
    results = jax.block_until_ready(program.compiled(*program.arguments))
    seconds = time.perf_counter() - began
    return program._replace(arguments=program.advance(program.arguments, results)), seconds


def measure(programs: Mapping[str, Program], config: BenchConfig) -> dict[str, Row]:
    """Times the programs, the teacher's among them, in turn."""
    programs = dict(programs)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(config.num_rounds + 2):
        for name, program in programs.items():
            programs[name], spent = call(program)
            if index >= 2:  # the first calls touch memory for the first time
                seconds[name].append(spent)
    result = {}
    for name, program in programs.items():
        median = statistics.median(seconds[name])
        ratios = [s / t for s, t in zip(seconds[name], seconds['teacher'], strict=True)]
        result[name] = Row(
            median_s=median,
            min_s=min(seconds[name]),
            ratio=statistics.median(ratios),
            images_per_second=config.batch_size / median,
            compile_s=program.compile_s,
            program_mb=program.peak_bytes / MEGABYTE,
        )
    return result


def measure_memory(program: Program) -> dict[str, float]:
    """`running_mb` and `peak_rss_mb` of this process, which has made this program alone."""
    compiling = peak_rss_mb()
    with memory.watched() as peak:
        for _ in range(2):
            program, _ = call(program)
    return {'running_mb': peak.mb, 'peak_rss_mb': max(compiling, peak.mb)}


def measure_alone(name: str) -> dict[str, float]:
    """`measure_memory` in a process that sets up, compiles and runs one row and nothing else."""
    command = [sys.executable, '-m', 'dmq_jax.bench', f'--rows={name}', '--alone']
    command += [f'--model={_MODEL.value}', f'--batch_size={_BATCH_SIZE.value or 8}']
    command += [f'--num_steps={_NUM_STEPS.value}', f'--dtype={_DTYPE.value}']
    command += [f'--weight_bits={_WEIGHT_BITS.value}', f'--coverage={_COVERAGE.value}']
    command += [f'--activation_bits={_ACTIVATION_BITS.value}']
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Mapping[str, Row]) -> list[str]:
    """The measurements as aligned lines."""
    lines = [
        f'{"row":16}{"median s":>10}{"min s":>10}{"x teacher":>11}{"images/s":>10}'
        f'{"compile s":>11}{"program MB":>12}{"running MB":>12}{"peak RSS MB":>13}'
    ]
    for name, row in rows.items():
        held = [f'{mb:.0f}' if mb else '-' for mb in (row.running_mb, row.peak_rss_mb)]
        lines.append(
            f'{name:16}{row.median_s:10.4f}{row.min_s:10.4f}{row.ratio:11.2f}'
            f'{row.images_per_second:10.2f}{row.compile_s:11.1f}{row.program_mb:12.0f}'
            f'{held[0]:>12}{held[1]:>13}'
        )
    return lines


def report(model: str, config: BenchConfig, rows: Mapping[str, Row]) -> dict[str, Any]:
    """The measurements and where they were made, as JSON values."""
    return {
        'model': model,
        **dataclasses.asdict(config),
        'rows': {name: row._asdict() for name, row in rows.items()},
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Where a measurement was made."""
    return {
        'device': jax.devices()[0].device_kind,
        'num_cores': len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count(),
        'versions': log.versions(),
        'revision': log.git_revision(),
    }


def _measure_network(name: str) -> None:
    python = _TORCH_PYTHON.value
    if not (python and network_bench.has_contestant(python)):
        python = None
    row = network_bench.measure(
        name, dtype=_DTYPE.value, batch_size=_BATCH_SIZE.value or 1,
        num_rounds=_NUM_ROUNDS.value, torch_python=python, folder=_FOLDER.value,
    )  # fmt: skip
    print('\n'.join([*network_bench.HEADER, network_bench.markdown(name, row)]), flush=True)
    if _JSON.value:
        result = {
            'network': name, 'dtype': _DTYPE.value, 'batch_size': _BATCH_SIZE.value or 1,
            **row._asdict(), **circumstances(),
        }  # fmt: skip
        Path(_JSON.value).write_text(json.dumps(result, indent=2) + '\n')


def measure_methods(names: list[str], config: method_bench.BenchConfig) -> dict[str, Any]:
    """The costs of some methods, by name; of more than one, each in a process of its own."""
    if len(names) == 1:
        load = functools.partial(load_model, _MODEL.value)
        row = method_bench.measure(load, method_bench.CASES[names[0]], config)
        return {names[0]: row}
    rows = {}
    for name in names:
        print(f'{name} ...', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'row.json'
            command = [sys.executable, '-m', 'dmq_jax.bench', f'--methods={name}']
            command += [f'--model={_MODEL.value}', f'--batch_size={config.batch_size}']
            command += [f'--num_rounds={config.num_rounds}', f'--json={file}']
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
            rows[name] = method_bench.Row(**json.loads(file.read_text())['methods'][name])
    return rows


def _measure_methods(names: list[str]) -> None:
    known = list(method_bench.CASES)
    names = known if names == ['all'] else names
    if not names or not set(names) <= set(known):
        raise app.UsageError(f'--methods={names}: expected all, or some of {", ".join(known)}.')
    config = method_bench.BenchConfig(
        batch_size=_BATCH_SIZE.value or 8, num_rounds=_NUM_ROUNDS.value
    )
    rows = measure_methods(names, config)
    print('\n'.join([f'{_MODEL.value}, batch {config.batch_size}', *method_bench.table(rows)]))
    if _JSON.value:
        result = {
            'model': _MODEL.value, **dataclasses.asdict(config),
            'methods': {name: row._asdict() for name, row in rows.items()}, **circumstances(),
        }  # fmt: skip
        Path(_JSON.value).write_text(json.dumps(result, indent=2) + '\n')


def _main(arguments: list[str]) -> None:
    if _METHODS.value:
        return _measure_methods(_METHODS.value)
    if _NETWORK.value:
        return _measure_network(_NETWORK.value)
    if arguments[1:] or not set(_ROWS.value) <= set(ROWS):
        raise app.UsageError(f'--rows={_ROWS.value}: expected some of {", ".join(ROWS)}.')
    config = BenchConfig(
        batch_size=_BATCH_SIZE.value or 8, num_steps=_NUM_STEPS.value,
        num_rounds=_NUM_ROUNDS.value, dtype=_DTYPE.value, weight_bits=_WEIGHT_BITS.value,
        activation_bits=_ACTIVATION_BITS.value, coverage=_COVERAGE.value,
    )  # fmt: skip
    teacher = load_model(_MODEL.value, config.dtype)
    if _ALONE.value:
        (program,) = make_programs(teacher, config, _ROWS.value).values()
        return print(json.dumps(measure_memory(program)))
    rows = measure(make_programs(teacher, config, {'teacher', *_ROWS.value}), config)
    if _MEMORY.value:
        rows = {name: row._replace(**measure_alone(name)) for name, row in rows.items()}
    result = report(_MODEL.value, config, rows)
    print(
        f'{_MODEL.value}, batch {config.batch_size}, {config.dtype}, W{config.weight_bits}'
        f'A{config.activation_bits} {config.coverage}, {result["device"]}, {result["num_cores"]} '
        f'cores, jax {result["versions"]["jax"]}, {result["revision"][:12]}'
    )
    print('\n'.join(table(rows)), flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    app.run(_main)
