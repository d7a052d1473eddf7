"""`quantize_cache` and `dequantize_cache`: rows of keys and values to bytes of several codes, and back.

Byte i of a row holds the codes i, i + C, i + 2C … of its C bytes (`ir.packing`): tiles are `[rows, codes to a byte, C]`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.triton_gpu.kernels.rounding import Codes, cast, codes_of, extremes, inverse_of, scale_of, zero_of
from backends.triton_gpu.ops.cache import Kept
from ir import packing
from ir.encoding import Encoding
from ir.errors import OptionError

ELEMENTS = 4096  # of a tile, about


@triton.jit(do_not_specialize=["count"])
def quantize_kernel(
    x,
    packed,
    scale,
    zero,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    REACH: tl.constexpr,
    CLIP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Bytes, scales and zero points of `ROWS` of `count` rows of `WIDTH` values, in blocks of `BLOCK`."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    blocks: tl.constexpr = triton.next_power_of_2(BLOCKS)
    inner = tl.arange(0, triton.next_power_of_2(BLOCK))
    b = tl.arange(0, blocks)
    k = b[:, None] * BLOCK + inner[None, :]
    row = r.to(tl.int64)[:, None, None] * WIDTH
    inside = (r < count)[:, None, None] & ((inner < BLOCK)[None, :] & (k < WIDTH))[None, :, :]
    low, high = extremes(tl.load(x + row + k[None, :, :], mask=inside, other=0.0).to(tl.float32), 2, SYMMETRIC)
    s = scale_of(low, high, REACH, CLIP, SYMMETRIC, HALF)
    z = zero_of(low, s, CLIP, GREATEST, SYMMETRIC)
    place = r.to(tl.int64)[:, None] * BLOCKS + b[None, :]
    known = (r < count)[:, None] & (b < BLOCKS)[None, :]
    tl.store(scale + place, s.to(scale.dtype.element_ty), mask=known)
    tl.store(zero + place, z.to(tl.uint8), mask=known)
    bytes: tl.constexpr = WIDTH // PER_BYTE
    slot, i = tl.arange(0, PER_BYTE), tl.arange(0, triton.next_power_of_2(bytes))
    k = slot[:, None] * bytes + i[None, :]
    inside = (r < count)[:, None, None] & (i < bytes)[None, None, :]
    value = tl.load(x + row + k[None, :, :], mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_of(s)
    if blocks > 1:
        inverse = _of_codes(inverse, k, BLOCK, BLOCKS, ROWS)
        s = _of_codes(s, k, BLOCK, BLOCKS, ROWS)
        z = _of_codes(z, k, BLOCK, BLOCKS, ROWS)
    else:
        s, inverse, z = s[:, :, None], inverse[:, :, None], z[:, :, None]
    codes = (codes_of(value, s, inverse, z, LEAST, GREATEST) - LEAST) << (8 // PER_BYTE * slot)[None, :, None]
    byte = tl.sum(codes, 1).to(tl.uint8)
    at = r.to(tl.int64)[:, None] * bytes + i[None, :]
    tl.store(packed + at, byte, mask=(r < count)[:, None] & (i < bytes)[None, :])


@triton.jit
def _of_codes(values, k, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """What blocks `[ROWS, blocks]` say of the codes at `k [PER_BYTE, bytes]`."""
    index = tl.minimum(k // BLOCK, BLOCKS - 1)
    flat = tl.broadcast_to(tl.reshape(index, (1, k.shape[0] * k.shape[1])), (ROWS, k.shape[0] * k.shape[1]))
    return tl.reshape(tl.gather(values, flat, 1), (ROWS, k.shape[0], k.shape[1]))


@triton.jit(do_not_specialize=["count"])
def dequantize_kernel(
    packed,
    scale,
    zero,
    out,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    LEAST: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The values of `ROWS` of `count` rows."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bytes: tl.constexpr = WIDTH // PER_BYTE
    slot, i = tl.arange(0, PER_BYTE), tl.arange(0, triton.next_power_of_2(bytes))
    row = r.to(tl.int64)[:, None, None]
    inside = (r < count)[:, None, None] & (i < bytes)[None, None, :]
    byte = tl.load(packed + row * bytes + i[None, None, :], mask=inside, other=0).to(tl.int32)
    k = (slot[:, None] * bytes + i[None, :])[None, :, :]
    place, inside = row * BLOCKS + k // BLOCK, tl.broadcast_to(inside, (ROWS, PER_BYTE, i.shape[0]))
    value = ((byte >> (8 // PER_BYTE * slot)[None, :, None]) & (2 ** (8 // PER_BYTE) - 1)) + LEAST
    if ZERO:
        value -= tl.load(zero + place, mask=inside, other=0).to(tl.int32)
    value = value.to(tl.float32) * tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + k, cast(value, out.dtype.element_ty), mask=inside)


def quantize_cache(x: Tensor, encoding: str, scale_dtype: torch.dtype | None = None) -> Kept:
    """The kernel of the operator of this name, to the bit.

    Raises:
        OptionError: no kernel has such an encoding or dtype, or codes do not fill bytes.
    """
    stated = Encoding.parse(encoding)
    kind = Codes.of(stated, x.dtype)
    if scale_dtype not in {None, torch.float32, torch.float16}:
        raise OptionError(f"the kernel stores scales in float32 or float16, not in {scale_dtype}")
    width, per_byte, block, blocks = _sizes(stated, x.shape[-1])
    packed = torch.empty([*x.shape[:-1], width // per_byte], dtype=torch.uint8, device=x.device)
    scale = torch.empty([*x.shape[:-1], blocks], dtype=scale_dtype or torch.float32, device=x.device)
    zero = torch.empty([*x.shape[:-1], blocks], dtype=torch.uint8, device=x.device)
    count, rows = x.numel() // width, rows_of(width)
    if count:
        quantize_kernel[(triton.cdiv(count, rows),)](
            x.contiguous(),
            packed,
            scale,
            zero,
            count,
            WIDTH=width,
            BLOCK=block,
            BLOCKS=blocks,
            PER_BYTE=per_byte,
            LEAST=kind.least,
            GREATEST=kind.greatest,
            REACH=kind.reach,
            CLIP=kind.clip,
            SYMMETRIC=kind.symmetric,
            HALF=scale_dtype == torch.float16,
            ROWS=rows,
            enable_fp_fusion=False,
        )
    return packed, scale, zero


def dequantize_cache(packed: Tensor, scale: Tensor, zero: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    """The kernel of the operator of this name, to the bit.

    Raises:
        OptionError: no kernel has such an encoding or dtype.
    """
    stated = Encoding.parse(encoding)
    kind = Codes.of(stated, dtype)
    width, per_byte, block, blocks = _sizes(stated, packed.shape[-1] * packing.per_byte(stated))
    out = torch.empty([*packed.shape[:-1], width], dtype=dtype, device=packed.device)
    count, rows = out.numel() // width, rows_of(width)
    zeros = not kind.symmetric and zero is not None
    if count:
        dequantize_kernel[(triton.cdiv(count, rows),)](
            packed.contiguous(),
            scale.contiguous(),
            zero.contiguous() if zeros and zero is not None else packed,
            out,
            count,
            WIDTH=width,
            BLOCK=block,
            BLOCKS=blocks,
            PER_BYTE=per_byte,
            LEAST=kind.least,
            ZERO=zeros,
            ROWS=rows,
            enable_fp_fusion=False,
        )
    return out


def _sizes(encoding: Encoding, width: int) -> tuple[int, int, int, int]:
    """Values of a row, codes to a byte, values of a block, blocks of a row."""
    per_byte, block = packing.per_byte(encoding), encoding.block[-1]
    if width % per_byte:
        raise OptionError(f"{width} codes of {encoding} do not fill bytes of {per_byte}")
    block = width if block == -1 else min(block, width)
    return width, per_byte, block, -(-width // block)


def rows_of(width: int) -> int:
    """Rows of a tile."""
    return max(1, ELEMENTS // (1 << (width - 1).bit_length()))
