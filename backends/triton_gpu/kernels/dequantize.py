"""Packed weights as numbers, for products of so many tokens that taking codes apart for every tile would cost more."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from backends.triton_gpu import layout
from backends.triton_gpu.kernels import codes
from backends.triton_gpu.kernels.interpreter import INTERPRETED
from backends.triton_gpu.kernels.launch import written
from backends.triton_gpu.kernels.tiles import LANES, first_words, span_words, taken_apart, twin

ROWS = 32  # channels of a program


@triton.jit
def dequantize_kernel(
    plane0, plane1, plane2, scale, zero, out, N, K,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`[BN, SPAN]` of a weight; the scale of 32 columns is one."""
    n, span = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(0)
    rows = n if EVEN else tl.minimum(n, N - 1)
    words = span_words(first_words(plane0, rows, span, N, W0, SPAN), 0, span, N, K, W0, SPAN, EVEN)
    if W1:
        words = words + span_words(first_words(plane1, rows, span, N, W1, SPAN), 0, span, N, K, W1, SPAN, EVEN)
    if W2:
        words = words + span_words(first_words(plane2, rows, span, N, W2, SPAN), 0, span, N, K, W2, SPAN, EVEN)
    if INTERPRETED:
        tiles = twin(words, W0, W1, W2, OFFSET, SPAN)
    else:
        tiles = taken_apart(words, tl.float16, SPAN // LANES, ASM, CONSTRAINTS)
    for c in tl.static_range(SPAN // LANES):
        k = span * SPAN + c * LANES
        g = k // GROUP
        if not EVEN:
            g = tl.minimum(g, tl.cdiv(K, GROUP) - 1)
        w = tiles[c].to(tl.float32)
        if ZERO:
            w -= (tl.load(zero + g * N + rows).to(tl.float32) - OFFSET)[:, None]
        w *= tl.load(scale + g * N + rows).to(tl.float32)[:, None]
        columns = k + tl.arange(0, LANES)
        at = out + n.to(tl.int64)[:, None] * K + columns[None, :]
        if EVEN:
            tl.store(at, w.to(out.dtype.element_ty))
        else:
            tl.store(at, w.to(out.dtype.element_ty), mask=(n < N)[:, None] & (columns < K)[None, :])


def constants(bits: int, n: int, k: int, group: int, offset: float, has_zero: bool) -> dict[str, object]:
    """The constant arguments of `dequantize_kernel`."""
    stored = 2.0 ** (bits - 1) if has_zero else offset
    assembly, constraints = codes.assembly(bits, "float16", stored)
    widths = (*layout.PLANES[bits], 0, 0)
    return {
        "W0": widths[0], "W1": widths[1], "W2": widths[2], "SPAN": codes.span(bits), "GROUP": group, "OFFSET": stored, "ASM": assembly,
        "CONSTRAINTS": constraints, "ZERO": has_zero, "BN": ROWS, "EVEN": n % ROWS == 0 and k % codes.span(bits) == 0,
    }  # fmt: skip


def dequantize(
    planes: list[Tensor], scale: Tensor, zero: Tensor | None, bits: int, group: int, offset: float, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight `[N, K]` in `dtype`, of `columns` = K."""
    N, K = scale.shape[1], columns
    out = torch.empty(N, K, dtype=written(dtype), device=scale.device)
    given = [*planes, planes[0], planes[0]][:3]
    grid = (triton.cdiv(K, codes.span(bits)), triton.cdiv(N, ROWS))
    with torch.cuda.device_of(out):
        dequantize_kernel[grid](
            *given, scale, scale if zero is None else zero, out, N, K, **constants(bits, N, K, group, offset, zero is not None), num_warps=4
        )
    return out.to(dtype)
