"""`hadamard` and `hadamard_quantize_rows` for blocks of powers of two: products with Sylvester's matrix of order 64 on both sides.

A run of `b = a · 64` channels is a matrix `X [a, 64]`, and with `H_b = H_a ⊗ H_64` its transform is `H_a X H_64`. Tiles are `[rows, 64]`,
up to 4096 channels; a smaller order makes both factors block-diagonal, `I ⊗ H`, and one above 4096 adds and subtracts 2, 4 or 8 tiles.
Signs are exact in every dtype. Values of 32 bits enter a product in two parts of tf32 and so keep 22 bits.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.triton_gpu.kernels.interpreter import INTERPRETED
from backends.triton_gpu.kernels.rounding import DTYPES, Codes, cast, codes_of, extremes, inverse_of, scale_of, zero_of
from backends.triton_gpu.kernels.rows import SHIFTED, empty, one_scale, quantize_rows
from backends.triton_gpu.ops.rows import Rows
from ir import hadamard as matrices
from ir.errors import OptionError

SIDE = tl.constexpr(64)
TILE, GREATEST = 64 * 64, 8 * 64 * 64  # channels of a tile; those that a program holds


@triton.jit
def _factor(signs, ORDER: tl.constexpr, SIZE: tl.constexpr):
    """`I ⊗ H` of an order up to 64, `[SIZE, SIZE]`, in the dtype of `signs`."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(signs + i % ORDER * SIDE + j % ORDER, mask=i // ORDER == j // ORDER, other=0.0)


@triton.jit
def _parts(x):
    """`x`, float32, as a sum of two whose last 13 bits are zeros, but for the least of its bits."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _tile(x, signs, at, inside, ORDER: tl.constexpr, ROWS: tl.constexpr):
    """The transform of a tile, `[ROWS, 64]`, float32, without the factor that makes it orthonormal."""
    right: tl.constexpr = ORDER if ORDER < SIDE else SIDE
    left: tl.constexpr = (ORDER // SIDE) if ORDER < 4096 else SIDE
    value = tl.load(x + at, mask=inside, other=0.0)
    H = _factor(signs, right, SIDE)
    if INTERPRETED or x.dtype.element_ty == tl.float32:
        H = H.to(tl.float32)
        high, low = _parts(value.to(tl.float32))
        y = tl.dot(low, H, tl.dot(high, H, input_precision="tf32"), input_precision="tf32")
    else:
        y = tl.dot(value, H)
    if left > 1:
        H = _factor(signs, left, ROWS).to(tl.float32)
        high, low = _parts(y)
        y = tl.dot(H, low, tl.dot(H, high, input_precision="tf32"), input_precision="tf32")
    return y


@triton.jit
def _mixed(tiles, dtype: tl.constexpr, ORDER: tl.constexpr, TILES: tl.constexpr):
    """The last factor of orders above 4096, sums and differences of tiles, in `dtype`."""
    for level in tl.static_range(3):
        if (8192 << level) <= ORDER:
            mixed = ()
            for index in tl.static_range(TILES):
                if index & (1 << level):
                    mixed += (tiles[index ^ (1 << level)] - tiles[index],)
                else:
                    mixed += (tiles[index] + tiles[index ^ (1 << level)],)
            tiles = mixed
    values = ()
    for index in tl.static_range(TILES):
        values += (cast(tiles[index], dtype),)
    return values


@triton.jit
def hadamard_kernel(
    x,
    signs,
    out,
    scale,
    zero,
    K,
    factor,
    QUANTIZE: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    REACH: tl.constexpr,
    CLIP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """`TILES` tiles of a row of `K` channels: their transform, in the dtype of `x`, or with all of the row its codes."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (TILES * ROWS * SIDE)
    place = tl.arange(0, ROWS)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tiles = ()
    for index in tl.static_range(TILES):
        k = first + index * ROWS * SIDE + place
        tile = _tile(x, signs, row * K + k, k < K, ORDER, ROWS) * factor
        tiles += (tile if ORDER > 4096 else cast(tile, x.dtype.element_ty),)
    values = _mixed(tiles, x.dtype.element_ty, ORDER, TILES) if ORDER > 4096 else tiles
    if QUANTIZE:
        low, high = 0.0, 0.0
        for index in tl.static_range(TILES):
            least, greatest = extremes(values[index].to(tl.float32), None, SYMMETRIC)
            low, high = tl.minimum(low, least), tl.maximum(high, greatest)
        s = scale_of(low, high, REACH, CLIP, SYMMETRIC, False)
        z = zero_of(low, s, CLIP, GREATEST, SYMMETRIC)
        shift: tl.constexpr = 0 if SYMMETRIC else SHIFTED
        tl.store(scale + row, s)
        tl.store(zero + row, (z.to(tl.int32) - shift).to(tl.int8))
    for index in tl.static_range(TILES):
        k = first + index * ROWS * SIDE + place
        value = values[index]
        if QUANTIZE:
            value = (codes_of(value.to(tl.float32), s, inverse_of(s), z, LEAST, GREATEST) - shift).to(tl.int8)
        tl.store(out + row * K + k, value, mask=k < K)


@functools.lru_cache(maxsize=16)
def _signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    return (matrices.hadamard(SIDE.value) * 8).to(device, dtype)


def has_kernel(x: Tensor, block: int) -> bool:
    """Whether `hadamard` has a kernel: powers of two up to 32768, of at least 2 channels, of 16 or 32 bits."""
    return block in {2**power for power in range(1, 16)} and x.dtype in DTYPES


def hadamard(x: Tensor, block: int) -> Tensor:
    """`fxpress::hadamard` by a kernel, or where there is none, by the products of its eager body on the device.

    Raises:
        OptionError: `block` does not divide the last axis, or no matrix of that order can be made; names the nearest that can.
    """
    if not has_kernel(x, block) or not x.numel():
        return matrices.transform(x, block)
    if reason := matrices.misfit(x.shape[-1], block):
        raise OptionError(reason)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Blocks follow one another through all rows: tiles need not end where a row does.
    _launch(x.contiguous().view(1, -1), block, (out, out, out), TILE // 64, max(1, block // TILE), None)
    return out


def hadamard_quantize_rows(x: Tensor, block: int, encoding: str) -> Rows:
    """The kernel of the operator of this name, in one launch up to 32768 channels; else, or without a kernel for `block`, in two steps.

    Raises:
        OptionError: no kernel has such an encoding or dtype; or as `hadamard`.
    """
    kind = one_scale(encoding, x.dtype)
    K = x.shape[-1]
    if not has_kernel(x, block) or K > GREATEST or not x.numel():
        return quantize_rows(hadamard(x, block), encoding)
    if reason := matrices.misfit(K, block):
        raise OptionError(reason)
    made = empty(x)
    across = max(1, block // TILE)
    rows = min(64, max(16, triton.next_power_of_2(K) // 64))
    _launch(x.contiguous().view(-1, K), block, made, rows, triton.cdiv(K, across * rows * 64) * across, kind)
    return made


def warps_of(tiles: int) -> int:
    """Warps of a program: as few as hold its tiles in registers."""
    return 4 if tiles == 1 else 8


def _launch(x: Tensor, block: int, made: Rows, rows: int, tiles: int, kind: Codes | None) -> None:
    count, K = x.shape
    hadamard_kernel[(count, triton.cdiv(K, tiles * rows * 64))](
        x,
        _signs(x.dtype, x.device),
        *made,
        K,
        1 / math.sqrt(block),
        QUANTIZE=kind is not None,
        LEAST=kind.least if kind else 0,
        GREATEST=kind.greatest if kind else 0,
        REACH=kind.reach if kind else 1.0,
        CLIP=kind.clip if kind else 1.0,
        SYMMETRIC=kind is None or kind.symmetric,
        ORDER=block,
        ROWS=rows,
        TILES=tiles,
        num_warps=warps_of(tiles),
        enable_fp_fusion=False,
    )
