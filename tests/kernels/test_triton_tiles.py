import json

import jax
import jax.numpy as jnp
import pytest

from kernels import triton_tiles
from kernels.epilogue import Epilogue
from kernels.int_conv import int_conv
from kernels.int_matmul import int_matmul

CAPABILITIES = (80, 86, 89, 90, 120)
MODES = ('W8A8', 'W4A8', 'W4A4')
# Of one program; CUDA programming guide, "Technical specifications per compute capability".
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# Sizes that fall into each class, with a K long enough that the loop is not unrolled.
SIZES = {
    'large': (2048, 1536),
    'medium': (256, 256),
    'few_rows': (32, 1024),
    'few_outputs': (2048, 32),
}
K = 1024
# A 16x8x32 product keeps the tensor cores of one quadrant of an RTX busy for 16 clocks, in which
# it issues 8 to 16 other instructions: up to 8 hide behind it. Narrow tiles have more, for the
# addresses of pixels are shared by fewer products; memory bounds them anyway.
INSTRUCTIONS_PER_PRODUCT = {'large': 4, 'medium': 5, 'few_rows': 8, 'few_outputs': 10}
# To unpack the second operand too, where there is no 4-bit instruction.
MORE_WHERE_UNPACKED = 2
# Of a convolution, for predicates of pixels; bytes are never taken apart one by one.
PERMUTATIONS = 12


def problem(op, mode, name, out_dtype='float16'):
    """A function that calls one kernel, and the shapes of its arguments."""
    M, N = SIZES[name]
    options = {'implementation': 'triton', 'out_dtype': out_dtype}
    x_type, w_type = (jnp.int8, K), (jnp.int8, K)
    if mode != 'W8A8':
        options['bits'], w_type = 4, (jnp.uint8, K // 2)
    if mode == 'W4A4':
        options['x_bits'], x_type = 4, (jnp.uint8, K // 2)

    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    epilogue = Epilogue(
        of((N,)), of((10,)), of((), jnp.int32), of((10,), jnp.int32), of((N,)),
        (of((M, 16), jnp.float16), of((N, 16), jnp.float16)),
    )  # fmt: skip
    if op == 'int_matmul':
        return lambda x, w, e, w_sum: int_matmul(x, w, epilogue=e, w_sum=w_sum, **options), (
            of((M, x_type[1]), x_type[0]),
            of((N, w_type[1]), w_type[0]),
            epilogue,
            of((N,), jnp.int32),
        )
    height = {2048: 16, 256: 8, 32: 4}[M]
    images = (M // (2 * height**2), height, 2 * height)
    down = of((*images, 16), jnp.float16)
    epilogue = epilogue._replace(low_rank=(down, epilogue.low_rank[1]))
    taps = (N, 9, K // 2) if mode != 'W8A8' else (N, 3, 3, K)
    geometry = {'strides': (1, 1), 'padding': ((1, 1), (1, 1))}
    return lambda x, w, e, sums: int_conv(x, w, epilogue=e, tap_sum=sums, **geometry, **options), (
        of((*images, x_type[1]), x_type[0]),
        of(taps, w_type[0]),
        epilogue,
        of((N, 9), jnp.int32),
    )


def check(op, mode, name, capability):
    """Compiles one entry of the table and asserts what makes it fast."""
    pytest.importorskip('triton', reason='it compiles the kernels, and brings a disassembler')
    from tests.kernels import machine_code

    function, arguments = problem(op, mode, name)
    code = machine_code.compile_kernel(function, *arguments, capability=capability)
    native = mode == 'W4A4' and capability < 90
    (instruction,) = code.products
    if native:
        assert instruction.startswith('IMMA.16864.S4.S4')
        assert code.name.endswith('s4mma')
        products = code.products[instruction]
    elif instruction.startswith('IGMMA'):
        assert capability == 90
        # One IGMMA.64xNx32 by four warps is N / 8 products of 16x8x32 for each.
        width = int(instruction.split('.')[1].split('x')[1])
        products = code.products[instruction] * width // 8
    else:
        # Hopper's instruction takes 64 outputs at least.
        assert capability != 90 or name == 'few_outputs'
        assert instruction.startswith('IMMA.16832.S8.S8')
        products = code.products[instruction]
    limit = INSTRUCTIONS_PER_PRODUCT[name]
    if mode == 'W4A4' and not native:
        limit += MORE_WHERE_UNPACKED
    assert sum(code.loop.values()) <= limit * products
    assert code.loop['PRMT'] <= (0 if op == 'int_matmul' else PERMUTATIONS)
    assert code.stack_bytes == 0 and code.loop['LDL'] + code.loop['STL'] == 0
    assert code.registers <= 255
    assert code.shared_bytes <= SHARED_BYTES[capability]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('op', ['int_matmul', 'int_conv'])
def test_the_large_tile_compiles_to_the_intended_instructions(op, mode):
    check(op, mode, 'large', capability=86)


@pytest.mark.parametrize(
    ('capability', 'op', 'mode', 'name'),
    [
        (90, 'int_matmul', 'W4A4', 'large'),
        (90, 'int_conv', 'W4A8', 'large'),
        (80, 'int_matmul', 'W4A4', 'medium'),
        (89, 'int_conv', 'W4A4', 'medium'),
        (120, 'int_conv', 'W4A8', 'few_rows'),
        (120, 'int_matmul', 'W8A8', 'few_outputs'),
    ],
)
def test_other_gpus_and_tiles_compile_to_the_intended_instructions(capability, op, mode, name):
    check(op, mode, name, capability)


@pytest.mark.slow
@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('op', ['int_matmul', 'int_conv'])
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_every_entry_of_the_table_compiles_to_the_intended_instructions(capability, op, mode, name):
    check(op, mode, name, capability)


def test_results_of_bfloat16_are_rounded_not_truncated():
    pytest.importorskip('triton', reason='it compiles the kernels')
    from tests.kernels import machine_code

    function, arguments = problem('int_matmul', 'W8A8', 'few_rows', 'bfloat16')
    code = machine_code.compile_kernel(function, *arguments, capability=86)
    assert 'cvt.rn.bf16' in code.ptx


def test_the_table_has_every_gpu_mode_and_class():
    assert set(triton_tiles.TABLE) == {(c, mode) for c in CAPABILITIES for mode in MODES}
    for classes in triton_tiles.TABLE.values():
        assert set(classes) == set(SIZES)
    assert {name: triton_tiles.size_class(*size) for name, size in SIZES.items()} == {
        name: name for name in SIZES
    }


def lookup(capability=86, kind='GPU A', row_bytes=256):
    return triton_tiles.lookup(
        'int_matmul', 'W4A8', 4096, 4096, row_bytes, capability=capability, device_kind=kind
    )


def test_an_unlisted_gpu_uses_the_nearest_listed_below_and_short_rows_a_short_step():
    assert lookup(capability=103) == triton_tiles.TABLE[90, 'W4A8']['large']
    assert lookup(row_bytes=48).BK == 64 and lookup(row_bytes=3).BK == 32


def test_a_file_of_tuned_tiles_serves_its_product_only(tmp_path, monkeypatch):
    tile = [64, 256, 32, 4, 8, 5]
    content = {'device_kind': 'GPU A', 'tiles': {'int_matmul/W4A8/large': tile}}
    (tmp_path / 'a.json').write_text(json.dumps(content))
    monkeypatch.setenv('KERNELS_TILES', str(tmp_path))
    assert lookup(kind='GPU A') == triton_tiles.Tile(*tile)
    assert lookup(kind='GPU B') == triton_tiles.TABLE[86, 'W4A8']['large']
