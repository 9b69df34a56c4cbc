"""Denoisers: where a network, its weights and its noise schedule meet.

Teacher and student are the same type, so samplers, metrics and reports cannot tell them apart.
`predict` is a pure function of its parameters: they are an argument of everything compiled, never
a constant baked into it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, PyTree

from dmq_jax import networks
from dmq_jax.config import FLOAT_BITS, QuantConfig, SamplerConfig
from dmq_jax.diffusion.samplers import Sampler, absorb_noise, make_spaced_sampler
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.methods.base import Bound, apply_fake, by_path, with_leaves, with_weights
from dmq_jax.networks import Network
from dmq_jax.quant import plan as plan_lib
from dmq_jax.quant.layers import integer, quantizable_layers
from dmq_jax.quant.plan import LayerSpec, Plan, QuantizableLayer, Rule, full_rules, paper_rules
from dmq_jax.quant.rows import at_timestep, per_channel, per_image
from dmq_jax.quant.tensor import QuantSpec
from kernels import choices

# Calibration keeps statistics only; any spec marks an input as observed.
OBSERVED = QuantSpec(bits=8, symmetric=False)

Predict = Callable[..., Float[Array, 'B H W C']]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserInfo:
    """What a sampler must know of a denoiser besides its function.

    Attributes:
      schedule: noise schedule it was trained with.
      prediction: what it predicts, 'eps' or 'v'.
      image_shape: (height, width, channels) of its images, or of its latents.
      num_classes: classes (or prompts) it is conditioned on, labels 0..num_classes-1; None if
        unconditional. Row num_classes of the network's class table, if there is one, is the null
        class.
      learned_variance: the network puts out twice the channels: the prediction, then the variance
        (arXiv:2102.09672, eq. 15).
      is_latent: what it draws are latents, images only once they are decoded.
    """

    schedule: Schedule
    prediction: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    learned_variance: bool = False
    is_latent: bool = False


class Decoder(NamedTuple):
    """What makes images of latents.

    Attributes:
      network: an autoencoder, which knows how its latents are scaled.
      params: of its decoding half.
      read_encoder: reads the parameters of the other half, for who learns from images; None: they
        are not at hand.
    """

    network: Any
    params: PyTree
    read_encoder: Callable[[], PyTree] | None = None

    @property
    def factor(self) -> int:
        """Pixels along the side of a latent."""
        return 2 ** (len(self.network.channels) - 1)


class Denoiser(NamedTuple):
    """A network that predicts the noise in an image.

    Attributes:
      predict: `predict(params, x, t, y)`, pure; `t` is a scalar or one per image, `y` the class of
        each image or None.
      params: its parameters, any pytree.
      info: schedule, prediction type, image shape, classes.
      network: the float network underneath; see `networks`.
      decoder: of its latents; None for one that draws images, or whose decoder is not at hand.
      encode_prompts: prompts -> rows of its table of conditions, by input, from text encoders that
        are read for it; None for one without prompts, or whose text encoders are not at hand.
    """

    predict: Predict
    params: PyTree
    info: DenoiserInfo
    network: Any
    decoder: Decoder | None = None
    encode_prompts: Callable[[Sequence[str]], dict[str, Array]] | None = None


def pixel_shape(denoiser: Denoiser) -> tuple[int, int, int]:
    """(height, width, channels) of its images, decoded where it draws latents."""
    if denoiser.decoder is None:
        return denoiser.info.image_shape
    height, width, _ = denoiser.info.image_shape
    factor, network = denoiser.decoder.factor, denoiser.decoder.network
    return factor * height, factor * width, network.in_channels


def float_denoiser(network: Network, params: PyTree, info: DenoiserInfo) -> Denoiser:
    """The denoiser that simply applies `network`."""
    return Denoiser(FloatPredict(network), params, info, network)


@dataclasses.dataclass(frozen=True)
class FloatPredict:
    """Applies a network; equal for equal networks, so that programs of one serve the other.

    Attributes:
      network: in float.
    """

    network: Network

    def __call__(self, params: PyTree, x: Array, t: Array, y: Array | None = None) -> Array:
        """The prediction of the network with these parameters."""
        return self.network.apply({'params': params}, x, t, y)


def guided(
    predict: Predict,
    info: DenoiserInfo,
    guidance_scale: float,
    *,
    keep_variance: bool = False,
) -> Predict:
    """What a sampler calls: `predict` with classifier-free guidance, as one doubled batch.

    The equation is arXiv:2207.12598, eq. 6. Of a learnt variance, which guidance leaves alone, only
    a sampler that uses it hears.

    Args:
      predict: of a denoiser.
      info: says which class is the null class; `make_denoiser_sampler` checks that there is one.
      guidance_scale: weight s of `null + s (conditional - null)`; 1 leaves `predict` as it is.
      keep_variance: the result has the channels of a learnt variance after those of the prediction.
    """
    drops = info.learned_variance and not keep_variance
    if guidance_scale == 1.0 and not drops:
        return predict
    channels = info.image_shape[2]

    def predict_guided(params, x, t, y):
        if guidance_scale == 1.0:
            # A capturing network returns its features too, as they are.
            output, *features = _with_features(predict(params, x, t, y))
            return _joined(output[..., :channels], features)
        times = t if jnp.ndim(t) == 0 else jnp.concatenate([t, t])
        doubled = jax.tree.map(
            lambda null, own: jnp.concatenate([null, own]), null_like(y, info), y
        )
        both, *features = _with_features(predict(params, jnp.concatenate([x, x]), times, doubled))
        # The features are those of both halves.
        unconditional, conditional = jnp.split(both, 2)
        if info.learned_variance:
            variance = conditional[..., channels:]
            unconditional, conditional = (
                half[..., :channels] for half in (unconditional, conditional)
            )
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        if info.learned_variance and keep_variance:
            prediction = jnp.concatenate([prediction, variance], axis=-1)
        return _joined(prediction, features)

    return predict_guided


def null_like(y: PyTree, info: DenoiserInfo) -> PyTree:
    """The condition of guidance's other half: the null class, and whatever else `y` holds.

    Raises:
      ValueError: a mapping without labels, of which nothing says what its null is.
    """
    if not isinstance(y, Mapping):
        return jnp.full_like(y, info.num_classes)
    if networks.LABEL not in y:
        raise ValueError(
            f'guidance of a condition with {", ".join(y)} alone: expected an entry '
            f'{networks.LABEL!r}, whose null is class num_classes.'
        )
    return {**y, networks.LABEL: jnp.full_like(y[networks.LABEL], info.num_classes)}


def _with_features(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def _joined(prediction: Array, features: list) -> Any:
    return (prediction, *features) if features else prediction


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

    Where a student's correction knows the noise in its prediction, the sampler adds less.

    Raises:
      ValueError: guidance of a denoiser without a null class, a learnt variance of one without;
        see also `diffusion.samplers.make_spaced_sampler`.
    """
    info = denoiser.info
    if config.guidance_scale != 1.0:
        _check_null_class(denoiser, config.guidance_scale)
    if config.variance == 'learned_range' and not info.learned_variance:
        raise ValueError(
            "sampler.variance='learned_range': this denoiser predicts no variance; expected "
            "'fixed_small' or 'fixed_large'."
        )
    sampler = make_spaced_sampler(
        config.name, info.schedule, config.num_steps, prediction=info.prediction,
        spacing=config.spacing, steps_offset=config.steps_offset, sections=config.sections,
        eta=config.eta, variance=config.variance, clip_sample=config.clip_sample,
        final_alpha=config.final_alpha, final_order=config.final_order,
    )  # fmt: skip
    if isinstance(denoiser.predict, QuantizedPredict) and 'correction' in denoiser.params:
        t = jnp.asarray(sampler.timesteps)
        params = denoiser.params
        row = at_timestep(params['correction'], params['timesteps'], t)
        sampler = absorb_noise(sampler, row['variance'])
    return sampler


def _check_null_class(denoiser: Denoiser, guidance_scale: float) -> None:
    num_classes, rows = denoiser.info.num_classes, networks.class_rows(denoiser.network)
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


def network_settings(network: Network) -> dict[str, Any]:
    """The attributes that rebuild `network`, as JSON values; the dtype is not one of them."""
    return networks.to_settings(network)


def make_network(settings: dict[str, Any]) -> Network:
    """The network that `network_settings` described."""
    return networks.from_settings(settings)


def info_settings(info: DenoiserInfo) -> dict[str, Any]:
    """`info` as JSON values, without the fields that have their defaults."""
    settings = dataclasses.asdict(info)
    for owner, values in ((info, settings), (info.schedule, settings['schedule'])):
        for field in dataclasses.fields(owner):
            if field.name not in _ALWAYS_WRITTEN and values[field.name] == field.default:
                del values[field.name]
    return settings


# What the first release wrote whatever its value: the names of artefacts are digests of it.
_ALWAYS_WRITTEN = ('kind', 'num_train_timesteps', 'beta_start', 'beta_end')


def make_info(settings: dict[str, Any]) -> DenoiserInfo:
    """The `DenoiserInfo` that `info_settings` described, possibly through JSON."""
    return DenoiserInfo(
        **{
            **settings,
            'schedule': Schedule(**settings['schedule']),
            'image_shape': tuple(settings['image_shape']),
        }
    )


def init_params(network: Network, info: DenoiserInfo, key: Array) -> PyTree:
    """Random parameters of `network`."""
    x, t, y = example_inputs(info, batch_size=1)
    return jax.jit(network.init)(key, x, t, y)['params']


def param_shapes(network: Network, info: DenoiserInfo) -> PyTree:
    """What `init_params` would give, as shapes: nothing is computed."""
    return jax.tree.map(lambda leaf: leaf, _param_shapes(network, info))


# Seconds for a network of a thousand layers, and some ask for every student anew.
@functools.lru_cache(maxsize=16)
def _param_shapes(network: Network, info: DenoiserInfo) -> PyTree:
    return jax.eval_shape(lambda key: init_params(network, info, key), jax.random.key(0))


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
    leaves, structure = jax.tree.flatten(teacher.params)
    kinds = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return dict(_quantizable(teacher.network, teacher.info, structure, kinds))


@functools.lru_cache(maxsize=16)  # as `_param_shapes`
def _quantizable(
    network: Network, info: DenoiserInfo, structure: Any, kinds: tuple[jax.ShapeDtypeStruct, ...]
) -> dict[str, QuantizableLayer]:
    x, t, y = example_inputs(info, batch_size=1)
    return quantizable_layers(network.apply, jax.tree.unflatten(structure, kinds), x, t, y)


def paper_exempt(network: Network) -> tuple[str, ...]:
    """Layers of a family that EfficientDM's code leaves in float, besides those of all families.

    It quantizes linear layers and two-dimensional convolutions. Attention that looks at pixels
    alone is made of one-dimensional ones in guided diffusion and in latent diffusion without a
    context.
    """
    module = networks.unwrapped(network)
    has_pixel_attention = networks.family(network) == 'adm' or (
        networks.family(network) == 'ldm' and module.context_dim is None
    )
    return (r'.*/attention_\d+/(q|k|v|out)',) if has_pixel_attention else ()


def make_plan(
    layers: Mapping[str, QuantizableLayer],
    config: QuantConfig,
    network: Network | None = None,
) -> dict[str, LayerSpec]:
    """The plan of a student: the rules of its config, then those of its coverage; {}: all float.

    Args:
      layers: every quantizable layer.
      config: of the student.
      network: whose layers they are; tells what its paper leaves in float.

    Raises:
      ValueError: see `quant.plan.make_plan`.
    """
    if config.weight_bits == config.activation_bits == FLOAT_BITS and not config.rules:
        return {}

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
        rules += paper_rules(target, edge, () if network is None else paper_exempt(network))
    elif config.coverage == 'full':
        rules += full_rules(target)
    plan = plan_lib.make_plan(layers, rules)
    if config.split_shortcuts:
        plan = plan_lib.split_joined(plan, layers)
    if config.softmax_bits is not None:
        plan = {path: _with_softmax(path, spec, config.softmax_bits) for path, spec in plan.items()}
    return plan


def _with_softmax(path: str, spec: LayerSpec, bits: int) -> LayerSpec:
    """The spec of a product `mix`, softmax times values, with a width for the softmax."""
    if not plan_lib.is_softmax(path, 'lhs') or spec.inputs is None:
        return spec
    # No value is negative, so the zero point of an unsigned grid is 0.
    softmax = dataclasses.replace(spec.inputs, bits=bits, symmetric=False)
    return dataclasses.replace(spec, lhs=softmax)


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

    def __call__(
        self,
        params: PyTree,
        x: Array,
        t: Array,
        y: Array | None = None,
        *,
        calls: dict[str, list[choices.Call]] | None = None,
    ) -> Array:
        """The prediction; `params` are those of `fake_params`, `training_params` or an export.

        `calls` receives what each layer calls in integer mode; see `quant.layers.integer`.
        """
        rows = rows_at(params, t, self.lookup)
        prediction = self._predict(params, rows, (x, t, y), calls)
        correction = params.get('correction')
        if correction is None:
            return prediction
        return _corrected(prediction, at_timestep(correction, params['timesteps'], t))

    def _predict(self, params: PyTree, rows: dict[str, Any], inputs: tuple, calls: Any) -> Array:
        plan = dict(self.plan)
        if self.mode == 'fake':
            weights = params.get('weights')
            return apply_fake(
                self.network.apply, plan, params['params'], rows, *inputs, weights=weights
            )
        entries = {path: dict(rows.get(path, {})) for path in plan}
        for path, weight in params['weights'].items():
            entries[path]['weight'] = weight
        with integer(plan, calls):
            variables = {'params': params['params'], 'quant': by_path(entries)}
            return self.network.apply(variables, *inputs)


def _corrected(prediction: Array, correction: dict[str, Array]) -> Array:
    """A prediction after its correction; channels beyond it, a learnt variance, as they are."""
    gain = per_image(correction['gain'], prediction.ndim)
    bias = per_channel(correction['bias'], prediction.ndim)
    channels = bias.shape[-1]
    mean = (prediction[..., :channels] - bias) / (1 + gain)
    return jnp.concatenate([mean.astype(prediction.dtype), prediction[..., channels:]], axis=-1)


def rows_at(params: PyTree, t: Array, lookup: str) -> dict[str, dict[str, Any]]:
    """What a student's layers are quantized with at `t`: rows by path and role, and what is beside.

    Args:
      params: of a student.
      t: a scalar, or one per image.
      lookup: of the tables; see `at_timestep`. Factors of channels take the nearest row.
    """
    tables, timesteps = params['tables'], params['timesteps']
    rows = dict(at_timestep(tables, timesteps, t, lookup=lookup))
    for path, roles in tables.items():
        for role, table in roles.items():
            # Between two kinds of grid there is none.
            if 'powers' in table and lookup != 'nearest':
                rows[path] = {**rows[path], role: at_timestep(table, timesteps, t)}
    if params.get('channels'):
        channels = at_timestep(params['channels'], params['channel_timesteps'], t)
        for path, factors in channels.items():
            rows[path] = {**rows.get(path, {}), 'channels': factors}
    for path, branch in params.get('branches', {}).items():
        rows[path] = {**rows.get(path, {}), 'branch': branch}
    return rows


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
        **time_tables(bound, timesteps),
    }


def training_params(params: PyTree, bound: Bound, timesteps: Int[Array, 'S']) -> PyTree:
    """`fake_params` whose kernels are still codes: equal gradients, a faster step on CPU."""
    return {
        'params': with_leaves(params, bound.params),
        'weights': bound.weights,
        **time_tables(bound, timesteps),
    }


def time_tables(bound: Bound, timesteps: Int[Array, 'S']) -> dict[str, Any]:
    """What `rows_at` looks up."""
    of_channels = bound.channel_timesteps
    correction = {} if bound.correction is None else {'correction': bound.correction._asdict()}
    return {
        'tables': bound.tables,
        'timesteps': jnp.asarray(timesteps, jnp.int32),
        'channels': dict(bound.channels),
        'channel_timesteps': jnp.zeros(1) if of_channels is None else jnp.asarray(of_channels),
        'branches': dict(bound.branches),
        **correction,
    }
