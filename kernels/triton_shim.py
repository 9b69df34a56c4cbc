"""The only place that calls jax-triton: versions, refusals, and one launch for 0.3.1 and 0.4.

Imports neither triton nor jax-triton until a kernel is launched.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32, UInt8

from kernels import gpu, triton_ptx, triton_tiles
from kernels.epilogue import Epilogue
from kernels.triton_tiles import CANDIDATES, Tile

# 3.8 and 3.9 compile int8 products for capability 8.x to four times the instructions.
MIN_TRITON, BELOW_TRITON = (3, 6), (3, 8)


def refusal() -> str | None:
    """Why Triton kernels cannot run here, None if they can."""
    target = gpu.current()
    if target is None:
        return f'no NVIDIA GPU here (platform {jax.default_backend()})'
    if target.capability < 80:
        return f'capability {target.capability / 10} < 8.0 has no such int8 instructions'
    return _missing_packages()


def size_refusal(num_products: int, *sizes: int) -> str | None:
    """Why a kernel cannot address that many products of operands of these sizes, None if it can."""
    if max(sizes) > 2**31 - 1:
        return f'{max(sizes)} elements in one operand: offsets are int32'
    if num_products > 65535:
        return f'{num_products} products: at most 65535 in one launch'
    return None


def check_sizes(num_products: int, *sizes: int) -> None:
    """Raises NotImplementedError for what vmap made too large for one launch."""
    if refusal := size_refusal(num_products, *sizes):
        raise NotImplementedError(f'triton: under vmap, {refusal}; use a smaller batch.')


def reluctance() -> str | None:
    """Why Triton kernels should not be chosen unless named, though they can run."""
    count = gpu.current().count
    if count > 1:
        return (
            f'{count} GPUs: jit would gather every operand of a kernel on each; name it inside '
            'shard_map'
        )
    return None


@functools.cache
def _missing_packages() -> str | None:
    versions = {}
    for name in ('triton', 'jax-triton'):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f'{name} is not installed (requirements-gpu.txt)'
    release = tuple(int(part) for part in versions['triton'].split('.')[:2])
    if not MIN_TRITON <= release < BELOW_TRITON:
        return f'triton {versions["triton"]} is installed: expected >=3.6,<3.8'
    if versions['jax-triton'].startswith('0.4') and release < (3, 7):
        return f'jax-triton 0.4 needs triton >=3.7, not {versions["triton"]}'
    try:
        importlib.import_module('jax_triton')
    except ImportError as error:
        return f'jax-triton does not load: {error}'
    return None


def launch_tiles(
    kernel: Any,
    op: str,
    operands: tuple[Array, Array, Epilogue | None, Int32[Array, '...'] | None],
    out: jax.ShapeDtypeStruct,
    *,
    groups: int,
    x_size: int,
    w_size: int,
    constants: Mapping[str, Any],
    others: Sequence[Array] = (),
) -> Array:
    """One launch over the tiles of a product, or of several: what both operations have in common.

    Args:
      kernel: see `launch`; its arguments are x, w, those of the epilogue, the others, the result.
      op: 'int_matmul' or 'int_conv', whose tiles to use.
      operands: x, w (uint8 if packed), epilogue, and the sums of w where it has a zero point.
      out: the result, outputs last.
      groups: number of products.
      x_size: codes of x in one product.
      w_size: the same of w.
      constants: sizes of the operation.
      others: further operands.
    """
    x, w, epilogue, w_sum = operands
    N = out.shape[-1]
    num_rows = out.size // N
    M = num_rows // groups
    check_sizes(groups, x_size, w_size, M * N)
    kind, target = mode(x, w), gpu.current()
    tile = triton_tiles.lookup(
        op, kind, M, N, w.shape[-1], capability=target.capability, device_kind=target.kind
    )
    arrays, terms = epilogue_operands(epilogue, w_sum, num_rows=num_rows, num_outputs=N)

    def grid(sizes):
        return (-(-M // sizes['BM']) * -(-N // sizes['BN']), groups)

    return launch(
        kernel,
        (as_int8(x), as_int8(w), *arrays, *others),
        out,
        grid=grid,
        tile=tile,
        constants={**constants, **mode_constants(kind), **terms},
    )


def launch(
    kernel: Any,
    arrays: Sequence[Array],
    out: jax.ShapeDtypeStruct,
    *,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    tile: Tile,
    constants: Mapping[str, Any],
) -> Array:
    """One kernel call.

    Args:
      kernel: decorated by `triton.jit`; its arguments are the arrays, the result, the constants
        and the fields BM, BN, BK and GROUP of the tile.
      arrays: operands in the order of the kernel.
      out: shape and dtype of the result.
      grid: tile fields → number of programs along each axis.
      tile: sizes to use, unless KERNELS_AUTOTUNE=1: then the first run times all candidates.
      constants: values known at compile time.
    """
    import jax_triton

    triton_ptx.install()
    options = {'compute_capability': gpu.current().capability}
    sizes = {name: getattr(tile, name) for name in ('BM', 'BN', 'BK', 'GROUP')}
    if os.environ.get('KERNELS_AUTOTUNE') == '1':
        kernel, sizes = _autotuned(kernel), {}
    else:
        options |= {'num_warps': tile.num_warps, 'num_stages': tile.num_stages}
    # Not fused: products and sums are rounded as XLA rounds them.
    if tuple(map(int, jax_triton.__version__.split('.')[:2])) >= (0, 4):
        options |= {'out_type': out, 'backend_options': {'enable_fp_fusion': False}}
    else:
        options |= {'out_shape': out, 'enable_fp_fusion': False}
    return jax_triton.triton_call(
        *arrays, kernel=kernel, grid=grid, **options, **constants, **sizes
    )


def _autotuned(kernel: Any) -> Any:
    import triton

    configs = [
        triton.Config(
            {name: getattr(tile, name) for name in ('BM', 'BN', 'BK', 'GROUP')},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for tile in CANDIDATES
    ]
    return triton.autotune(configs=configs, key=[])(kernel)


def call(
    name: str,
    launch_one: Callable[..., Array],
    fold: Callable[..., Array],
    operands: tuple,
    **options: Any,
) -> Array:
    """`launch_one(*operands, **options)`, which vmap batches and which has no gradient.

    Args:
      name: of the operation, for the error about gradients.
      launch_one: launches a kernel.
      fold: (size of the axis, which operands have it, operands, **options) → all results.
      operands: pytrees of arrays.
      **options: of both functions.
    """

    @jax.custom_batching.custom_vmap
    def run(*operands):
        return launch_one(*operands, **options)

    @run.def_vmap
    def batch(axis_size, in_batched, *operands):
        return fold(axis_size, in_batched, operands, **options), True

    return _without_gradient(run, name)(*operands)


def _without_gradient(run: Callable[..., Array], name: str) -> Callable[..., Array]:
    """The same function of arrays, whose derivative is an error that says what to do."""
    run = jax.custom_jvp(run)

    @run.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(
            f"{name} by 'triton' has no gradient: stop_gradient its operands, or use "
            "implementation='xla', whose epilogue has one."
        )

    return run


def sequentially(run, axis_size: int, in_batched, operands) -> Array:
    """One call for each entry of a leading axis, where a kernel has no axis for it."""
    leaves, structure = jax.tree.flatten(operands)
    batched = jax.tree.leaves(in_batched)

    def one(index):
        return run(
            *structure.unflatten(
                leaf[index] if has_axis else leaf
                for leaf, has_axis in zip(leaves, batched, strict=True)
            )
        )

    return lax.map(one, jnp.arange(axis_size))


def tables_are_batched(in_batched: Epilogue | None) -> bool:
    """Whether vmap maps over anything in an epilogue but its rows and the input of its branch."""
    if in_batched is None:
        return False
    others = in_batched._replace(row=False)
    if others.low_rank is not None:
        others = others._replace(low_rank=(False, others.low_rank[1]))
    return any(jax.tree.leaves(others))


def merge_axis(array: Array, is_batched: bool, axis_size: int) -> Array:
    """[V, A, ...] → [V A, ...], of an array that vmap maps over, or repeats."""
    if not is_batched:
        array = jnp.broadcast_to(array[None], (axis_size, *array.shape))
    return array.reshape(-1, *array.shape[2:])


def merge_rows(
    epilogue: Epilogue | None, in_batched: Epilogue | None, axis_size: int
) -> Epilogue | None:
    """The epilogue of a product whose rows are those of all products that vmap asks for."""
    if epilogue is None:
        return None
    if in_batched.row or epilogue.row.shape[-1] > 1:
        epilogue = epilogue._replace(row=merge_axis(epilogue.row, in_batched.row, axis_size))
    if epilogue.low_rank is not None:
        down, up = epilogue.low_rank
        down = merge_axis(down, in_batched.low_rank[0], axis_size)
        epilogue = epilogue._replace(low_rank=(down, up))
    return epilogue


def mode(x: Array, w: Array) -> str:
    """'W8A8', 'W4A8' or 'W4A4': packed operands are uint8."""
    return f'W{4 if w.dtype == jnp.uint8 else 8}A{4 if x.dtype == jnp.uint8 else 8}'


def mode_constants(mode: str) -> dict[str, bool]:
    """The constants of a kernel that say how its operands are packed and multiplied."""
    both = mode == 'W4A4'
    return {
        'W4': mode != 'W8A8',
        'X4': both,
        'NATIVE': both and triton_ptx.has_int4_instructions(gpu.current().capability),
        'ASM': True,
    }


def as_int8(x: Int8[Array, '*shape'] | UInt8[Array, '*shape']) -> Int8[Array, '*shape']:
    """The same bytes."""
    return lax.bitcast_convert_type(x, jnp.int8)


def epilogue_operands(
    epilogue: Epilogue | None,
    w_sum: Int32[Array, '...'] | None,
    *,
    num_rows: int,
    num_outputs: int,
) -> tuple[list[Array], dict[str, Any]]:
    """Operands and constants of `triton_parts.write`; terms left out get one unused number.

    Args:
      epilogue: with `row` as a vector, or None for integer sums.
      w_sum: where there is a zero point.
      num_rows: rows of the result, all batches together.
      num_outputs: N.
    """
    if epilogue is None:
        epilogue = Epilogue(jnp.zeros(()), jnp.zeros(1), jnp.zeros(1, jnp.int32))
        scaled = False
    else:
        scaled = True
    unused, no_code = jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.int32)
    down, up = epilogue.low_rank or (unused, unused)
    branch_dtype = down.dtype if down.dtype == up.dtype else jnp.float32
    rank = 0 if epilogue.low_rank is None else down.shape[-1]
    has_zero = epilogue.zero_point is not None
    w_scale = jnp.broadcast_to(epilogue.w_scale.astype(jnp.float32), (num_outputs,))
    arrays = [
        w_scale,
        epilogue.x_scale.astype(jnp.float32),
        epilogue.row.astype(jnp.int32),
        epilogue.zero_point.astype(jnp.int32) if has_zero else no_code,
        w_sum if has_zero else no_code,
        unused if epilogue.bias is None else epilogue.bias.astype(jnp.float32),
        down.astype(branch_dtype),
        up.astype(branch_dtype),
    ]
    constants = {
        'SCALED': scaled,
        'ZERO': has_zero,
        'BIAS': epilogue.bias is not None,
        'ROWS_PER_ENTRY': num_rows // epilogue.row.shape[0],
        'NUM_ROWS': epilogue.x_scale.shape[0],
        'RANK': rank,
    }
    return arrays, constants
