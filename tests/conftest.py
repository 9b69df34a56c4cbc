"""Strict JAX, eight CPU devices, and programs that are compiled quickly, for every test."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path


def _add_flag(flag):
    """To `XLA_FLAGS`, which are read once, when JAX starts its back end; a given value stays."""
    flags = os.environ.get('XLA_FLAGS', '')
    if flag.split('=')[0] not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()


_add_flag('--xla_force_host_platform_device_count=8')

# Many tests need the same programs. All here goes through the environment, so that the workers of
# pytest-xdist and the processes that tests start share the folder and compile alike.
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
_own_cache = None
if _CACHE not in os.environ:
    _own_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix='dmq_jax_compiled_')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

# Where in Python an operation comes from is written into every program, and no test reads it.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

import jax  # noqa: E402
import pytest  # noqa: E402

from dmq_jax.runtime import memory  # noqa: E402

_LARGE_MB = 1500

# Silent widening of a dtype or of a rank is how wrong shapes pass unnoticed.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure(config):
    """Without 'slow' and 'gpu' tests, compiling is most of the time: less of it is optimised.

    What fuses for the CPU, and what LLVM makes of it, is left out; all else that XLA does to a
    program, its partitioning above all, is what users have. 'slow' and 'gpu' tests run as users do.
    """
    # Tracing makes and drops objects by the million, none of them in cycles: collecting as often as
    # Python does by itself takes a fifteenth of the time.
    gc.set_threshold(50_000, 20, 50)
    expression = config.option.markexpr
    if 'not slow' in expression and 'not gpu' in expression:
        os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
        jax.config.update('jax_disable_most_optimizations', True)
        # Half of what is left; newer versions do not know this flag, and stop at it.
        if importlib.metadata.version('jaxlib').startswith('0.10.'):
            _add_flag('--xla_cpu_use_fusion_emitters=false')
            # There is a worker for every core already.
            _add_flag('--xla_cpu_parallel_codegen_split_count=1')


# A file goes to one worker as a whole: those of minutes come first, so that none is left alone at
# the end. Relative to this folder.
_LONGEST = (
    'test_pipeline.py', 'methods/test_all.py', 'test_exporting.py', 'test_finetune.py',
    'test_api.py', 'test_compare.py', 'test_adapt.py', 'launch/test_local.py',
    'test_train_teacher.py', 'metrics/test_inception.py', 'test_method_bench.py', 'test_bench.py',
    'test_adm.py', 'test_costs.py', 'test_reconstruct.py', 'models/test_ddpm_unet.py',
    'test_networks.py',
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """The longest files first; `launch/test.sh` tells pytest-xdist to keep that order."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """What stays to the end, modules and thousands of tests, is not searched for garbage."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file has compiled is let go after it, where it is much: no other file calls it."""
    if nextitem is not None and nextitem.path == item.path:
        return
    if memory.rss_mb() > _LARGE_MB:
        jax.clear_caches()
        memory.give_back()


def pytest_unconfigure():
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)
