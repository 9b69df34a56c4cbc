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
import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.extend import core
from jaxtyping import Array, Float, PyTree

from dmq_jax.quant import observers
from dmq_jax.quant.activation_products import integer_product
from dmq_jax.quant.integer import (
    float_branch,
    integer_layer,
    scaled_layer,
    straight_through_layer,
)
from dmq_jax.quant.order import not_before
from dmq_jax.quant.plan import (
    INPUT_ROLES,
    LayerSpec,
    Part,
    Plan,
    QuantizableLayer,
    parts_by_layer,
)
from dmq_jax.quant.rows import at_timestep, fake_quantize_input
from dmq_jax.quant.tensor import QuantSpec
from kernels import choices

# Named, not imported: quant knows no network, and a user's own modules may use these names.
_PRODUCTS = {'Product': 'product', 'Tap': 'tap'}


# A module that computes several products in one piece unless asked to run them as modules.
_FUSED, _UNFUSED = 'Attend', 'by_products'
# What a module may say of its layers: {name: channels of the first tensor of a joined input}.
_JOINED = 'joined_inputs'


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
            joined = getattr(context.module.parent, _JOINED, {}).get(context.module.name)
            found[path] = QuantizableLayer(kind=kind, weight_shape=shape, joined=joined)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda p, *rest: apply({'params': p}, *rest), params, *inputs)
    return found


class _Site(NamedTuple):
    """A layer that is about to run.

    Attributes:
      module: of the network.
      kind: see `layer_kind`.
      spec: of the whole layer; None: it is quantized in parts only.
      parts: of the layer, each with its spec.
      args: of the call.
      proceed: runs the layer as it is.
    """

    module: nn.Module
    kind: str
    spec: LayerSpec | None
    parts: tuple[tuple[Part, LayerSpec], ...]
    args: tuple
    proceed: Callable[..., Any]

    def sum_of_parts(self, run: Callable[..., Array]) -> Array:
        """The sum of `run(part, spec, x)` over the parts, `x` being what each sees."""
        (x,) = self.args
        return sum(run(part, spec, x[..., part.begin : part.end]) for part, spec in self.parts)


@contextlib.contextmanager
def _intercepted(plan: Plan, action: Callable[[_Site], Any]) -> Iterator[None]:
    """Runs `action` in place of every layer of `plan`."""
    parts = {
        layer: tuple((part, plan[part.path]) for part in found)
        for layer, found in parts_by_layer(plan).items()
    }
    # Attention whose products stay in float remains in one piece.
    unfused = {path.rpartition('/')[0] for path, spec in plan.items() if spec.inputs is not None}

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != '__call__':
            return next_fun(*args, **kwargs)
        path = _path_of(module)
        if _is_fused(module) and path in unfused:
            return getattr(module, _UNFUSED)(*args, **kwargs)
        kind = layer_kind(module)
        if kind is None:
            return next_fun(*args, **kwargs)
        spec = plan.get(path)
        if spec is None and path not in parts:
            return next_fun(*args, **kwargs)
        if kwargs:
            raise ValueError(
                f'layer {path!r} is called with keywords {sorted(kwargs)}: quantization needs its '
                f'inputs as positional arguments.'
            )
        return action(_Site(module, kind, spec, parts.get(path, ()), args, next_fun))

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


@contextlib.contextmanager
def recomputed(pattern: str) -> Iterator[None]:
    """Within it, some modules keep for the backward pass no more than what they were called with.

    Whatever is computed inside them is computed again when its turn comes. `jax.checkpoint` would
    do, were it not for XLA on CPU: it drops the barriers that keep the two computations apart, and
    then keeps what one of them made.

    Args:
      pattern: regular expression over module paths; outermost modules whose whole path matches.
    """

    def intercept(next_fun, args, kwargs, context):
        module, inside = context.module, _prefix.get()
        path = _path_of(module)
        if inside or context.method_name != '__call__' or not re.fullmatch(pattern, path):
            return next_fun(*args, **kwargs)
        alone = module.clone(parent=None, name=None)

        def run(variables, inputs):
            with _standing_at(path):
                return alone.apply(variables, *inputs[0], **inputs[1])

        return _run_again(run, module.variables, (args, kwargs))

    with nn.intercept_methods(intercept):
        yield


def _run_again(run: Callable[..., Array], variables: PyTree, inputs: PyTree) -> Array:
    """`run(variables, inputs)`, of which nothing is kept but the arguments."""
    # Traced once, here, where the hooks are in force: a backward pass comes after they have gone.
    traced, shape = jax.make_jaxpr(run, return_shape=True)(variables, inputs)
    leaves = jax.tree.leaves((variables, inputs))
    num_variables = len(leaves) - len(jax.tree.leaves(inputs))

    @jax.custom_vjp
    def call(*leaves):
        return core.jaxpr_as_fun(traced)(*leaves)

    def forward(*leaves):
        return call(*leaves), leaves

    def backward(leaves, g):
        variables, inputs = leaves[:num_variables], leaves[num_variables:]
        inputs = not_before(g, inputs)
        slopes = jax.vjp(core.jaxpr_as_fun(traced), *variables, *inputs)[1](g)
        # Sums over activations, which would otherwise wait for the optimizer's update, and the
        # activations with them.
        late = not_before(slopes[:num_variables], slopes[num_variables:])
        return *slopes[:num_variables], *late

    call.defvjp(forward, backward)
    return jax.tree.unflatten(jax.tree.structure(shape), call(*leaves))


# The path at which a module runs that was taken out of its network.
_prefix: contextvars.ContextVar[str] = contextvars.ContextVar('prefix', default='')


@contextlib.contextmanager
def _standing_at(path: str) -> Iterator[None]:
    token = _prefix.set(path)
    try:
        yield
    finally:
        _prefix.reset(token)


def _path_of(module: nn.Module) -> str:
    """The path of a module in its network, even if it runs alone."""
    return '/'.join(filter(None, (_prefix.get(), *module.path)))


def observe_inputs(
    plan: Plan, num_values: int, *, channels: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Within it, `apply(..., mutable=['stats'])` also returns statistics of every input.

    Args:
      plan: the layers observed; those whose inputs stay float are left out.
      num_values: values sampled per tensor and call.
      channels: whether ranges of single channels are wanted, of the inputs of `Dense` and `Conv`.
    """

    def action(site):
        observe = functools.partial(
            observers.observe, num_values=num_values,
            channels=channels and site.kind in ('dense', 'conv'),
        )  # fmt: skip
        found = {}
        if site.spec is not None and site.spec.inputs is not None:
            for role, x in zip(INPUT_ROLES[site.kind], site.args, strict=True):
                found[role] = observe(x)
        for part, spec in site.parts:
            if spec.inputs is not None:
                x = site.args[0][..., part.begin : part.end]
                found[part.name] = {'input': observe(x)}
        for name, stats in found.items():
            site.module.sow(
                'stats', name, stats, init_fn=lambda: None, reduce_fn=lambda _, new: new
            )
        return site.proceed(*site.args)

    return _intercepted(plan, action)


def collect_stats(plan: Plan, collection: PyTree) -> dict[str, dict[str, observers.TensorStats]]:
    """The collection `stats` as {path: {role: statistics}}."""
    is_leaf = lambda _, value: isinstance(value, observers.TensorStats)  # noqa: E731
    flat = traverse_util.flatten_dict(collection, is_leaf=is_leaf)
    result: dict[str, dict[str, observers.TensorStats]] = {}
    for (*path, role), stats in flat.items():
        result.setdefault('/'.join(path), {})[role] = stats
    return {path: result[path] for path in plan if path in result}


def _get(module: nn.Module, name: str, part: Part | None) -> Mapping[str, Array] | None:
    """The entry `name` of a layer, or of a part of it, in the collection `quant`, if any."""
    if part is None:
        return module.get_variable('quant', name)
    return (module.get_variable('quant', part.name) or {}).get(name)


def _entry(module: nn.Module, name: str, part: Part | None = None) -> Mapping[str, Array]:
    """As `_get`; the entry must be there."""
    entry = _get(module, name, part)
    if entry is None:
        raise ValueError(
            f"collection 'quant' has no {name!r} for layer {'/'.join(module.path)!r}, which the "
            f'plan quantizes: make plan and collection from the same network.'
        )
    return entry


def _with_branch(
    module: nn.Module,
    x: Array,
    y: Array,
    channels: Mapping[str, Array] | None,
    part: Part | None,
) -> Array:
    """`y`, what a layer made of `x`, plus what its branch of low rank, if any, makes of it."""
    branch = _get(module, 'branch', part)
    return y if branch is None else y + float_branch(module, x, channels, branch)


def fake_quantized(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Within it, every layer of `plan` rounds its inputs as the collection `quant` says.

    The collection holds `{path: {role: {'scale', 'zero_point'}}}`, rows of `at_timestep`, nested
    by path. Weights are the caller's: either `params` hold a kernel already rounded, or the
    collection holds `{path: {'weight': {'codes', 'scale', 'zero_point'}}}`, codes as floats with
    straight-through gradients; then the float kernel is not read, see `straight_through_layer`.
    `{path: {'channels': {'input', 'output'}}}` are factors of a layer's channels,
    `{path: {'branch': {'down', 'up'}}}` adds a product of low rank in float. A layer that the
    plan has in parts is the sum of what they give, each with entries of its own.
    """

    def layer(module, x, spec, part=None):
        rows = _entry(module, 'input', part) if spec.inputs is not None else None
        weight, channels = (_get(module, name, part) for name in ('weight', 'channels'))
        if weight is not None:
            y = straight_through_layer(module, x, rows, weight, spec, channels, part=part)
        else:
            y = scaled_layer(module, x, rows, channels, spec, part=part)
        return _with_branch(module, x, y, channels, part)

    def action(site):
        module, spec = site.module, site.spec
        if spec is None:
            return site.sum_of_parts(lambda part, spec, x: layer(module, x, spec, part))
        if site.kind in ('dense', 'conv') and any(
            _get(module, name, None) is not None for name in ('weight', 'channels', 'branch')
        ):
            return layer(module, *site.args, spec)
        args = site.args
        if spec.inputs is not None:
            args = [
                fake_quantize_input(x, _entry(module, role), spec.activation(role))
                for role, x in zip(INPUT_ROLES[site.kind], args, strict=True)
            ]
        return site.proceed(*args)

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

    def layer(module, x, spec, part=None):
        rows = _entry(module, 'input', part) if spec.inputs is not None else None
        weight = _entry(module, 'weight', part) if spec.weight is not None else None
        channels = _get(module, 'channels', part)
        y = integer_layer(module, x, rows, weight, spec, channels, part=part)
        return _with_branch(module, x, y, channels, part)

    def action(site):
        with choices.recorded() as made:
            result = compute(site)
        if calls is not None:
            calls['/'.join(site.module.path)] = made
        return result

    def compute(site):
        module, spec = site.module, site.spec
        if spec is None:
            return site.sum_of_parts(lambda part, spec, x: layer(module, x, spec, part))
        if site.kind not in ('tap', 'product'):
            return layer(module, *site.args, spec)
        rows = [_entry(module, role) for role in INPUT_ROLES[site.kind]]
        if site.kind == 'tap':
            return fake_quantize_input(*site.args, *rows, spec.inputs)
        return integer_product(
            *site.args, *rows, lhs_spec=spec.activation('lhs'), rhs_spec=spec.activation('rhs')
        )

    return _intercepted(plan, action)
