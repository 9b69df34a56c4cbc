"""Winograd's gradient of a kernel, against its definition in float64."""

import jax
import numpy as np
import pytest

from dmq_jax.quant import winograd

# Seen: 3.2e-6 for 8192 pixels, fewer for fewer; a wrong term is wrong by a tenth and more.
TOLERANCE = 1e-5


def by_definition(x, g, padding):
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    _, height, width, _ = g.shape
    taps = [
        np.tensordot(x[:, i : i + height, j : j + width], g.astype(np.float64), ((0, 1, 2),) * 2)
        for i in range(3)
        for j in range(3)
    ]
    return np.reshape(taps, (3, 3, x.shape[-1], g.shape[-1]))


def operands(batch, height, width, channels, num_outputs, padding):
    rng = np.random.default_rng(0)
    out = [size + sum(pads) - 2 for size, pads in zip((height, width), padding, strict=True)]
    x = rng.standard_normal((batch, height, width, channels)).astype(np.float32)
    g = rng.standard_normal((batch, *out, num_outputs)).astype(np.float32)
    return x, g


@pytest.mark.parametrize('group_bytes', [winograd.GROUP_BYTES, 0])
@pytest.mark.parametrize(
    'sizes, padding',
    [
        ((2, 8, 12, 5, 6), ((1, 1), (1, 1))),
        ((4, 7, 10, 3, 4), ((1, 1), (1, 1))),  # tiles overhang
        ((2, 5, 6, 4, 3), ((0, 2), (1, 0))),
        ((1, 9, 3, 2, 5), ((0, 0), (2, 2))),
        ((3, 2, 2, 4, 4), ((1, 1), (1, 1))),  # less than a tile
    ],
)
def test_it_is_the_gradient(sizes, padding, group_bytes, monkeypatch):
    monkeypatch.setattr(winograd, 'GROUP_BYTES', group_bytes)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)  # groups are taken on one device
    x, g = operands(*sizes, padding)
    found = np.asarray(jax.jit(lambda x, g: winograd.kernel_gradient(x, g, padding))(x, g))
    wanted = by_definition(x, g, padding)
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


def test_it_is_as_exact_at_full_width():
    padding = ((1, 1), (1, 1))
    x, g = operands(8, 32, 32, 128, 64, padding)
    found = np.asarray(jax.jit(lambda x, g: winograd.kernel_gradient(x, g, padding))(x, g))
    wanted = by_definition(x, g, padding)
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    'kernel_shape, strides, out_shape, is_fast',
    [
        ((3, 3, 128, 128), (1, 1), (8, 32, 32, 128), True),
        ((3, 3, 256, 256), (1, 1), (4, 16, 16, 256), True),
        ((3, 3, 256, 256), (1, 1), (3, 16, 16, 256), False),  # tiles
        ((3, 3, 128, 128), (2, 2), (8, 32, 32, 128), False),
        ((1, 1, 128, 128), (1, 1), (8, 32, 32, 128), False),
        ((3, 3, 128, 3), (1, 1), (8, 32, 32, 3), False),
        ((3, 3, 3, 128), (1, 1), (8, 32, 32, 128), False),
    ],
)
def test_it_is_taken_where_many_tiles_have_many_channels(kernel_shape, strides, out_shape, is_fast):
    assert winograd.is_fast(kernel_shape, strides, out_shape) == is_fast
