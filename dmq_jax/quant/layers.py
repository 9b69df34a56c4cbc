"""Quantization applied to a Flax network from outside, by module path.

The one place that hooks into Flax. A context manager intercepts `Dense`, `Conv` and the modules
named as products and taps, in one of three modes:

* `observe_inputs`: statistics of every input appear in the collection `stats`;
* `fake_quantized`: inputs are rounded to their grid, in float; weights come already rounded;
* `integer`: inputs become int8 codes and the products run on integers.

A layer is quantized iff the plan names it; what it is quantized with stands at its path in the
collection `quant`: for its inputs, rows that `quant.rows.at_timestep` picked before the network was
called.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, PyTree

from dmq_jax.quant import observers
from dmq_jax.quant.integer import (
    integer_layer,
    integer_product,
    scaled_layer,
    straight_through_layer,
)
from dmq_jax.quant.plan import INPUT_ROLES, Plan, QuantizableLayer
from dmq_jax.quant.rows import at_timestep, fake_quantize_input
from dmq_jax.quant.tensor import QuantSpec
from kernels import choices

# Named, not imported: quant knows no network, and a user's own modules may use these names.
_PRODUCTS = {'Product': 'product', 'Tap': 'tap'}


# A module that computes several products in one piece unless asked to run them as modules.
_FUSED, _UNFUSED = 'Attend', 'by_products'


def _is_fused(module: nn.Module) -> bool:
    return type(module).__name__ == _FUSED


def layer_kind(module: nn.Module) -> str | None:
    """'dense', 'conv', 'product' or 'tap'; None for a module that is never quantized."""
    if isinstance(module, nn.Dense):
        return 'dense'
    if isinstance(module, nn.Conv):
        return 'conv'
    return _PRODUCTS.get(type(module).__name__)


class FakeQuant(nn.Module):
    """Rounds a tensor to a grid whose scale depends on the timestep, with trainable tables.

    For networks of your own: place it where a tensor is to be quantized. The hook below runs the
    same arithmetic on tables it finds by path.

    Attributes:
      spec: the grid.
      timesteps: the timestep of each row, descending; empty for a single row.
      lookup: how a row is found for other timesteps; see `at_timestep`.
    """

    spec: QuantSpec
    timesteps: tuple[int, ...] = ()
    lookup: str = 'nearest'

    @nn.compact
    def __call__(self, x: Float[Array, 'B ...'], t: Array | int = 0) -> Float[Array, 'B ...']:
        """`x` on the grid of timestep `t` (a scalar, or one per image).

        The tables `scale` and `zero_point` live in the collection `quant`; on initialisation
        every row covers the range of `x`.
        """
        num_rows = max(len(self.timesteps), 1)

        def initial(index: int) -> Array:
            pair = observers.compute_scale(jnp.min(x), jnp.max(x), self.spec)
            return jnp.full((num_rows,), pair[index].astype(jnp.float32))

        tables = {
            'scale': self.variable('quant', 'scale', initial, 0).value,
            'zero_point': self.variable('quant', 'zero_point', initial, 1).value,
        }
        timesteps = jnp.asarray(self.timesteps or (0,), jnp.int32)
        rows = at_timestep(tables, timesteps, jnp.asarray(t), lookup=self.lookup)
        return fake_quantize_input(x, rows, self.spec)


def quantizable_layers(
    apply: Callable[..., Any], params: PyTree, *inputs: Any
) -> dict[str, QuantizableLayer]:
    """Every layer of a network that could be quantized, by path, in the order of execution.

    Nothing is computed: the network is only traced.

    Args:
      apply: a network's `apply`.
      params: its parameters, or their shapes.
      *inputs: what `apply` takes after the variables.

    Raises:
      ValueError: a layer called twice, since one entry could not serve both calls.
    """
    kernels = traverse_util.flatten_dict(params, sep='/')
    found: dict[str, QuantizableLayer] = {}

    def note(next_fun, args, kwargs, context):
        if context.method_name == '__call__' and _is_fused(context.module):
            return getattr(context.module, _UNFUSED)(*args, **kwargs)
        kind = layer_kind(context.module)
        if context.method_name == '__call__' and kind is not None:
            path = '/'.join(context.module.path)
            if path in found:
                raise ValueError(
                    f'layer {path!r} runs twice in one pass; quantization addresses layers by '
                    f'path, so give each call a module of its own.'
                )
            kernel = kernels.get(f'{path}/kernel')
            shape = None if kernel is None else tuple(kernel.shape)
            found[path] = QuantizableLayer(kind=kind, weight_shape=shape)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda p, *rest: apply({'params': p}, *rest), params, *inputs)
    return found


@contextlib.contextmanager
def _intercepted(plan: Plan, action: Callable[..., Any]) -> Iterator[None]:
    """Runs `action(module, kind, spec, args, proceed)` in place of every layer of `plan`."""
    # Attention whose products stay in float remains in one piece.
    unfused = {path.rpartition('/')[0] for path, spec in plan.items() if spec.inputs is not None}

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__':
            return next_fun(*args, **kwargs)
        path = '/'.join(module.path)
        if _is_fused(module) and path in unfused:
            return getattr(module, _UNFUSED)(*args, **kwargs)
        kind = layer_kind(module)
        if kind is None:
            return next_fun(*args, **kwargs)
        spec = plan.get(path)
        if spec is None:
            return next_fun(*args, **kwargs)
        if kwargs:
            raise ValueError(
                f'layer {path!r} is called with keywords {sorted(kwargs)}: quantization needs its '
                f'inputs as positional arguments.'
            )
        return action(module, kind, spec, args, next_fun)

    with nn.intercept_methods(intercept):
        yield


class Call(NamedTuple):
    """One call of a module.

    Attributes:
      module: free of the network it stands in: applied by itself, it has path ''.
      args: what it was called with.
      kwargs: likewise.
      output: what it returned.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any


@contextlib.contextmanager
def recorded_calls(is_wanted: Callable[[str], bool]) -> Iterator[dict[str, Call]]:
    """Within it, calls of the modules whose path `is_wanted` appear in what it yields, by path.

    In order of their beginning. Enter it before the modes below: inputs are then seen unrounded.
    """
    calls: dict[str, Call] = {}

    def intercept(next_fun, args, kwargs, context):
        path = '/'.join(context.module.path)
        if context.method_name != '__call__' or not is_wanted(path):
            return next_fun(*args, **kwargs)
        calls[path] = None
        output = next_fun(*args, **kwargs)
        module = context.module.clone(parent=None, name=None)
        calls[path] = Call(module, args, kwargs, output)
        return output

    with nn.intercept_methods(intercept):
        yield calls


def observe_inputs(plan: Plan, num_values: int) -> contextlib.AbstractContextManager[None]:
    """Within it, `apply(..., mutable=['stats'])` also returns statistics of every input.

    Args:
      plan: the layers observed; those whose inputs stay float are left out.
      num_values: values sampled per tensor and call.
    """

    def action(module, kind, spec, args, proceed):
        if spec.inputs is not None:
            for role, x in zip(INPUT_ROLES[kind], args, strict=True):
                module.sow(
                    'stats', role, observers.observe(x, num_values),
                    init_fn=lambda: None, reduce_fn=lambda _, new: new,
                )  # fmt: skip
        return proceed(*args)

    return _intercepted(plan, action)


def collect_stats(plan: Plan, collection: PyTree) -> dict[str, dict[str, observers.TensorStats]]:
    """The collection `stats` as {path: {role: statistics}}."""
    is_leaf = lambda _, value: isinstance(value, observers.TensorStats)  # noqa: E731
    flat = traverse_util.flatten_dict(collection, is_leaf=is_leaf)
    result: dict[str, dict[str, observers.TensorStats]] = {}
    for (*path, role), stats in flat.items():
        result.setdefault('/'.join(path), {})[role] = stats
    return {path: result[path] for path in plan if path in result}


def _entry(module: nn.Module, name: str) -> Mapping[str, Array]:
    """The entry `name` of a layer in the collection `quant`."""
    entry = module.get_variable('quant', name)
    if entry is None:
        raise ValueError(
            f"collection 'quant' has no {name!r} for layer {'/'.join(module.path)!r}, which the "
            f'plan quantizes: make plan and collection from the same network.'
        )
    return entry


def _channels(module: nn.Module) -> Mapping[str, Array] | None:
    """Factors of the channels of a layer; None: it has none."""
    return module.get_variable('quant', 'channels')


def fake_quantized(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Within it, every layer of `plan` rounds its inputs as the collection `quant` says.

    The collection holds `{path: {role: {'scale', 'zero_point'}}}`, rows of `at_timestep`, nested
    by path. Weights are the caller's: either `params` hold a kernel already rounded, or the
    collection holds `{path: {'weight': {'codes', 'scale', 'zero_point'}}}`, codes as floats with
    straight-through gradients; then the float kernel is not read, see `straight_through_layer`.
    `{path: {'channels': {'input', 'output'}}}` are factors of a layer's channels.
    """

    def action(module, kind, spec, args, proceed):
        if kind in ('dense', 'conv') and module.has_variable('quant', 'weight'):
            rows = _entry(module, 'input') if spec.inputs is not None else None
            return straight_through_layer(
                module, args[0], rows, _entry(module, 'weight'), spec, _channels(module)
            )
        if _channels(module) is not None:
            rows = _entry(module, 'input') if spec.inputs is not None else None
            return scaled_layer(module, args[0], rows, _channels(module), spec)
        if spec.inputs is not None:
            args = [
                fake_quantize_input(x, _entry(module, role), spec.activation(role))
                for role, x in zip(INPUT_ROLES[kind], args, strict=True)
            ]
        return proceed(*args)

    return _intercepted(plan, action)


def integer(
    plan: Plan, calls: dict[str, list[choices.Call]] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within it, every layer of `plan` multiplies integers.

    Besides the rows of the inputs, the collection `quant` holds for layers with a quantized
    kernel the entry `weight`, made by `integer_weight`; their `params` need no kernel. A layer
    with only one of its two operands quantized stays in float, on the values its integers stand
    for.

    Args:
      plan: the layers.
      calls: receives, by path, the calls of kernels that each layer made; none for a float one.
    """

    def action(module, kind, spec, args, proceed):
        with choices.recorded() as made:
            result = compute(module, kind, spec, args)
        if calls is not None:
            calls['/'.join(module.path)] = made
        return result

    def compute(module, kind, spec, args):
        rows = [
            _entry(module, role) if spec.inputs is not None else None for role in INPUT_ROLES[kind]
        ]
        if kind == 'tap':
            return fake_quantize_input(args[0], rows[0], spec.inputs)
        if kind == 'product':
            return integer_product(
                *args, *rows, lhs_spec=spec.activation('lhs'), rhs_spec=spec.activation('rhs')
            )
        weight = _entry(module, 'weight') if spec.weight is not None else None
        return integer_layer(module, args[0], rows[0], weight, spec, _channels(module))

    return _intercepted(plan, action)
