"""Codes of fewer than 8 bits side by side in bytes, in planes: the form in which a quantized cache is kept.

Byte `i` of a row of `n` codes holds code `i` in its lowest bits, then code `i + n/p`, and so on, `p` codes to a byte: a vector unit unpacks
by masks and shifts of whole rows, without moving codes between lanes.
"""

import torch
from torch import Tensor

from ir.encoding import Encoding, Float
from ir.errors import OptionError
from ir.numerics import code_range, storage_dtype

CONTAINERS = (2, 4, 8)  # widths that codes are kept in: those that divide a byte


def container(encoding: Encoding) -> int:
    """The least width in bits that holds the encoding's codes and divides a byte."""
    return next(width for width in CONTAINERS if width >= encoding.bits)


def per_byte(encoding: Encoding) -> int:
    """How many codes a byte holds."""
    return 8 // container(encoding)


def misfit(codes: Tensor, encoding: Encoding) -> str | None:
    """Why codes cannot be packed; None if they can."""
    if codes.dtype != storage_dtype(encoding):
        return f"codes of {encoding} are {storage_dtype(encoding)}, not {codes.dtype}"
    if codes.shape[-1] % per_byte(encoding):
        return f"{codes.shape[-1]} codes of {encoding} do not fill bytes of {per_byte(encoding)}"
    return None


def pack(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes `[..., n]` as bytes, uint8 `[..., n / per_byte]`, signed ones shifted to start from zero, 8-bit floats as their bits.

    Raises:
        OptionError: `per_byte` does not divide `n`, or the codes have another dtype than the encoding's.
    """
    if reason := misfit(codes, encoding):
        raise OptionError(reason)
    if isinstance(encoding.format, Float):
        return codes.view(torch.uint8).clone()
    width, (least, _) = container(encoding), code_range(encoding)
    planes = (codes.to(torch.int16) - least).chunk(per_byte(encoding), -1)
    packed = planes[0]
    for index, plane in enumerate(planes[1:], 1):
        packed = packed | (plane << (width * index))
    return packed.to(torch.uint8)


def unpack(packed: Tensor, encoding: Encoding) -> Tensor:
    """The exact inverse of `pack`: codes in `storage_dtype(encoding)`."""
    if isinstance(encoding.format, Float):
        return packed.view(storage_dtype(encoding)).clone()
    width, (least, _) = container(encoding), code_range(encoding)
    planes = [(packed >> (width * index)) & (2**width - 1) for index in range(per_byte(encoding))]
    return (torch.cat(planes, -1).to(torch.int16) + least).to(storage_dtype(encoding))
