"""Codes in planes of bytes as operands of integer matrix units.

A code of b bits is laid in the *high* bits of a byte, its planes side by side, and the top bit is flipped. As int8 that is
`2^(8−b) · (u − c)` with `c = 2^(b−1)`, whatever the width: one shift and one three-input logical operation per plane and four weights,
no sign extension, and one product where planes would take several. A sign, of one bit, has its centre in the middle, `c = ½`.
"""

import triton
import triton.language as tl

from backends.triton_gpu import layout
from backends.triton_gpu.kernels.interpreter import INTERPRETED

LANES = tl.constexpr(layout.LANES)


@triton.constexpr_function
def slots(planes, index):
    """Runs of 32 k in one block of a plane."""
    return 8 // planes[index]


@triton.constexpr_function
def opens(planes, index, run):
    """Whether a run of 32 k is the first of a block of a plane."""
    return index < len(planes) and run % (8 // planes[index]) == 0


@triton.constexpr_function
def _has(planes, index):
    return index < len(planes)


@triton.constexpr_function
def _shift(planes, index, run, bits):
    """How far left the codes of one run in a plane move, to their place in a byte."""
    width = planes[index]
    return 8 - bits + sum(planes[:index]) - run % (8 // width) * width


@triton.constexpr_function
def _mask(planes, index, bits):
    return (2 ** planes[index] - 1) << (8 - bits + sum(planes[:index]))


@triton.constexpr_function
def _flip(bits):
    return 0xC0 if bits == 1 else 0x80


@triton.constexpr_function
def _asm(shift, mask, other):
    """`((word << shift) & mask) ^ other` of four bytes: where a neighbour's bits arrive, the mask has none."""
    move = f"shl.b32 t, $1, {shift}" if shift >= 0 else f"shr.u32 t, $1, {-shift}"
    return f"{{ .reg .b32 t; {move}; lop3.b32 $0, t, {mask * 0x01010101}, {other}, 0x6A; }}"


@triton.constexpr_function
def _flip_asm(shift, mask, bits):
    return _asm(shift, mask, _flip(bits) * 0x01010101)


@triton.jit
def _moved(words, SHIFT: tl.constexpr):
    """Codes in the interpreter, which knows no assembly, wide enough to keep what a shift pushes out."""
    wide = words.to(tl.int32)
    return wide << SHIFT if SHIFT >= 0 else wide >> -SHIFT


@triton.jit
def _first(words, SHIFT: tl.constexpr, MASK: tl.constexpr, BITS: tl.constexpr):
    if INTERPRETED:
        return ((_moved(words, SHIFT) & MASK) ^ _flip(BITS)).to(tl.uint8)
    asm: tl.constexpr = _flip_asm(SHIFT, MASK, BITS)
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def _joined(words, other, SHIFT: tl.constexpr, MASK: tl.constexpr):
    if INTERPRETED:
        return (_moved(words, SHIFT) & MASK).to(tl.uint8) ^ other
    asm: tl.constexpr = _asm(SHIFT, MASK, "$2")
    return tl.inline_asm_elementwise(asm, "=r,r,r", [words, other], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def operand(words0, words1, words2, RUN: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """The codes of run `RUN` of 32 k, int8 `[BLOCK_N, 32]`, from the containers of the blocks of each plane that it lies in."""
    codes = _first(words0, _shift(PLANES, 0, RUN, BITS), _mask(PLANES, 0, BITS), BITS)
    if _has(PLANES, 1):
        codes = _joined(words1, codes, _shift(PLANES, 1, RUN, BITS), _mask(PLANES, 1, BITS))
    if _has(PLANES, 2):
        codes = _joined(words2, codes, _shift(PLANES, 2, RUN, BITS), _mask(PLANES, 2, BITS))
    return codes.to(tl.int8, bitcast=True)


@triton.jit
def block_words(plane, at, step, K, N, RUN: tl.constexpr, RUNS: tl.constexpr, SLOTS: tl.constexpr, EVEN: tl.constexpr):
    """The containers `[BLOCK_N, 32]` of a plane's block with run `RUN` of a step of `RUNS`; past the last block, the last once more.

    There, activations are zeros.
    """
    block = step * (RUNS // SLOTS) + RUN // SLOTS
    if not EVEN:
        block = tl.minimum(block, tl.cdiv(K, LANES * SLOTS) - 1)
    return tl.load(plane + block.to(tl.int64) * N * LANES + at)
