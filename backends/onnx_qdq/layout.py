"""How codes, scales and zero points of a weight [N, K] are arranged for each form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.sites import Weight
from ir import numerics
from ir.deferred import Deferred

SAFE_BITS = 7  # of weights whose products no kernel saturates
ROWS = 256  # packed at once; eight rows fill whole bytes in any width


@dataclass(frozen=True)
class Stored:
    """A weight as a form stores it, made when it is written. Codes of fewer than 8 bits are bytes, packed from the least significant up."""

    codes: Deferred
    scale: Deferred
    zero_point: Deferred | None


def pack(codes: Tensor, bits: int) -> Tensor:
    """All codes `[R, C]` in row-major order as bytes; the last byte is filled with zeros."""
    return torch.cat([_pack(rows, bits) for rows in torch.split(codes, ROWS)])


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    flat = codes.reshape(-1).view(torch.uint8) & (2**bits - 1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    packed = flat[:, 0].clone()
    for i in range(1, per_byte):
        packed |= flat[:, i] << (bits * i)
    return packed


def packed_size(codes: int, bits: int) -> int:
    """Bytes of so many packed codes."""
    return -(-codes * bits // 8)


def per_block(values: Tensor, weight: Weight, block: int) -> Tensor:
    """Scales or zero points [N, ceil(K / block)] for blocks of `block` codes, each of which lies in one block of the encoding."""
    rows, columns = weight.codes.shape
    row_block, column_block = weight.encoding.block_shape((rows, columns))
    starts = torch.arange(0, columns, block) // column_block
    return values.repeat_interleave(row_block, 0)[:rows][:, starts].contiguous()


def blocked(weight: Weight, bits: int, block: int) -> Stored:
    """Codes [K, N] with scales [K / block, N], for DequantizeLinear along axis 0.

    Eight-bit codes are uint8: where ONNX Runtime replaces signed bytes for exactness it forgets that they are blocked.
    """
    rows, columns = weight.codes.shape
    shape = (-(-columns // block), rows)
    points = weight.zero_point
    scale = Deferred(torch.float32, shape, lambda: per_block(weight.scale.float(), weight, block).T)
    if bits < 8:
        size, point_size = packed_size(rows * columns, bits), packed_size(shape[0] * rows, bits)
        codes = Deferred(torch.uint8, (size,), lambda: pack(weight.codes.T, bits))
        if points is None:
            return Stored(codes, scale, None)
        return Stored(codes, scale, Deferred(torch.uint8, (point_size,), lambda: pack(per_block(points, weight, block).T, bits)))
    if points is None:
        middle = Deferred(torch.uint8, shape, lambda: torch.full(shape, 128, dtype=torch.uint8))
        return Stored(Deferred(torch.uint8, (columns, rows), lambda: weight.codes.T.contiguous().view(torch.uint8) ^ 128), scale, middle)
    zero_point = Deferred(points.dtype, shape, lambda: per_block(points, weight, block).T)
    return Stored(Deferred(weight.codes.dtype, (columns, rows), lambda: weight.codes.T), scale, zero_point)


def integer(weight: Weight, signed: bool) -> Stored:
    """Eight-bit codes [K, N] with scales [N], signed or shifted to be unsigned.

    Kernels without VNNI add two products of an unsigned and a signed byte in 16 bits. Weights of up to 7 bits, centred on zero, cannot
    overflow there, 2 · 255 · 64 < 2¹⁵, so they are always signed: these kernels are the fastest.
    """
    signed = signed or weight.encoding.bits <= SAFE_BITS
    middle = 2 ** (weight.encoding.bits - 1)
    shift = {(True, False): 128, (False, True): -middle}.get((weight.encoding.symmetric, signed), 0)
    dtype = torch.int8 if signed else torch.uint8
    rows, columns = weight.codes.shape
    zeros = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero_point is None else weight.zero_point.to(torch.int16)
    return Stored(
        Deferred(dtype, (columns, rows), lambda: _shifted(weight.codes.T, shift, dtype)),
        Deferred.of(weight.scale.float().expand(rows, 1).reshape(rows).contiguous()),
        Deferred.of(_shifted(zeros, shift, dtype).expand(rows, 1).reshape(rows).contiguous()),
    )


def _shifted(codes: Tensor, shift: int, dtype: torch.dtype) -> Tensor:
    return (codes.to(torch.int16) + shift).to(dtype)


def gathered(weight: Weight, bits: int, block: int) -> Stored:
    """Bytes [N, K · bits / 8] of unsigned codes with scales [N, K / block], for GatherBlockQuantized."""
    rows, columns = weight.codes.shape
    blocks, points = -(-columns // block), weight.zero_point
    middle = 2 ** (bits - 1)  # the zero point that the operator assumes if none is given

    def codes() -> Tensor:
        unsigned = _shifted(weight.codes, middle, torch.uint8) if weight.encoding.symmetric else weight.codes
        return pack(unsigned, bits).view(rows, -1)

    def zero_point() -> Tensor:
        assert points is not None
        zeros = per_block(points, weight, block)
        return pack(torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % (8 // bits))), bits).view(rows, -1)

    return Stored(
        Deferred(torch.uint8, (rows, packed_size(columns, bits)), codes),
        Deferred(torch.float32, (rows, blocks), lambda: per_block(weight.scale.float(), weight, block)),
        None if points is None else Deferred(torch.uint8, (rows, packed_size(blocks, bits)), zero_point),
    )


def dequantized(weight: Weight) -> Deferred:
    """The weight as float32."""
    qparams = numerics.QParams(weight.scale, weight.zero_point)
    return Deferred(torch.float32, tuple(weight.codes.shape), lambda: numerics.dequantize(weight.codes, qparams, weight.encoding))
