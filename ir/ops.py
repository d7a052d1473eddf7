"""The operators that a quantized graph adds to aten, with eager bodies that define what they mean.

    fxpress::choose_qparams(x, encoding, scale_dtype?) -> (scale, zero_point)   dynamic encodings: scales from the tensor itself
    fxpress::quantize(x, scale, zero_point?, encoding) -> codes
    fxpress::dequantize(codes, scale, zero_point?, encoding, dtype) -> x
    fxpress::pack(codes, encoding) -> packed                                 several codes to a byte, for caches
    fxpress::unpack(packed, encoding) -> codes
    fxpress::hadamard(x, block) -> y                                         an online rotation of the last axis, block by block

`encoding` is an `Encoding`'s text form. Importing this module registers the operators.
"""

from typing import Any

import torch
from torch import Tensor

from ir import hadamard as matrices
from ir import numerics, packing
from ir.encoding import Encoding
from ir.errors import OptionError
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
def choose_qparams(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points from the extremes of every block of `x`; the zero points of a symmetric encoding are zeros.

    Args:
        scale_dtype: in which scales are kept; the compute dtype of `x` if None.
    """
    qparams = numerics.choose_qparams(x, Encoding.parse(encoding), scale_dtype)
    zero_point = torch.zeros_like(qparams.scale, dtype=torch.uint8) if qparams.zero_point is None else qparams.zero_point
    return qparams.scale, zero_point


@choose_qparams.register_fake
def _(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    blocks = Encoding.parse(encoding)
    full = (blocks.block[0],) * (x.ndim - len(blocks.block)) + blocks.block[-x.ndim :]
    # Symbolic sizes: an axis that is one block has one scale, an axis of blocks of one has its own size.
    shape = [1 if block == -1 else size if block == 1 else -(-size // block) for size, block in zip(x.shape, full, strict=True)]
    return x.new_empty(shape, dtype=scale_dtype or numerics.compute_dtype(x.dtype)), x.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("fxpress::pack", mutates_args=())
def pack(codes: Tensor, encoding: str) -> Tensor:
    """Codes `[..., n]` side by side in bytes, uint8 `[..., n / per_byte]`; see `ir.packing`."""
    return packing.pack(codes, Encoding.parse(encoding))


@pack.register_fake
def _(codes: Tensor, encoding: str) -> Tensor:
    parsed = Encoding.parse(encoding)
    if reason := packing.misfit(codes, parsed):
        raise OptionError(reason)
    return codes.new_empty([*codes.shape[:-1], codes.shape[-1] // packing.per_byte(parsed)], dtype=torch.uint8)


@torch.library.custom_op("fxpress::unpack", mutates_args=())
def unpack(packed: Tensor, encoding: str) -> Tensor:
    """The codes that `pack` took."""
    return packing.unpack(packed, Encoding.parse(encoding))


@unpack.register_fake
def _(packed: Tensor, encoding: str) -> Tensor:
    parsed = Encoding.parse(encoding)
    return packed.new_empty([*packed.shape[:-1], packed.shape[-1] * packing.per_byte(parsed)], dtype=numerics.storage_dtype(parsed))


@torch.library.custom_op("fxpress::hadamard", mutates_args=())
def hadamard(x: Tensor, block: int) -> Tensor:
    """`x [..., channels]` with every run of `block` channels times the orthonormal Hadamard matrix of that order; shape and dtype of `x`.

    The matrix is symmetric: the operator is its own inverse and its own gradient.

    Raises:
        OptionError: `block` does not divide the channels, or no matrix of that order can be made; names the nearest that can.
    """
    return matrices.transform(x, block)


@hadamard.register_fake
def _(x: Tensor, block: int) -> Tensor:
    if reason := matrices.misfit(x.shape[-1], block):
        raise OptionError(reason)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _hadamard_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return hadamard(gradient, ctx.block), None


hadamard.register_autograd(_hadamard_gradient, setup_context=_keep_block)

QUANTIZE = torch.ops.fxpress.quantize.default
DEQUANTIZE = torch.ops.fxpress.dequantize.default
CHOOSE_QPARAMS = torch.ops.fxpress.choose_qparams.default
PACK = torch.ops.fxpress.pack.default
UNPACK = torch.ops.fxpress.unpack.default
HADAMARD = torch.ops.fxpress.hadamard.default
