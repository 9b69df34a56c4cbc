import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmq_jax import adm, evaluate, features
from dmq_jax.config import EvaluateConfig
from dmq_jax.files import npz
from dmq_jax.files.images import array_stream, open_images
from dmq_jax.metrics import frechet, inception
from tests import tiny
from tests.oracles import metrics as oracle

COUNT = 8
CHEAP = adm.Options(metrics=('is', 'pr', 'dc'), batch_size=8)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return tiny.write_inception(tmp_path_factory.mktemp('weights') / 'inception.safetensors')


@pytest.fixture(scope='module')
def network(weights):
    return inception.load_inception(weights)


def random_images(seed, count=COUNT):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(5, axis=1).repeat(5, axis=2)


@pytest.fixture(scope='module')
def sets(network, tmp_path_factory):
    """Two sets whose features are kept, so that each is extracted once."""
    kept = tmp_path_factory.mktemp('kept')
    streams = [array_stream(random_images(seed), name) for seed, name in ((0, 'real'), (1, 'fake'))]
    return streams, CHEAP._replace(kept_in=kept)


@pytest.fixture(scope='module')
def read(network, sets):
    streams, options = sets
    return [adm.read_set(network, stream, options) for stream in streams]


def test_metrics_are_those_of_the_features(read):
    real, drawn = read
    found = adm.compare(real, drawn, CHEAP)
    want = oracle.precision_recall(drawn.features.pool, real.features.pool, k=3)
    assert (found['precision'], found['recall']) == pytest.approx(want, abs=0)
    p = drawn.features.probabilities.astype(np.float64)
    kl = np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)
    # The network's float32 probabilities, summed in float64 on both sides.
    assert found['inception_score'] == pytest.approx(np.exp(kl.mean()), rel=1e-9)
    assert list(found) == ['inception_score', 'precision', 'recall', 'density', 'coverage']


def test_a_set_compared_with_itself_is_perfect(read):
    real, _ = read
    found = adm.compare(real, real, CHEAP._replace(metrics=('fid', 'pr', 'dc', 'paired')))
    assert abs(found['fid']) < 1e-6 * np.trace(real.gaussian.cov)
    assert found['precision'] == found['recall'] == found['coverage'] == 1
    assert found['feature_distance'] == 0 and found['psnr'] == 100 and found['ssim'] == 1


def test_the_paired_distance_is_between_image_i_and_image_i(read):
    real, drawn = read
    found = adm.compare(real, drawn, CHEAP._replace(metrics=('paired',)))
    gaps = np.linalg.norm(drawn.features.pool.astype(np.float64) - real.features.pool, axis=1)
    assert found['feature_distance'] == pytest.approx(gaps.mean(), rel=1e-6)  # float32 features


def test_batches_straight_from_a_sampler_are_measured_as_a_file_is(network, read):
    real, drawn = read
    images = random_images(1)
    options = CHEAP._replace(batch_size=8)
    passing = adm.read_batches(network, iter([images[:3], images[3:]]), 'drawn now', options)
    assert (passing.stream.num_images, passing.stream.image_shape) == (COUNT, (20, 20, 3))
    # The same program on the same batch.
    assert adm.compare(real, passing, options) == adm.compare(real, drawn, options)
    with pytest.raises(ValueError, match='drawn now: the images themselves were not kept'):
        adm.compare(real, passing, options._replace(metrics=('paired',)))


@pytest.fixture(scope='module')
def reference_file(network, sets, tmp_path_factory):
    streams, options = sets
    path = tmp_path_factory.mktemp('reference') / 'reference.npz'
    adm.make_reference(network, streams[0], path, options)
    return path


def test_a_reference_file_has_the_layout_of_guided_diffusion(reference_file, read):
    with np.load(reference_file) as file:
        shapes = {name: (file[name].shape, file[name].dtype) for name in file.files}
        np.testing.assert_array_equal(file['arr_0'], random_images(0))
        np.testing.assert_array_equal(file['sigma'], read[0].gaussian.cov)
    assert shapes == {
        'arr_0': ((COUNT, 20, 20, 3), np.uint8),
        'mu': ((2048,), np.float64), 'sigma': ((2048, 2048), np.float64),
        'mu_s': ((2023,), np.float64), 'sigma_s': ((2023, 2023), np.float64),
    }  # fmt: skip


def test_statistics_in_a_file_win_and_its_images_are_not_looked_at(
    network, sets, read, reference_file, monkeypatch
):
    streams, options = sets
    stream = open_images(reference_file)
    monkeypatch.setattr(features, 'extract', None)
    # Distances are tested with the metric; here it matters which Gaussians reach it.
    monkeypatch.setattr(adm, 'frechet_distance', lambda a, b: (a.mean.size, float(b.mean[0])))
    found = adm.run(network, stream, streams[1], options._replace(metrics=('fid', 'sfid')))
    assert found.metrics['fid'] == (2048, read[0].gaussian.mean[0])
    assert found.metrics['sfid'] == (2023, read[0].spatial_gaussian.mean[0])
    assert found.protocol['reference']['statistics'] == 'from the file'
    assert found.protocol['samples']['statistics'] == 'computed'


def test_the_protocol_names_weights_images_and_versions(network, sets, read):
    streams, options = sets
    protocol = adm.run(network, *streams, options).protocol
    assert protocol['weights']['sha256'] == network.sha256
    assert protocol['samples']['num_images'] == COUNT
    assert {'preprocessing', 'dtype', 'versions', 'neighbours', 'kid', 'device'} <= protocol.keys()
    json.dumps(protocol)


@pytest.mark.parametrize(
    'change, text',
    [
        ({'metrics': ('fidd',)}, "'fidd' is none of fid, sfid"),
        ({'metrics': ('kid',)}, '8 images, kid needs at least 1000'),
        ({'batch_size': 0}, 'batch_size=0: expected at least 1'),
        ({'num_resamples': 1}, 'bootstrap: 1 resamples, expected none or at least 2'),
        ({'pr_dtype': 'float16'}, "pr_dtype='float16': expected float32 or adm-fp16"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_the_network_runs(
    network, sets, monkeypatch, change, text
):
    streams, options = sets
    monkeypatch.setattr(features, 'of_stream', None)
    with pytest.raises(ValueError, match=text):
        adm.run(network, *streams, options._replace(**change))


def test_pairs_need_equal_shapes(network, sets):
    streams, options = sets
    other = array_stream(random_images(2, COUNT - 1), 'short')
    with pytest.raises(ValueError, match=r'paired: \(8, 20, 20, 3\) and \(7, 20, 20, 3\)'):
        adm.run(network, streams[0], other, options._replace(metrics=('paired',)))


@pytest.mark.parametrize(
    'name, error', [('absent/r.npz', FileNotFoundError), ('r.txt', ValueError)]
)
def test_a_reference_that_could_not_be_written_is_refused_at_once(
    network, sets, tmp_path, monkeypatch, name, error
):
    streams, options = sets
    monkeypatch.setattr(features, 'of_stream', None)
    with pytest.raises(error):
        adm.make_reference(network, streams[0], tmp_path / name, options)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The two sets as files: an .npz and a folder of pictures."""
    folder = tmp_path_factory.mktemp('files')
    np.savez(folder / 'real.npz', random_images(0))
    (folder / 'fake').mkdir()
    for i, image in enumerate(random_images(1)):
        Image.fromarray(image).save(folder / 'fake' / f'{i:03}.png')
    return folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """Of all commands: features are extracted once."""
    return tmp_path_factory.mktemp('workdir')


def test_the_command_prints_adms_lines_and_writes_everything(
    files, weights, workdir, tmp_path, capsys, monkeypatch
):
    # Of matrices this large it takes seconds; here it matters where the number goes.
    monkeypatch.setattr(adm, 'frechet_distance', lambda a, b: float(a.mean[0] - b.mean[0]))
    arguments = [
        str(files / 'real.npz'), str(files / 'fake'), f'--inception-weights={weights}',
        '--batch-size=8', f'--workdir={workdir}', f'--json={tmp_path / "out.json"}',
        '--metrics=is,fid,pr',
    ]  # fmt: skip
    evaluate.command(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line[:8] == 'features']
    written = json.loads((tmp_path / 'out.json').read_text())
    found = written['metrics']
    assert lines == [
        'Computing evaluations...', f'Inception Score: {found["inception_score"]}',
        f'FID: {found["fid"]}', f'Precision: {found["precision"]}', f'Recall: {found["recall"]}',
    ]  # fmt: skip
    assert written['protocol']['samples']['source'] == f'{files / "fake"} (8 files)'


def test_the_command_makes_a_reference(files, weights, workdir, tmp_path, capsys):
    path = tmp_path / 'made.npz'
    evaluate.command(
        ['--make-reference', str(path), str(files / 'fake'), '--batch-size=8',
         f'--inception-weights={weights}', f'--workdir={workdir}']
    )  # fmt: skip
    assert sorted(npz.array_names(path)) == ['arr_0', 'mu', 'mu_s', 'sigma', 'sigma_s']
    assert f'reference: {path}' in capsys.readouterr().out


def test_without_weights_the_command_says_which_files_work(files):
    done = subprocess.run(
        [sys.executable, '-m', 'dmq_jax.evaluate', str(files / 'real.npz'), str(files / 'fake')],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120,
        env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith('Error: ') and 'Traceback' not in done.stderr
    for part in ('classify_image_graph_def.pb', '6726825d', 'DMQ_INCEPTION_WEIGHTS'):
        assert part in done.stderr


def test_one_set_too_few_is_a_mistake_of_the_command_line(files, capsys):
    with pytest.raises(SystemExit, match='^2$'):
        evaluate.command([str(files / 'real.npz')])
    assert '1 sets of images given, expected 2: REF SAMPLES' in capsys.readouterr().err


# -- as the features of a run ---------------------------------------------------------------------


def test_a_run_is_measured_by_the_same_functions(files, weights, read, monkeypatch):
    monkeypatch.setattr(adm, 'frechet_distance', lambda a, b: float(a.mean[0] - b.mean[0]))
    config = EvaluateConfig(
        features='inception', reference=str(files / 'real.npz'), inception_weights=str(weights),
        batch_size=8,
    )  # fmt: skip
    reference = evaluate.load_reference(config)
    assert (reference.name, reference.num_images, reference.channels) == ('FID', COUNT, 3)
    images = random_images(1)
    found = evaluate.run(images, None, reference, images)
    want = adm.compare(*read, adm.DEFAULTS)
    assert found['fd'] == pytest.approx(want['fid'], rel=1e-4)  # other runs of one float32 network
    assert found['precision'] == want['precision'] and found['recall'] == want['recall']
    assert found['psnr_to_teacher'] == 100 and found['class_accuracy'] is None
    assert reference.protocol['weights']['file'] == 'inception.safetensors'


def test_the_bundled_reference_has_no_inception_features(weights):
    config = EvaluateConfig(features='inception', inception_weights=str(weights))
    with pytest.raises(ValueError, match="reference='fashion_mnist' has features of its own"):
        evaluate.load_reference(config)


def test_fid_is_the_distance_of_the_gaussians(read):
    real, drawn = read
    # The liveliest features, fewer than images: the oracle wants full rank.
    few = np.argsort(real.features.pool.std(0) * drawn.features.pool.std(0))[-4:]
    cut = [
        side._replace(
            gaussian=frechet.GaussianStatistics(
                side.gaussian.mean[few], side.gaussian.cov[np.ix_(few, few)], COUNT
            )
        )
        for side in (real, drawn)
    ]
    found = adm.compare(*cut, adm.Options(metrics=('fid',)))
    pools = [side.features.pool[:, few].astype(np.float64) for side in (real, drawn)]
    want = oracle.frechet_distance(
        *(part for pool in pools for part in (pool.mean(0), np.cov(pool, rowvar=False)))
    )
    assert found['fid'] == pytest.approx(want, rel=1e-6)
