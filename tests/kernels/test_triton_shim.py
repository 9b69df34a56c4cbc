import importlib.metadata

import jax
import jax.export
import jax.numpy as jnp
import pytest

from kernels import gpu, triton_ptx, triton_shim
from kernels.epilogue import Epilogue
from kernels.int_conv import choose as conv_choose
from kernels.int_conv import int_conv
from kernels.int_matmul import choose, int_matmul


def of(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


EPILOGUE = Epilogue(
    of((64,), jnp.float32), of((10,), jnp.float32), of((), jnp.int32), of((10,), jnp.int32),
    of((64,), jnp.float32),
)  # fmt: skip


def scaled_product(x, w, epilogue):
    return int_matmul(x, w, bits=4, epilogue=epilogue, out_dtype='bfloat16')


def scaled_convolution(x, w, epilogue):
    return int_conv(
        x, w, bits=4, epilogue=epilogue, strides=(2, 2), padding=((0, 1), (0, 1)),
        out_dtype='float16',
    )  # fmt: skip


def packed_product(x, w, epilogue):
    return int_matmul(x, w, bits=4, x_bits=4, epilogue=epilogue)


CALLS = {
    'product': (scaled_product, of((32, 128), jnp.int8), of((64, 64), jnp.uint8)),
    'W4A4': (packed_product, of((32, 64), jnp.uint8), of((64, 64), jnp.uint8)),
    'convolution': (scaled_convolution, of((2, 8, 8, 64), jnp.int8), of((64, 9, 32), jnp.uint8)),
}


@pytest.fixture
def installed():
    reason = triton_shim._missing_packages()
    if reason is not None:
        pytest.skip(f'{reason}; jax-cuda13-plugin of the version of jaxlib lets it load')


def lower(function, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',))
    return lowered.as_text()


@pytest.mark.usefixtures('installed')
@pytest.mark.parametrize('capability', [86, 90])
@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS)
def test_none_lowers_to_one_kernel_for_a_gpu_that_is_not_here(call, capability):
    function, x, w = call
    with gpu.targeting(capability):
        text = lower(function, x, w, EPILOGUE)
    assert text.count('@triton_kernel_call') == 1
    assert 'dot_general' not in text and 'stablehlo.convolution' not in text


@pytest.mark.usefixtures('installed')
def test_4_bit_instructions_are_what_jax_would_launch(monkeypatch):
    texts = []
    rewrite = triton_ptx.rewrite
    monkeypatch.setattr(
        triton_ptx, 'rewrite', lambda *args: texts.append(rewrite(*args)) or texts[-1]
    )
    function, x, w = CALLS['W4A4']
    x = of((48, 64), x.dtype)  # a kernel that no other test has compiled
    for capability in (86, 90):
        with gpu.targeting(capability):
            lower(function, x, w, EPILOGUE)
    native, unpacked = texts
    assert '.s32.s4.s4.s32' in native and '.s8.s8.' not in native
    assert '.s4.s4.' not in unpacked and '.s8.s8' in unpacked


@pytest.mark.usefixtures('installed')
def test_an_export_for_cuda_is_made_on_a_machine_without_it():
    function, x, w = CALLS['convolution']
    # Of jax-triton 0.3 and of 0.4.
    kernel_calls = [
        jax.export.DisabledSafetyCheck.custom_call(f'triton_kernel_call{suffix}')
        for suffix in ('', '_ffi')
    ]
    with gpu.targeting(89):
        exported = jax.export.export(
            jax.jit(function), platforms=('cuda',), disabled_checks=kernel_calls
        )(x, w, EPILOGUE)
    assert exported.platforms == ('cuda',)
    assert exported.out_avals[0].shape == (2, 4, 4, 64)
    assert exported.out_avals[0].dtype == jnp.float16


@pytest.mark.usefixtures('installed')
def test_traces_for_one_gpu_are_not_taken_for_another():
    function, x, w = CALLS['W4A4']
    run = jax.jit(function)
    texts = []
    for capability in (86, 90):
        with gpu.targeting(capability):
            lowered = run.trace(x, w, EPILOGUE).lower(lowering_platforms=('cuda',))
            texts.append(lowered.as_text())
    assert texts[0] != texts[1]
    # Outside, the same function is the CPU's again.
    assert 'triton_kernel_call' not in run.trace(x, w, EPILOGUE).lower().as_text()


@pytest.mark.usefixtures('installed')
def test_a_batch_axis_and_a_mesh_lower_to_one_kernel_too():
    function, x, w = CALLS['product']
    batched = jax.vmap(function, (0, None, None))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ('data',))
    rows, whole = jax.sharding.PartitionSpec('data'), jax.sharding.PartitionSpec()
    split = jax.shard_map(function, mesh=mesh, in_specs=(rows, whole, whole), out_specs=rows)
    with gpu.targeting(86):
        text = lower(batched, of((3, *x.shape), x.dtype), w, EPILOGUE)
        assert text.count('@triton_kernel_call') == 1
        text = lower(split, of((64, 128), x.dtype), w, EPILOGUE)
        assert text.count('@triton_kernel_call') == 1


def test_without_a_gpu_the_named_kernel_is_an_error_that_says_so():
    x = jnp.ones((2, 32), jnp.int8)
    with pytest.raises(NotImplementedError, match='triton: no NVIDIA GPU here .platform cpu.'):
        int_matmul(x, x, implementation='triton')
    assert 'no NVIDIA GPU here' in choose().reason


@pytest.mark.parametrize(
    ('versions', 'text'),
    [
        ({}, 'triton is not installed .requirements-gpu.txt'),
        ({'triton': '3.7.1'}, 'jax-triton is not installed'),
        ({'triton': '3.8.0', 'jax-triton': '0.3.1'}, 'triton 3.8.0 is installed: expected >=3.6'),
        ({'triton': '3.6.0', 'jax-triton': '0.4.0'}, 'jax-triton 0.4 needs triton >=3.7'),
    ],
)  # fmt: skip
def test_missing_and_unfit_versions_are_named(versions, text, monkeypatch):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    with gpu.targeting(86), pytest.raises(NotImplementedError, match=text):
        triton_shim._missing_packages.cache_clear()
        choose('triton')
    triton_shim._missing_packages.cache_clear()


@pytest.mark.usefixtures('installed')
def test_on_several_gpus_a_kernel_runs_only_if_named(monkeypatch):
    monkeypatch.setattr(gpu, 'current', lambda: gpu.Gpu(86, 'GPU A', 4))
    choice = conv_choose((128, 3, 3, 128))
    assert choice.implementation == 'xla' and 'triton: 4 GPUs' in choice.reason
    assert conv_choose((128, 3, 3, 128), 'triton').implementation == 'triton'


@pytest.mark.usefixtures('installed')
def test_autotuning_lowers_every_candidate_in_one_call(monkeypatch):
    function, x, w = CALLS['product']
    with gpu.targeting(86):
        fixed = lower(lambda *a: function(*a), x, w, EPILOGUE)
        monkeypatch.setenv('KERNELS_AUTOTUNE', '1')
        monkeypatch.setattr(triton_shim, 'CANDIDATES', triton_shim.CANDIDATES[:3])
        tuned = lower(lambda *a: function(*a), x, w, EPILOGUE)  # read when traced
    assert tuned.count('@triton_kernel_call') == 1
    assert len(tuned) > 2 * len(fixed)
