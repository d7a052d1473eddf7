"""The kernels that `tools/kernel_counts.py` compiles: each with the arguments of a launch, and what its hot loop is expected to do.

A kernel gets an entry by a function that yields `Entry`s for an architecture, in `TABLE`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from backends.triton_gpu import layout
from backends.triton_gpu.kernels import codes, dequantize, weight_only
from backends.triton_gpu.select import Config

ARCHITECTURES = (80, 89, 90)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
N, K = 4096, 8192  # of a weight that tiles divide


@dataclass(frozen=True)
class Entry:
    """One specialization of a kernel.

    Attributes:
        name: unique among entries; those of one name for several architectures make a row.
        kernel: the `triton.jit` function.
        signature: types of arguments by name, `*fp16` or `i32`; arguments that are not named are constants.
        constants: values of the others.
        weights: how many weights a program multiplies by in an iteration of its hot loop; 0 if it has none.
        products: multiply-accumulates of a program in that iteration, of which the number of iterations that ptxas made one follows.
        matrix: the matrix instruction expected; empty if none.
        odd: arguments that are not multiples of 16.
        bits: of a weight, and
        config: the form, of entries that `select` may choose.
        fusion: of products and sums into one rounding.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    weights: int = 0
    products: int = 0
    matrix: str = ""
    odd: frozenset[str] = field(default_factory=frozenset)
    bits: int = 0
    config: Config | None = None
    fusion: bool = True


TILES = {8: 4, 16: 4, 32: 4, 64: 4, 128: 8}  # tile M: warps, where a warp group multiplies
WIDE, NARROW = 128, 64  # tile N
STEP = 256  # consecutive k of a step, of widths without a plane of one bit, whose words cover 512
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


def form(arch: int, bits: int, tile_m: int, tile_n: int | None = None) -> Config | None:
    """The form of `packed_linear` that is counted for a tile M: as many loads ahead, and as long a step, as shared memory has room for."""
    many = len(layout.PLANES[bits]) > 1 or (bits == 1 and tile_m > 8)  # words, or codes in them, for the registers of a wide tile
    tile_n = tile_n or (NARROW if many else WIDE)
    longest = 2 * STEP if bits <= 2 and tile_m == 8 else STEP // 2 if tile_m * bits >= 512 else STEP
    if not _in_registers(arch, bits, tile_m):
        return None
    for step, stages in ((longest, 3), (longest, 2), (longest // 2, 3), (longest // 2, 2)):
        spans = max(1, step // codes.span(bits))
        # tokens are kept until they are multiplied, words only until they are in registers
        bytes_of = spans * codes.span(bits) * (2 * tile_m * stages + tile_n * bits // 8 * (stages - 1))
        if bytes_of + 2048 <= SHARED[arch]:
            depth, warps = (4, TILES[tile_m]) if arch >= 90 and tile_m > 8 else (1, 8 if tile_m > 32 else 4)
            return Config("linear", tile_m, tile_n, spans, depth, warps, stages)
    return None


def _in_registers(arch: int, bits: int, tile_m: int) -> bool:
    """Whether a tile's sums, words and weights stay in registers, as machine code of all tiles showed."""
    if bits == 7:
        return tile_m == 16
    if bits in {1, 3, 5, 6}:
        return tile_m <= (64 if arch >= 90 and bits != 3 else 32)
    return tile_m <= (128 if arch >= 90 or bits == 4 else 64)


def packed_linear(arch: int) -> Iterator[Entry]:
    """Groups of 128 columns, no zero points, float16; bfloat16 and zero points of some."""
    for bits in range(1, 9):
        for tile_m in TILES if bits in {4, 8} else (8, 16, 32, 64):
            if config := form(arch, bits, tile_m):
                yield linear_entry(arch, bits, config)
        if bits in {1, 2, 4, 8} and (config := form(arch, bits, 8, NARROW)):  # for weights of few channels
            yield linear_entry(arch, bits, config)
    for bits, tile_m in ((4, 8), (8, 8), (4, 16)):
        if config := form(arch, bits, tile_m):
            yield linear_entry(arch, bits, config, dtype="bf16")
            yield linear_entry(arch, bits, config, zero=True)


def linear_entry(arch: int, bits: int, config: Config, *, dtype: str = "fp16", zero: bool = False, group: int = 128) -> Entry:
    constants = weight_only.constants(bits, DTYPES[dtype], N, K, group, 2.0 ** (bits - 1), zero, False, config)
    step = codes.span(bits) * config.spans
    x = "*" + dtype
    narrow = "" if config.tile_n == WIDE else f" N{config.tile_n}"
    sums = constants["ZERO"] and constants["SUMS"]
    return Entry(
        name=f"packed_linear u{bits} {dtype}{' zero' if zero else ''} M{config.tile_m}{narrow}",
        kernel=weight_only.linear_kernel,
        signature={"x": x, "plane0": "*u16", "plane1": "*u16", "plane2": "*u16", "scale": x, "zero": "*u8", "bias": x, "out": x}
        | dict.fromkeys(("M", "N", "K", "steps"), "i32"),
        constants=constants,
        warps=config.warps,
        stages=config.stages,
        weights=config.tile_n * step,
        products=0 if sums else config.tile_n * config.tile_m * step,
        matrix="HGMMA" if arch >= 90 and config.tile_m > 8 else "HMMA",
        odd=frozenset({"M", "steps"}),
        bits=bits,
        config=None if zero or dtype != "fp16" else config,
    )


def dequantized(arch: int) -> Iterator[Entry]:
    for bits in (3, 4):
        yield Entry(
            name=f"dequantize u{bits}",
            kernel=dequantize.dequantize_kernel,
            signature={"plane0": "*u16", "plane1": "*u16", "plane2": "*u16", "scale": "*fp16", "zero": "*u8", "out": "*fp16"}
            | {"N": "i32", "K": "i32"},
            constants=dequantize.constants(bits, N, K, 128, 2.0 ** (bits - 1), False),
        )


TABLE: tuple[Callable[[int], Iterator[Entry]], ...] = (packed_linear, dequantized)


def entries(arch: int) -> list[Entry]:
    from tools.gpu import entries_int8  # noqa: PLC0415 - it makes entries, and so imports this file

    return [entry for made in (*TABLE, *entries_int8.TABLE) for entry in made(arch)]
