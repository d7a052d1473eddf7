"""Codes of activations whose scale is known before.

    fxpress::quantize_static(x, scale, zero?, bits) -> codes

It has no kernel: its body runs on every device.
"""

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding, Int


@torch.library.custom_op("fxpress::quantize_static", mutates_args=())
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """`round(x / scale) + zero`, clamped to −2^(bits−1) … 2^(bits−1)−1: int8, the shape of `x`; `scale` and `zero` have one element."""
    dtype = numerics.compute_dtype(x.dtype)
    z = None if zero is None else zero.to(dtype)
    return numerics.nearest(x.to(dtype), scale.to(dtype), z, Encoding(Int(bits), (-1,))).to(torch.int8)


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


QUANTIZE_STATIC = torch.ops.fxpress.quantize_static.default
