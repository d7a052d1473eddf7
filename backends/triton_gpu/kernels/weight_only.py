"""Linears of floating-point activations with packed weights: operands swapped, `acc[N, M] = W[N, K] · x[M, K]^T`.

Weights are then the operand that a matrix instruction takes from registers, where their codes were taken apart, and M is padded to 8 only.
A scale multiplies sums of a group (`AFTER`), which costs `M` multiplications a group and row, or weights before the product (`BEFORE`),
or all sums at the end, if one scale is all of a row's. Zero points are one constant in what takes codes apart; what a tensor of them
differs from it is subtracted from weights, or for few tokens (`SUMS`) times the sum of the group's activations from the group's sum.
"""

from functools import lru_cache
from math import gcd

import torch
import triton
from torch import Tensor
from triton import language as tl

from backends.triton_gpu import layout, select
from backends.triton_gpu.kernels import codes
from backends.triton_gpu.kernels.dequantize import dequantize
from backends.triton_gpu.kernels.interpreter import INTERPRETED
from backends.triton_gpu.kernels.launch import arch_of, written
from backends.triton_gpu.kernels.tiles import LANES, beside, first_words, span_words, taken_apart, twin
from backends.triton_gpu.select import Config
from ir.errors import OptionError

END, AFTER, BEFORE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_choose = lru_cache(maxsize=4096)(select.choose)  # a launch asks each time
SUMMED = 512  # outputs of a program that sums parts


@triton.jit(do_not_specialize=["M", "steps"])
def linear_kernel(
    x, plane0, plane1, plane2, scale, zero, bias, out, M, N, K, steps,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, SPANS: tl.constexpr, DEPTH: tl.constexpr,
    SCALE: tl.constexpr, OF_PART: tl.constexpr, SUMS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of `x W^T`: of `steps` steps of `SPANS · SPAN` consecutive `k`, those that the third axis of the grid says.

    `OF_PART` tiles of 32 `k` are summed before a scale is applied: they divide groups and spans.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rows = n if EVEN else tl.minimum(n, N - 1)
    CHUNKS: tl.constexpr = SPAN // LANES
    start = tl.program_id(2) * steps
    tokens = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + (start * SPANS * SPAN + tl.arange(0, DEPTH * LANES))[:, None]
    at0 = first_words(plane0, rows, start * SPANS, N, W0, SPAN)
    if W1:
        at1 = first_words(plane1, rows, start * SPANS, N, W1, SPAN)
    if W2:
        at2 = first_words(plane2, rows, start * SPANS, N, W2, SPAN)
    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BN, BM), tl.float32)
    ones = tl.full((BN, DEPTH * LANES), 1, tl.float32 if INTERPRETED else x.dtype.element_ty)
    for step in range(start, tl.minimum(start + steps, tl.cdiv(K, SPAN * SPANS))):
        for inner in tl.static_range(SPANS):
            span = step * SPANS + inner
            scales, zeros = (), ()
            if SCALE != END or (ZERO and not SUMS):
                for p in tl.static_range(CHUNKS // OF_PART):
                    g = (span * SPAN + p * OF_PART * LANES) // GROUP
                    if not EVEN:
                        g = tl.minimum(g, tl.cdiv(K, GROUP) - 1)
                    scales = scales + (tl.load(scale + g * N + rows),)
                    if ZERO:
                        zeros = zeros + (tl.load(zero + g * N + rows).to(tl.float32) - OFFSET,)
            words = span_words(at0, inner, span, N, K, W0, SPAN, EVEN)
            if W1:
                words = words + span_words(at1, inner, span, N, K, W1, SPAN, EVEN)
            if W2:
                words = words + span_words(at2, inner, span, N, K, W2, SPAN, EVEN)
            if INTERPRETED:
                tiles = twin(words, W0, W1, W2, OFFSET, SPAN)
            else:
                tiles = taken_apart(words, x.dtype.element_ty, CHUNKS, ASM, CONSTRAINTS)
            part = tl.zeros((BN, BM), tl.float32)
            for c in tl.static_range(0, CHUNKS, DEPTH):
                if EVEN:
                    xs = tl.load(tokens + (inner * SPAN + c * LANES))
                else:
                    k = span * SPAN + c * LANES + tl.arange(0, DEPTH * LANES)
                    xs = tl.load(tokens + (inner * SPAN + c * LANES), mask=(k < K)[:, None], other=0.0)
                w = beside(tiles, c, DEPTH)
                if INTERPRETED:
                    xs = xs.to(tl.float32)
                if ZERO and not SUMS:
                    w = w - zeros[c // OF_PART].to(w.dtype)[:, None]
                if SCALE == BEFORE:
                    w = w * scales[c // OF_PART].to(w.dtype)[:, None]
                if ZERO and SUMS:
                    sums = tl.dot(ones, xs, sums)
                if SCALE == AFTER:
                    part = tl.dot(w, xs, part)
                    if (c + DEPTH) % OF_PART == 0:
                        if ZERO and SUMS:
                            part -= sums * zeros[c // OF_PART][:, None]
                            sums = tl.zeros((BN, BM), tl.float32)
                        acc += part * scales[c // OF_PART].to(tl.float32)[:, None]
                        part = tl.zeros((BN, BM), tl.float32)
                else:
                    acc = tl.dot(w, xs, acc)
        tokens += SPANS * SPAN
        at0 += SPANS * N * (SPAN * W0 // 16)
        if W1:
            at1 += SPANS * N * (SPAN * W1 // 16)
        if W2:
            at2 += SPANS * N * (SPAN * W2 // 16)
    if SCALE == END:
        if ZERO and SUMS:
            acc -= sums * (tl.load(zero + rows).to(tl.float32) - OFFSET)[:, None]
        acc *= tl.load(scale + rows).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    at = out + m.to(tl.int64)[None, :] * N + n[:, None]
    if PARTIAL:
        at += tl.program_id(2).to(tl.int64) * M * N
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["MN"])
def sum_kernel(parts, bias, out, MN, N, SPLIT: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """`SPLIT` partial results, in their order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < MN
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * MN + at, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def constants(
    bits: int, dtype: torch.dtype, n: int, k: int, group: int, offset: float, has_zero: bool, has_bias: bool, config: Config
) -> dict[str, object]:
    """The constant arguments of `linear_kernel`."""
    span, whole = codes.span(bits), group >= k
    part = span if whole else gcd(group, span)
    stored = 2.0 ** (bits - 1) if has_zero else offset
    assembly, constraints = codes.assembly(bits, "bfloat16" if dtype == torch.bfloat16 else "float16", stored)
    widths = (*layout.PLANES[bits], 0, 0)
    step = span * config.spans
    return {
        "W0": widths[0], "W1": widths[1], "W2": widths[2], "SPAN": span, "GROUP": group, "OFFSET": stored, "ASM": assembly,
        "CONSTRAINTS": constraints, "ZERO": has_zero, "BIAS": has_bias and config.split == 1, "PARTIAL": config.split > 1,
        "BN": config.tile_n, "BM": config.tile_m, "SPANS": config.spans, "DEPTH": min(config.depth, part // layout.LANES),
        "SCALE": (END if whole else BEFORE if config.before else AFTER).value, "OF_PART": part // layout.LANES,
        "SUMS": config.tile_m == 8 and not config.before, "EVEN": k % step == 0 and n % config.tile_n == 0,
    }  # fmt: skip


def check_group(group: int, k: int) -> None:
    """That the kernels can multiply by scales of such groups.

    Raises:
        OptionError: `group` is neither a multiple of 32 nor all of `k`.
    """
    if group < k and group % layout.LANES:
        raise OptionError(
            f"no kernel multiplies by scales of {group} columns",
            remedy=f"quantize in groups of a multiple of {layout.LANES}, or one a row",
        )


def linear(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    config: Config | None = None,
) -> Tensor:
    """The launcher of `fxpress::packed_linear`, whose arguments it takes; activations of float32 go by a whole weight.

    Raises:
        OptionError: `group` is neither a multiple of 32 nor all of K.
    """
    K, N = x.shape[-1], scale.shape[1]
    check_group(group, K)
    rows = x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    config = config or _choose("packed_linear", bits, M, N, K, group, arch_of(x))
    if config.kernel == "dequantize" or x.dtype == torch.float32:
        weight = dequantize(planes, scale, zero, bits, group, offset, K, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    out = torch.empty(M, N, dtype=written(x.dtype), device=x.device)
    parts = out if config.split == 1 else torch.empty(config.split, M, N, dtype=torch.float32, device=x.device)
    steps = triton.cdiv(triton.cdiv(K, codes.span(bits) * config.spans), config.split)
    grid = (triton.cdiv(M, config.tile_m), triton.cdiv(N, config.tile_n), config.split)
    fixed = constants(bits, x.dtype, N, K, group, offset, zero is not None, bias is not None, config)
    given = [*planes, planes[0], planes[0]][:3]
    addend = scale if bias is None else bias
    with torch.cuda.device_of(x):
        linear_kernel[grid](
            rows, *given, scale, scale if zero is None else zero, addend, parts, M, N, K, steps,
            **fixed, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if config.split > 1:
            sum_kernel[(triton.cdiv(M * N, SUMMED),)](parts, addend, out, M * N, N, config.split, bias is not None, SUMMED, num_warps=4)
    return out.to(x.dtype).reshape(*x.shape[:-1], N)
