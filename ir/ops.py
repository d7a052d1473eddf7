"""The operators that a quantized graph adds to aten, with eager bodies that define what they mean.

    fxpress::choose_qparams(x, encoding) -> (scale, zero_point)              dynamic encodings: scales from the tensor itself
    fxpress::quantize(x, scale, zero_point?, encoding) -> codes
    fxpress::dequantize(codes, scale, zero_point?, encoding, dtype) -> x

`encoding` is an `Encoding`'s text form. Importing this module registers the operators.
"""

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.numerics import QParams


@torch.library.custom_op("fxpress::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: str) -> Tensor:
    """Codes of `x`, same shape, in the encoding's storage dtype."""
    return numerics.quantize(x, QParams(scale, zero_point), Encoding.parse(encoding))


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: str) -> Tensor:
    return torch.empty_like(x, dtype=numerics.storage_dtype(Encoding.parse(encoding)), memory_format=torch.contiguous_format)


@torch.library.custom_op("fxpress::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    """Values of `codes`, same shape, in `dtype`."""
    return numerics.dequantize(codes, QParams(scale, zero_point), Encoding.parse(encoding), dtype)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("fxpress::choose_qparams", mutates_args=())
def choose_qparams(x: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
    """Scales and zero points from the extremes of every block of `x`; the zero points of a symmetric encoding are zeros."""
    qparams = numerics.choose_qparams(x, Encoding.parse(encoding))
    zero_point = torch.zeros_like(qparams.scale, dtype=torch.uint8) if qparams.zero_point is None else qparams.zero_point
    return qparams.scale, zero_point


@choose_qparams.register_fake
def _(x: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
    blocks = Encoding.parse(encoding)
    full = (blocks.block[0],) * (x.ndim - len(blocks.block)) + blocks.block[-x.ndim :]
    # Symbolic sizes: an axis that is one block has one scale, an axis of blocks of one has its own size.
    shape = [1 if block == -1 else size if block == 1 else -(-size // block) for size, block in zip(x.shape, full, strict=True)]
    return x.new_empty(shape, dtype=numerics.compute_dtype(x.dtype)), x.new_empty(shape, dtype=torch.uint8)


QUANTIZE = torch.ops.fxpress.quantize.default
DEQUANTIZE = torch.ops.fxpress.dequantize.default
CHOOSE_QPARAMS = torch.ops.fxpress.choose_qparams.default
