"""How a tensor is quantized (`QuantSpec`) and what comes out (`QuantizedTensor`)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dmq_jax.quant import numerics
from kernels import packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is mapped to integers; static and hashable.

    Attributes:
      bits: width of the codes, 2..8; 16 for a softmax that attention multiplies by.
      symmetric: signed grid around zero, or unsigned grid with a zero point.
      per_channel: one scale per entry of the last axis (output channels); otherwise one for all.
      group_size: entries of the contraction axis that share a scale, with `per_channel`; None
        means all of them.
      observer: how the range is chosen: 'minmax', 'percentile' or 'mse'.
      percentile: per cent of the values inside the range of a 'percentile' observer.

    Raises:
      ValueError: another width, or groups without channels.
    """

    bits: int
    symmetric: bool
    per_channel: bool = False
    group_size: int | None = None
    observer: str = 'mse'
    percentile: float = 99.9

    def __post_init__(self):
        numerics.integer_grid(self.bits, self.symmetric)
        if self.group_size is not None and not self.per_channel:
            raise ValueError('group_size needs per_channel=True: groups divide a channel.')

    @property
    def grid(self) -> tuple[int, int]:
        """(qmin, qmax)."""
        return numerics.integer_grid(self.bits, self.symmetric)

    @property
    def granularity(self) -> str:
        """'per tensor', 'per channel' or 'groups of N'."""
        if self.group_size is not None:
            return f'groups of {self.group_size}'
        return 'per channel' if self.per_channel else 'per tensor'


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Shape of the scale of a weight `[..., K, N]` (Dense [K, N], Conv [kh, kw, C, O]).

    One entry per channel and group of the contraction axis -2; `expand` makes it broadcast.

    Raises:
      ValueError: a group size that does not divide the contraction axis.
    """
    if not spec.per_channel:
        return (1,) * len(shape)
    groups = 1
    if spec.group_size is not None:
        if shape[-2] % spec.group_size:
            raise ValueError(
                f'group_size={spec.group_size} does not divide the {shape[-2]} inputs of a weight '
                f'of shape {shape}; choose a divisor, or give this layer a rule with '
                f'weight_group_size=0.'
            )
        groups = shape[-2] // spec.group_size
    return (1,) * (len(shape) - 2) + (groups, shape[-1])


def expand(scale: Array, shape: tuple[int, ...]) -> Array:
    """`scale` of `scale_shape` made to broadcast against `shape`: groups are repeated."""
    if scale.ndim < 2 or scale.shape[-2] == 1:
        return scale
    return jnp.repeat(scale, shape[-2] // scale.shape[-2], axis=-2)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('packed', 'scale', 'zero_point'),
    meta_fields=('spec', 'shape'),
)
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A weight as packed integers, with the map back to real numbers.

    Laws: `unpack(tensor)` has shape `shape`; `x ≈ (unpack(tensor) - zero_point) * scale` with the
    scale and zero point expanded over their groups; the error is at most scale / 2 in range.

    Attributes:
      packed: [N, bytes] for a Dense kernel [K, N]; [O, kh * kw, bytes] for a Conv kernel
        [kh, kw, C, O]: see `kernels.packing`.
      scale: float32, `scale_shape(shape, spec)`.
      zero_point: int32, the same shape; zeros if symmetric.
      spec: how it was quantized.
      shape: of the weight, in Flax's order.
    """

    packed: UInt8[Array | np.ndarray, '...']
    scale: Float[Array | np.ndarray, '...']
    zero_point: Int[Array | np.ndarray, '...']
    spec: QuantSpec
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and (if asymmetric) zero points."""
        zero_points = 0 if self.spec.symmetric else self.zero_point.size
        return int(self.packed.size + 4 * self.scale.size + zero_points)


def pack(codes: Any, scale: Any, zero_point: Any, *, spec: QuantSpec) -> QuantizedTensor:
    """Packs the integer-valued `codes` [..., K, N] of a weight.

    Args:
      codes: integer-valued, any dtype, in the grid of `spec`.
      scale: `scale_shape`.
      zero_point: `scale_shape`, integer-valued after rounding.
      spec: how it was quantized.

    Raises:
      ValueError: a code outside the grid.
    """
    codes = np.asarray(codes)
    qmin, qmax = spec.grid
    if codes.size and not (codes.min() >= qmin and codes.max() <= qmax):
        raise ValueError(
            f'codes span [{codes.min()}, {codes.max()}]: expected [{qmin}, {qmax}] '
            f'(bits={spec.bits}, symmetric={spec.symmetric}).'
        )
    carrier = np.int8 if spec.symmetric else np.uint8
    rows = np.ascontiguousarray(np.moveaxis(codes.astype(carrier), -1, 0))  # [N, ..., K]
    if codes.ndim > 2:
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    return QuantizedTensor(
        packed=packing.pack(rows, spec.bits),
        scale=np.asarray(scale, np.float32),
        zero_point=np.round(np.asarray(zero_point)).astype(np.int32),
        spec=spec,
        shape=tuple(codes.shape),
    )


def unpack_rows(tensor: QuantizedTensor) -> Int[Array, 'N *taps K']:
    """Codes with the output channel first: [N, K] or [O, kh, kw, C]; int8, or uint8."""
    codes = packing.unpack(
        tensor.packed, tensor.spec.bits, signed=tensor.spec.symmetric, length=tensor.shape[-2]
    )
    return codes.reshape(tensor.shape[-1], *tensor.shape[:-2], tensor.shape[-2])


def unpack(tensor: QuantizedTensor) -> Int[Array, '...']:
    """Codes in the order and shape of the weight."""
    return jnp.moveaxis(jnp.asarray(unpack_rows(tensor)), 0, -1)


def dequantize(tensor: QuantizedTensor) -> Float[Array, '...']:
    """The float32 weight that the integers stand for."""
    return numerics.dequantize(
        unpack(tensor).astype(jnp.float32),
        expand(jnp.asarray(tensor.scale), tensor.shape),
        expand(jnp.asarray(tensor.zero_point).astype(jnp.float32), tensor.shape),
    )
