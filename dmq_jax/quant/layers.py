"""Quantization applied to a Flax network from outside, by module path.

The one place that hooks into Flax. A context manager intercepts `Dense`, `Conv` and the modules
named as products and taps, in one of three modes:

* `observe_inputs`: statistics of every input appear in the collection `stats`;
* `fake_quantized`: inputs are rounded to their grid, in float; weights come already rounded;
* `integer`: inputs become int8 codes and the products run on integers.

A layer is quantized iff the plan names it; what it is quantized with stands at its path in the
collection `quant`. Tables of scales have a leading axis of timesteps; `at_timestep` picks the row
before the network is called, so no layer ever knows the time and nothing counts calls.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int, PyTree

from dmq_jax.quant import numerics, observers, products
from dmq_jax.quant.plan import INPUT_ROLES, LayerSpec, Plan, QuantizableLayer
from dmq_jax.quant.tensor import QuantizedTensor, QuantSpec, expand, unpack_rows
from kernels.int_conv.api import int_conv
from kernels.int_matmul.api import int_matmul

Rows = Mapping[str, Array]  # 'scale' and 'zero_point' of one tensor: [] or one per image [B]

# Named, not imported: quant knows no network, and a user's own modules may use these names.
_PRODUCTS = {'Product': 'product', 'Tap': 'tap'}


def layer_kind(module: nn.Module) -> str | None:
    """'dense', 'conv', 'product' or 'tap'; None for a module that is never quantized."""
    if isinstance(module, nn.Dense):
        return 'dense'
    if isinstance(module, nn.Conv):
        return 'conv'
    return _PRODUCTS.get(type(module).__name__)


def at_timestep(
    tables: PyTree, timesteps: Int[Array, 'S'], t: Array, *, lookup: str = 'nearest'
) -> PyTree:
    """The row of every table (leading axis S, or 1 where all timesteps share it) for `t`.

    Args:
      tables: arrays with a leading axis of S timesteps, or of 1.
      timesteps: what each row belongs to, descending as visited; any other `t` is served too.
      t: a scalar, or one per image [B]; then rows have a leading axis B.
      lookup: 'nearest' timestep, or 'linear' interpolation between the two around `t` (the ends
        are held beyond the first and last).

    Raises:
      ValueError: an unknown lookup.
    """
    if lookup not in ('nearest', 'linear'):
        raise ValueError(f"timestep_lookup={lookup!r}: expected 'nearest' or 'linear'.")
    t, timesteps = jnp.asarray(t), jnp.asarray(timesteps)

    def constant(table: Array) -> Array:
        row = table[0]
        return row if t.ndim == 0 else jnp.broadcast_to(row, (*t.shape, *row.shape))

    if lookup == 'nearest':
        rows = timesteps.astype(jnp.float32).reshape((1,) * t.ndim + (-1,))
        nearest = jnp.argmin(jnp.abs(rows - t.astype(jnp.float32)[..., None]), axis=-1)

        def pick(table: Array) -> Array:
            return constant(table) if table.shape[0] == 1 else table[nearest]
    else:
        ascending = timesteps[::-1].astype(jnp.float32)
        position = jnp.interp(
            t.astype(jnp.float32), ascending, jnp.arange(timesteps.size, dtype=jnp.float32)
        )
        below = jnp.floor(position).astype(jnp.int32)
        above = jnp.minimum(below + 1, timesteps.size - 1)
        share = position - below.astype(jnp.float32)

        def pick(table: Array) -> Array:
            if table.shape[0] == 1:
                return constant(table)
            weight = share.reshape(share.shape + (1,) * (table.ndim - 1))
            rows = table[::-1]
            return rows[below] * (1 - weight) + rows[above] * weight

    return jax.tree.map(pick, tables)


def per_image(row: Array, ndim: int) -> Array:
    """A row that broadcasts against a tensor of `ndim` axes: [] as it is, [B] as [B, 1, ...]."""
    return row if row.ndim == 0 else row.reshape(row.shape + (1,) * (ndim - row.ndim))


def fake_quantize_input(x: Float[Array, 'B ...'], rows: Rows, spec: QuantSpec) -> Array:
    """`x` rounded to the grid of `spec` at the given scale and zero point."""
    qmin, qmax = spec.grid
    scale, zero_point = (per_image(rows[name], x.ndim) for name in ('scale', 'zero_point'))
    rounded = numerics.fake_quantize(
        x.astype(jnp.float32), scale, zero_point, float(qmin), float(qmax)
    ).astype(x.dtype)
    # An analysis switches layers on and off by data, so that one program serves them all.
    return jnp.where(rows['gate'], rounded, x) if 'gate' in rows else rounded


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

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        kind = layer_kind(module)
        if kind is None or context.method_name != '__call__':
            return next_fun(*args, **kwargs)
        path = '/'.join(module.path)
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


def fake_quantized(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Within it, every layer of `plan` rounds its inputs as the collection `quant` says.

    The collection holds `{path: {role: {'scale', 'zero_point'}}}`, rows of `at_timestep`, nested
    by path. Weights are the caller's: either `params` hold a kernel already rounded, or the
    collection holds `{path: {'weight': {'codes', 'scale', 'zero_point'}}}`, codes as floats with
    straight-through gradients; then the float kernel is not read, see `straight_through_layer`.
    """

    def action(module, kind, spec, args, proceed):
        if kind in ('dense', 'conv') and module.has_variable('quant', 'weight'):
            return straight_through_layer(module, args[0], spec)
        if spec.inputs is not None:
            args = [
                fake_quantize_input(x, _entry(module, role), spec.inputs)
                for role, x in zip(INPUT_ROLES[kind], args, strict=True)
            ]
        return proceed(*args)

    return _intercepted(plan, action)


def straight_through_layer(
    module: nn.Dense | nn.Conv, x: Float[Array, 'B ...'], spec: LayerSpec
) -> Float[Array, 'B ...']:
    """A `Dense` or `Conv` of integer codes, with the gradients of the float layer.

    Its value is that of integer mode where that is faster than float (`products`), its gradients
    those of the product of the real values that the codes stand for.

    Raises:
      NotImplementedError: see `integer_layer`.
    """
    rows = _entry(module, 'input') if spec.inputs is not None else None
    geometry = None if isinstance(module, nn.Dense) else conv_geometry(module, x.shape)

    # A checkpoint for each layer: only `x` and the codes wait for the backward pass, and what is
    # repeated there is repeated when this layer's turn comes, one layer at a time.
    @jax.checkpoint
    def multiply(x, rows, weight):
        shape = weight['codes'].shape
        kernel = numerics.dequantize(
            weight['codes'], expand(weight['scale'], shape), expand(weight['zero_point'], shape)
        )
        x_hat = x if rows is None else fake_quantize_input(x, rows, spec.inputs)
        if rows is None or 'gate' in rows or not products.integers_are_faster():
            value = products.product(x_hat, kernel, geometry)
        else:
            entry = _int8_weight(
                jnp.moveaxis(weight['codes'], -1, 0).astype(jnp.int32),
                weight['scale'], jnp.round(weight['zero_point']).astype(jnp.int32),
                spec.weight, shape,
            )  # fmt: skip
            value = _accumulate(module, *jax.lax.stop_gradient((x, rows, entry)), spec)
        return products.with_float_gradients(geometry, x_hat, kernel, jax.lax.stop_gradient(value))

    y = multiply(x.astype(jnp.float32), rows, dict(_entry(module, 'weight')))
    if module.use_bias:
        bias = module.get_variable('params', 'bias')
        y = y + _as_last(bias.astype(jnp.float32), y.ndim)
    return y.astype(module.dtype or x.dtype)


def integer(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """Within it, every layer of `plan` multiplies integers.

    Besides the rows of the inputs, the collection `quant` holds for layers with a quantized
    kernel the entry `weight`, made by `integer_weight`; their `params` need no kernel. A layer
    with only one of its two operands quantized stays in float, on the values its integers stand
    for.
    """

    def action(module, kind, spec, args, proceed):
        rows = [
            _entry(module, role) if spec.inputs is not None else None for role in INPUT_ROLES[kind]
        ]
        if kind == 'tap':
            return fake_quantize_input(args[0], rows[0], spec.inputs)
        if kind == 'product':
            return integer_product(*args, *rows, spec=spec.inputs)
        weight = _entry(module, 'weight') if spec.weight is not None else None
        return integer_layer(module, args[0], rows[0], weight, spec)

    return _intercepted(plan, action)


def carry_codes(
    x: Float[Array, 'B ...'], rows: Rows, spec: QuantSpec
) -> tuple[Int[Array, 'B ...'], Array | None]:
    """int8 codes of `x`, and the code that means 0.0 (None: it is 0).

    Up to 7 bits the zero point is subtracted at once: the difference of two codes still fits
    int8, and zero padding is exact for free. At 8 bits codes are shifted by 128 into int8.
    """
    qmin, qmax = spec.grid
    scale, zero_point = (per_image(rows[name], x.ndim) for name in ('scale', 'zero_point'))
    codes = numerics.quantize(x.astype(jnp.float32), scale, zero_point, qmin, qmax)
    if spec.symmetric:
        return codes.astype(jnp.int8), None
    rounded = jnp.round(zero_point)
    if spec.bits < 8:
        return (codes - rounded).astype(jnp.int8), None
    return (codes - 128.0).astype(jnp.int8), jnp.round(rows['zero_point']).astype(jnp.int32) - 128


def integer_product(
    lhs: Float[Array, 'B *batch M K'],
    rhs: Float[Array, 'B *batch N K'],
    lhs_rows: Rows,
    rhs_rows: Rows,
    *,
    spec: QuantSpec,
) -> Float[Array, 'B *batch M N']:
    """A product of two activations on integers, zero points taken out of the sum exactly."""
    a, a_zero = carry_codes(lhs, lhs_rows, spec)
    b, b_zero = carry_codes(rhs, rhs_rows, spec)
    total = int_matmul(a, b, x_max=_largest(spec), w_max=_largest(spec))
    if a_zero is not None:
        # sum (a - za)(b - zb) = sum ab - za sum b - zb sum a + K za zb
        za, zb = per_image(a_zero, a.ndim), per_image(b_zero, b.ndim)
        a_sum = jnp.sum(a.astype(jnp.int32), axis=-1)[..., :, None]
        b_sum = jnp.sum(b.astype(jnp.int32), axis=-1)[..., None, :]
        total = total - za * b_sum - zb * a_sum + a.shape[-1] * za * zb
    scale = per_image(lhs_rows['scale'], total.ndim) * per_image(rhs_rows['scale'], total.ndim)
    return (total.astype(jnp.float32) * scale).astype(lhs.dtype)


def integer_layer(
    module: nn.Dense | nn.Conv,
    x: Float[Array, 'B ...'],
    rows: Rows | None,
    weight: Mapping[str, Array] | None,
    spec: LayerSpec,
) -> Float[Array, 'B ...']:
    """A `Dense` or `Conv` on integer codes, with its bias.

    Raises:
      NotImplementedError: grouped or dilated convolutions, or string paddings other than SAME and
        VALID.
    """
    bias = module.get_variable('params', 'bias') if module.use_bias else None
    if weight is None or rows is None:
        y = _half_quantized(module, x, rows, weight, spec)
    else:
        y = _accumulate(module, x, rows, weight, spec)
    if bias is not None:
        y = y + _as_last(bias.astype(jnp.float32), y.ndim)
    return y.astype(module.dtype or x.dtype)


def integer_weight(tensor: QuantizedTensor) -> dict[str, Array]:
    """The entry `weight` of the collection `quant` for integer mode.

    `codes` are int8 with the output channel first. Up to 7 bits an asymmetric weight's zero point
    is subtracted at once; at 8 bits codes and zero point are shifted by 128 into int8.
    """
    return _int8_weight(
        jnp.asarray(unpack_rows(tensor)).astype(jnp.int32),
        jnp.asarray(tensor.scale), jnp.asarray(tensor.zero_point), tensor.spec, tensor.shape,
    )  # fmt: skip


def _int8_weight(codes, scale, zero_point, spec, shape):
    """`integer_weight` of int32 codes with the output channel first, shape [N, ..., K]."""
    if _keeps_zero_point(spec):
        codes, zero_point = codes - 128, zero_point - 128
    elif not spec.symmetric:
        zeros = jnp.broadcast_to(expand(zero_point, shape), shape)
        codes, zero_point = codes - jnp.moveaxis(zeros, -1, 0), jnp.zeros_like(zero_point)
    return {'codes': codes.astype(jnp.int8), 'scale': scale, 'zero_point': zero_point}


def _keeps_zero_point(spec: QuantSpec) -> bool:
    """Whether codes minus zero point would not fit int8."""
    return spec.bits == 8 and not spec.symmetric


def _half_quantized(module, x, rows, weight, spec):
    """A layer with float activations or float weights: the product of what they stand for."""
    if rows is not None:
        x = fake_quantize_input(x, rows, spec.inputs)
    if weight is None:
        kernel = module.get_variable('params', 'kernel')
    else:
        codes = jnp.moveaxis(weight['codes'], 0, -1).astype(jnp.float32)
        zero_point = weight['zero_point'].astype(jnp.float32)
        kernel = numerics.dequantize(
            codes, expand(weight['scale'], codes.shape), expand(zero_point, codes.shape)
        )
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    if isinstance(module, nn.Dense):
        return x @ kernel
    strides, padding = conv_geometry(module, x.shape)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _accumulate(module, x, rows, weight, spec):
    """scale_x * sum over groups of scale_w * (integer accumulator), zero points taken out."""
    x_codes, x_zero = carry_codes(x, rows, spec.inputs)
    codes, w_scale = weight['codes'], weight['scale']
    bounds = {'x_max': _largest(spec.inputs), 'w_max': _largest(spec.weight)}
    groups = w_scale.shape[-2]
    size = codes.shape[-1] // groups
    total = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        w, xs = codes[..., part], x_codes[..., part]
        acc = _multiply(module, xs, w, x_zero, bounds)
        if _keeps_zero_point(spec.weight):
            # What a weight of ones would give: the sum of the codes under the kernel.
            ones = jnp.ones((1, *w.shape[1:]), jnp.int8)
            zero = _channels(weight['zero_point'], g)
            acc = acc - _multiply(module, xs, ones, x_zero, bounds) * _as_last(zero, acc.ndim)
        scaled = acc.astype(jnp.float32) * _as_last(_channels(w_scale, g), acc.ndim)
        total = scaled if total is None else total + scaled
    return total * per_image(rows['scale'], total.ndim)


def _largest(spec: QuantSpec) -> int:
    """The largest |code - zero point| of a tensor of `spec`, at least any |code| that int8 holds.

    It bounds the sum with the zero points taken out; on the way there int32 may wrap around.
    """
    return 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1


def _multiply(module, x, w, x_zero, bounds):
    """Integer product or convolution, the zero point of `x` taken out."""
    if isinstance(module, nn.Dense):
        acc = int_matmul(x.reshape(-1, x.shape[-1]), w, **bounds)
        acc = acc.reshape(*x.shape[:-1], w.shape[0])
    else:
        strides, padding = conv_geometry(module, x.shape)
        pad_value = 0 if x_zero is None else x_zero
        acc = int_conv(x, w, strides=strides, padding=padding, pad_value=pad_value, **bounds)
    if x_zero is None:
        return acc
    column_sum = jnp.sum(w.astype(jnp.int32), axis=tuple(range(1, w.ndim)))
    return acc - per_image(x_zero, acc.ndim) * _as_last(column_sum, acc.ndim)


def _channels(table: Array, group: int) -> Array:
    """Entry `group` of a `scale_shape` table: [] or [N]."""
    return table.reshape(()) if table.size == 1 else table.reshape(-1, table.shape[-1])[group]


def _as_last(vector: Array, ndim: int) -> Array:
    """[N] or [] with axes of size 1 before it: ranks are never matched implicitly."""
    return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def conv_geometry(
    module: nn.Conv, x_shape: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]:
    """Strides and explicit padding of a Flax convolution over images of `x_shape`.

    Raises:
      NotImplementedError: groups, dilation, other than two spatial axes, or an unusual padding.
    """
    path = '/'.join(module.path)
    sizes = module.kernel_size
    if len(sizes) != 2:
        raise NotImplementedError(f'{path}: {len(sizes)} spatial axes; integers need 2.')
    pair = functools.partial(_as_pair, path=path)
    dilated = pair(module.kernel_dilation) != (1, 1) or pair(module.input_dilation) != (1, 1)
    if module.feature_group_count != 1 or dilated:
        raise NotImplementedError(
            f'{path}: grouped or dilated convolutions have no integer form here; leave the layer '
            f'float with a rule.'
        )
    strides = pair(module.strides)
    padding = module.padding
    if isinstance(padding, str):
        if padding not in ('SAME', 'VALID'):
            raise NotImplementedError(f"{path}: padding={padding!r}; expected 'SAME' or 'VALID'.")
        return strides, tuple(jax.lax.padtype_to_pads(x_shape[1:3], sizes, strides, padding))
    sides = [padding, padding] if isinstance(padding, int) else padding
    return strides, tuple((s, s) if isinstance(s, int) else tuple(s) for s in sides)


def _as_pair(value, *, path):
    if value is None:
        return (1, 1)
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise NotImplementedError(f'{path}: {value} for two spatial axes.')
    return pair
