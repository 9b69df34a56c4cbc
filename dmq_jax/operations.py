"""Counts what a traced function would do: operations, bytes moved, bytes alive at once.

The reading of a jaxpr is that of a compiler that fuses: an elementwise result is computed where it
is used, and lies in memory only if a product, a gather, a loop or the caller reads it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_KEY_BYTES = 8  # of the default generator
_CALLS = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
_PRODUCTS = ('dot_general', 'conv_general_dilated')
# Rather kept than computed a second time.
_EXPENSIVE = (
    'exp', 'exp2', 'expm1', 'log', 'log1p', 'logistic', 'tanh', 'erf', 'erf_inv', 'div', 'sqrt',
    'rsqrt', 'pow', 'sin', 'cos', 'rem',
)  # fmt: skip
# Their operands must lie in memory, beside those of products.
_READERS = (
    'gather', 'scatter', 'scatter-add', 'scatter_add', 'sort', 'scan', 'while', 'cond', 'top_k',
    'dynamic_slice', 'dynamic_update_slice', 'concatenate', 'reduce_window_sum', 'cumsum',
    'random_bits', 'threefry2x32', 'random_split', 'random_fold_in', 'random_wrap',
    'random_unwrap',
)  # fmt: skip
_FREE = (
    'reshape', 'broadcast_in_dim', 'squeeze', 'expand_dims', 'convert_element_type', 'iota',
    'transpose', 'slice', 'copy', 'stop_gradient', 'rev', 'pad', 'select_n', 'bitcast_convert_type',
    'concatenate', 'split', 'stack', 'gather', 'sharding_constraint', 'layout_constraint',
)  # fmt: skip


class Counts(NamedTuple):
    """What one call does.

    Attributes:
      product_flops: of matrix products and convolutions; a multiplication and an addition are 2.
      other_flops: one for each element of every other result.
      bytes_moved: operands read and results written, after fusion.
      live: the most bytes alive at once, arguments not counted.
      products: bytes of the results of all products.
    """

    product_flops: float
    other_flops: float
    bytes_moved: float
    live: float
    products: float


class _Value:
    """One result of the program: where it comes from, and when it is last read."""

    def __init__(self, size: int, sources: tuple['_Value', ...], is_fused: bool, born: int):
        self.size, self.sources, self.is_fused = size, sources, is_fused
        self.born, self.last, self.is_kept = born, born, not is_fused
        self.is_expensive, self.readers = False, 0

    def read(self, now: int) -> None:
        """Marks that whoever runs at `now` needs the value, from memory or computed once more."""
        left = [self]
        while left:
            value = left.pop()
            if value.last >= now and value is not self:
                continue
            value.last = max(value.last, now)
            if not value.is_kept:
                left.extend(value.sources)

    def keep(self) -> None:
        """Marks that the value must lie in memory."""
        self.is_kept = True


def count(closed: Any) -> Counts:
    """The counts of a closed jaxpr; loops count each round, the largest branch of a choice."""
    walk = _Walk()
    arguments = [walk.argument(v) for v in (*closed.jaxpr.constvars, *closed.jaxpr.invars)]
    results = walk.visit(closed.jaxpr, arguments)
    walk.now += 1
    for value in results:
        value.keep()
        value.read(walk.now)
    return walk.counts()


def _used(jaxpr: Any) -> list[Any]:
    """The equations whose results are read: no compiler computes the others."""
    wanted = set(filter(_is_variable, jaxpr.outvars))
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            found.append(equation)
            wanted.update(filter(_is_variable, equation.invars))
    return found[::-1]


def _is_variable(operand: Any) -> bool:
    return not hasattr(operand, 'val')


class _Walk:
    def __init__(self):
        self.now = 0
        self.values: list[_Value] = []
        self.extra: dict[int, float] = {}  # bytes alive inside a loop, by when it runs
        self.product_flops = self.other_flops = self.moved = self.products = 0.0

    def argument(self, variable: Any) -> _Value:
        # Not among `values`: the caller holds it.
        return _Value(_size(variable), (), False, 0)

    def visit(self, jaxpr: Any, arguments: list[_Value]) -> list[_Value]:
        found = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def look(variable: Any) -> _Value:
            if not _is_variable(variable):
                return _Value(0, (), False, 0)
            return found[variable]

        for equation in _used(jaxpr):
            operands = [look(v) for v in equation.invars]
            results = self._equation(equation, operands)
            found.update(zip(equation.outvars, results, strict=True))
        return [look(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        name, inner = equation.primitive.name, _called(equation)
        if inner is not None:
            consts = [_Value(0, (), False, 0) for _ in inner.jaxpr.constvars]
            return self.visit(inner.jaxpr, consts + operands[-len(inner.jaxpr.invars) :])
        if name == 'optimization_barrier':  # orders, and moves nothing
            return operands
        self.now += 1
        sizes = [_size(v) for v in equation.outvars]
        is_reader = name in _PRODUCTS or name in _READERS
        is_fused = not is_reader and not name.startswith(('reduce', 'arg'))
        if is_reader:
            for operand in operands:
                operand.keep()
        for operand in operands:
            operand.readers += 1
            if operand.is_expensive and operand.readers > 1:
                operand.keep()
            operand.read(self.now)
        # A slice at a place that is computed reads what it takes, not all of its operand.
        sources = () if name == 'dynamic_slice' else tuple(operands)
        results = [_Value(size, sources, is_fused, self.now) for size in sizes]
        for result in results:
            result.is_expensive = is_fused and name in _EXPENSIVE
        self.values += results
        self._work(name, equation, sizes)
        return results

    def _work(self, name: str, equation: Any, sizes: list[int]) -> None:
        if name in _PRODUCTS:
            self.product_flops += _product_flops(name, equation)
            self.products += sum(sizes)
        elif name in ('scan', 'while', 'cond'):
            bodies = equation.params.get('branches') or [
                equation.params[k] for k in ('jaxpr', 'body_jaxpr') if k in equation.params
            ]
            each = max(map(count, bodies), key=lambda counts: counts.bytes_moved)
            rounds = equation.params.get('length', 1)
            self.product_flops += rounds * each.product_flops
            self.other_flops += rounds * each.other_flops
            self.moved += rounds * each.bytes_moved
            self.products += rounds * each.products
            self.extra[self.now] = each.live
        elif name == 'dynamic_slice':
            self.moved += sum(sizes)
        elif name not in _FREE:
            reads = equation.invars if name.startswith(('reduce', 'arg')) else equation.outvars
            self.other_flops += sum(math.prod(v.aval.shape) for v in reads)

    def counts(self) -> Counts:
        moved, changes = self.moved, {}
        for value in self.values:
            if not value.is_kept:
                continue
            moved += value.size + sum(source.size for source in _in_memory(value))
            changes[value.born] = changes.get(value.born, 0) + value.size
            changes[value.last + 1] = changes.get(value.last + 1, 0) - value.size
        live = most = 0.0
        for now in sorted({*changes, *self.extra}):
            live += changes.get(now, 0)
            most = max(most, live + self.extra.get(now, 0))
        return Counts(self.product_flops, self.other_flops, moved, most, self.products)


def _in_memory(value: _Value) -> list[_Value]:
    """The values in memory that the computation of `value` reads."""
    found, left, seen = [], list(value.sources), set()
    while left:
        source = left.pop()
        if id(source) in seen:
            continue
        seen.add(id(source))
        if source.is_kept:
            found.append(source)
        else:
            left.extend(source.sources)
    return found


def _called(equation: Any) -> Any:
    """The jaxpr of an equation that only calls it."""
    if equation.primitive.name in ('scan', 'while', 'cond'):
        return None
    inner = [equation.params[name] for name in _CALLS if name in equation.params]
    if not inner:
        return None
    if hasattr(inner[0], 'jaxpr'):
        return inner[0]
    return _Open(inner[0])


class _Open:
    """A jaxpr without constants, as if closed."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr


def _product_flops(name: str, equation: Any) -> float:
    left, right = (v.aval.shape for v in equation.invars)
    if name == 'dot_general':
        result = math.prod(equation.outvars[0].aval.shape)
        (contracted, _), _ = equation.params['dimension_numbers']
        return 2.0 * result * math.prod(left[axis] for axis in contracted)
    names = equation.params['dimension_numbers']
    # rhs_spec: output channels, input channels of a group, then space.
    out = equation.outvars[0].aval.shape
    flops = 2.0 * right[names.rhs_spec[1]]
    flops *= math.prod(out[axis] for axis in names.out_spec[:2])
    for i, (a, b, c) in enumerate(
        zip(names.lhs_spec[2:], names.rhs_spec[2:], names.out_spec[2:], strict=True)
    ):
        flops *= _taps(left[a], right[b], out[c], equation.params, i)
    return flops


def _taps(size: int, taps: int, places: int, params: Any, axis: int) -> int:
    """Pairs of a place and a tap that meet a value, not padding and not a hole of a dilation."""
    (before, _), stride = params['padding'][axis], params['window_strides'][axis]
    hole, spread = params['lhs_dilation'][axis], params['rhs_dilation'][axis]
    at = np.arange(places)[:, None] * stride + np.arange(taps)[None] * spread - before
    return int(np.sum((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)))


def _size(variable: Any) -> int:
    aval = variable.aval
    if not hasattr(aval, 'dtype') or not hasattr(aval, 'shape'):
        return 0
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
    return math.prod(aval.shape) * (_KEY_BYTES if is_key else aval.dtype.itemsize)
