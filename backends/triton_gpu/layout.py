"""The layout of packed weights that kernels read: planes of codes, in containers as wide as the activation.

A width is a sum of planes of 1, 2, 4 or 8 bits, lowest bits first: 3 = 2 + 1, 7 = 4 + 2 + 1. A plane of `bits` bits in containers of `C`
bits has `S = C / bits` slots to a container and is stored as `[blocks, N, L]` with `L = 32`:

    container i, slot j of block b   holds the code of   k = (b · S + j) · L + i

so that one mask and one shift of a loaded tile give an operand tile for 32 consecutive `k`, without moving codes between lanes. Codes are
unsigned, `0 … 2^bits − 1`; a ragged end of `k` is filled with zeros, which meet activations that are masked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ir.errors import OptionError

VERSION = 1  # of the layout, written beside the weights
LANES = 32  # L: containers of one row and block, and consecutive k of one slot
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
CONTAINERS = {16: torch.uint16, 8: torch.uint8}  # for 16-bit activations, and for int8 ones
_SIGNED = {16: torch.int16, 8: torch.uint8}  # the same bits in dtypes that torch has arithmetic for


def slots(bits: int, container: int) -> int:
    """Codes of one plane in a container."""
    return container // bits


def span(bits: int, container: int) -> int:
    """How many consecutive `k` a block of one plane covers: `S · L`."""
    return slots(bits, container) * LANES


def shifts(bits: int) -> tuple[int, ...]:
    """The place in a code of each plane's lowest bit."""
    planes = PLANES[bits]
    return tuple(sum(planes[:index]) for index in range(len(planes)))


def pack(codes: Tensor, bits: int, container: int) -> list[Tensor]:
    """The planes of codes `[N, K]`, uint8: each `[ceil(K / (S · L)), N, L]` in the container's dtype.

    Raises:
        OptionError: there is no such width or container, or codes are not uint8 `[N, K]` below `2^bits`.
    """
    if bits not in PLANES or container not in CONTAINERS:
        raise OptionError(f"there is no layout of {bits} bits in containers of {container}")
    if codes.dtype != torch.uint8 or codes.ndim != 2 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise OptionError(f"codes are uint8 [N, K] below {2**bits}, not {codes.dtype} {list(codes.shape)}")
    places = zip(PLANES[bits], shifts(bits), strict=True)
    return [_pack_plane((codes >> shift) & (2**plane - 1), plane, container) for plane, shift in places]


def unpack(planes: Sequence[Tensor], bits: int, columns: int) -> Tensor:
    """The exact inverse of `pack`: codes `[N, K]`, uint8, with `columns` = K."""
    codes = torch.zeros(planes[0].shape[1], columns, dtype=torch.uint8, device=planes[0].device)
    for plane, width, shift in zip(planes, PLANES[bits], shifts(bits), strict=True):
        codes |= _unpack_plane(plane, width)[:, :columns] << shift
    return codes


def repack(planes: Sequence[Tensor], bits: int, columns: int, container: int) -> list[Tensor]:
    """The same codes in containers of another width."""
    return pack(unpack(planes, bits, columns), bits, container)


def taken(planes: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The planes of some rows of the codes, which `rows`, int64 `[n]`, lists."""
    return [plane.view(_SIGNED[8 * plane.element_size()]).index_select(1, rows).view(plane.dtype) for plane in planes]


def _pack_plane(codes: Tensor, bits: int, container: int) -> Tensor:
    n, k = codes.shape
    of_block, count = span(bits, container), slots(bits, container)
    padded = torch.nn.functional.pad(codes, (0, -k % of_block))
    # [N, blocks, S, L], each slot at its place
    split = padded.reshape(n, -1, count, LANES).to(torch.int32)
    places = torch.arange(0, container, bits, dtype=torch.int32, device=codes.device)[:, None]
    words = (split << places).sum(2, dtype=torch.int32)
    if container == 16:
        words = torch.where(words >= 2**15, words - 2**16, words)
    packed: Tensor = words.to(_SIGNED[container]).transpose(0, 1).contiguous().view(CONTAINERS[container])
    return packed


def _unpack_plane(plane: Tensor, bits: int) -> Tensor:
    container = 8 * plane.element_size()
    words = plane.view(_SIGNED[container]).to(torch.int32).transpose(0, 1)
    places = torch.arange(0, container, bits, dtype=torch.int32, device=plane.device)[:, None]
    codes: Tensor = (words[:, :, None, :] >> places) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)
