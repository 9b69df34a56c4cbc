"""EfficientDM: quantization-aware low-rank fine-tuning without data.

He et al., ICLR 2024, arXiv:2310.03270. A low-rank update is added to each weight *before* it is
rounded (QALoRA, eq. 6), so nothing of it remains at inference; it is trained, with the steps of
weights and activations, to match the teacher's prediction along trajectories drawn from noise
(eq. 7). The update of a layer learns at a rate proportional to the layer's weight scale (eq. 8),
so that weights with large steps also cross rounding boundaries; activations have one scale per
timestep (TALSQ, eq. 9).

Where this differs from the authors' code, on purpose:

* rows of a table are found by the timestep, not by counting calls;
* zero points are integers in every forward pass: 2^b levels, not 2^b + 1;
* the update is added to the float weight, which keeps the rounding error recoverable
  (`base='dequantized'` gives the code's behaviour);
* the step of a weight is one parameter, not two tied ones with moments of their own;
* a row of a table keeps Adam moments of its own and moves only when its timestep is trained;
* no weight decay on scales;
* biases and the parameters of normalizations, which stay in float and cost nothing at inference,
  are trained as well (`affine_learning_rate=0` leaves them);
* channels of the inputs may be rescaled first (`channels`, see `channel_factors`);
* SVDQuant's branch in 16 bits may stand beside the integers (`branch_rank`), and is trained: the
  one thing here that costs time at inference.

A learning rate of a scale is relative to the scale's first value, as eq. 8 does for the update:
scales differ by orders of magnitude between layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, PyTree

from dmq_jax.config import EfficientDMConfig
from dmq_jax.methods import base, channel_factors, low_rank, svdquant
from dmq_jax.quant import numerics
from dmq_jax.quant.plan import Plan

# A scale may shrink to this share of its first value, never to zero or below.
SMALLEST_SHARE = 0.05


def make(config: EfficientDMConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable keep their calibration."""
    del num_train_timesteps
    trainable = {path for path, spec in plan.items() if spec.trainable}

    def init(params, stats, key):
        factors = channel_factors.init(plan, params, stats, config.channels)
        params = channel_factors.fold(params, factors)
        stats = channel_factors.scale_stats(stats, factors)
        branches = {}
        if config.branch_rank:
            branches = svdquant.init_branches(
                plan, params, config.branch_rank, config.branch_refits
            )
        weights = base.init_weights(plan, low_rank.subtract(params, branches))
        inputs = base.init_inputs(plan, stats)
        learnt = {
            path: base.get_kernel(params, path) for path in sorted(weights) if path in trainable
        }
        updates = low_rank.init(learnt, config.lora_rank, key)
        return {
            'lora': updates,
            # Scales are learnt as multiples of their calibrated value, zero points as offsets.
            'weight': {path: jnp.ones_like(weights[path]['scale']) for path in updates},
            'input': {
                path: {role: unit_table(table) for role, table in roles.items()}
                for path, roles in inputs.items()
                if path in trainable
            },
            'affine': zero_offsets(params) if config.affine_learning_rate else {},
            'branch': dict(branches),
            'calibrated': {
                'weight': weights,
                'input': inputs,
                'channels': factors,
                'branch': branches,
            },  # fmt: skip
        }

    # Repeated in the backward pass: cheaper than to keep three arrays as large as the weights.
    @functools.partial(jax.checkpoint, static_argnums=4)
    def updated(kernel, update, scale, zero_point, path):
        return base.quantize_weight(kernel + low_rank.delta(update), scale, zero_point, plan[path])

    def bind(params, state):
        calibrated = jax.lax.stop_gradient(state['calibrated'])
        factors = calibrated['channels']
        # The integers go on standing for what the branch left of the kernel when it was made.
        params = low_rank.subtract(channel_factors.fold(params, factors), calibrated['branch'])
        weights = {}
        for path, start in calibrated['weight'].items():
            kernel = base.get_kernel(params, path)
            scale, zero_point = start['scale'], start['zero_point']
            if path not in state['lora']:
                weights[path] = base.quantize_weight(kernel, scale, zero_point, plan[path])
                continue
            if config.base == 'dequantized':
                kernel = base.dequantize_weight(
                    base.quantize_weight(kernel, scale, zero_point, plan[path])
                )
            scale = scale * jnp.maximum(state['weight'][path], SMALLEST_SHARE)
            weights[path] = updated(
                jax.lax.stop_gradient(kernel), state['lora'][path], scale, zero_point, path
            )
        tables = {
            path: {
                role: learnt_table(
                    table, state['input'][path][role], plan[path].activation(role).grid
                )
                if path in state['input']
                else table
                for role, table in roles.items()
            }
            for path, roles in calibrated['input'].items()
        }
        affine = {
            name: jax.lax.stop_gradient(base.as_float32(base.get_leaf(params, name))) + offset
            for name, offset in state['affine'].items()
        }
        return base.Bound(
            weights, tables, affine, channel_factors.channels(factors),
            branches=low_rank.as_stored(state['branch']),
        )  # fmt: skip

    def optimizer(state, decay):
        rates = rates_by_scale(
            state, 'lora', config.lora_rate_per_scale, is_relative=config.scale_aware
        )
        return base.per_group(
            {
                'lora': optax.chain(
                    optax.scale_by_adam(), scale_by_layer(rates), base.decayed(1.0, decay)
                ),
                'weight': base.adam(config.weight_scale_learning_rate, decay),
                'input': table_rule(
                    decay, config.input_scale_learning_rate, config.zero_point_learning_rate
                ),
                'affine': base.adam(config.affine_learning_rate, decay),
                'branch': base.adam(config.branch_learning_rate, decay),
                'calibrated': optax.set_to_zero(),
            }
        )

    def loss(student, teacher):
        output = base.output_loss(student, teacher)
        if config.loss == 'output':
            return output
        # Both terms are of the order of the output's own size: |eps|^2 is close to its dimension.
        size = teacher.output[0].size
        return output + config.feature_weight * size * base.feature_loss(student, teacher)

    features = config.feature_layers if config.loss == 'feature' else None
    return base.Method(
        init, bind, loss, optimizer, features, channel_stats=channel_factors.is_on(config.channels)
    )


def zero_offsets(params: PyTree) -> dict[str, Array]:
    """Zeros for every bias and every scale of a normalization, by 'path/name'."""
    flat = traverse_util.flatten_dict(params, sep='/')
    return {
        name: jnp.zeros(leaf.shape, jnp.float32)
        for name, leaf in flat.items()
        if name.rpartition('/')[2] in ('bias', 'scale')
    }


def unit_table(table: dict[str, Array]) -> dict[str, Array]:
    """The learnt form of a calibrated table: factor 1, offset 0."""
    return {
        'scale': jnp.ones_like(table['scale']),
        'zero_point': jnp.zeros_like(table['zero_point']),
    }


def learnt_table(
    table: dict[str, Array], learnt: dict[str, Array], grid: tuple[int, int]
) -> dict[str, Array]:
    """A calibrated table with what was learnt of it; zero points stay integers on the grid."""
    factor = jnp.maximum(learnt['scale'], SMALLEST_SHARE)
    # Rounded here, not only where it is used: between two rows, linear lookup then starts from the
    # integers that an export holds.
    zero_point = numerics.straight_through_clip(
        numerics.straight_through_round(table['zero_point'] + learnt['zero_point']),
        *(jnp.asarray(end, jnp.float32) for end in grid),
    )
    return {'scale': table['scale'] * factor, 'zero_point': zero_point}


def table_rule(
    decay: optax.Schedule, scale_rate: float, zero_point_rate: float
) -> optax.GradientTransformation:
    """How the learnt forms of tables move: every row by itself, see `scale_by_row_adam`."""

    def rule(rate: float) -> optax.GradientTransformation:
        return optax.chain(scale_by_row_adam(), base.decayed(rate, decay))

    rules = {'scale': rule(scale_rate), 'zero_point': rule(zero_point_rate)}
    return optax.multi_transform(rules, _last_names)


def _last_names(tables):
    """'scale' or 'zero_point' for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tables)


def rates_by_scale(
    state: base.State, group: str, rate: float, *, is_relative: bool = True
) -> dict[str, Array]:
    """Eq. 8: a rate proportional to the mean weight scale of the layer; or the mean for all."""
    means = {path: jnp.mean(state['calibrated']['weight'][path]['scale']) for path in state[group]}
    if not is_relative and means:
        overall = sum(means.values()) / len(means)
        means = dict.fromkeys(means, overall)
    return {path: mean * rate for path, mean in means.items()}


def scale_by_layer(rates: dict[str, Array]) -> optax.GradientTransformation:
    """Multiplies the updates of each layer by its rate.

    With Adam this is the only way to realise eq. 8: Adam's update does not depend on the size of
    the gradient, so scaling the gradient would do nothing.
    """

    def update(updates, state, params=None):
        del params
        return {
            path: jax.tree.map(lambda u, rate=rates[path]: u * rate, update)
            for path, update in updates.items()
        }, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class RowAdamState(NamedTuple):
    """Moments per entry, and how often each entry was visited."""

    count: PyTree
    mean: PyTree
    square: PyTree


def scale_by_row_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam that leaves an entry, its moments and its count alone where its gradient is zero.

    A table of scales receives gradients only in the rows of the timesteps just trained. Plain
    Adam would go on moving all the others by their decaying moments, by about 10 learning rates
    per visit at 100 timesteps.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return RowAdamState(zeros, zeros, zeros)

    def update(updates, state, params=None):
        del params
        visited = jax.tree.map(lambda g: g != 0, updates)

        def where(new, old):
            return jax.tree.map(jnp.where, visited, new, old)

        count = where(jax.tree.map(lambda c: c + 1, state.count), state.count)
        mean = where(
            jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates), state.mean
        )
        square = where(
            jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, updates),
            state.square,
        )

        def step(seen, c, m, v):
            c = jnp.maximum(c, 1.0)
            corrected = (m / (1 - b1**c)) / (jnp.sqrt(v / (1 - b2**c)) + eps)
            return jnp.where(seen, corrected, 0.0)

        return jax.tree.map(step, visited, count, mean, square), RowAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)
