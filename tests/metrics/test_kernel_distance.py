import numpy as np
import pytest

from dmq_jax.metrics.kernel_distance import kernel_distance, unbiased_mmd
from tests.oracles import metrics as oracle

# Sums of some thousand float64 kernels of size 1 to 10, cancelling to 1e-2.
TOLERANCE = 1e-12


def random_sets(seed=0, shift=0.5):
    rng = np.random.default_rng(seed)
    generated = rng.normal(size=(40, 6)) + shift
    return generated.astype(np.float32), rng.normal(size=(30, 6)).astype(np.float32)


def test_equals_the_brute_force_oracle_on_the_same_subsets():
    sets = random_sets()
    got = kernel_distance(*sets, num_subsets=4, subset_size=12, seed=5)
    expected = oracle.kernel_distances(*sets, num_subsets=4, subset_size=12, seed=5)
    assert got.mean == pytest.approx(np.mean(expected), abs=TOLERANCE)
    assert got.std == pytest.approx(np.std(expected), abs=TOLERANCE)


def test_torch_fidelity_agrees_on_equal_features():
    metric = pytest.importorskip('torch_fidelity.metric_kid', reason='the oracle is torch-fidelity')
    torch = pytest.importorskip('torch', reason='torch-fidelity takes torch tensors')
    sets = random_sets()
    expected = metric.kid_features_to_metric(
        *map(torch.from_numpy, sets), kid_subsets=10, kid_subset_size=20, verbose=False
    )
    got = kernel_distance(*sets, num_subsets=10, subset_size=20)
    # Its kernels are float32.
    assert got.mean == pytest.approx(expected['kernel_inception_distance_mean'], abs=1e-4)


def test_the_estimate_is_unbiased():
    rng = np.random.default_rng(1)
    values = [unbiased_mmd(*rng.normal(size=(2, 5, 3))) for _ in range(4000)]
    error = np.std(values) / np.sqrt(len(values))
    # Equal distributions are 0 apart; the biased estimate would lie 40 standard errors above.
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0


def test_a_larger_shift_is_farther():
    options = {'num_subsets': 5, 'subset_size': 20}
    near, far = (kernel_distance(*random_sets(shift=s), **options).mean for s in (0.2, 2.0))
    assert far > near + 1


def test_the_seed_decides_the_subsets():
    sets = random_sets()
    options = {'num_subsets': 3, 'subset_size': 10}
    assert kernel_distance(*sets, **options) == kernel_distance(*sets, seed=2020, **options)
    assert kernel_distance(*sets, **options) != kernel_distance(*sets, seed=1, **options)


@pytest.mark.parametrize(
    'generated, reference, options, message',
    [
        (np.zeros((9, 3)), np.zeros((20, 3)), {}, '9 generated features: .*subset_size=10'),
        (np.zeros((20, 3)), np.zeros((9, 3)), {}, '9 reference features'),
        (np.zeros((20, 3)), np.zeros((20, 4)), {}, 'same feature network'),
        (np.zeros(20), np.zeros((20, 4)), {}, 'generated features have shape'),
        (np.full((20, 3), np.inf), np.zeros((20, 3)), {}, '60 of 60 values of the generated'),
        (np.zeros((20, 3)), np.zeros((20, 3)), {'subset_size': 1}, 'subset_size=1'),
        (np.zeros((20, 3)), np.zeros((20, 3)), {'num_subsets': 0}, 'num_subsets=0'),
    ],
)
def test_bad_input_is_refused(generated, reference, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(generated, reference, **{'subset_size': 10, **options})
