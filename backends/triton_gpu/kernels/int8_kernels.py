"""The kernel of `fxpress::packed_linear_int8`: weights of 1 to 8 bits times int8 activations, on integer matrix units.

The weight is the first operand, `acc[N, M] = W[N, K] Xᵀ[K, M]`, so that a few tokens fill its short side. Its codes come centred and
scaled by `2^(8−b)` from `int8_operand`, a factor that leaves in the epilogue with the scales. What the centre c leaves of an offset, and
zero points, are integers, too:

    Σ (q − z_x)(u − z) = Σ q (u − c) − (z − c)(Σ q − z_x · count) − z_x Σ (u − c)

`Σ q` and `Σ (u − c)` are products with ones. All sums over a group are exact. Activations' scales, and weights' that are one a channel,
stay out of the loop. A long `K` is split: parts go to a buffer that a second kernel adds up in one order.
"""

import triton
import triton.language as tl

from backends.triton_gpu.kernels.int8_operand import LANES, block_words, opens, operand, slots
from backends.triton_gpu.kernels.rounding import cast

ONES = tl.constexpr(8)  # columns of the ones that sum weights


@triton.jit
def _corrected(part, seen, weighed, delta, z_x, count, CENTRED: tl.constexpr, INPUT_ZERO: tl.constexpr):
    """`part`, `2^(8−b) Σ q (u − c)`, with what zero points add to it taken off."""
    if INPUT_ZERO:
        part -= tl.max(weighed, 1)[:, None] * z_x[None, :]
        seen -= z_x[None, :] * tl.maximum(count, 0)
    if not CENTRED:
        part -= delta[:, None] * seen
    return part


@triton.jit
def _ones(k, K, EVEN: tl.constexpr):
    """Ones where there are activations, int8 `[32, ONES]`."""
    if EVEN:
        return tl.full((LANES, ONES), 1, tl.int8)
    return tl.broadcast_to((k + tl.arange(0, LANES) < K)[:, None], (LANES, ONES)).to(tl.int8)


@triton.jit
def _deltas(zero, at, DELTA: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, BLOCK_N: tl.constexpr):
    """`2^(8−b) (z − c)` of every channel."""
    if ZERO:
        return (tl.load(zero + at).to(tl.int32) << (8 - BITS)) + DELTA
    return tl.full((BLOCK_N,), DELTA, tl.int32)


@triton.jit
def _finished(value, input_scale, bias, m, n, BITS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr):
    """`value`, which has its weights' scales, times the activations' and `2^(b−8)`, plus the bias."""
    value *= tl.load(input_scale + m * TOKENS).to(tl.float32) * 2.0 ** (BITS - 8)
    if BIAS:
        value += tl.load(bias + n).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["M", "steps"])
def linear_kernel(
    codes,
    input_scale,
    input_zero,
    plane0,
    plane1,
    plane2,
    scale,
    zero,
    bias,
    out,
    M,
    N,
    K,
    steps,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one scale a channel
    FLUSH: tl.constexpr,  # runs of 32 k after which the scales of groups apply
    DELTA: tl.constexpr,  # of the offset, or what turns a zero point into one
    ZERO: tl.constexpr,
    CENTRED: tl.constexpr,  # the flip took all of the offset off
    INPUT_ZERO: tl.constexpr,
    TOKENS: tl.constexpr,  # 1: a scale a token, 0: one in all
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # steps fill K
    SPLIT: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of `[N, M]`, by `steps` steps over `32 · RUNS` of k each; with `SPLIT`, its sum without the scales of activations."""
    lane = tl.arange(0, LANES)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    near_n, near_m = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    at = near_n[:, None] * LANES + lane[None, :]
    x = codes + near_m[None, :].to(tl.int64) * K + lane[:, None]
    first = tl.program_id(2) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, LANES * RUNS))
    z_x = near_m
    if INPUT_ZERO:
        z_x = tl.load(input_zero + near_m * TOKENS).to(tl.int32)
    ones_n = tl.full((BLOCK_N, LANES), 1, tl.int8)
    if GROUP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        seen = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        weighed = tl.zeros((BLOCK_N, ONES), tl.int32)
    for step in range(first, last):
        for run in tl.static_range(RUNS):
            k = (step * RUNS + run) * LANES
            if opens(PLANES, 0, run):
                words0 = block_words(plane0, at, step, K, N, run, RUNS, slots(PLANES, 0), EVEN)
            if run == 0:
                words1, words2 = words0, words0
            if opens(PLANES, 1, run):
                words1 = block_words(plane1, at, step, K, N, run, RUNS, slots(PLANES, 1), EVEN)
            if opens(PLANES, 2, run):
                words2 = block_words(plane2, at, step, K, N, run, RUNS, slots(PLANES, 2), EVEN)
            w = operand(words0, words1, words2, run, BITS, PLANES)
            xs = tl.load(x + k) if EVEN else tl.load(x + k, mask=(k + lane < K)[:, None], other=0)
            if GROUP and run % FLUSH == 0:
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
                seen = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
                weighed = tl.zeros((BLOCK_N, ONES), tl.int32)
            part = tl.dot(w, xs, part, out_dtype=tl.int32)
            if not CENTRED:
                seen = tl.dot(ones_n, xs, seen, out_dtype=tl.int32)
            if INPUT_ZERO:
                weighed = tl.dot(w, _ones(k, K, EVEN), weighed, out_dtype=tl.int32)
            if GROUP and run % FLUSH == FLUSH - 1:
                g = tl.minimum(k, K - 1) // GROUP
                delta = _deltas(zero, g * N + near_n, DELTA, BITS, ZERO, BLOCK_N)
                count = tl.minimum(K - k + (FLUSH - 1) * LANES, FLUSH * LANES)
                exact = _corrected(part, seen, weighed, delta, z_x, count, CENTRED, INPUT_ZERO)
                total += exact.to(tl.float32) * tl.load(scale + g * N + near_n).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    if not GROUP:
        delta = _deltas(zero, near_n, DELTA, BITS, ZERO, BLOCK_N)
        count = tl.minimum(last * RUNS * LANES, K) - first * RUNS * LANES
        part = _corrected(part, seen, weighed, delta, z_x, count, CENTRED, INPUT_ZERO)
    if SPLIT:
        at_out = (tl.program_id(2) * M + m[None, :]).to(tl.int64) * N + n[:, None]
        tl.store(out + at_out, total if GROUP else part, mask=inside)
    else:
        value = total if GROUP else part.to(tl.float32) * tl.load(scale + near_n).to(tl.float32)[:, None]
        value = _finished(value, input_scale, bias, near_m[None, :], near_n[:, None], BITS, TOKENS, BIAS)
        tl.store(out + m[None, :].to(tl.int64) * N + n[:, None], cast(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "splits"])
def sum_kernel(
    parts,
    input_scale,
    scale,
    bias,
    out,
    M,
    N,
    splits,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `linear_kernel` leaves in `parts [splits, M, N]`, added up, integers exactly, and scaled: `BLOCK` elements of `out [M, N]`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M * N
    total = tl.zeros((BLOCK,), tl.float32 if GROUP else tl.int64)
    for split in range(splits):
        total += tl.load(parts + split * M.to(tl.int64) * N + at, mask=inside, other=0).to(total.dtype)
    near = tl.where(inside, at, 0)
    n = near % N
    value = total if GROUP else total.to(tl.float32) * tl.load(scale + n).to(tl.float32)
    value = _finished(value, input_scale, bias, near // N, n, BITS, TOKENS, BIAS)
    tl.store(out + at, cast(value, out.dtype.element_ty), mask=inside)
