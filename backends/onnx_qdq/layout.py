"""How codes, scales and zero points of a weight [N, K] are arranged for each form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.sites import Weight
from ir import numerics

SAFE_BITS = 7  # of weights whose products no kernel saturates


@dataclass(frozen=True)
class Stored:
    """A weight as a form stores it. Codes of fewer than 8 bits are flat bytes, packed from the least significant bits up."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def pack(codes: Tensor, bits: int) -> Tensor:
    """All codes in row-major order as bytes; the last byte is filled with zeros."""
    per_byte = 8 // bits
    flat = codes.reshape(-1).view(torch.uint8) & (2**bits - 1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    packed = flat[:, 0].clone()
    for i in range(1, per_byte):
        packed |= flat[:, i] << (bits * i)
    return packed


def per_block(values: Tensor, weight: Weight, block: int) -> Tensor:
    """Scales or zero points [N, ceil(K / block)] for blocks of `block` codes, each of which lies in one block of the encoding."""
    rows, columns = weight.codes.shape
    row_block, column_block = weight.encoding.block_shape((rows, columns))
    starts = torch.arange(0, columns, block) // column_block
    return values.repeat_interleave(row_block, 0)[:rows][:, starts].contiguous()


def blocked(weight: Weight, bits: int, block: int) -> Stored:
    """Codes [K, N] with scales [K / block, N], for DequantizeLinear along axis 0."""
    scale = per_block(weight.scale.float(), weight, block).T.contiguous()
    offset = None if weight.zero_point is None else per_block(weight.zero_point, weight, block).T.contiguous()
    codes = weight.codes.T.contiguous()
    if bits == 8:
        return Stored(*_unsigned(codes, scale, offset))
    return Stored(pack(codes, bits), scale, None if offset is None else pack(offset, bits))


def _unsigned(codes: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Eight-bit codes as uint8: where ONNX Runtime replaces signed bytes for exactness it forgets that they are blocked."""
    if offset is not None:
        return codes, scale, offset
    return codes.view(torch.uint8) ^ 128, scale, torch.full_like(scale, 128, dtype=torch.uint8)


def integer(weight: Weight, signed: bool) -> Stored:
    """Eight-bit codes [K, N] with scales [N], signed or shifted to be unsigned.

    Kernels without VNNI add two products of an unsigned and a signed byte in 16 bits. Weights of up to 7 bits, centred on zero, cannot
    overflow there, 2 · 255 · 64 < 2¹⁵, so they are always signed: these kernels are the fastest.
    """
    signed = signed or weight.encoding.bits <= SAFE_BITS
    middle = 2 ** (weight.encoding.bits - 1)
    shift = {(True, False): 128, (False, True): -middle}.get((weight.encoding.symmetric, signed), 0)
    dtype = torch.int8 if signed else torch.uint8
    rows = weight.codes.shape[0]
    codes = (weight.codes.T.to(torch.int16) + shift).to(dtype).contiguous()
    zeros = torch.zeros_like(weight.scale, dtype=torch.int16) if weight.zero_point is None else weight.zero_point.to(torch.int16)
    offset = (zeros + shift).to(dtype).expand(rows, 1).reshape(rows).contiguous()
    return Stored(codes, weight.scale.float().expand(rows, 1).reshape(rows).contiguous(), offset)


def gathered(weight: Weight, bits: int, block: int) -> Stored:
    """Bytes [N, K · bits / 8] of unsigned codes with scales [N, K / block], for GatherBlockQuantized."""
    rows = weight.codes.shape[0]
    encoding = weight.encoding
    middle = 2 ** (bits - 1)  # the zero point that the operator assumes if none is given
    codes = (weight.codes.to(torch.int16) + middle).to(torch.uint8) if encoding.symmetric else weight.codes
    offset = None
    if weight.zero_point is not None:
        zeros = per_block(weight.zero_point, weight, block)
        zeros = torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % (8 // bits)))
        offset = pack(zeros.contiguous(), bits).view(rows, -1)
    return Stored(pack(codes.contiguous(), bits).view(rows, -1), per_block(weight.scale.float(), weight, block), offset)


def dequantized(weight: Weight) -> Tensor:
    """The weight as float32."""
    return numerics.dequantize(weight.codes, numerics.QParams(weight.scale, weight.zero_point), weight.encoding)
