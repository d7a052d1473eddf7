"""What happens to activations before an integer product: rotation, normalization and the choice of codes, token by token, in one step.

    fxpress::quantize_rows(x, encoding) -> (codes, scale, zero)
    fxpress::hadamard_quantize_rows(x, block, encoding) -> (codes, scale, zero)
    fxpress::norm_quantize_rows(x, weight?, eps, encoding) -> (codes, scale, zero)

`encoding` is one of a dynamic activation, one scale a token: `i8[1,-1]dynamic`, `u8[1,-1]dynamic*0.9`, `i4[1,-1]dynamic`. Codes come as
int8 whatever their width: unsigned ones less 128, and so do their zero points.
"""

import torch
from torch import Tensor

from ir import hadamard, numerics, ops
from ir.encoding import Encoding

SHIFT = 128  # of unsigned codes, to be int8
Rows = tuple[Tensor, Tensor, Tensor]


def _rounded(x: Tensor, encoding: str) -> Rows:
    stated = Encoding.parse(encoding)
    qparams = numerics.choose_qparams(x, stated)
    codes = numerics.quantize(x, qparams, stated)
    if qparams.zero_point is None:
        return codes, qparams.scale, torch.zeros_like(qparams.scale, dtype=torch.int8)
    return signed(codes), qparams.scale, signed(qparams.zero_point)


def signed(codes: Tensor) -> Tensor:
    """Unsigned codes of 8 bits, less 128, as int8."""
    return (codes.to(torch.int16) - SHIFT).to(torch.int8)


def _like(x: Tensor) -> Rows:
    one = [*x.shape[:-1], 1]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(one, dtype=torch.float32), x.new_empty(one, dtype=torch.int8)


@torch.library.custom_op("fxpress::quantize_rows", mutates_args=(), device_types="cpu")
def quantize_rows(x: Tensor, encoding: str) -> Rows:
    """Codes of `x [..., K]`, int8 of the same shape, their scales `[..., 1]`, float32, and zero points, int8."""
    return _rounded(x, encoding)


@quantize_rows.register_fake
def _(x: Tensor, encoding: str) -> Rows:
    return _like(x)


@quantize_rows.register_kernel("cuda")
def _(x: Tensor, encoding: str) -> Rows:
    from backends.triton_gpu.kernels import rows

    return rows.quantize_rows(x, encoding)


@torch.library.custom_op("fxpress::hadamard_quantize_rows", mutates_args=(), device_types="cpu")
def hadamard_quantize_rows(x: Tensor, block: int, encoding: str) -> Rows:
    """`quantize_rows` of `fxpress::hadamard(x, block)`, whose result is rounded to the dtype of `x` first."""
    return _rounded(hadamard.transform(x, block), encoding)


@hadamard_quantize_rows.register_fake
def _(x: Tensor, block: int, encoding: str) -> Rows:
    return _like(x)


@hadamard_quantize_rows.register_kernel("cuda")
def _(x: Tensor, block: int, encoding: str) -> Rows:
    from backends.triton_gpu.kernels import hadamard

    return hadamard.hadamard_quantize_rows(x, block, encoding)


@torch.library.custom_op("fxpress::norm_quantize_rows", mutates_args=(), device_types="cpu")
def norm_quantize_rows(x: Tensor, weight: Tensor | None, eps: float, encoding: str) -> Rows:
    """`quantize_rows` of `rms_norm(x, weight, eps)` over the last axis, whose result is rounded to the dtype of `x` first."""
    return _rounded(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps), encoding)


@norm_quantize_rows.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, encoding: str) -> Rows:
    return _like(x)


@norm_quantize_rows.register_kernel("cuda")
def _(x: Tensor, weight: Tensor | None, eps: float, encoding: str) -> Rows:
    from backends.triton_gpu.kernels import rows

    return rows.norm_quantize_rows(x, weight, eps, encoding)


@ops.hadamard.register_kernel("cuda")
def _(x: Tensor, block: int) -> Tensor:
    from backends.triton_gpu.kernels import hadamard

    return hadamard.hadamard(x, block)


QUANTIZE_ROWS = torch.ops.fxpress.quantize_rows.default
HADAMARD_QUANTIZE_ROWS = torch.ops.fxpress.hadamard_quantize_rows.default
NORM_QUANTIZE_ROWS = torch.ops.fxpress.norm_quantize_rows.default
