"""Keys and values in few bits: what `quantize_cache` writes in three operators, and reads in two, in one each.

    fxpress::quantize_cache(x, encoding) -> (packed, scale, zero)
    fxpress::dequantize_cache(packed, scale, zero?, encoding, dtype) -> x

`packed` is in the layout of `ir.packing`, and `encoding` a dynamic one whose blocks lie along the last axis: `u4[1,32]dynamic`.
"""

import torch
from torch import Tensor

from ir import numerics, packing
from ir.encoding import Encoding
from ir.numerics import QParams

Kept = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("fxpress::quantize_cache", mutates_args=(), device_types="cpu")
def quantize_cache(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> Kept:
    """Codes of `x [..., width]` in bytes, uint8 `[..., width / per_byte]`, with scales and zero points (uint8, zeros if symmetric)."""
    stated = Encoding.parse(encoding)
    qparams = numerics.choose_qparams(x, stated, scale_dtype)
    zero = torch.zeros_like(qparams.scale, dtype=torch.uint8) if qparams.zero_point is None else qparams.zero_point
    return packing.pack(numerics.quantize(x, qparams, stated), stated), qparams.scale, zero


@quantize_cache.register_fake
def _(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> Kept:
    stated = Encoding.parse(encoding)
    block = stated.block[-1]
    count = 1 if block == -1 else -(-x.shape[-1] // block)
    packed = x.new_empty([*x.shape[:-1], x.shape[-1] // packing.per_byte(stated)], dtype=torch.uint8)
    scale = x.new_empty([*x.shape[:-1], count], dtype=scale_dtype or numerics.compute_dtype(x.dtype))
    return packed, scale, torch.empty_like(scale, dtype=torch.uint8)


@quantize_cache.register_kernel("cuda")
def _(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> Kept:
    from backends.triton_gpu.kernels import cache

    return cache.quantize_cache(x, encoding, scale_dtype)


@torch.library.custom_op("fxpress::dequantize_cache", mutates_args=(), device_types="cpu")
def dequantize_cache(packed: Tensor, scale: Tensor, zero: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    """The values `[..., width]` of codes that `quantize_cache` packed, in `dtype`."""
    stated = Encoding.parse(encoding)
    return numerics.dequantize(packing.unpack(packed, stated), QParams(scale, None if stated.symmetric else zero), stated, dtype)


@dequantize_cache.register_fake
def _(packed: Tensor, scale: Tensor, zero: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    return packed.new_empty([*packed.shape[:-1], packed.shape[-1] * packing.per_byte(Encoding.parse(encoding))], dtype=dtype)


@dequantize_cache.register_kernel("cuda")
def _(packed: Tensor, scale: Tensor, zero: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    from backends.triton_gpu.kernels import cache

    return cache.dequantize_cache(packed, scale, zero, encoding, dtype)


QUANTIZE_CACHE = torch.ops.fxpress.quantize_cache.default
DEQUANTIZE_CACHE = torch.ops.fxpress.dequantize_cache.default
