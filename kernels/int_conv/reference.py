"""The definition: pad with the code that means 0.0, then one int32 product per tap."""

import jax.numpy as jnp
from jaxtyping import Array, Int8, Int32


def pad_with_codes(
    x: Int8[Array, 'B H W C'],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int8[Array, 'B Hp Wp C']:
    """Surrounds images with the code that means 0.0, one code for all or one per image."""
    widths = ((0, 0), *padding, (0, 0))
    if isinstance(pad_value, int) or pad_value.ndim == 0:
        return jnp.pad(x, widths, constant_values=jnp.asarray(pad_value).astype(jnp.int8))
    inside = jnp.pad(jnp.ones((1, *x.shape[1:3], 1), bool), widths)
    codes = pad_value.astype(jnp.int8)[:, None, None, None]
    return jnp.where(inside, jnp.pad(x, widths), codes)


def output_size(
    image_size: tuple[int, int],
    kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution of images of (H, W)."""
    height, width = (
        (image_size[axis] + sum(padding[axis]) - kernel_size[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )
    return height, width


def int_conv(
    x: Int8[Array, 'B H W C'],
    w: Int8[Array, 'O kh kw C'],
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    pad_value: int | Int32[Array, ''] | Int32[Array, 'B'],
) -> Int32[Array, 'B Ho Wo O']:
    """out[b, h, w, o] = sum over i, j, c of padded[b, h s + i, w s + j, c] w[o, i, j, c]."""
    padded = pad_with_codes(x, padding, pad_value).astype(jnp.int32)
    _, kh, kw, _ = w.shape
    height, width = output_size(x.shape[1:3], (kh, kw), strides, padding)
    total = jnp.zeros((x.shape[0], height, width, w.shape[0]), jnp.int32)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i, i + (height - 1) * strides[0] + 1, strides[0])
            columns = slice(j, j + (width - 1) * strides[1] + 1, strides[1])
            tap = w[:, i, j].astype(jnp.int32)
            total += jnp.einsum('bhwc,oc->bhwo', padded[:, rows, columns], tap)
    return total
