"""The interface of a method, and what all methods share.

A method is made once, for a plan and a list of timesteps, and is then four pure functions:

* `init(params, stats, key) -> state`: what it starts from; the state's top-level keys are the
  optimizer's groups, its leaves float arrays;
* `bind(params, state) -> Bound`: the quantized network that this state stands for, as integer
  codes with straight-through gradients and tables of scales;
* `loss(student, teacher) -> scalar`: how far the student's `Prediction` is from the teacher's;
* `optimizer(state, decay) -> optax transformation`: `decay(step)` falls from 1 to 0 over the run.

A method that learns block by block also lists `phases`: passes of block reconstruction. Every
group of a state is keyed by the paths of layers, so a part of a state is the state of a part of
the network, and the functions of a method take either.

`bind` knows no time: whatever depends on the timestep is a table of `Bound`, one row per timestep,
from which `quant.rows.at_timestep` picks. Scales of weights that change with time (TuneQDM) are
tables on the input and the output of the integer product, so even then the codes stay the same.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Key, PyTree

from dmq_jax.quant import numerics, observers
from dmq_jax.quant import plan as plan_lib
from dmq_jax.quant.codes import integer_weight
from dmq_jax.quant.layers import fake_quantized
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import LayerSpec, Plan
from dmq_jax.quant.tensor import QuantSpec, expand, pack

A = TypeVar('A')
K = TypeVar('K')
Options = TypeVar('Options')
T = TypeVar('T')
State = dict[str, Any]
Stats = Mapping[str, Mapping[str, TensorStats]]
Tables = dict[str, dict[str, dict[str, Array]]]


class WeightCodes(NamedTuple):
    """A weight on its integer grid, differentiable.

    Attributes:
      codes: integer-valued floats in the order of the weight; or, of integers that stand still,
        those of `quant.codes.integer_weight`.
      scale: `scale_shape`.
      zero_point: `scale_shape`.
    """

    codes: Float[Array, '...']
    scale: Float[Array, '...']
    zero_point: Float[Array, '...']


class Correction(NamedTuple):
    """What undoes the effect of rounding on a prediction, at each timestep of the tables.

    The prediction is taken for `(prediction - bias) / (1 + gain)`, and what is left of the error
    for noise.

    Attributes:
      gain: above -1.
      bias: of each channel.
      variance: of the noise that is left in the corrected prediction.
    """

    gain: Float[Array, 'S']
    bias: Float[Array, 'S C']
    variance: Float[Array, 'S']


class Bound(NamedTuple):
    """A quantized network: codes, and tables of scales over the timesteps.

    Attributes:
      weights: by path of the layer.
      tables: {path: {role: {'scale': [S] or [1], 'zero_point': the same}}}; see `quant.rows.Rows`.
      params: new values of parameters that stay in float, by 'path/name'; the others are the
        teacher's.
      channels: by path, factors of single channels: {'input': [E, K], 'output': [E, N]} or one of
        them. The input is multiplied before it is rounded, the product before its bias is added,
        so a kernel is seen as `input * (codes - zero_point) * scale * output`. Shifts besides, of
        the same shapes: 'shift' is added to the scaled input, 'offset' to the scaled product.
      channel_timesteps: of the rows of `channels`: a row serves the timesteps nearest to its own,
        of two equally near the first; None where every table of `channels` has one row.
      branches: by path, {'down': [..., K, R], 'up': [R, N]}, of values that float16 holds: a
        product in float beside that of the integers, of the same input before it is rounded.
      correction: of the network's prediction; None: none.
    """

    weights: dict[str, WeightCodes]
    tables: Tables
    params: Mapping[str, Array] = {}
    channels: Mapping[str, Mapping[str, Array]] = {}
    channel_timesteps: Float[Array, 'E'] | None = None
    branches: Mapping[str, Mapping[str, Array]] = {}
    correction: Correction | None = None


class Prediction(NamedTuple):
    """What a network says of a batch.

    Attributes:
      output: the (guided) prediction.
      features: outputs of the modules that `Method.features` names, by path.
    """

    output: Float[Array, 'B H W C']
    features: Mapping[str, Array] = {}


class Phase(NamedTuple):
    """One pass of block reconstruction over a network: what learns, and towards what.

    Attributes:
      name: of the pass, for people.
      rounds_inputs: whether activations are rounded during the pass.
      bind: `(params, state, progress) -> Bound`, the network as it learns; `progress` rises from 0
        to 1 over the pass of one block. Its codes need not be integers yet; those of
        `Method.bind` are.
      penalty: `(state, progress) -> scalar`, added to the error of the block's output.
      optimizer: as `Method.optimizer`; what the pass does not learn stands still.
      norm: exponent of the error |output - target|^norm.
      share: iterations of this pass for each one that the run asks for.
      correct: `(state, error) -> state`, after the pass of a block that is one layer: takes in the
        mean of target - output, of each channel [C]; None: it stays.
    """

    name: str
    rounds_inputs: bool
    bind: Callable[[PyTree, State, Float[Array, '']], Bound]
    penalty: Callable[[State, Float[Array, '']], Float[Array, '']]
    optimizer: Callable[[State, optax.Schedule], optax.GradientTransformation]
    norm: float = 2.0
    share: float = 1.0
    correct: Callable[[State, Float[Array, 'C']], State] | None = None


class JointBlock(NamedTuple):
    """Layers all over a network that block reconstruction learns first, as one block.

    No block they lie in changes them after.

    Attributes:
      layers: regular expression over their paths.
      outputs: of those whose outputs are compared with the float network's.
    """

    layers: str
    outputs: str


class Method(NamedTuple):
    """See the module's docstring.

    Attributes:
      init: makes the state.
      bind: makes the quantized network.
      loss: compares two predictions.
      optimizer: makes the optax transformation.
      features: regular expression over module paths whose outputs `loss` wants to see; None: none.
      phases: of block reconstruction, in order; (): the method has none.
      joint: layers that block reconstruction learns before all others; None: there are none.
      channel_stats: whether `init` wants statistics with the ranges of single channels.
      correct: `(student's predictions, teacher's) -> Correction`, both [S, N, H, W, C]: fits a
        correction to the network that was bound last; None: the method has none.
      beside: `state -> Bound`, all that `bind` makes but the weights, of a method whose integers
        stand still while it learns; None: they change.
    """

    init: Callable[[PyTree, Stats, Key[Array, '']], State]
    bind: Callable[[PyTree, State], Bound]
    loss: Callable[[Prediction, Prediction], Float[Array, '']]
    optimizer: Callable[[State, optax.Schedule], optax.GradientTransformation]
    features: str | None = None
    phases: tuple[Phase, ...] = ()
    joint: JointBlock | None = None
    channel_stats: bool = False
    correct: Callable[[Array, Array], Correction] | None = None
    beside: Callable[[State], Bound] | None = None


def output_loss(student: Prediction, teacher: Prediction) -> Float[Array, '']:
    """The mean over images of the squared distance of two outputs, summed over pixels.

    EfficientDM's code sums over the batch as well; the mean makes learning rates independent of it.
    """
    difference = (student.output - teacher.output).astype(jnp.float32)
    return jnp.sum(difference**2) / difference.shape[0]


def feature_loss(student: Prediction, teacher: Prediction) -> Float[Array, '']:
    """Mean over the captured features of |student - teacher|^2 / |teacher|^2."""

    def relative(path: str) -> Float[Array, '']:
        target = teacher.features[path].astype(jnp.float32)
        difference = student.features[path].astype(jnp.float32) - target
        return jnp.sum(difference**2) / jnp.maximum(jnp.sum(target**2), 1e-12)

    errors = [relative(path) for path in sorted(teacher.features)]
    return sum(errors) / len(errors)


def frozen(state: State, decay: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a method that learns nothing."""
    del state, decay
    return optax.set_to_zero()


def num_trained(state: State, optimizers: Iterable[Callable[[State, optax.Schedule], Any]]) -> int:
    """How many numbers of a state move under any of these optimizers.

    Args:
      state: from `Method.init`, or its shapes.
      optimizers: of a method, or of its phases.
    """
    optimizers = list(optimizers)
    if not optimizers:
        return 0

    def moves(state: State) -> PyTree:
        found = jax.tree.map(lambda leaf: jnp.zeros((), bool), state)
        for make in optimizers:
            optimizer = make(state, Decay(1))
            slope = jax.tree.map(jnp.ones_like, state)
            updates, _ = optimizer.update(slope, optimizer.init(state), state)
            found = jax.tree.map(lambda old, leaf: old | jnp.any(leaf != 0), found, updates)
        return found

    # Of NumPy: each shape of `jnp.ones` would be compiled.
    found = jax.jit(moves)(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), state))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    return sum(leaf.size for leaf, has_moved in pairs if has_moved)


class Decay(NamedTuple):
    """The common factor of learning rates: an `optax.Schedule`, from 1 to 0 over a run.

    Attributes:
      num_iterations: of the run.
      kind: 'cosine' or 'linear'.
    """

    num_iterations: int
    kind: str = 'cosine'

    def __call__(self, step: Any) -> Any:
        """The factor after so many steps."""
        steps = max(self.num_iterations, 1)
        if self.kind == 'cosine':
            return optax.cosine_decay_schedule(1.0, steps)(step)
        return optax.linear_schedule(1.0, 0.0, steps)(step)


def decayed(rate: float, decay: optax.Schedule) -> optax.GradientTransformation:
    """Steps of `rate` times `decay(step)` against the direction it is given."""
    return optax.scale_by_schedule(lambda step: -rate * decay(step))


def adam(rate: float, decay: optax.Schedule) -> optax.GradientTransformation:
    """Adam at `rate` times `decay(step)`."""
    return optax.chain(optax.scale_by_adam(), decayed(rate, decay))


def promoting(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule of optax that raises a float to its int32 step count, which strict promotion forbids.

    Adam does.
    """

    def update(updates, optimizer_state, state=None):
        with jax.numpy_dtype_promotion('standard'):
            return rule.update(updates, optimizer_state, state)

    return optax.GradientTransformation(rule.init, update)


def per_group(
    groups: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One transformation for each top-level key of a state; each sees its own subtree alone."""

    def init(state):
        return {name: group.init(state[name]) for name, group in groups.items()}

    def update(updates, optimizer_state, state=None):
        results = {
            name: group.update(
                updates[name], optimizer_state[name], None if state is None else state[name]
            )
            for name, group in groups.items()
        }
        return {n: r[0] for n, r in results.items()}, {n: r[1] for n, r in results.items()}

    return promoting(optax.GradientTransformation(init, update))


def get_leaf(params: PyTree, name: str) -> Array:
    """The parameter 'path/name', or all of a module; '' is everything."""
    for part in filter(None, name.split('/')):
        params = params[part]
    return params


def get_kernel(params: PyTree, path: str) -> Float[Array, '...']:
    """The kernel of the layer at `path`, or of the part of a layer that it names, in float32."""
    part = plan_lib.part_at(path)
    if part is None:
        return as_float32(get_leaf(params, f'{path}/kernel'))
    return as_float32(get_leaf(params, f'{part.layer}/kernel'))[..., part.begin : part.end, :]


def as_float32(leaf: Array) -> Float[Array, '...']:
    """A parameter as what is computed with: a teacher may be kept in bfloat16."""
    return leaf if leaf.dtype == jnp.float32 else leaf.astype(jnp.float32)


def init_inputs(plan: Plan, stats: Stats) -> Tables:
    """Calibrated scale and zero point of every quantized input: [S], or [1] if shared.

    Raises:
      ValueError: statistics of a layer are missing.
    """
    found, specs = {}, {}
    for path, spec in plan.items():
        if spec.inputs is None:
            continue
        if path not in stats:
            raise ValueError(
                f'no statistics for layer {path!r}: calibrated with another plan? Delete the '
                f'calibration folder of the workdir and run again.'
            )
        for role, tensor in stats[path].items():
            found[path, role] = tensor if spec.per_timestep else observers.pool(tensor)
            specs[path, role] = spec.activation(role)
    tables: Tables = {}
    for (path, role), table in calibrated_tables(found, specs).items():
        tables.setdefault(path, {})[role] = table
    return tables


def calibrated_tables(
    stats: Mapping[K, observers.TensorStats], specs: Mapping[K, QuantSpec]
) -> dict[K, dict[str, Array]]:
    """Scale and zero point of tensors by what was seen of them, under the same keys."""

    def calibrate(tensor: observers.TensorStats, spec: QuantSpec) -> dict[str, Array]:
        scale, zero_point = observers.calibrate(tensor, spec)
        return {'scale': scale, 'zero_point': zero_point}

    # No observer looks at single channels, which layers have in different numbers.
    blind = {'channel_low': None, 'channel_high': None, 'channels': None}
    return map_alike(calibrate, {key: s._replace(**blind) for key, s in stats.items()}, specs)


def map_alike(
    function: Callable[[A, Options], T], arguments: Mapping[K, A], options: Mapping[K, Options]
) -> dict[K, T]:
    """`function` of each argument and its options.

    Arguments of one shape and with the same options pass through one loop, so that a program has
    one copy of `function` for them: a network has ten times as many layers as shapes, and compiling
    a search, a decomposition or a random generator takes seconds.

    Args:
      function: of arrays, and the options for which it is traced.
      arguments: trees of arrays.
      options: of the same keys, hashable.
    """
    groups: dict[Any, list[K]] = {}
    for key, argument in arguments.items():
        leaves, structure = jax.tree.flatten(argument)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        groups.setdefault((structure, shapes, options[key]), []).append(key)
    found = {}
    for (_, _, same), keys in groups.items():
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arguments[k] for k in keys))
        results = jax.lax.map(lambda argument, same=same: function(argument, same), stacked)
        for index, key in enumerate(keys):
            found[key] = jax.tree.map(lambda leaf, index=index: leaf[index], results)
    return {key: found[key] for key in arguments}


def init_weights(plan: Plan, params: PyTree) -> dict[str, dict[str, Array]]:
    """Calibrated scale and zero point of every quantized weight."""
    return calibrate_kernels(
        plan,
        {path: get_kernel(params, path) for path, spec in plan.items() if spec.weight is not None},
    )


def calibrate_kernels(plan: Plan, kernels: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Calibrated scale and zero point of these kernels, by the path of their layer."""

    def calibrate(kernel: Array, spec: QuantSpec) -> dict[str, Array]:
        scale, zero_point = observers.calibrate_weight(kernel, spec)
        return {'scale': scale, 'zero_point': zero_point}

    return map_alike(calibrate, kernels, {path: plan[path].weight for path in kernels})


def quantize_weight(
    weight: Float[Array, '...'], scale: Array, zero_point: Array, spec: LayerSpec
) -> WeightCodes:
    """A weight on the grid of `spec.weight`."""
    codes = numerics.quantize(
        weight, expand(scale, weight.shape), expand(zero_point, weight.shape), *spec.weight.grid
    )
    return WeightCodes(codes, scale, zero_point)


def calibrated_weights(plan: Plan, params: PyTree, state: State) -> dict[str, WeightCodes]:
    """The kernels of `params` on the grids of `state['calibrated']`; nothing has a gradient."""
    fixed = jax.lax.stop_gradient
    return {
        path: quantize_weight(fixed(get_kernel(params, path)), **fixed(start), spec=plan[path])
        for path, start in state['calibrated']['weight'].items()
    }


def dequantize_weight(weight: WeightCodes) -> Float[Array, '...']:
    """The real weight that the codes stand for."""
    shape = weight.codes.shape
    return numerics.dequantize(
        weight.codes, expand(weight.scale, shape), expand(weight.zero_point, shape)
    )


def with_weights(params: PyTree, weights: Mapping[str, WeightCodes]) -> PyTree:
    """`params` with the kernels of `weights` replaced by what their codes stand for."""
    return with_kernels(params, {path: dequantize_weight(w) for path, w in weights.items()})


def with_kernels(params: PyTree, kernels: Mapping[str, Array]) -> PyTree:
    """`params` with these kernels, by path; of a layer in parts, all parts must be there."""
    parts = plan_lib.parts_by_layer(kernels)
    leaves = {f'{path}/kernel': k for path, k in kernels.items() if not plan_lib.part_at(path)}
    for layer, found in parts.items():
        pieces = [jnp.asarray(kernels[part.path]) for part in found]
        leaves[f'{layer}/kernel'] = jnp.concatenate(pieces, axis=-2)
    return with_leaves(params, leaves)


def without_kernels(params: PyTree, paths: Iterable[str]) -> PyTree:
    """`params` without the kernels of the layers at `paths`, or of those that they are parts of."""
    flat = traverse_util.flatten_dict(params, sep='/')
    gone = {f'{plan_lib.layer_at(path)}/kernel' for path in paths}
    kept = {name: leaf for name, leaf in flat.items() if name not in gone}
    return traverse_util.unflatten_dict(kept, sep='/')


def freeze(method: Method, plan: Plan, params: PyTree, state: State) -> dict[str, WeightCodes]:
    """The weights of a method with `beside`, packed; they serve every state that it learns."""
    weights = {}
    for path, weight in jax.jit(method.bind)(params, state).weights.items():
        entry = integer_weight(pack(*weight, spec=plan[path].weight))
        weights[path] = WeightCodes(entry['codes'], entry['scale'], entry['zero_point'])
    return weights


def with_leaves(params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """`params` with some leaves replaced, by 'path/name'."""
    flat = traverse_util.flatten_dict(params, sep='/')
    return traverse_util.unflatten_dict({**flat, **leaves}, sep='/')


def by_path(rows: Mapping[str, Any]) -> PyTree:
    """{path: entry} as the nested collection that Flax expects; path '' is the network itself."""
    if '' in rows:
        return dict(rows[''])
    return traverse_util.unflatten_dict({tuple(path.split('/')): v for path, v in rows.items()})


def apply_fake(
    apply: Callable[..., Array],
    plan: Plan,
    params: PyTree,
    rows: Mapping[str, Any],
    *inputs: Any,
    weights: Mapping[str, WeightCodes] | None = None,
) -> Array:
    """Runs a network in fake-quantized mode.

    Args:
      apply: the network's `apply`.
      plan: what is quantized.
      params: float parameters, kernels already replaced (`with_weights`) unless in `weights`.
      rows: of the tables, at the timestep of `inputs`.
      *inputs: what `apply` takes after the variables.
      weights: kernels that are given as codes; what a training step uses, since it is faster.
    """
    entries = {path: dict(roles) for path, roles in rows.items()}
    for path, weight in (weights or {}).items():
        entries.setdefault(path, {})['weight'] = weight._asdict()
    with fake_quantized(plan):
        return apply({'params': params, 'quant': by_path(entries)}, *inputs)
