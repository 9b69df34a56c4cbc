"""What the other stages of a run leave in its folder, made up, for the tests of the report."""

import json

import jax
import numpy as np

from dmq_jax import calibrate, denoisers, exporting
from dmq_jax.config import Config, FinetuneConfig, QuantConfig, StudentConfig, to_dict
from dmq_jax.config import EfficientDMConfig as EfficientDM
from dmq_jax.quant import observers
from dmq_jax.quant.tensor import pack, scale_shape
from dmq_jax.reporting.results import IMPLEMENTATIONS
from tests import tiny

TIMESTEPS = np.array([40, 20, 1], np.int32)
CONFIG = Config(
    students={
        'tuned': StudentConfig(
            method=EfficientDM(), finetune=FinetuneConfig(num_iterations=4),
            quant=QuantConfig(coverage='full'),
        ),
        'plain': StudentConfig(quant=QuantConfig(per_timestep=False)),
    }
)  # fmt: skip
PROTOCOL = {
    'distance': 'FD-FMNIST', 'num_images': 12, 'reference_images': 60000, 'mode': 'integer',
    'features': 'bundled', 'reference': 'fashion_mnist', 'seed': 0, 'device': 'cpu',
    'sampler': to_dict(CONFIG.sampler), 'versions': {'jax': '1'}, 'revision': 'abc',
}  # fmt: skip


def row(name, fd, method=None, **values):
    bits = 32 if name == 'teacher' else 4
    return {
        'name': name, 'method': method, 'weight_bits': bits, 'activation_bits': bits,
        'coverage': 'paper', 'per_timestep': name == 'tuned', 'fd': fd, 'precision': 0.5,
        'recall': 0.5, 'class_accuracy': 0.9, 'psnr_to_teacher': None, 'ssim_to_teacher': None,
        'size_mb': 8.0 if name == 'teacher' else 2.0, 'images_per_second': None,
        'finetune_seconds': None, **values,
    }  # fmt: skip


def rows(teacher=1.0, plain=11.0, tuned=3.0):
    found = [
        row('teacher', teacher),
        row('plain', plain, 'round_to_nearest'),
        row('tuned', tuned, 'efficientdm'),
    ]
    return {r['name']: r for r in found}


def make_export(layers, student, rng):
    """An export of random integers."""
    plan = denoisers.make_plan(layers, student.quant)
    weights, tables = {}, {}
    for path, spec in plan.items():
        num_rows = len(TIMESTEPS) if spec.per_timestep else 1
        roles = ('lhs', 'rhs') if layers[path].kind == 'product' else ('input',)
        tables[path] = {
            role: {
                'scale': rng.uniform(0.1, 1, num_rows).astype(np.float32),
                'zero_point': np.zeros(num_rows, np.int32),
            }
            for role in roles
        }
        if spec.weight is not None:
            shape = layers[path].weight_shape
            scale = np.ones(scale_shape(shape, spec.weight), np.float32)
            codes = rng.integers(0, 8, shape)  # on every grid of 4 bits and more
            weights[path] = pack(codes, scale, 0 * scale, spec=spec.weight)
    return exporting.Exported(
        tiny.NETWORK, tiny.INFO, plan, 'nearest', TIMESTEPS, weights, tables, {}
    )


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write(folder):
    """Fills `folder` with a finished run: the teacher and the students of `CONFIG`."""
    layers = denoisers.quantizable(tiny.teacher())
    rng = np.random.default_rng(0)
    write_json(folder / 'config.json', {'config': to_dict(CONFIG), 'revision': 'abc'})
    write_json(folder / 'metrics.json', {'protocol': PROTOCOL, 'rows': list(rows().values())})
    labels = np.arange(12, dtype=np.int32) % 3
    for name in ('teacher', *CONFIG.students):
        images = rng.integers(0, 256, (12, *tiny.INFO.image_shape), dtype=np.uint8)
        (folder / 'samples' / name).mkdir(parents=True)
        np.savez(folder / 'samples' / name / 'images.npz', arr_0=images, labels=labels)
    for name, student in CONFIG.students.items():
        path = folder / 'students' / name
        exported = make_export(layers, student, rng)
        exporting.save(path / 'export', exported)
        ran = {p: ('xla', 'int_conv W4A4: xla is the first that can run') for p in exported.plan}
        write_json(folder / 'samples' / name / IMPLEMENTATIONS, ran)
        write_json(path / 'export' / 'complete.json', {})
        errors = {part: [0.1, 0.2, 0.3] for part in ('student', 'weights', 'activations')}
        found = {
            p: {'sensitivity': float(rng.uniform()), 'weight_error': 0.1 if s.weight else None}
            for p, s in exported.plan.items()
        }
        analysis = {'num_images': 4, 'timesteps': TIMESTEPS.tolist(), 'error': errors,
                    'layers': found, 'sensitivity_timesteps': [20]}  # fmt: skip
        write_json(path / 'analysis' / 'analysis.json', analysis)
    (folder / 'students' / 'tuned' / 'finetune').mkdir()
    lines = '\n'.join(json.dumps({'step': s, 'loss': 1.0 / s}) for s in (1, 2, 4))
    (folder / 'students' / 'tuned' / 'finetune' / 'metrics.jsonl').write_text(lines + '\n')
    seen = rng.uniform(-1, 2, (3, 64)).astype(np.float32)
    one = jax.vmap(lambda x: observers.observe(x, 32))(seen)
    stats = {p: {r: one for r in t} for p, t in make_export(
        layers, CONFIG.students['tuned'], rng).tables.items()}  # fmt: skip
    (folder / 'calibration').mkdir()
    calibrate.save(folder / 'calibration' / 'stats.npz', calibrate.Calibration(TIMESTEPS, stats))
