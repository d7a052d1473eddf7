"""Kernels of integer products and of what surrounds them, as entries of `tools/kernel_counts.py`."""

from collections.abc import Iterator

from backends.triton_gpu.kernels import cache, hadamard, int8, int8_kernels, rows
from tools.gpu.entries import Entry, K, N

CODES = {"LEAST": -128, "GREATEST": 127, "REACH": 127.5, "CLIP": 1.0, "SYMMETRIC": True}
UNSIGNED = {"LEAST": 0, "GREATEST": 15, "REACH": 15.0, "CLIP": 1.0, "SYMMETRIC": False}


# bits, tokens, columns of a scale, zero points of both sides
HOPPER = (
    *((bits, 16, K, False) for bits in range(1, 9)),
    *((4, count, K, False) for count in (8, 64, 4096)),
    *((4, count, 128, False) for count in (8, 16, 64, 4096)),
    (8, 4096, K, False),
    *((4, 16, K, True), (4, 64, 128, True), (7, 16, 64, True), (8, 64, 128, True)),
)
OTHERS = ((4, 16, K, False), (4, 16, 128, False))


def products(arch: int) -> Iterator[Entry]:
    """Scales of channels for every width, and of groups and zero points for some; the forms are those that the launcher chooses."""
    for bits, count, group, zeros in HOPPER if arch >= 90 else OTHERS:
        yield product(arch, bits, count, group, zeros=zeros)
    yield Entry(
        name="sum of parts",
        kernel=int8_kernels.sum_kernel,
        signature={"parts": "*i32", "input_scale": "*fp32", "scale": "*fp16", "bias": "*fp16", "out": "*fp16"}
        | dict.fromkeys(("M", "N", "splits"), "i32"),
        constants={"BITS": 4, "GROUP": 0, "TOKENS": 1, "BIAS": False, "BLOCK": int8.SUMMED},
        odd=frozenset({"M", "splits"}),
    )


def product(arch: int, bits: int, tokens: int, group: int, *, zeros: bool) -> Entry:
    form = int8.choose(bits, tokens, N, K, group, arch, zeros)
    constants = int8.constants(bits, K, group, 2.0 ** (bits - 1) if bits > 1 else 0.5, (zeros, zeros), True, False, form)
    pointers = {"codes": "*i8", "input_scale": "*fp32", "input_zero": "*i8", "plane0": "*u8", "plane1": "*u8", "plane2": "*u8"}
    kind = "*fp16" if form.split == 1 else "*fp32" if group < K else "*i32"
    step = constants["RUNS"] * 32 * form.tile_n
    return Entry(
        name=f"packed_linear_int8 u{bits} {'a channel' if group == K else f'groups of {group}'}{' zeros' if zeros else ''} M{form.tile_m}",
        kernel=int8_kernels.linear_kernel,
        signature=pointers
        | {"scale": "*fp16", "zero": "*u8", "bias": "*fp16", "out": kind}
        | dict.fromkeys(("M", "N", "K", "steps"), "i32"),
        constants=constants | {"SPLIT": form.split > 1},
        warps=form.warps,
        stages=form.stages,
        weights=step,
        products=0 if zeros else step * form.tile_m,
        matrix="IGMMA" if arch >= 90 and form.tile_m > 8 else "IMMA",
        odd=frozenset({"M", "steps"}),
    )


def tokens(arch: int) -> Iterator[Entry]:
    """Transforms, norms and the choice of codes, a token a program."""
    for order, tiles, dtype, quantize in ((4096, 1, "fp16", False), (4096, 1, "bf16", True)):
        x = "*" + dtype
        yield Entry(
            name=f"hadamard{' and quantize' if quantize else ''} {order} {dtype} tiles {tiles}",
            kernel=hadamard.hadamard_kernel,
            signature={"x": x, "signs": x, "out": "*i8" if quantize else x, "scale": "*fp32", "zero": "*i8", "K": "i32", "factor": "fp32"},
            constants=CODES | {"QUANTIZE": quantize, "ORDER": order, "ROWS": 64, "TILES": tiles},
            warps=hadamard.warps_of(tiles),
            matrix="HGMMA" if arch >= 90 else "HMMA",
            fusion=False,
        )
    for norm, dtype in ((False, "fp16"), (True, "bf16")):
        x = "*" + dtype
        yield Entry(
            name=f"{'norm and ' if norm else ''}quantize {dtype} 4096",
            kernel=rows.rows_kernel,
            signature={"x": x, "weight": x, "codes": "*i8", "scale": "*fp32", "zero": "*i8", "K": "i32", "eps": "fp32"},
            constants=CODES | {"NORM": norm, "GAIN": norm, "BLOCK": 4096},
            warps=rows.warps_of(4096),
            fusion=False,
        )


def caches(_: int) -> Iterator[Entry]:
    """Heads of 128 channels in 4 bits, in blocks of 32."""
    sizes = {"WIDTH": 128, "BLOCK": 32, "BLOCKS": 4, "PER_BYTE": 2, "ROWS": cache.rows_of(128)}
    yield Entry(
        name="quantize cache u4",
        kernel=cache.quantize_kernel,
        signature={"x": "*fp16", "packed": "*u8", "scale": "*fp16", "zero": "*u8", "count": "i32"},
        constants=UNSIGNED | sizes | {"HALF": True},
        odd=frozenset({"count"}),
        fusion=False,
    )
    yield Entry(
        name="dequantize cache u4",
        kernel=cache.dequantize_kernel,
        signature={"packed": "*u8", "scale": "*fp16", "zero": "*u8", "out": "*fp16", "count": "i32"},
        constants=sizes | {"LEAST": 0, "ZERO": True},
        odd=frozenset({"count"}),
        fusion=False,
    )


TABLE = (products, tokens, caches)
