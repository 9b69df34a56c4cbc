"""Cost of every method: `python -m dmq_jax.bench --methods=all [--model=bundled]`.

Each is set up as a run sets it up, its steps are compiled, and a few of them are timed: seconds per
100 iterations, memory of the compiled step, memory of the process. Methods that learn block by
block are told for their slowest block and for all blocks together, methods that learn nothing by
the seconds of their arithmetic. Statistics of activations are made up, which changes no duration.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import (
    adapt,
    blocks,
    denoisers,
    exporting,
    finetune,
    methods,
    reconstruct,
    scale_sets,
    trajectories,
)
from dmq_jax.config import (
    AdaptConfig,
    EfficientDMConfig,
    FinetuneConfig,
    FullFinetuningConfig,
    LSQConfig,
    MethodConfig,
    PTQDConfig,
    QDiffusionConfig,
    QLoRAConfig,
    QuantConfig,
    ReconstructConfig,
    RepQViTConfig,
    RoundToNearestConfig,
    SVDQuantConfig,
    TCAQDMConfig,
    TFMQDMConfig,
    TuneQDMConfig,
)
from dmq_jax.methods import base
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import (
    INPUT_ROLES,
    LayerSpec,
    QuantizableLayer,
    is_softmax,
    multiplies_integers,
)
from dmq_jax.runtime import memory, mesh, programs

TABLE_STEPS = 20  # rows of the tables of scales
_NUM_VALUES = 64  # of the made-up statistics of a tensor, and how many it would have had
_NUM_COUNTED = 10_000
_NUM_SAMPLES = 32  # that a block is shown; a step takes as long with 5,120
_WEIGHTS_ALONE = {'weight_bits': 4, 'activation_bits': 32}
# What takes the time of a method that only calibrates.
_SEARCHED = {'weight_observer': 'mse', 'activation_observer': 'mse'}
_FLOAT = {'weight_bits': 32, 'activation_bits': 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
      batch_size: images per step.
      num_rounds: timed steps; one more comes before them.
    """

    batch_size: int = 8
    num_rounds: int = 7


class Row(NamedTuple):
    """What one method costs.

    Attributes:
      stage: where it learns; 'calibrate': it learns nothing.
      bits: of weights and activations.
      per_100_s: seconds of 100 iterations, of the slowest block where there are blocks; without
        iterations, those of the arithmetic of the whole method.
      all_blocks_s: seconds of 100 iterations of every block, in all phases with their shares.
      block: the slowest, or how many there are.
      compile_s: of the step, or of those of all blocks.
      program_mb: memory of the compiled step: arguments, results and temporaries.
      running_mb: the most the process held while steps ran.
      peak_rss_mb: the most it ever held; mostly while compiling.
      trained: numbers that are trained.
      model_mb: of the exported network.
      set_mb: of another adaptation of the same integers; None: there is none.
    """

    stage: str
    bits: str
    per_100_s: float
    all_blocks_s: float | None
    block: str | None
    compile_s: float
    program_mb: float
    running_mb: float
    peak_rss_mb: float
    trained: int
    model_mb: float
    set_mb: float | None


class Case(NamedTuple):
    """A method as it is measured.

    Attributes:
      method: its options.
      measure: `(Setup, BenchConfig) -> Timed`, its stage.
      stage: name of that.
      quant: options of QuantConfig that are not W4A8.
    """

    method: MethodConfig
    measure: Callable[..., 'Timed']
    stage: str
    quant: Mapping[str, Any] = {}


class Setup(NamedTuple):
    """A method ready to learn."""

    teacher: denoisers.Denoiser
    method: methods.Method
    plan: dict[str, LayerSpec]
    timesteps: np.ndarray
    state: base.State
    stats: base.Stats


class Timed(NamedTuple):
    """What the steps of a stage took; see `Row`."""

    per_100_s: float
    compile_s: float
    program_mb: float
    running_mb: float
    all_blocks_s: float | None = None
    block: str | None = None


def made_up_stats(
    plan: Mapping[str, LayerSpec], layers: Mapping[str, QuantizableLayer]
) -> dict[str, dict[str, TensorStats]]:
    """Statistics of every quantized input as if its values were spread evenly over [-2, 4].

    Those of a softmax over (0, 1]; of every channel alike.
    """

    def tensor(path: str, role: str) -> TensorStats:
        ends = (1 / _NUM_VALUES, 1.0) if is_softmax(path, role) else (-2.0, 4.0)
        values = np.linspace(*ends, _NUM_VALUES, dtype=np.float32)
        low, high, values = (np.stack([a] * TABLE_STEPS) for a in (*map(np.float32, ends), values))
        extremes = np.stack([low, high], axis=-1)
        stats = TensorStats(low, high, values, extremes, np.full_like(low, _NUM_COUNTED))
        shape = layers[path].weight_shape
        if shape is None:
            return stats
        size = shape[-2]
        channels = np.broadcast_to(np.arange(_NUM_VALUES, dtype=np.int32) % size, values.shape)
        wide = {
            f'channel_{end}': np.repeat(ends[:, None], size, axis=1)
            for end, ends in (('low', low), ('high', high))
        }
        return stats._replace(channels=channels, **wide)

    return {
        path: {role: tensor(path, role) for role in INPUT_ROLES[layers[path].kind]}
        for path, spec in plan.items()
        if spec.inputs is not None
    }


def set_up(teacher: denoisers.Denoiser, case: Case) -> Setup:
    """The method of `case` at its start."""
    # Min-max ranges, where a search would take longer than the benchmark.
    observers = {'weight_observer': 'minmax', 'activation_observer': 'minmax'}
    quant = {'weight_bits': 4, 'activation_bits': 8, 'coverage': 'full'} | observers | case.quant
    layers = denoisers.quantizable(teacher)
    plan = denoisers.make_plan(layers, QuantConfig(**quant), teacher.network)
    method = methods.make(case.method, plan, teacher.info.schedule.num_train_timesteps)
    stats = made_up_stats(plan, layers)
    timesteps = np.linspace(990, 0, TABLE_STEPS).astype(np.int32)
    state = programs.call_once(method.init, teacher.params, stats, jax.random.key(0))
    return Setup(teacher, method, plan, timesteps, state, stats)


def measure(load: Callable[[], denoisers.Denoiser], case: Case, config: BenchConfig) -> Row:
    """The cost of one method.

    Args:
      load: gives the float network; its kernels are let go where steps do not need them.
      case: the method.
      config: images and steps.
    """
    setup = set_up(load(), case)
    exported = exporting.make(
        setup.teacher, setup.plan,
        programs.call_once(setup.method.bind, setup.teacher.params, setup.state),
        setup.timesteps, 'nearest',
    )  # fmt: skip
    set_mb = None
    if setup.method.beside is not None:
        set_mb = scale_sets.size_bytes(exported) / memory.MEGABYTE
    model_mb = exporting.size_bytes(exported) / memory.MEGABYTE
    trained = base.num_trained(setup.state, _optimizers(setup.method, case.stage))
    del exported
    holder = [setup]
    del setup
    timed = case.measure(holder.pop(), config)
    quant = {'weight_bits': 4, 'activation_bits': 8} | case.quant
    return Row(
        stage=case.stage, bits=f'W{quant["weight_bits"]}A{quant["activation_bits"]}',
        peak_rss_mb=memory.peak_rss_mb(), trained=trained, model_mb=model_mb, set_mb=set_mb,
        **timed._asdict(),
    )  # fmt: skip


def _optimizers(method: methods.Method, stage: str) -> list[Callable[..., Any]]:
    if stage == 'reconstruct':
        return [phase.optimizer for phase in method.phases]
    return [] if stage == 'calibrate' else [method.optimizer]


def _repeat(step: Callable[[Any], Any], carry: Any, num_rounds: int) -> tuple[float, float]:
    """Median seconds of `step`, which makes its next argument, and the memory while it ran."""
    spent = []
    with memory.watched() as peak:
        for index in range(num_rounds + 1):
            began = time.perf_counter()
            carry = jax.block_until_ready(step(carry))
            if index:  # the first call touches memory for the first time
                spent.append(time.perf_counter() - began)
    return statistics.median(spent), peak.mb


def _compile(function: Any, *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function.lower(*arguments).compile(), time.perf_counter() - began


def _calibrating(setup: Setup, config: BenchConfig) -> Timed:
    inputs = setup.teacher.params, setup.stats, jax.random.key(0)
    compiled, compile_s = _compile(jax.jit(setup.method.init), *inputs)
    seconds, running_mb = _repeat(lambda _: compiled(*inputs), None, min(config.num_rounds, 2))
    return Timed(seconds, compile_s, programs.peak_bytes(compiled) / memory.MEGABYTE, running_mb)


def finetuning_step(
    teacher: denoisers.Denoiser,
    method: methods.Method,
    plan: Mapping[str, LayerSpec],
    timesteps: np.ndarray,
    state: base.State,
    batch_size: int,
) -> tuple[Any, tuple[Any, ...]]:
    """The train step of `finetune`, not yet compiled, and its first arguments.

    Args:
      teacher: the float network.
      method: of `state`.
      plan: what is quantized.
      timesteps: of the rows of the tables.
      state: where it starts; copied, since the step donates the first argument.
      batch_size: images per step.
    """
    key = jax.random.key(0)
    options = FinetuneConfig(num_iterations=1000, batch_size=batch_size)
    sampler = denoisers.make_denoiser_sampler(teacher, options.sampler)
    optimizer = method.optimizer(state, base.Decay(options.num_iterations, options.schedule))
    loss = finetune.make_loss(teacher, method, plan, timesteps, 'nearest', options)
    step = finetune.make_train_step(
        teacher, loss, optimizer, options, has_integers=multiplies_integers(plan)
    )
    start = finetune.start_state(teacher, sampler, options, optimizer, state, teacher.params, key)
    # Donated: the teacher's leaves must survive.
    return step, (programs.copied(start), teacher.params, sampler, key)


def _finetuning(setup: Setup, config: BenchConfig) -> Timed:
    step, (start, *fixed) = finetuning_step(
        setup.teacher, setup.method, setup.plan, setup.timesteps, setup.state, config.batch_size
    )
    began = time.perf_counter()
    compiled = step.compiled(start, *fixed)
    compile_s = time.perf_counter() - began
    program_mb = compiled.peak_bytes(start, *fixed) / memory.MEGABYTE
    holder = [start]
    del start
    seconds, running_mb = _repeat(
        lambda train: compiled(train, *fixed)[0], holder.pop(), config.num_rounds
    )
    return Timed(100 * seconds, compile_s, program_mb, running_mb)


def _adapting(setup: Setup, config: BenchConfig, remat: str = AdaptConfig().remat) -> Timed:
    teacher, method = setup.teacher, setup.method
    loss = adapt.make_loss(teacher, method, setup.plan, setup.timesteps, 'nearest', 0.0, remat)
    optimizer = method.optimizer(setup.state, base.Decay(config.num_rounds))
    step = adapt.make_train_step(
        loss, optimizer, config.batch_size, jax.random.key(0), mesh.make_mesh(1),
        has_integers=multiplies_integers(setup.plan),
    )  # fmt: skip
    constants = adapt.make_constants(teacher, method, setup.state, setup.plan)
    images = jnp.zeros((config.batch_size, *teacher.info.image_shape))
    labels = denoisers.balanced_labels(config.batch_size, teacher.info.num_classes)
    train = adapt.TrainState(
        setup.state, optimizer.init(setup.state), jnp.zeros((), jnp.int32)
    )  # fmt: skip
    train = programs.copied(train)
    compiled, compile_s = _compile(step, train, constants, (images, labels))
    # What is left is what the step needs.
    del setup, teacher, loss
    holder = [train]
    del train
    seconds, running_mb = _repeat(
        lambda train: compiled(train, constants, (images, labels))[0],
        holder.pop(),
        config.num_rounds,
    )
    program_mb = programs.peak_bytes(compiled) / memory.MEGABYTE
    return Timed(100 * seconds, compile_s, program_mb, running_mb)


def _adapting_kept(setup: Setup, config: BenchConfig) -> Timed:
    return _adapting(setup, config, remat='')


def _reconstructing(setup: Setup, config: BenchConfig) -> Timed:
    teacher, method, plan = setup.teacher, setup.method, setup.plan
    options = ReconstructConfig(num_iterations=1000, batch_size=config.batch_size)
    device_mesh = mesh.make_mesh(1)
    task = reconstruct.make_task(
        teacher, method, plan, setup.timesteps, 'nearest', options, device_mesh
    )
    num_samples = max(_NUM_SAMPLES, config.batch_size)
    key = jax.random.key(0)
    labels = denoisers.balanced_labels(num_samples, teacher.info.num_classes)
    inputs = trajectories.Inputs(
        jax.random.normal(key, (num_samples, *teacher.info.image_shape)),
        jnp.asarray(np.resize(setup.timesteps, num_samples)),
        None if labels is None else jnp.asarray(labels),
    )
    state = jax.device_get(setup.state)
    slowest, total, compile_s, program_mb, running_mb = (0.0, ''), 0.0, 0.0, 0.0, 0.0
    for block in task.blocks:
        in_all = 0.0
        for phase in method.phases:
            if not blocks.learns(block, phase, plan):
                continue
            step = reconstruct.make_block_step(
                task, phase, block, state, inputs, share=1.0, key=key
            )
            index = jnp.zeros((), jnp.int32)
            fixed = task.params, step.examples, index
            compiled, spent = _compile(step.learn, step.part, step.moments, *fixed)
            seconds, mb = _repeat(
                lambda carry, run=compiled, fixed=fixed: run(*carry, *fixed)[:2],
                (step.part, step.moments), config.num_rounds,
            )  # fmt: skip
            in_all += 100 * seconds * phase.share
            compile_s += spent
            program_mb = max(program_mb, programs.peak_bytes(compiled) / memory.MEGABYTE)
            running_mb = max(running_mb, mb)
        slowest, total = max(slowest, (in_all, block.name)), total + in_all
    name = f'{slowest[1]}, of {len(task.blocks)}'
    return Timed(slowest[0], compile_s, program_mb, running_mb, total, name)


CASES = {
    'round_to_nearest': Case(RoundToNearestConfig(), _calibrating, 'calibrate', _SEARCHED),
    'repq_vit': Case(RepQViTConfig(), _calibrating, 'calibrate', _SEARCHED),
    'svdquant': Case(SVDQuantConfig(), _calibrating, 'calibrate', _SEARCHED),
    'qdiffusion': Case(QDiffusionConfig(), _reconstructing, 'reconstruct'),
    'tfmq_dm': Case(TFMQDMConfig(), _reconstructing, 'reconstruct'),
    'ptqd': Case(PTQDConfig(), _reconstructing, 'reconstruct'),
    'tcaq_dm': Case(TCAQDMConfig(), _reconstructing, 'reconstruct'),
    'efficientdm': Case(EfficientDMConfig(), _finetuning, 'finetune'),
    'lsq': Case(LSQConfig(), _finetuning, 'finetune'),
    'peqa': Case(
        TuneQDMConfig(scales='output', num_experts=1), _adapting, 'adapt', _WEIGHTS_ALONE
    ),
    'tuneqdm': Case(TuneQDMConfig(), _adapting, 'adapt', _WEIGHTS_ALONE),
    'tuneqdm_w4a8': Case(TuneQDMConfig(), _adapting, 'adapt'),
    'qlora': Case(QLoRAConfig(), _adapting, 'adapt', _WEIGHTS_ALONE),
    'qlora_rank2': Case(QLoRAConfig(rank=2), _adapting, 'adapt', _WEIGHTS_ALONE),
    'full_finetuning': Case(FullFinetuningConfig(), _adapting, 'adapt', _FLOAT),
    # As most train: activations are kept for the backward pass.
    'tuneqdm_kept': Case(TuneQDMConfig(), _adapting_kept, 'adapt', _WEIGHTS_ALONE),
    'full_finetuning_kept': Case(FullFinetuningConfig(), _adapting_kept, 'adapt', _FLOAT),
}  # fmt: skip


def table(rows: Mapping[str, Row]) -> list[str]:
    """The measurements as aligned lines."""
    lines = [
        f'{"method":21}{"stage":13}{"bits":8}{"s/100 it":>10}{"all blocks":>12}{"compile s":>11}'
        f'{"program MB":>12}{"running MB":>12}{"peak RSS":>10}{"trained":>12}{"model MB":>10}'
        f'{"set MB":>9}  block'
    ]
    for name, row in rows.items():
        blocks, sets = (
            '-' if value is None else f'{value:.{digits}f}'
            for value, digits in ((row.all_blocks_s, 1), (row.set_mb, 3))
        )
        lines.append(
            f'{name:21}{row.stage:13}{row.bits:8}{row.per_100_s:10.2f}{blocks:>12}'
            f'{row.compile_s:11.1f}{row.program_mb:12.1f}{row.running_mb:12.0f}'
            f'{row.peak_rss_mb:10.0f}{row.trained:12,}{row.model_mb:10.2f}{sets:>9}'
            f'  {row.block or ""}'.rstrip()
        )
    return lines
