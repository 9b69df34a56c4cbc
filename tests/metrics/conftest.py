"""Random weights of the FID network, in every kind of file."""

import pytest

from dmq_jax.metrics import inception


@pytest.fixture(scope='session')
def inception_state():
    """A state dict as PyTorch's port has it."""
    pytest.importorskip('torch', reason='torch is the reference of the network')
    from tests.oracles import inception as oracle

    return oracle.random_state()


@pytest.fixture(scope='session')
def inception_files(inception_state, tmp_path_factory):
    """The same weights in every kind of file, by its name."""
    import torch

    from tests.oracles import inception as oracle

    folder = tmp_path_factory.mktemp('weights')
    paths = {
        name: folder / name for name in ('zip.pth', 'legacy.pth', 'graph.pb', 'own.safetensors')
    }
    torch.save(inception_state, paths['zip.pth'])
    counted = inception_state | {'Conv2d_1a_3x3.bn.num_batches_tracked': torch.tensor(0)}
    torch.save(counted, paths['legacy.pth'], _use_new_zipfile_serialization=False)
    paths['graph.pb'].write_bytes(oracle.graphdef(inception_state))
    inception.convert(paths['zip.pth'], paths['own.safetensors'])
    return paths


@pytest.fixture(scope='session')
def network(inception_files):
    """The network with those weights."""
    return inception.load_inception(inception_files['zip.pth'])
