"""`quantize_rows` and `norm_quantize_rows`: a program reads a token once, and writes its codes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.triton_gpu.kernels.rounding import Codes, cast, codes_of, extremes, inverse_of, scale_of, zero_of
from backends.triton_gpu.ops.rows import SHIFT, Rows
from ir.encoding import Encoding
from ir.errors import OptionError

SHIFTED = tl.constexpr(SHIFT)


@triton.jit
def rows_kernel(
    x,
    weight,
    codes,
    scale,
    zero,
    K,
    eps,
    NORM: tl.constexpr,
    GAIN: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    REACH: tl.constexpr,
    CLIP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The codes of one token, `x [K]`, normalized first or not, with `BLOCK` the next power of two."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        value *= tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(value * value, 0), K.to(tl.float32)) + eps))
        if GAIN:
            value *= tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
        value = cast(value, x.dtype.element_ty).to(tl.float32)
    low, high = extremes(value, 0, SYMMETRIC)
    s = scale_of(low, high, REACH, CLIP, SYMMETRIC, False)
    z = zero_of(low, s, CLIP, GREATEST, SYMMETRIC)
    shift: tl.constexpr = 0 if SYMMETRIC else SHIFTED
    tl.store(codes + row * K + k, (codes_of(value, s, inverse_of(s), z, LEAST, GREATEST) - shift).to(tl.int8), mask=k < K)
    tl.store(scale + row, s)
    tl.store(zero + row, (z.to(tl.int32) - shift).to(tl.int8))


def quantize_rows(x: Tensor, encoding: str) -> Rows:
    """The kernel of the operator of this name: its codes, scales and zero points to the bit.

    Raises:
        OptionError: no kernel has such an encoding or dtype.
    """
    return _launch(x, None, 0.0, encoding, norm=False)


def norm_quantize_rows(x: Tensor, weight: Tensor | None, eps: float, encoding: str) -> Rows:
    """The kernel of the operator of this name; squares are summed in another order than in the eager body.

    Raises:
        OptionError: no kernel has such an encoding or dtype.
    """
    return _launch(x, weight, eps, encoding, norm=True)


def one_scale(encoding: str, dtype: torch.dtype) -> Codes:
    """What kernels must know of an encoding with one scale a token.

    Raises:
        OptionError: no kernel has such an encoding or dtype.
    """
    stated = Encoding.parse(encoding)
    if stated.block[-1] != -1:
        raise OptionError(f"rows have one scale each, as in i8[1,-1]dynamic, not those of {stated}")
    return Codes.of(stated, dtype)


def empty(x: Tensor) -> Rows:
    """Codes, scales and zero points to be written."""
    one = [*x.shape[:-1], 1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(one, dtype=torch.float32, device=x.device), torch.empty(one, dtype=torch.int8, device=x.device)


def warps_of(block: int) -> int:
    """Warps of a row: sixteen values a thread."""
    return min(16, max(1, block // 512))


def _launch(x: Tensor, weight: Tensor | None, eps: float, encoding: str, *, norm: bool) -> Rows:
    kind = one_scale(encoding, x.dtype)
    made = empty(x)
    if not x.numel():
        return made
    K = x.shape[-1]
    block = triton.next_power_of_2(K)
    rows_kernel[(x.numel() // K,)](
        x.contiguous(),
        x if weight is None else weight.contiguous(),
        *made,
        K,
        eps,
        NORM=norm,
        GAIN=weight is not None,
        LEAST=kind.least,
        GREATEST=kind.greatest,
        REACH=kind.reach,
        CLIP=kind.clip,
        SYMMETRIC=kind.symmetric,
        BLOCK=block,
        num_warps=warps_of(block),
        enable_fp_fusion=False,
    )
    return made
