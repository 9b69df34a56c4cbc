import dataclasses
import html.parser
import json

import jax
import numpy as np
import pytest

from dmq_jax import calibrate, denoisers, exporting, report
from dmq_jax.config import Config, FinetuneConfig, QuantConfig, ReportConfig, StudentConfig, to_dict
from dmq_jax.config import EfficientDMConfig as EfficientDM
from dmq_jax.denoisers import DenoiserInfo
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant import observers
from dmq_jax.quant.plan import QuantizableLayer
from dmq_jax.quant.tensor import pack, scale_shape

NETWORK = DDPMUNet(
    channels=(8,), in_channels=1, out_channels=1, layers_per_block=1, num_groups=4,
    down_attention=(True,), up_attention=(True,), mid_attention=False, num_class_embeds=4,
)  # fmt: skip
INFO = DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(4, 4, 1),
    num_classes=3,
)
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


def known_layers():
    empty = exporting.Exported(NETWORK, INFO, {}, 'nearest', TIMESTEPS, {}, {}, {})
    return report.quantizable_layers(empty)


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
    return exporting.Exported(NETWORK, INFO, plan, 'nearest', TIMESTEPS, weights, tables, {})


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope='module')
def layers():
    return known_layers()


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, layers):
    """A finished run, as the other stages leave it."""
    folder = tmp_path_factory.mktemp('run')
    rng = np.random.default_rng(0)
    write_json(folder / 'config.json', {'config': to_dict(CONFIG), 'revision': 'abc'})
    write_json(folder / 'metrics.json', {'protocol': PROTOCOL, 'rows': list(rows().values())})
    labels = np.arange(12, dtype=np.int32) % 3
    for name in ('teacher', *CONFIG.students):
        images = rng.integers(0, 256, (12, *INFO.image_shape), dtype=np.uint8)
        (folder / 'samples' / name).mkdir(parents=True)
        np.savez(folder / 'samples' / name / 'images.npz', arr_0=images, labels=labels)
    for name, student in CONFIG.students.items():
        path = folder / 'students' / name
        exported = make_export(layers, student, rng)
        exporting.save(path / 'export', exported)
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
    return folder


@pytest.fixture(scope='module')
def page(workdir):
    report.run(workdir, ReportConfig(grid_size=3))
    return (workdir / 'report.html').read_text()


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed, and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href')]
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parse(page):
    balance = Balance()
    balance.feed(page)
    return balance


def test_the_page_is_well_formed_and_needs_no_other_file(page):
    parsed = parse(page)
    assert parsed.wrong == [] and parsed.open == []
    assert parsed.links and all(link.startswith('data:image/png;base64,') for link in parsed.links)
    assert 'http' not in page and 'script' not in parsed.tags and '@import' not in page


def test_a_finished_run_leaves_nothing_out(page):
    parsed = parse(page)
    assert parsed.tags.count('img') == 3
    assert 'class="absent"' not in page
    # Loss, six panels of scales at most, three of errors, sensitivity, kernels.
    assert page.count('class="chart"') >= 1 + 1 + 3 + 1 + 1


def test_names_of_classes_stand_beside_their_rows(page):
    assert '<span>T-shirt</span><span>Trouser</span><span>Pullover</span></div>' in page


def test_an_empty_run_says_which_stage_makes_what(tmp_path):
    report.run(tmp_path, ReportConfig())
    page = (tmp_path / 'report.html').read_text()
    parsed = parse(page)
    assert parsed.wrong == [] and parsed.open == []
    for stage in ('sample', 'evaluate', 'analyse', 'export'):
        assert f'the stage <code>{stage}</code>' in page


def test_a_layer_without_scales_cannot_be_plotted(workdir):
    with pytest.raises(ValueError, match="report.layers has 'nowhere'"):
        report.run(workdir, ReportConfig(layers=('nowhere',)))


def test_calibrated_students_come_before_learnt_ones(workdir):
    assert report.read(workdir).students == ['plain', 'tuned']


@pytest.mark.parametrize(
    'distances, text',
    [
        ({}, 'closes <strong>80&nbsp;%</strong> of the FD-FMNIST gap'),
        ({'tuned': 12.0}, 'does not improve on <b>plain</b>'),
        ({'plain': 0.5}, 'reaches a FD-FMNIST of 3'),
    ],
)
def test_the_verdict_says_what_the_numbers_say(workdir, distances, text):
    table = list(rows(**distances).values())
    found = report.read(workdir)._replace(metrics={'protocol': PROTOCOL, 'rows': table})
    sentence = report.verdict(found)
    assert text in sentence
    assert '<strong>4.0 times</strong> smaller' in sentence


def test_the_gap_is_measured_from_the_baseline_to_the_teacher():
    assert report.closed_gap(rows(), 'tuned') == pytest.approx(0.8)
    assert report.closed_gap(rows(tuned=1.0), 'tuned') == 1
    assert report.closed_gap(rows(tuned=11.0), 'tuned') == 0
    assert report.closed_gap(rows(plain=1.0), 'tuned') is None
    assert report.closed_gap(rows(), 'plain') is None


def test_the_baseline_is_the_static_one():
    table = rows()
    table['timed'] = row('timed', 2.0, 'round_to_nearest', per_timestep=True)
    assert report.find_baseline(table) == 'plain'
    assert report.find_best(table) == 'timed'


def test_students_with_more_bits_are_not_compared_with_the_baseline():
    table = rows()
    table['wide'] = row('wide', 1.1, 'round_to_nearest', weight_bits=8, activation_bits=8)
    assert report.find_baseline(table) == 'plain'
    assert report.find_best(table) == 'tuned'


def test_images_of_a_row_share_their_class():
    labels = np.array([2, 0, 1, 2, 0, 0, 1])
    names, picked = report.pick_images(labels, 8, 8, ('a', 'b', 'c'))
    assert names == ['a', 'b', 'c']
    assert picked.shape == (3, 2)
    np.testing.assert_array_equal(labels[picked], [[0, 0], [1, 1], [2, 2]])


def test_unlabelled_images_fill_a_square():
    names, picked = report.pick_images(np.zeros(0, np.int32), 4, 8, None)
    assert names == []
    np.testing.assert_array_equal(picked, np.arange(16).reshape(4, 4))


def test_the_metrics_table_is_aligned_and_marks_the_best_student():
    lines = report.metrics_table(PROTOCOL, list(rows().values()))
    table = [line for line in lines if 'teacher' in line or 'plain' in line or 'tuned' in line]
    ends = {line.index(number) + len(number) for line, number in zip(
        table, ('1.00', '11.00', '3.00'), strict=True)}  # fmt: skip
    assert len(ends) == 1
    assert '3.00*' in table[2] and '*' not in table[0] + table[1]


def test_the_plan_table_counts_the_bytes_that_are_stored(layers):
    rng = np.random.default_rng(0)
    for student in CONFIG.students.values():
        for symmetric in (True, False):
            quant = dataclasses.replace(student.quant, weight_symmetric=symmetric, weight_bits=8)
            exported = make_export(layers, dataclasses.replace(student, quant=quant), rng)
            for path, weight in exported.weights.items():
                _, after = report.kernel_bytes(layers[path], exported.plan[path])
                assert after == weight.nbytes
            lines = report.plan_table(layers, exported.plan)
            assert len(lines) == len(layers) + 3
            total = sum(
                report.kernel_bytes(layer, exported.plan.get(path))[1]
                for path, layer in layers.items()
            )
            assert lines[-1].split()[-1] == f'{total / 1e6:.4f}'


def test_a_layer_left_alone_is_shown_as_float():
    layers = {'a': QuantizableLayer(kind='dense', weight_shape=(4, 5))}
    assert report.plan_table(layers, {})[2].split() == [
        'a', 'dense', 'float', 'float', '-', '0.0001', '0.0001'
    ]  # fmt: skip
