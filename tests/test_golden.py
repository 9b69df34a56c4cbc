"""The one published pair of files with all five numbers, for whoever has them.

    DMQ_INCEPTION_WEIGHTS=classify_image_graph_def.pb \\
    DMQ_GOLDEN_REFERENCE=VIRTUAL_imagenet256_labeled.npz \\
    DMQ_GOLDEN_SAMPLES=admnet_guided_upsampled_imagenet256.npz \\
    python -m pytest -m slow tests/test_golden.py

Both files are linked from the README of guided-diffusion's evaluations, which also states the
numbers below.
"""

import os
from pathlib import Path

import pytest

from dmq_jax import adm
from dmq_jax.files.images import open_images
from dmq_jax.metrics import inception

NEEDED = ('DMQ_INCEPTION_WEIGHTS', 'DMQ_GOLDEN_REFERENCE', 'DMQ_GOLDEN_SAMPLES')
missing = [name for name in NEEDED if not os.environ.get(name)]

# The published run used TensorFlow on a GPU: float32 convolutions of another library, and for
# precision and recall distances in float16, whose effect was measured as up to 0.004.
WANTED = {
    'inception_score': (215.8370361328125, 0.05),
    'fid': (3.9425574129223264, 0.01),
    'sfid': (6.140433703346162, 0.01),
    'precision': (0.8265, 0.004),
    'recall': (0.5309, 0.004),
}


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f'files of others: set {", ".join(missing)}')
def test_the_numbers_are_those_of_guided_diffusion(tmp_path):
    network = inception.load_inception()
    streams = [open_images(os.environ[name]) for name in NEEDED[1:]]
    kept = Path(os.environ.get('DMQ_GOLDEN_FEATURES', tmp_path))
    found = adm.run(network, *streams, adm.Options(kept_in=kept)).metrics
    for name, (value, tolerance) in WANTED.items():
        assert found[name] == pytest.approx(value, abs=tolerance), found
