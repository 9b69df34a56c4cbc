"""Who may import whom. The table below is the layering of ARCHITECTURE.md, read with `ast`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAGES = {'calibrate', 'reconstruct', 'finetune', 'adapt', 'correct'}
STAGES |= {'exporting', 'sampling'}
STAGES |= {'evaluate', 'report'}
LIBRARIES = {'quant', 'methods', 'models', 'diffusion', 'metrics', 'runtime', 'files'}

# What each part of dmq_jax may import, besides itself, config and the empty package.
ALLOWED = {
    'config': set(),
    'quant': {'kernels'},
    'methods': {'quant'},
    'files': set(),
    'models': {'files'},
    # One of its modules: what the compiler is told.
    'metrics': {'files', 'runtime.programs'},
    'diffusion': set(),
    # What the compiler is told depends on what integer convolutions are made of.
    'runtime': {'kernels'},
    'assets': set(),
    'networks': {'models'},
    'denoisers': {'methods', 'quant', 'networks', 'diffusion', 'kernels'},
    'checkpoints': {'denoisers', 'diffusion', 'files', 'models', 'networks'},
    'teachers': {'assets', 'checkpoints', 'denoisers', 'files', 'networks', 'runtime'},
    **{stage: {'denoisers', 'kernels'} | LIBRARIES for stage in STAGES},
    'descent': {'runtime'},
    **{stage: {'denoisers', 'descent'} | LIBRARIES for stage in ('finetune', 'adapt')},
    # What reconstruction is made of.
    'blocks': {'denoisers'} | LIBRARIES,
    'trajectories': {'denoisers'} | LIBRARIES,
    'examples': {'blocks', 'denoisers', 'trajectories'} | LIBRARIES,
    'reconstruct': {'blocks', 'denoisers', 'examples', 'trajectories'} | LIBRARIES,
    # It reads what these two wrote.
    'reporting': {'calibrate', 'exporting', 'denoisers', 'kernels'} | LIBRARIES,
    'report': {'reporting', 'runtime'},
    'scale_sets': {'artefacts', 'exporting', 'denoisers', 'kernels'} | LIBRARIES,
    'artefacts': {'runtime'},
    'analysis': {'denoisers'} | LIBRARIES,
    'features': {'artefacts'} | LIBRARIES,
    'adm': {'features'} | LIBRARIES,
    # The stage is a command as well.
    'evaluate': {'adm', 'assets', 'command_line', 'denoisers', 'features'} | LIBRARIES,
    'data': {'denoisers', 'files', 'models', 'networks', 'sampling'},
    # Where the stages of learning meet, for the pipeline and for the functions of a notebook.
    'learning': {'artefacts', 'data', 'denoisers', 'networks', 'scale_sets', 'kernels'}
    | STAGES
    | LIBRARIES,
    'pipeline': {'analysis', 'artefacts', 'denoisers', 'learning', 'networks', 'reporting'}
    | {'teachers', 'exporting', 'sampling', 'evaluate', 'report'}
    | LIBRARIES,
    'command_line': set(),
    'api': {'artefacts', 'denoisers', 'exporting', 'learning', 'runtime', 'sampling', 'teachers'},
    'operations': set(),
    'costs': {'denoisers', 'operations', 'kernels'} | STAGES | LIBRARIES,
    'scaling': {'costs', 'teachers'} | LIBRARIES,
    'inspect': {'costs', 'denoisers', 'exporting', 'networks', 'reporting', 'teachers'} | LIBRARIES,
    'main': {'pipeline', 'command_line', 'runtime'},
    'compare': {'artefacts', 'command_line', 'evaluate', 'learning', 'pipeline', 'reporting'}
    | {'runtime'},
    # Commands of their own, beside the pipeline.
    'train_teacher': {'artefacts', 'command_line', 'denoisers', 'sampling', 'teachers'}
    | {'train_classifier'}
    | LIBRARIES,
    'train_classifier': LIBRARIES,
    'bench': {'command_line', 'denoisers', 'method_bench', 'network_bench', 'networks', 'teachers'}
    | {'kernels'}
    | STAGES
    | LIBRARIES,
    'method_bench': {'blocks', 'denoisers', 'scale_sets', 'trajectories', 'kernels'}
    | STAGES
    | LIBRARIES,
    'network_bench': {'checkpoints'} | LIBRARIES,
}

COMMANDS = ('command_line.py', 'main.py', 'train_teacher.py', 'bench.py', 'compare.py')

# A name (or anything below it) and the only files, relative to the root, that may use it.
ONLY_IN = {
    'orbax': lambda path: path == 'dmq_jax/runtime/checkpoint.py',
    'jax.sharding': lambda path: path == 'dmq_jax/runtime/mesh.py',
    'jax.make_mesh': lambda path: path == 'dmq_jax/runtime/mesh.py',
    'jax.set_mesh': lambda path: path == 'dmq_jax/runtime/mesh.py',
    'jax.NamedSharding': lambda path: path == 'dmq_jax/runtime/mesh.py',
    'jax.P': lambda path: path == 'dmq_jax/runtime/mesh.py',
    'flax.linen.intercept_methods': lambda path: path == 'dmq_jax/quant/layers.py',
    'tensorboardX': lambda path: path == 'dmq_jax/runtime/log.py',
    'clu.metric_writers': lambda path: path == 'dmq_jax/runtime/log.py',
    'tensorflow': lambda path: False,
    'torch': lambda path: False,
    'diffusers': lambda path: False,
    'absl.flags': lambda path: path.rpartition('/')[2] in COMMANDS,
    'absl.app': lambda path: path.rpartition('/')[2] in COMMANDS,
}

# config/ is read before anything heavy is loaded.
FORBIDDEN_IN_CONFIG = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'kernels', 'dmq_jax'}


def used_names(source: str, module: str) -> set[str]:
    """Dotted names of everything a file imports, and of what it takes from its imports."""
    tree = ast.parse(source)
    names, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
                bound = alias.asname or alias.name.partition('.')[0]
                aliases[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom):
            package = module.split('.')[: -node.level] if node.level else []
            origin = '.'.join(package + [node.module] * bool(node.module))
            for alias in node.names:
                names.add(f'{origin}.{alias.name}')
                aliases[alias.asname or alias.name] = f'{origin}.{alias.name}'
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in aliases:
            names.add('.'.join([aliases[node.id], *reversed(parts)]))
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f'{package}.')


def part_of(name: str) -> str:
    """'quant' for 'dmq_jax.quant.rows.at_timestep', 'kernels' for 'kernels.int4_matmul'."""
    root, *rest = name.split('.')
    return rest[0] if root == 'dmq_jax' and rest else root


def violations(root: Path) -> list[str]:
    """One sentence per broken rule among the Python files of dmq_jax/ and kernels/."""
    found = set()
    for path in sorted([*root.glob('dmq_jax/**/*.py'), *root.glob('kernels/**/*.py')]):
        relative = path.relative_to(root).as_posix()
        module = relative.removesuffix('.py').replace('/', '.')
        names = used_names(path.read_text(encoding='utf-8'), module)
        ours = {name for name in names if within(name, 'dmq_jax') or within(name, 'kernels')}
        for name in names:
            for limited, is_allowed in ONLY_IN.items():
                if within(name, limited) and not is_allowed(relative):
                    found.add(f'{relative} uses {limited}, which has a place of its own')
        if relative.startswith('kernels/'):
            if any(within(name, 'dmq_jax') for name in names):
                found.add(f'{relative} imports dmq_jax: kernels take bare arrays')
            continue
        if relative.startswith('dmq_jax/config/'):
            for name in names:
                is_own = within(name, 'dmq_jax.config')
                if not is_own and name.partition('.')[0] in FORBIDDEN_IN_CONFIG:
                    found.add(f'{relative} imports {name}: it must stay light')
        part = part_of(module)
        if part == '__init__':
            found.update(f'{relative} imports {name}: it must stay light' for name in ours)
            continue
        if part not in ALLOWED:
            found.add(f'{relative} is in no layer: add {part!r} to ALLOWED')
            continue
        modules = [f'dmq_jax.{allowed}' for allowed in ALLOWED[part] if '.' in allowed]
        for name in ours:
            target = part_of(name)
            if any(within(name, allowed) for allowed in modules):
                continue
            if target not in {part, 'config', 'dmq_jax'} | ALLOWED[part]:
                found.add(f'{relative} imports {target}: {part} may import {ALLOWED[part] or "-"}')
    return sorted(found)


def test_imports_point_down():
    assert violations(ROOT) == []


CLEAN = {
    'dmq_jax/config/run.py': 'import dataclasses\nfrom dmq_jax.config.checks import check',
    'dmq_jax/runtime/mesh.py': 'from jax.sharding import Mesh\nfrom dmq_jax.config import A',
    'dmq_jax/runtime/checkpoint.py': 'import orbax.checkpoint as ocp\nocp.args',
    'dmq_jax/models/unet.py': 'from dmq_jax.files import images\nfrom dmq_jax.models import tap',
    'dmq_jax/metrics/a.py': 'from dmq_jax.runtime import programs\nprograms.NetworkProgram',
    'dmq_jax/quant/layers.py': 'from flax import linen\nimport kernels\nlinen.intercept_methods',
    'dmq_jax/pipeline.py': 'from dmq_jax import config, learning\nfrom dmq_jax.runtime import log',
    'dmq_jax/main.py': 'from absl import app, flags\nfrom dmq_jax import pipeline',
    'kernels/int4_matmul/api.py': 'import jax\nfrom kernels.int4_matmul import reference',
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


def test_a_clean_tree_has_no_violations(tmp_path):
    assert violations(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    'file, source, text',
    [
        ('models/unet.py', 'from dmq_jax.quant import numerics', 'models/unet.py imports quant'),
        ('models/unet.py', 'from dmq_jax import quant', 'models/unet.py imports quant'),
        ('models/unet.py', 'import dmq_jax.quant.layers', 'models/unet.py imports quant'),
        ('models/unet.py', 'from ..quant import layers', 'models/unet.py imports quant'),
        ('models/unet.py', 'def f():\n  from dmq_jax import main', 'models/unet.py imports main'),
        ('metrics/frechet.py', 'from dmq_jax.models import tap', 'frechet.py imports models'),
        ('metrics/b.py', 'from dmq_jax.runtime import mesh', 'metrics/b.py imports runtime'),
        ('methods/a.py', 'from dmq_jax.models import tap', 'methods/a.py imports models'),
        ('quant/a.py', 'from dmq_jax.runtime import log', 'quant/a.py imports runtime'),
        ('calibrate.py', 'from dmq_jax import finetune', 'calibrate.py imports finetune'),
        ('denoisers.py', 'from dmq_jax import sampling', 'denoisers.py imports sampling'),
        ('__init__.py', 'from dmq_jax import main', '__init__.py imports'),
        ('helpers.py', '', "is in no layer: add 'helpers'"),
        ('config/a.py', 'import jax.numpy as jnp', 'config/a.py imports jax'),
        ('config/a.py', 'from dmq_jax import quant', 'config/a.py imports'),
        ('config/__init__.py', 'from dmq_jax import quant', 'config/__init__.py imports'),
        ('finetune.py', 'import orbax.checkpoint', 'finetune.py uses orbax'),
        ('finetune.py', 'import jax\njax.sharding.Mesh', 'finetune.py uses jax.sharding'),
        ('finetune.py', 'from jax import sharding as s', 'finetune.py uses jax.sharding'),
        ('finetune.py', 'import jax as j\nj.make_mesh(())', 'finetune.py uses jax.make_mesh'),
        ('models/a.py', 'from flax import linen\nlinen.intercept_methods', 'intercept_methods'),
        ('models/a.py', 'from flax.linen import intercept_methods as i', 'intercept_methods'),
        ('files/a.py', 'import torch.nn', 'files/a.py uses torch'),
        ('metrics/a.py', 'from diffusers import UNet2DModel', 'metrics/a.py uses diffusers'),
        ('pipeline.py', 'from dmq_jax import finetune', 'pipeline.py imports finetune'),
        ('pipeline.py', 'from absl import flags', 'pipeline.py uses absl.flags'),
        ('report.py', 'import tensorboardX', 'report.py uses tensorboardX'),
        ('../kernels/a.py', 'import dmq_jax.quant', 'kernels/a.py imports dmq_jax'),
        ('../kernels/a.py', 'import jax\njax.sharding', 'kernels/a.py uses jax.sharding'),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, source, text):
    name = os.path.normpath(f'dmq_jax/{file}')
    found = violations(plant(tmp_path, {**CLEAN, name: source}))
    assert len(found) >= 1
    assert any(text in sentence for sentence in found), found


def test_importing_every_module_touches_no_device_and_no_heavy_framework():
    # A platform that does not exist makes the first use of a device an error.
    script = """
import importlib, pkgutil, sys
import dmq_jax
for module in pkgutil.walk_packages(dmq_jax.__path__, 'dmq_jax.'):
    importlib.import_module(module.name)
heavy = {'torch', 'diffusers', 'tensorflow', 'tensorboardX', 'triton'} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'nowhere'}
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_package_alone_loads_no_jax():
    script = 'import sys, dmq_jax; assert "jax" not in sys.modules'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    assert subprocess.run([sys.executable, '-c', script], env=environment).returncode == 0
