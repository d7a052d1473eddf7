"""Tiles of a packed weight `[N, K]`: how kernels find the words of a span of `k`, and take them apart into 32 columns a tile."""

import triton
from triton import language as tl

from backends.triton_gpu import layout

LANES = tl.constexpr(layout.LANES)


@triton.jit
def first_words(plane, rows, span, N, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Where the words of a plane begin for a span: `[BN, LANES]`."""
    return plane + span.to(tl.int64) * (N * (SPAN * WIDTH // 16)) + rows[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def span_words(at, inner: tl.constexpr, span, N, K, WIDTH: tl.constexpr, SPAN: tl.constexpr, EVEN: tl.constexpr):
    """The words of one plane that make a span, `[BN, LANES]` each."""
    found = ()
    COUNT: tl.constexpr = SPAN * WIDTH // (16 * LANES)
    for r in tl.static_range(COUNT):
        here = at + (inner * COUNT + r) * LANES * N
        if EVEN:
            found = found + (tl.load(here),)
        else:
            found = found + (tl.load(here, mask=(span * COUNT + r) * (16 * LANES // WIDTH) < K, other=0),)
    return found


@triton.jit
def twin(words, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, OFFSET: tl.constexpr, SPAN: tl.constexpr):
    """What the assembly computes, in float32: for the interpreter."""
    found = ()
    for c in tl.static_range(SPAN // LANES):
        u = words[0].to(tl.float32) * 0 - OFFSET
        first, weight = 0, 0
        for width in (W0, W1, W2):
            if width:
                per = 16 // width
                word = words[first + c // per].to(tl.int32)
                u += (((word >> (c % per * width)) & (2**width - 1)) << weight).to(tl.float32)
                first += SPAN // (per * LANES)
                weight += width
        found = found + (u,)
    return found


@triton.jit
def taken_apart(inputs, T: tl.constexpr, CHUNKS: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """The tiles of a span by `kernels.codes`."""
    if CHUNKS == 2:
        return tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (T.value,) * 2, is_pure=True, pack=2)
    elif CHUNKS == 4:
        return tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (T.value,) * 4, is_pure=True, pack=2)
    elif CHUNKS == 8:
        return tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (T.value,) * 8, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (T.value,) * 16, is_pure=True, pack=2)


@triton.jit
def beside(tiles, FIRST: tl.constexpr, DEPTH: tl.constexpr):
    """`DEPTH` tiles `[BN, LANES]` as one, `[BN, DEPTH · LANES]`: without moving anything, since a product's operand is spread so."""
    if DEPTH == 1:
        return tiles[FIRST]
    elif DEPTH == 2:
        pair = tl.join(tiles[FIRST], tiles[FIRST + 1])
        return tl.reshape(tl.permute(pair, (0, 2, 1)), (pair.shape[0], 2 * LANES))
    else:
        even, odd = tl.join(tiles[FIRST], tiles[FIRST + 2]), tl.join(tiles[FIRST + 1], tiles[FIRST + 3])
        four = tl.join(even, odd)
        return tl.reshape(tl.permute(four, (0, 2, 3, 1)), (four.shape[0], 4 * LANES))
