"""The arithmetic of encodings: choose scales, quantize, dequantize. Every backend is measured against these functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.encoding import Encoding, Float, Int

FLOAT_STORAGE = {Float(4, 3): torch.float8_e4m3fn, Float(5, 2): torch.float8_e5m2}
TINY = 1e-8  # the least scale: keeps blocks of zeros finite, and stays normal in float32
TINY_HALF = 6.2e-5  # the same for scales stored in float16


@dataclass(frozen=True)
class QParams:
    """Scales and zero points of one tensor, both of shape `encoding.scale_shape(x.shape)`; no zero point if symmetric."""

    scale: Tensor
    zero_point: Tensor | None = None


def code_range(encoding: Encoding) -> tuple[int, int]:
    """Least and greatest integer code: −2^(b−1) … 2^(b−1)−1 symmetric (−1, 1 for one bit, a sign), 0 … 2^b−1 asymmetric."""
    bits = encoding.bits
    if not encoding.symmetric:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def storage_dtype(encoding: Encoding) -> torch.dtype:
    """The dtype that holds the codes in a graph: int8 (symmetric), uint8 (asymmetric) or an 8-bit float."""
    if isinstance(encoding.format, Float):
        return FLOAT_STORAGE[encoding.format]
    return torch.int8 if encoding.symmetric else torch.uint8


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on a tensor of `dtype` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocked(x: Tensor, encoding: Encoding) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with each axis split in (blocks, block), ragged ends padded with zeros, and the positions of the block axes."""
    shape = tuple(x.shape)
    sizes, counts = encoding.block_shape(shape), encoding.scale_shape(shape)
    padding = [amount for size, n, b in reversed(list(zip(shape, counts, sizes, strict=True))) for amount in (0, n * b - size)]
    if any(padding):
        x = torch.nn.functional.pad(x, padding)
    split = [part for pair in zip(counts, sizes, strict=True) for part in pair]
    return x.reshape(split), tuple(range(1, 2 * len(shape), 2))


def expand(values: Tensor, encoding: Encoding, shape: tuple[int, ...]) -> Tensor:
    """Per-block `values` in a form that broadcasts against a tensor of `shape`."""
    for axis, (size, block) in enumerate(zip(shape, encoding.block_shape(shape), strict=True)):
        if block not in (1, size):
            values = values.repeat_interleave(block, axis).narrow(axis, 0, size)
    return values


def choose_qparams(x: Tensor, encoding: Encoding, scale_dtype: torch.dtype | None = None) -> QParams:
    """Scales (and zero points) that cover the extremes of every block.

    Symmetric: `s = max|x| / (2^(b−1) − ½)`; one bit: `s = mean|x|`, the least-squares scale of a sign; asymmetric, over a range that
    includes zero: `s = (max − min) / (2^b − 1)`, `z = round(−min / s)`; floats: `s = max|x| / greatest float`. With a clip, of the
    encoding, extremes are that much nearer to zero.

    Args:
        x: any shape, floating point.
        encoding: its format and block.
        scale_dtype: the dtype in which scales are stored; the compute dtype of `x` if None.
    """
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    split, axes = blocked(x, encoding)
    if encoding.symmetric:
        if encoding.bits == 1:
            ones, _ = blocked(torch.ones_like(x), encoding)
            scale = split.abs().sum(axes) / ones.sum(axes)
        else:
            scale = split.abs().amax(axes) / (_symmetric_range(encoding) / encoding.clip)
        return QParams(stored_scale(scale, scale_dtype))
    low, high = split.amin(axes).clamp_max(0) * encoding.clip, split.amax(axes).clamp_min(0) * encoding.clip
    return qparams_from_range(low, high, encoding, scale_dtype)


def qparams_from_range(low: Tensor, high: Tensor, encoding: Encoding, scale_dtype: torch.dtype | None = None) -> QParams:
    """Scales (and zero points) for values in [low, high], with low ≤ 0 ≤ high, tensors of the scales' shape."""
    if encoding.symmetric:
        return QParams(stored_scale(torch.maximum(-low, high) / _symmetric_range(encoding), scale_dtype))
    least, greatest = code_range(encoding)
    scale = stored_scale((high - low) / (greatest - least), scale_dtype)
    zero_point = (-low / scale.to(low.dtype)).round().clamp(least, greatest)
    return QParams(scale, zero_point.to(torch.uint8))


def _symmetric_range(encoding: Encoding) -> float:
    """The value, in scales, that the greatest magnitude maps to."""
    if isinstance(encoding.format, Int):
        return 1.0 if encoding.bits == 1 else 2.0 ** (encoding.bits - 1) - 0.5
    return float(torch.finfo(FLOAT_STORAGE[encoding.format]).max)


def stored_scale(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`scale` kept away from zero and in the dtype that it is stored in."""
    return scale.clamp_min(TINY) if dtype != torch.float16 else scale.clamp(TINY_HALF, 65504.0).to(dtype)


def nearest(x: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: Encoding) -> Tensor:
    """The codes nearest to `x`, in its dtype: round half to even, then clamp. `scale` and `zero_point` are of that dtype and broadcast."""
    if encoding.bits == 1:
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    scaled = x / scale
    if isinstance(encoding.format, Float):
        storage = storage_dtype(encoding)
        limit = torch.finfo(storage).max
        return scaled.clamp_(-limit, limit).to(storage).to(x.dtype)
    codes = scaled.round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(*code_range(encoding))


def restored(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values of codes as `nearest` gives them: `(q − z) · s`."""
    return codes * scale if zero_point is None else (codes - zero_point).mul_(scale)


def quantize(x: Tensor, qparams: QParams, encoding: Encoding) -> Tensor:
    """Codes of `x` in `storage_dtype(encoding)`: round half to even, then clamp."""
    x = x.to(compute_dtype(x.dtype))
    return nearest(x, *_expanded(qparams, encoding, tuple(x.shape), x.dtype), encoding).to(storage_dtype(encoding))


def dequantize(codes: Tensor, qparams: QParams, encoding: Encoding, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `codes` stand for: `(q − z) · s`, in `dtype`."""
    compute = compute_dtype(dtype)
    return restored(codes.to(compute), *_expanded(qparams, encoding, tuple(codes.shape), compute)).to(dtype)


def _expanded(qparams: QParams, encoding: Encoding, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that broadcast against a tensor of `shape`."""
    z = qparams.zero_point
    return expand(qparams.scale.to(dtype), encoding, shape), None if z is None else expand(z.to(dtype), encoding, shape)


def fake_quantize(x: Tensor, encoding: Encoding, qparams: QParams | None = None) -> Tensor:
    """`x` after one round trip through `encoding`, with the extremes' scales if no `qparams` are given."""
    qparams = choose_qparams(x, encoding) if qparams is None else qparams
    return dequantize(quantize(x, qparams, encoding), qparams, encoding, x.dtype)


def pack(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes as a stream of bits along the last axis, least significant first: uint8 `[..., ceil(n · bits / 8)]`."""
    bits, (least, _) = encoding.bits, code_range(encoding)
    unsigned = (codes.to(torch.int16) + 1) // 2 if bits == 1 else codes.to(torch.int16) - least
    planes = (unsigned.unsqueeze(-1) >> torch.arange(bits, dtype=torch.int16)) & 1
    stream = planes.flatten(-2).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    stream = stream.reshape(*stream.shape[:-1], -1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, encoding: Encoding, size: int) -> Tensor:
    """The exact inverse of `pack`; `size` is the number of codes along the last axis."""
    bits, (least, _) = encoding.bits, code_range(encoding)
    stream = ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)[..., : size * bits]
    planes = stream.reshape(*stream.shape[:-1], size, bits).to(torch.int16)
    unsigned = (planes << torch.arange(bits, dtype=torch.int16)).sum(-1, dtype=torch.int16)
    codes = unsigned * 2 - 1 if bits == 1 else unsigned + least
    return codes.to(storage_dtype(encoding))
