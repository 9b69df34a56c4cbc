"""Denoisers: where a network, its weights and its noise schedule meet.

Teacher and student are the same type, so samplers, metrics and reports cannot tell them apart.
`predict` is a pure function of its parameters: they are an argument of everything compiled, never
a constant baked into it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, PyTree

from dmq_jax.config import FLOAT_BITS, QuantConfig, SamplerConfig
from dmq_jax.diffusion.samplers import Sampler, make_sampler
from dmq_jax.diffusion.schedule import Schedule, sampling_timesteps
from dmq_jax.methods.base import Bound, apply_fake, by_path, with_leaves, with_weights
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant import plan as plan_lib
from dmq_jax.quant.layers import integer, quantizable_layers
from dmq_jax.quant.plan import LayerSpec, Plan, QuantizableLayer, Rule, full_rules, paper_rules
from dmq_jax.quant.rows import at_timestep
from dmq_jax.quant.tensor import QuantSpec

# Calibration keeps statistics only; any spec marks an input as observed.
OBSERVED = QuantSpec(bits=8, symmetric=False)

Predict = Callable[..., Float[Array, 'B H W C']]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserInfo:
    """What a sampler must know of a denoiser besides its function.

    Attributes:
      schedule: noise schedule it was trained with.
      prediction: what it predicts, 'eps' or 'v'.
      image_shape: (height, width, channels) of its images.
      num_classes: classes it is conditioned on, labels 0..num_classes-1; None if unconditional.
        Row num_classes of the network's class table, if there is one, is the null class.
    """

    schedule: Schedule
    prediction: str
    image_shape: tuple[int, int, int]
    num_classes: int | None


class Denoiser(NamedTuple):
    """A network that predicts the noise in an image.

    Attributes:
      predict: `predict(params, x, t, y)`, pure; `t` is a scalar or one per image, `y` the class of
        each image or None.
      params: its parameters, any pytree.
      info: schedule, prediction type, image shape, classes.
      network: the float Flax module underneath.
    """

    predict: Predict
    params: PyTree
    info: DenoiserInfo
    network: Any


def float_denoiser(network: DDPMUNet, params: PyTree, info: DenoiserInfo) -> Denoiser:
    """The denoiser that simply applies `network`."""

    def predict(params, x, t, y=None):
        return network.apply({'params': params}, x, t, y)

    return Denoiser(predict, params, info, network)


def guided(predict: Predict, info: DenoiserInfo, guidance_scale: float) -> Predict:
    """`predict` with classifier-free guidance (arXiv:2207.12598, eq. 6), as one doubled batch.

    Args:
      predict: of a class-conditional denoiser.
      info: says which class is the null class; `make_denoiser_sampler` checks that there is one.
      guidance_scale: weight s of `null + s (conditional - null)`; 1 leaves `predict` as it is.
    """
    if guidance_scale == 1.0:
        return predict

    def predict_guided(params, x, t, y):
        null = jnp.full_like(y, info.num_classes)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t, t])
        both = predict(params, jnp.concatenate([x, x]), times, jnp.concatenate([null, y]))
        # A capturing network returns its features too: those of both halves, as they are.
        both, *features = both if isinstance(both, tuple) else (both,)
        unconditional, conditional = jnp.split(both, 2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        return (prediction, *features) if features else prediction

    return predict_guided


@dataclasses.dataclass(frozen=True)
class Capturing:
    """A network whose `apply` returns `(prediction, features)`.

    Attributes:
      network: a Flax module.
      pattern: regular expression; the outputs of all modules whose whole path matches are the
        features, by path.
    """

    network: Any
    pattern: str

    def apply(self, variables: PyTree, *inputs: Any) -> tuple[Array, dict[str, Array]]:
        """As the network's.

        Raises:
          ValueError: the pattern matches no module.
        """
        prediction, state = self.network.apply(
            variables, *inputs, mutable=['intermediates'],
            capture_intermediates=lambda module, method: (
                method == '__call__'
                and re.fullmatch(self.pattern, '/'.join(module.path)) is not None
            ),
        )  # fmt: skip
        found = traverse_util.flatten_dict(state.get('intermediates', {}), sep='/')
        if not found:
            raise ValueError(f'feature_layers={self.pattern!r} matches no module of the network.')
        return prediction, {
            path.removesuffix('/__call__'): outputs[0] for path, outputs in found.items()
        }


def make_denoiser_sampler(denoiser: Denoiser, config: SamplerConfig) -> Sampler:
    """The sampler that `config` describes, on the schedule of `denoiser`.

    Raises:
      ValueError: guidance of a denoiser without a null class; see also
        `diffusion.schedule.sampling_timesteps` and `diffusion.samplers.make_sampler`.
    """
    info = denoiser.info
    if config.guidance_scale != 1.0:
        _check_null_class(denoiser, config.guidance_scale)
    timesteps = sampling_timesteps(info.schedule, config.num_steps, config.spacing)
    return make_sampler(
        config.name, info.schedule, timesteps, eta=config.eta, prediction=info.prediction
    )


def _check_null_class(denoiser: Denoiser, guidance_scale: float) -> None:
    num_classes, rows = denoiser.info.num_classes, denoiser.network.num_class_embeds
    if num_classes is None:
        raise ValueError(
            f'guidance_scale={guidance_scale}: this denoiser is unconditional; expected 1.0.'
        )
    if rows <= num_classes:
        raise ValueError(
            f'guidance_scale={guidance_scale}: this denoiser has no null class, since each of the '
            f'{rows} rows of its class table is a class; expected 1.0. If the last row of a '
            f'diffusers folder is the null class, load it with teacher.num_classes={rows - 1}.'
        )


def network_settings(network: DDPMUNet) -> dict[str, Any]:
    """The attributes that rebuild `network`, as JSON values; the dtype is not one of them."""
    names = [
        f.name for f in dataclasses.fields(network) if f.name not in ('parent', 'name', 'dtype')
    ]
    return {name: getattr(network, name) for name in names}


def make_network(settings: dict[str, Any]) -> DDPMUNet:
    """The network that `network_settings` described."""
    return DDPMUNet(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def make_info(settings: dict[str, Any]) -> DenoiserInfo:
    """The `DenoiserInfo` whose `dataclasses.asdict` is `settings`, possibly through JSON."""
    return DenoiserInfo(
        schedule=Schedule(**settings['schedule']),
        prediction=settings['prediction'],
        image_shape=tuple(settings['image_shape']),
        num_classes=settings['num_classes'],
    )


def init_params(network: DDPMUNet, info: DenoiserInfo, key: Array) -> PyTree:
    """Random parameters of `network`."""
    x, t, y = example_inputs(info, batch_size=1)
    return jax.jit(network.init)(key, x, t, y)['params']


def example_inputs(
    info: DenoiserInfo, batch_size: int
) -> tuple[Float[Array, 'B H W C'], Int[Array, ''], Int[Array, 'B'] | None]:
    """Zeros of the shapes that `predict` takes: images, timestep, classes."""
    y = None if info.num_classes is None else jnp.zeros((batch_size,), jnp.int32)
    return jnp.zeros((batch_size, *info.image_shape)), jnp.zeros((), jnp.int32), y


def balanced_labels(num_images: int, num_classes: int | None) -> Int[np.ndarray, 'N'] | None:
    """Labels that go round the classes: every prefix is as balanced as can be."""
    return None if num_classes is None else np.arange(num_images, dtype=np.int32) % num_classes


def quantizable(teacher: Denoiser) -> dict[str, QuantizableLayer]:
    """Every layer of the teacher that could be quantized, by path."""
    x, t, y = example_inputs(teacher.info, batch_size=1)
    return quantizable_layers(teacher.network.apply, teacher.params, x, t, y)


def make_plan(layers: Mapping[str, QuantizableLayer], config: QuantConfig) -> dict[str, LayerSpec]:
    """The plan of a student: the rules of its config, then those of its coverage.

    Raises:
      ValueError: see `quant.plan.make_plan`.
    """

    def spec(
        weight_bits: int, activation_bits: int, group_size: int | None, *, edge: bool = False
    ) -> LayerSpec:
        weight = inputs = None
        if weight_bits != FLOAT_BITS:
            weight = QuantSpec(
                bits=weight_bits,
                symmetric=config.weight_symmetric,
                per_channel=True,
                group_size=group_size or None,
                observer=config.weight_observer,
                percentile=config.percentile,
            )
        if activation_bits != FLOAT_BITS:
            inputs = QuantSpec(
                bits=activation_bits,
                symmetric=config.activation_symmetric,
                observer=config.activation_observer,
                percentile=config.percentile,
            )
        per_timestep = config.per_timestep and not edge
        return LayerSpec(
            weight=weight, inputs=inputs, per_timestep=per_timestep, trainable=not edge
        )

    def width(own: int | None, default: int | None) -> int | None:
        return default if own is None else own

    rules = [
        Rule(
            pattern=rule.pattern,
            spec=spec(
                width(rule.weight_bits, config.weight_bits),
                width(rule.activation_bits, config.activation_bits),
                width(rule.weight_group_size, config.weight_group_size),
            ),
        )
        for rule in config.rules
    ]
    target = spec(config.weight_bits, config.activation_bits, config.weight_group_size)
    if config.coverage == 'paper':
        edge_bits = (
            FLOAT_BITS if bits == FLOAT_BITS else 8
            for bits in (config.weight_bits, config.activation_bits)
        )
        # First and last layers have too few channels to divide into groups.
        edge = spec(*edge_bits, None, edge=True)
        rules += paper_rules(target, edge)
    elif config.coverage == 'full':
        rules += full_rules(target)
    return plan_lib.make_plan(layers, rules)


@dataclasses.dataclass(frozen=True)
class QuantizedPredict:
    """`predict` of a student: a value, so that equal students share one compiled program.

    Attributes:
      network: the float network underneath.
      plan: (path, spec) of every quantized layer.
      lookup: how the row of a table is found; see `quant.rows.at_timestep`.
      mode: 'fake' rounds in float, 'integer' multiplies integers.
    """

    network: Any
    plan: tuple[tuple[str, LayerSpec], ...]
    lookup: str
    mode: str

    def __call__(self, params: PyTree, x: Array, t: Array, y: Array | None = None) -> Array:
        """The prediction; `params` are those of `fake_params`, `training_params` or an export."""
        rows = at_timestep(params['tables'], params['timesteps'], t, lookup=self.lookup)
        plan = dict(self.plan)
        if self.mode == 'fake':
            weights = params.get('weights')
            return apply_fake(
                self.network.apply, plan, params['params'], rows, x, t, y, weights=weights
            )
        entries = {path: dict(rows.get(path, {})) for path in plan}
        for path, weight in params['weights'].items():
            entries[path]['weight'] = weight
        with integer(plan):
            variables = {'params': params['params'], 'quant': by_path(entries)}
            return self.network.apply(variables, x, t, y)


def fake_student(
    teacher: Denoiser, plan: Plan, bound: Bound, timesteps: Int[Array, 'S'], lookup: str
) -> Denoiser:
    """The student that `bound` stands for, rounding in float."""
    predict = QuantizedPredict(teacher.network, tuple(plan.items()), lookup, 'fake')
    return teacher._replace(predict=predict, params=fake_params(teacher.params, bound, timesteps))


def fake_params(params: PyTree, bound: Bound, timesteps: Int[Array, 'S']) -> PyTree:
    """The parameters of a fake-quantized student; differentiable."""
    return {
        'params': with_weights(with_leaves(params, bound.params), bound.weights),
        'tables': bound.tables,
        'timesteps': jnp.asarray(timesteps, jnp.int32),
    }


def training_params(params: PyTree, bound: Bound, timesteps: Int[Array, 'S']) -> PyTree:
    """`fake_params` whose kernels are still codes: equal gradients, a faster step on CPU."""
    return {
        'params': with_leaves(params, bound.params),
        'weights': bound.weights,
        'tables': bound.tables,
        'timesteps': jnp.asarray(timesteps, jnp.int32),
    }
