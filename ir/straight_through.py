"""Fake quantization with a gradient: rounding passes it unchanged, clipping stops it, scales carry it to what they are made of."""

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding


class _Round(torch.autograd.Function):
    """Round half to even; the gradient goes straight through (1308.3432)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grad: Tensor) -> Tensor:
        return grad[0]


def fake_quantize(x: Tensor, encoding: Encoding, clip: Tensor | float = 1.0) -> Tensor:
    """`x` after one round trip through an integer encoding of two bits or more, with scales that cover `clip` of the extremes.

    Equals `numerics.fake_quantize` where `clip` is the encoding's own. The gradient reaches `x`, through scales too, and `clip`.

    Args:
        x: any shape.
        encoding: its own clip is not applied.
        clip: a number, or of the shape `clip_shape(x.shape, encoding)`.
    """
    split, axes = numerics.blocked(x, encoding)
    low, high = numerics.code_range(encoding)
    if encoding.symmetric:
        scale = (split.abs().amax(axes, keepdim=True) * clip / (2.0 ** (encoding.bits - 1) - 0.5)).clamp_min(numerics.TINY)
        values = round_through(split / scale).clamp(low, high) * scale
    else:
        least, greatest = (split.amin(axes, keepdim=True).clamp_max(0) * clip, split.amax(axes, keepdim=True).clamp_min(0) * clip)
        scale = ((greatest - least) / (high - low)).clamp_min(numerics.TINY)
        zero = round_through(-least / scale).clamp(low, high)
        values = ((round_through(split / scale) + zero).clamp(low, high) - zero) * scale
    padded = [n * b for n, b in zip(split.shape[::2], split.shape[1::2], strict=True)]
    values = values.reshape(padded)
    for axis, size in enumerate(x.shape):
        values = values.narrow(axis, 0, size) if padded[axis] != size else values
    return values


def clip_shape(shape: tuple[int, ...], encoding: Encoding) -> tuple[int, ...]:
    """The shape of one clip for each scale, as it meets the blocks."""
    return tuple(part for count in encoding.scale_shape(shape) for part in (count, 1))


def round_through(x: Tensor) -> Tensor:
    """`x` rounded half to even; its gradient is that of the identity."""
    rounded: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded
