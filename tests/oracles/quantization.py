"""The quantizer, its gradients and its searches in float64 loops, and integer layers in int64."""

import numpy as np


def integer_grid(bits, symmetric):
    """(qmin, qmax)."""
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def quantize(x, scale, zero_point, qmin, qmax):
    """Codes, int64; `zero_point` is rounded."""
    x, scale, zero_point = (np.asarray(a, np.float64) for a in (x, scale, zero_point))
    return np.clip(np.rint(x / scale) + np.rint(zero_point), qmin, qmax).astype(np.int64)


def fake_quantize(x, scale, zero_point, qmin, qmax):
    """The values the codes stand for, float64."""
    codes = quantize(x, scale, zero_point, qmin, qmax)
    return (codes - np.rint(zero_point)) * np.float64(scale)


def fake_quantize_gradients(x, scale, zero_point, qmin, qmax):
    """(d/dx, d/dscale, d/dzero_point) of one fake-quantized number: LSQ's and LSQ+'s table."""
    u, z = float(x) / float(scale), round(float(zero_point))
    code = np.rint(u) + z
    if code < qmin:
        return 0.0, qmin - z, -float(scale)
    if code > qmax:
        return 0.0, qmax - z, -float(scale)
    return 1.0, np.rint(u) - u, 0.0


def compute_scale(low, high, bits, symmetric):
    """(scale, zero point) of one range, widened to contain 0."""
    qmin, qmax = integer_grid(bits, symmetric)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        return max(max(-low, high) / qmax, 1e-8), 0.0
    scale = max((high - low) / (qmax - qmin), 1e-8)
    return scale, float(np.clip(np.rint(-low / scale), qmin, qmax))


def search_errors(values, low, high, bits, symmetric):
    """[(error, scale, zero point)] of the 80 shrunken ranges, brute force."""
    qmin, qmax = integer_grid(bits, symmetric)
    found = []
    for i in range(80):
        shrink = 1 - 0.01 * i
        scale, zero_point = compute_scale(low * shrink, high * shrink, bits, symmetric)
        difference = values - fake_quantize(values, scale, zero_point, qmin, qmax)
        found.append((np.mean(np.abs(difference) ** 2.4), scale, zero_point))
    return found


def dense(x, w):
    """int64 sums of x [..., K] and w [K, N]."""
    return np.asarray(x, np.int64) @ np.asarray(w, np.int64)


def conv(x, w, strides, padding):
    """Sums of zero-padded x [B, H, W, C] and w [kh, kw, C, O], int64 or float64, one by one."""
    (top, bottom), (left, right) = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    kh, kw = w.shape[:2]
    height = (x.shape[1] - kh) // strides[0] + 1
    width = (x.shape[2] - kw) // strides[1] + 1
    out = np.zeros((x.shape[0], height, width, w.shape[3]), np.result_type(x, w))
    for i in range(height):
        for j in range(width):
            rows, columns = i * strides[0], j * strides[1]
            window = x[:, rows : rows + kh, columns : columns + kw]
            out[:, i, j] = np.tensordot(window, w, axes=3)
    return out
