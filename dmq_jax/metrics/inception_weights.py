"""Files with the weights of the FID network: names of other projects, layouts, folding.

Three kinds, told apart by their content: TensorFlow's frozen graph, the state dict of PyTorch's
port, and our own `.safetensors`. Batch normalisation is folded into the convolutions in float64.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dmq_jax.files import torch_files
from dmq_jax.files.graphdef import GraphDef, open_graphdef
from dmq_jax.files.safetensors import open_safetensors

FORMAT = 'dmq_jax.inception/1'
WEIGHTS_VARIABLE = 'DMQ_INCEPTION_WEIGHTS'
BN_EPSILON = 1e-3
Shapes = Mapping[str, tuple[int, ...]]

HOW_TO_GET = f"""Expected one of the published files, which this project never downloads:
  classify_image_graph_def.pb (95.7 MB, in TensorFlow's inception-2015-12-05.tgz),
  pt_inception-2015-12-05-6726825d.pth (of pytorch-fid; its sha256 begins with 6726825d),
  weights-inception-2015-12-05-6726825d.pth (of torch-fidelity, the same tensors),
or a .safetensors made of them by python -m dmq_jax.metrics.inception --convert IN OUT.
Put it anywhere and name it by the path argument or the environment variable {WEIGHTS_VARIABLE}."""

# Per kind of block: our name of a layer -> torchvision's.
_BLOCK_A = {
    'conv': 'branch1x1',
    'tower_conv': 'branch5x5_1',
    'tower_conv_1': 'branch5x5_2',
    'tower_1_conv': 'branch3x3dbl_1',
    'tower_1_conv_1': 'branch3x3dbl_2',
    'tower_1_conv_2': 'branch3x3dbl_3',
    'tower_2_conv': 'branch_pool',
}
_BLOCK_B = {
    'conv': 'branch3x3',
    'tower_conv': 'branch3x3dbl_1',
    'tower_conv_1': 'branch3x3dbl_2',
    'tower_conv_2': 'branch3x3dbl_3',
}
_BLOCK_C = {
    'conv': 'branch1x1',
    'tower_conv': 'branch7x7_1',
    'tower_conv_1': 'branch7x7_2',
    'tower_conv_2': 'branch7x7_3',
    'tower_1_conv': 'branch7x7dbl_1',
    'tower_1_conv_1': 'branch7x7dbl_2',
    'tower_1_conv_2': 'branch7x7dbl_3',
    'tower_1_conv_3': 'branch7x7dbl_4',
    'tower_1_conv_4': 'branch7x7dbl_5',
    'tower_2_conv': 'branch_pool',
}
_BLOCK_D = {
    'tower_conv': 'branch3x3_1',
    'tower_conv_1': 'branch3x3_2',
    'tower_1_conv': 'branch7x7x3_1',
    'tower_1_conv_1': 'branch7x7x3_2',
    'tower_1_conv_2': 'branch7x7x3_3',
    'tower_1_conv_3': 'branch7x7x3_4',
}
_BLOCK_E = {
    'conv': 'branch1x1',
    'tower_conv': 'branch3x3_1',
    'tower_mixed_conv': 'branch3x3_2a',
    'tower_mixed_conv_1': 'branch3x3_2b',
    'tower_1_conv': 'branch3x3dbl_1',
    'tower_1_conv_1': 'branch3x3dbl_2',
    'tower_1_mixed_conv': 'branch3x3dbl_3a',
    'tower_1_mixed_conv_1': 'branch3x3dbl_3b',
    'tower_2_conv': 'branch_pool',
}
_TORCH_BLOCKS = {
    'mixed': ('Mixed_5b', _BLOCK_A),
    'mixed_1': ('Mixed_5c', _BLOCK_A),
    'mixed_2': ('Mixed_5d', _BLOCK_A),
    'mixed_3': ('Mixed_6a', _BLOCK_B),
    'mixed_4': ('Mixed_6b', _BLOCK_C),
    'mixed_5': ('Mixed_6c', _BLOCK_C),
    'mixed_6': ('Mixed_6d', _BLOCK_C),
    'mixed_7': ('Mixed_6e', _BLOCK_C),
    'mixed_8': ('Mixed_7a', _BLOCK_D),
    'mixed_9': ('Mixed_7b', _BLOCK_E),
    'mixed_10': ('Mixed_7c', _BLOCK_E),
}
# Path in InceptionV3 -> torchvision's name.
TORCH_NAMES = {
    'conv': 'Conv2d_1a_3x3',
    'conv_1': 'Conv2d_2a_3x3',
    'conv_2': 'Conv2d_2b_3x3',
    'conv_3': 'Conv2d_3b_1x1',
    'conv_4': 'Conv2d_4a_3x3',
    **{
        f'{block}/{ours}': f'{theirs}.{name}'
        for block, (theirs, layers) in _TORCH_BLOCKS.items()
        for ours, name in layers.items()
    },
}


def tensorflow_scope(path: str) -> str:
    """The TensorFlow scope 'mixed_9/tower_1/mixed/conv' of 'mixed_9/tower_1_mixed_conv'."""
    scope = re.sub(r'/(tower(?:_\d)?)_((?:mixed_)?conv)', r'/\1/\2', path)
    return scope.replace('/mixed_conv', '/mixed/conv')


def find(path: str | os.PathLike | None) -> Path:
    """The file at `path`, or else the one that the environment variable names.

    Raises:
      FileNotFoundError: neither; lists the files that work.
    """
    if path is None and not (path := os.environ.get(WEIGHTS_VARIABLE)):
        raise FileNotFoundError(
            f'No weights of the Inception network: no path was given and {WEIGHTS_VARIABLE} is '
            f'not set. {HOW_TO_GET}'
        )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such file of Inception weights. {HOW_TO_GET}')
    return path


def read(path: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters by path, float32, batch normalisation folded in.

    Args:
      path: a file of any known kind.
      shapes: of the parameters of the network, by path.

    Raises:
      ValueError: a file of another kind or another network, or one with tensors missing,
        misshapen, left over or not finite; names them.
    """
    with path.open('rb') as file:
        start = file.read(16)
    if start[8:9] == b'{':
        flat = _read_own(path, shapes)
    elif start[:4] == b'PK\x03\x04' or start[:1] in (b'\x80', b'L'):
        flat = _read_torch(path, shapes)
    elif start[:1] == b'\x0a':
        flat = _read_graphdef(open_graphdef(path), shapes)
    else:
        raise ValueError(f'{path}: begins with {start!r}, as no known weights do. {HOW_TO_GET}')
    if not_finite := sorted(n for n, a in flat.items() if not np.isfinite(a).all()):
        raise ValueError(f'{path}: values that are not finite, e.g. in {not_finite[0]!r}.')
    return flat


def _check_shapes(
    path: Path, tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses tensors that are missing, left over or of another shape."""
    missing = sorted(expected.keys() - tensors.keys())
    left_over = sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, 'missing'), (left_over, 'left over')):
        if names:
            raise ValueError(
                f'{path}: {len(names)} tensors are {what}, e.g. {", ".join(map(repr, names[:3]))}: '
                f'not the Inception-v3 of 2015-12-05? {HOW_TO_GET}'
            )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f'{path}: the tensor {name!r} has shape {tensors[name].shape}, expected {shape}: '
                f'not the Inception-v3 of 2015-12-05? {HOW_TO_GET}'
            )


def fold(
    kernel: Float[np.ndarray, 'h w C N'],
    gamma: Float[np.ndarray, 'N'] | float,
    beta: Float[np.ndarray, 'N'],
    mean: Float[np.ndarray, 'N'],
    variance: Float[np.ndarray, 'N'],
) -> tuple[Float[np.ndarray, 'h w C N'], Float[np.ndarray, 'N']]:
    """Kernel and bias of a convolution with its batch normalisation, computed in float64.

    Each is then within half a unit of float32; features differ from those of the normalisation
    computed by itself by the rounding of the latter, about 1e-6 of the largest.
    """
    factor = gamma / np.sqrt(np.asarray(variance, np.float64) + BN_EPSILON)
    kernel = np.asarray(kernel, np.float64) * factor[None, None, None]
    return kernel.astype(np.float32), (beta - mean * factor).astype(np.float32)


def _read_own(path: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters by path, from a file that `convert` wrote."""
    reader = open_safetensors(path)
    if reader.metadata.get('format') != FORMAT:
        raise ValueError(
            f'{path}: the format is {reader.metadata.get("format")!r}, expected {FORMAT!r}, as '
            f'--convert writes. {HOW_TO_GET}'
        )
    tensors = {name: reader[name] for name in reader}
    _check_shapes(path, tensors, shapes)
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def _read_torch(path: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters by path, from a state dict under torchvision's names."""
    state = torch_files.load(path)
    if not isinstance(state, dict) or not all(isinstance(a, np.ndarray) for a in state.values()):
        raise ValueError(f'{path}: not a dict of tensors. {HOW_TO_GET}')
    tensors = {n: a for n, a in state.items() if not str(n).endswith('.num_batches_tracked')}
    classes = len(tensors['fc.weight']) if 'fc.weight' in tensors else None
    if classes == 1000 or any(str(name).startswith('AuxLogits.') for name in tensors):
        raise ValueError(
            f"{path}: these are the weights of torchvision's inception_v3 (1000 classes, an "
            'auxiliary head), another network: numbers made with it are no FID. ' + HOW_TO_GET
        )
    width, num_classes = shapes['softmax/kernel']
    expected = {'fc.weight': (num_classes, width), 'fc.bias': (num_classes,)}
    for ours, theirs in TORCH_NAMES.items():
        h, w, c, n = shapes[f'{ours}/kernel']
        expected[f'{theirs}.conv.weight'] = (n, c, h, w)
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            expected[f'{theirs}.bn.{name}'] = (n,)
    _check_shapes(path, tensors, expected)
    flat = {'softmax/kernel': tensors['fc.weight'].T.astype(np.float32)}
    for ours, theirs in TORCH_NAMES.items():
        gamma, beta, mean, variance = (
            tensors[f'{theirs}.bn.{name}']
            for name in ('weight', 'bias', 'running_mean', 'running_var')
        )
        # torch keeps OIHW.
        kernel = tensors[f'{theirs}.conv.weight'].transpose(2, 3, 1, 0)
        flat[f'{ours}/kernel'], flat[f'{ours}/bias'] = fold(kernel, gamma, beta, mean, variance)
    return flat


_GRAPH_BN = ('gamma', 'beta', 'moving_mean', 'moving_variance')


def _read_graphdef(graph: GraphDef, shapes: Shapes) -> dict[str, np.ndarray]:
    """Parameters by path, from the frozen TensorFlow graph."""
    width, num_classes = shapes['softmax/kernel']
    expected = {'softmax/weights': (width, num_classes), 'softmax/biases': (num_classes,)}
    for ours in TORCH_NAMES:
        expected[f'{tensorflow_scope(ours)}/conv2d_params'] = shapes[f'{ours}/kernel']
        for name in _GRAPH_BN:
            expected[f'{tensorflow_scope(ours)}/batchnorm/{name}'] = shapes[f'{ours}/bias']
    # Other constants are sizes and axes; one that is text cannot even be read.
    tensors = {
        name: graph[name]
        for name in graph
        if name in expected or name.endswith(('/conv2d_params', *(f'/{n}' for n in _GRAPH_BN)))
    }
    _check_shapes(graph.path, tensors, expected)
    last_pool = graph.nodes.get('mixed_10/tower_2/pool')
    if last_pool is not None and last_pool.op != 'MaxPool':
        raise ValueError(
            f'{graph.path}: mixed_10/tower_2/pool is {last_pool.op}, expected MaxPool: not the '
            f'Inception-v3 of 2015-12-05? {HOW_TO_GET}'
        )
    flat = {'softmax/kernel': tensors['softmax/weights'].astype(np.float32)}
    for ours in TORCH_NAMES:
        scope = tensorflow_scope(ours)
        gamma, beta, mean, variance = (tensors[f'{scope}/batchnorm/{n}'] for n in _GRAPH_BN)
        if not _uses_gamma(graph, f'{scope}/batchnorm'):
            gamma = 1.0
        kernel = tensors[f'{scope}/conv2d_params']
        flat[f'{ours}/kernel'], flat[f'{ours}/bias'] = fold(kernel, gamma, beta, mean, variance)
    return flat


def _uses_gamma(graph: GraphDef, name: str) -> bool:
    """Whether the normalisation `name` multiplies by gamma; also checks its epsilon."""
    node = graph.nodes.get(name)
    if node is None or node.op != 'BatchNormWithGlobalNormalization':
        return True
    epsilon = node.attrs.get('variance_epsilon', BN_EPSILON)
    if not isinstance(epsilon, float) or abs(epsilon - BN_EPSILON) > 1e-6 * BN_EPSILON:
        raise ValueError(
            f'{graph.path}: {name} has variance_epsilon {epsilon!r}, expected {BN_EPSILON}: not '
            f'the Inception-v3 of 2015-12-05? {HOW_TO_GET}'
        )
    return bool(node.attrs.get('scale_after_normalization', True))
