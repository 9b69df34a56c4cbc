"""The FID network in plain torch, its resize in NumPy, and writers of the files it comes in.

`random_state` gives weights under torchvision's names. Everything is written from the topology of
the 2015-12-05 graph: blocks A (35x35), B (to 17x17), C (17x17), D (to 8x8), E (8x8).
"""

import struct

import numpy as np
import torch
import torch.nn.functional as F

BN_EPSILON = 1e-3

# name -> (in, out, kernel, stride, padding) under torchvision's names.
LAYERS: dict[str, tuple] = {
    'Conv2d_1a_3x3': (3, 32, (3, 3), 2, 0),
    'Conv2d_2a_3x3': (32, 32, (3, 3), 1, 0),
    'Conv2d_2b_3x3': (32, 64, (3, 3), 1, 1),
    'Conv2d_3b_1x1': (64, 80, (1, 1), 1, 0),
    'Conv2d_4a_3x3': (80, 192, (3, 3), 1, 0),
}
for _block, _in, _pool in (('5b', 192, 32), ('5c', 256, 64), ('5d', 288, 64)):
    LAYERS |= {
        f'Mixed_{_block}.branch1x1': (_in, 64, (1, 1), 1, 0),
        f'Mixed_{_block}.branch5x5_1': (_in, 48, (1, 1), 1, 0),
        f'Mixed_{_block}.branch5x5_2': (48, 64, (5, 5), 1, 2),
        f'Mixed_{_block}.branch3x3dbl_1': (_in, 64, (1, 1), 1, 0),
        f'Mixed_{_block}.branch3x3dbl_2': (64, 96, (3, 3), 1, 1),
        f'Mixed_{_block}.branch3x3dbl_3': (96, 96, (3, 3), 1, 1),
        f'Mixed_{_block}.branch_pool': (_in, _pool, (1, 1), 1, 0),
    }
LAYERS |= {
    'Mixed_6a.branch3x3': (288, 384, (3, 3), 2, 0),
    'Mixed_6a.branch3x3dbl_1': (288, 64, (1, 1), 1, 0),
    'Mixed_6a.branch3x3dbl_2': (64, 96, (3, 3), 1, 1),
    'Mixed_6a.branch3x3dbl_3': (96, 96, (3, 3), 2, 0),
}
for _block, _c in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
    _row, _column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    LAYERS |= {
        f'Mixed_{_block}.branch1x1': (768, 192, (1, 1), 1, 0),
        f'Mixed_{_block}.branch7x7_1': (768, _c, (1, 1), 1, 0),
        f'Mixed_{_block}.branch7x7_2': (_c, _c, *_row),
        f'Mixed_{_block}.branch7x7_3': (_c, 192, *_column),
        f'Mixed_{_block}.branch7x7dbl_1': (768, _c, (1, 1), 1, 0),
        f'Mixed_{_block}.branch7x7dbl_2': (_c, _c, *_column),
        f'Mixed_{_block}.branch7x7dbl_3': (_c, _c, *_row),
        f'Mixed_{_block}.branch7x7dbl_4': (_c, _c, *_column),
        f'Mixed_{_block}.branch7x7dbl_5': (_c, 192, *_row),
        f'Mixed_{_block}.branch_pool': (768, 192, (1, 1), 1, 0),
    }
LAYERS |= {
    'Mixed_7a.branch3x3_1': (768, 192, (1, 1), 1, 0),
    'Mixed_7a.branch3x3_2': (192, 320, (3, 3), 2, 0),
    'Mixed_7a.branch7x7x3_1': (768, 192, (1, 1), 1, 0),
    'Mixed_7a.branch7x7x3_2': (192, 192, (1, 7), 1, (0, 3)),
    'Mixed_7a.branch7x7x3_3': (192, 192, (7, 1), 1, (3, 0)),
    'Mixed_7a.branch7x7x3_4': (192, 192, (3, 3), 2, 0),
}
for _block, _in in (('7b', 1280), ('7c', 2048)):
    LAYERS |= {
        f'Mixed_{_block}.branch1x1': (_in, 320, (1, 1), 1, 0),
        f'Mixed_{_block}.branch3x3_1': (_in, 384, (1, 1), 1, 0),
        f'Mixed_{_block}.branch3x3_2a': (384, 384, (1, 3), 1, (0, 1)),
        f'Mixed_{_block}.branch3x3_2b': (384, 384, (3, 1), 1, (1, 0)),
        f'Mixed_{_block}.branch3x3dbl_1': (_in, 448, (1, 1), 1, 0),
        f'Mixed_{_block}.branch3x3dbl_2': (448, 384, (3, 3), 1, 1),
        f'Mixed_{_block}.branch3x3dbl_3a': (384, 384, (1, 3), 1, (0, 1)),
        f'Mixed_{_block}.branch3x3dbl_3b': (384, 384, (3, 1), 1, (1, 0)),
        f'Mixed_{_block}.branch_pool': (_in, 192, (1, 1), 1, 0),
    }


def random_state(seed=0):
    """He-initialised weights with batch-norm statistics that are far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, size):
        return torch.rand(size, generator=generator) * (high - low) + low

    state = {}
    for name, (inputs, outputs, kernel, _, _) in LAYERS.items():
        fan_in = inputs * kernel[0] * kernel[1]
        weight = torch.randn((outputs, inputs, *kernel), generator=generator)
        state[f'{name}.conv.weight'] = weight * (2 / fan_in) ** 0.5
        state[f'{name}.bn.weight'] = uniform(0.5, 1.5, outputs)
        state[f'{name}.bn.bias'] = uniform(-0.3, 0.5, outputs)
        state[f'{name}.bn.running_mean'] = uniform(-0.5, 0.5, outputs)
        state[f'{name}.bn.running_var'] = uniform(0.3, 2.0, outputs)
    state['fc.weight'] = torch.randn((1008, 2048), generator=generator) * 0.05
    state['fc.bias'] = torch.randn(1008, generator=generator)
    return state


def network(state, x):
    """Named outputs for x, float [N, 3, 299, 299] in [-1, 1], in the type of `x` and `state`."""

    def conv(x, name):
        _, _, _, stride, padding = LAYERS[name]
        bn = f'{name}.bn'
        x = F.conv2d(x, state[f'{name}.conv.weight'], None, stride, padding)
        return F.relu(
            F.batch_norm(
                x, state[f'{bn}.running_mean'], state[f'{bn}.running_var'],
                state[f'{bn}.weight'], state[f'{bn}.bias'], False, 0.0, BN_EPSILON,
            )
        )  # fmt: skip

    def chain(x, block, *names):
        for name in names:
            x = conv(x, f'{block}.{name}')
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    outputs = {}
    for name in ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3'):
        x = conv(x, name)
    x = F.max_pool2d(x, 3, 2)
    outputs['64'] = x.mean((2, 3))
    x = conv(conv(x, 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3')
    x = F.max_pool2d(x, 3, 2)
    outputs['192'] = x.mean((2, 3))
    for b in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
        x = torch.cat([
            chain(x, b, 'branch1x1'),
            chain(x, b, 'branch5x5_1', 'branch5x5_2'),
            chain(x, b, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
            chain(average(x), b, 'branch_pool'),
        ], 1)  # fmt: skip
    b = 'Mixed_6a'
    x = torch.cat([
        chain(x, b, 'branch3x3'),
        chain(x, b, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'),
        F.max_pool2d(x, 3, 2),
    ], 1)  # fmt: skip
    for b in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
        first = chain(x, b, 'branch1x1')
        if b == 'Mixed_6d':
            outputs['spatial'] = first[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
        x = torch.cat([
            first,
            chain(x, b, 'branch7x7_1', 'branch7x7_2', 'branch7x7_3'),
            chain(x, b, *(f'branch7x7dbl_{i}' for i in range(1, 6))),
            chain(average(x), b, 'branch_pool'),
        ], 1)  # fmt: skip
    outputs['768'] = x.mean((2, 3))
    b = 'Mixed_7a'
    x = torch.cat([
        chain(x, b, 'branch3x3_1', 'branch3x3_2'),
        chain(x, b, *(f'branch7x7x3_{i}' for i in range(1, 5))),
        F.max_pool2d(x, 3, 2),
    ], 1)  # fmt: skip
    for b in ('Mixed_7b', 'Mixed_7c'):
        pooled = average(x) if b == 'Mixed_7b' else F.max_pool2d(x, 3, 1, 1)
        narrow = chain(x, b, 'branch3x3_1')
        deep = chain(x, b, 'branch3x3dbl_1', 'branch3x3dbl_2')
        x = torch.cat([
            chain(x, b, 'branch1x1'),
            chain(narrow, b, 'branch3x3_2a'),
            chain(narrow, b, 'branch3x3_2b'),
            chain(deep, b, 'branch3x3dbl_3a'),
            chain(deep, b, 'branch3x3dbl_3b'),
            chain(pooled, b, 'branch_pool'),
        ], 1)  # fmt: skip
    x = x.mean((2, 3))
    outputs['2048'] = x
    outputs['logits'] = x @ state['fc.weight'].T
    return outputs


def resize(images, size):
    """TF1's bilinear resize of uint8 [N, H, W, C] in NumPy float32, pixel by pixel formula."""

    def corners(length, out_length):
        scale = np.float32(length) / np.float32(out_length)
        position = np.arange(out_length, dtype=np.float32) * scale
        low = np.floor(position).astype(np.int64)
        return low, np.minimum(low + 1, length - 1), position - low.astype(np.float32)

    x = images.astype(np.float32)
    y0, y1, fy = corners(x.shape[1], size[0])
    x0, x1, fx = corners(x.shape[2], size[1])
    fx, fy = fx[None, None, :, None], fy[None, :, None, None]
    rows0, rows1 = x[:, y0], x[:, y1]
    top = rows0[:, :, x0] + (rows0[:, :, x1] - rows0[:, :, x0]) * fx
    bottom = rows1[:, :, x0] + (rows1[:, :, x1] - rows1[:, :, x0]) * fx
    result = top + (bottom - top) * fy
    assert result.dtype == np.float32
    return result


# ---- TensorFlow's names, written independently of the package's table.

_BLOCKS = ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c')
_A = {
    'branch1x1': 'conv', 'branch5x5_1': 'tower/conv', 'branch5x5_2': 'tower/conv_1',
    'branch3x3dbl_1': 'tower_1/conv', 'branch3x3dbl_2': 'tower_1/conv_1',
    'branch3x3dbl_3': 'tower_1/conv_2', 'branch_pool': 'tower_2/conv',
}  # fmt: skip
_B = {
    'branch3x3': 'conv', 'branch3x3dbl_1': 'tower/conv', 'branch3x3dbl_2': 'tower/conv_1',
    'branch3x3dbl_3': 'tower/conv_2',
}  # fmt: skip
_C = {
    'branch1x1': 'conv', 'branch7x7_1': 'tower/conv', 'branch7x7_2': 'tower/conv_1',
    'branch7x7_3': 'tower/conv_2', 'branch7x7dbl_1': 'tower_1/conv',
    'branch7x7dbl_2': 'tower_1/conv_1', 'branch7x7dbl_3': 'tower_1/conv_2',
    'branch7x7dbl_4': 'tower_1/conv_3', 'branch7x7dbl_5': 'tower_1/conv_4',
    'branch_pool': 'tower_2/conv',
}  # fmt: skip
_D = {
    'branch3x3_1': 'tower/conv', 'branch3x3_2': 'tower/conv_1', 'branch7x7x3_1': 'tower_1/conv',
    'branch7x7x3_2': 'tower_1/conv_1', 'branch7x7x3_3': 'tower_1/conv_2',
    'branch7x7x3_4': 'tower_1/conv_3',
}  # fmt: skip
_E = {
    'branch1x1': 'conv', 'branch3x3_1': 'tower/conv', 'branch3x3_2a': 'tower/mixed/conv',
    'branch3x3_2b': 'tower/mixed/conv_1', 'branch3x3dbl_1': 'tower_1/conv',
    'branch3x3dbl_2': 'tower_1/conv_1', 'branch3x3dbl_3a': 'tower_1/mixed/conv',
    'branch3x3dbl_3b': 'tower_1/mixed/conv_1', 'branch_pool': 'tower_2/conv',
}  # fmt: skip
_KINDS = (_A, _A, _A, _B, _C, _C, _C, _C, _D, _E, _E)
_STEM = dict(
    zip(
        ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3'),
        ('conv', 'conv_1', 'conv_2', 'conv_3', 'conv_4'),
        strict=True,
    )
)


def tf_scope(layer):
    """'mixed_9/tower/mixed/conv' for 'Mixed_7b.branch3x3_2a'."""
    if layer in _STEM:
        return _STEM[layer]
    block, branch = layer.removeprefix('Mixed_').split('.')
    index = _BLOCKS.index(block)
    return ('mixed' if index == 0 else f'mixed_{index}') + '/' + _KINDS[index][branch]


# ---- A writer of the protocol-buffer wire format.


def varint(value):
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number, value):
    """One field: int as a varint, float as 4 bytes, bytes or str with its length."""
    if isinstance(value, bool | int):
        return varint(number << 3) + varint(int(value))
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack('<f', value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(dtype, shape, *value_fields):
    dims = b''.join(field(2, field(1, size)) for size in shape)
    return field(1, dtype) + field(2, dims) + b''.join(value_fields)


def node(name, op, inputs=(), attrs=None):
    encoded = field(1, name) + field(2, op) + b''.join(field(3, i) for i in inputs)
    for key, value in (attrs or {}).items():
        encoded += field(5, field(1, key) + field(2, value))
    return field(1, encoded)


def const(name, array):
    numbers = {'float32': 1, 'int32': 3, 'uint8': 4, 'int64': 9, 'bool': 10, 'float16': 19}
    dtype = numbers[array.dtype.name]
    content = tensor(dtype, array.shape, field(4, array.tobytes()))
    return node(name, 'Const', (), {'value': field(8, content), 'dtype': field(6, dtype)})


def graphdef(state, *, scale_after_normalization=True, epsilon=0.001, last_pool='MaxPool'):
    """The frozen graph of `state` as far as a reader of weights can see it."""
    parts = [node('DecodeJpeg/contents', 'Const', (), {'value': field(8, tensor(7, ()))})]
    parts.append(const('ResizeBilinear/size', np.array([299, 299], np.int32)))
    for layer in LAYERS:
        scope = tf_scope(layer)
        weight = state[f'{layer}.conv.weight'].numpy().transpose(2, 3, 1, 0)
        parts.append(const(f'{scope}/conv2d_params', np.ascontiguousarray(weight)))
        parts.append(node(f'{scope}/Conv2D', 'Conv2D', [f'{scope}/conv2d_params']))
        for theirs, ours in (
            ('beta', 'bias'), ('gamma', 'weight'), ('moving_mean', 'running_mean'),
            ('moving_variance', 'running_var'),
        ):  # fmt: skip
            parts.append(const(f'{scope}/batchnorm/{theirs}', state[f'{layer}.bn.{ours}'].numpy()))
        attrs = {
            'variance_epsilon': field(4, epsilon),
            'scale_after_normalization': field(5, scale_after_normalization),
        }
        inputs = [f'{scope}/Conv2D'] + [
            f'{scope}/batchnorm/{n}' for n in ('moving_mean', 'moving_variance', 'beta', 'gamma')
        ]
        parts.append(node(f'{scope}/batchnorm', 'BatchNormWithGlobalNormalization', inputs, attrs))
    parts.append(node('mixed_10/tower_2/pool', last_pool, ['mixed_9/join']))
    weights = np.ascontiguousarray(state['fc.weight'].numpy().T)
    parts += [const('softmax/weights', weights), const('softmax/biases', state['fc.bias'].numpy())]
    return b''.join(parts)
