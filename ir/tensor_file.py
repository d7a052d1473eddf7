"""Safetensors files: their headers, and writing them tensor by tensor, so that no more than one is in memory."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ir.errors import DataError
from ir.files import appearing

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"  # the entry of a header that is no tensor
LENGTH = 8  # bytes that state the length of the header
ALIGNED = 64  # bytes: as torch aligns memory, which decides the last bit of products


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype, its shape, and where its bytes lie behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Source(Protocol):
    """A tensor to write: what it is, and its content in order, in pieces that are made as they are asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the whole."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole."""

    def pieces(self) -> Iterable[Tensor]:
        """Tensors of that dtype, that have the content one behind the other."""


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """The tensors of a file by name, and where the bytes behind the header start. The library checks that they fit the file.

    Raises:
        DataError: a damaged file, or a tensor of a dtype that torch does not have.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"not a file of tensors: {error}", where=str(path), remedy="get the file again") from error
    entries = {}
    for name, stated in header.items():
        if name == METADATA:
            continue
        if stated["dtype"] not in DTYPES:
            raise DataError(f"{name} is of the dtype {stated['dtype']!r}, which torch does not have", where=str(path))
        entries[name] = Entry(DTYPES[stated["dtype"]], tuple(stated["shape"]), *stated["data_offsets"])
    return entries, LENGTH + length


def write_tensors(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, one piece of a tensor at a time; it appears whole or not at all.

    Args:
        path: of the file, which is replaced.
        tensors: by name. Those whose bytes end aligned come first, so that what follows is aligned too.
        metadata: texts by name.
    """
    order = sorted(tensors, key=lambda name: (_size(tensors[name]) % ALIGNED > 0, -tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    end = 0
    for name in order:
        source, begin = tensors[name], end
        end += _size(source)
        header[name] = {"dtype": NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH + len(text)) % ALIGNED)
    with appearing(path) as draft, draft.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for name in order:
            written = sum(_write(file, piece) for piece in tensors[name].pieces())
            assert written == _size(tensors[name]), name


def _size(source: Source) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def _write(file: BinaryIO, piece: Tensor) -> int:
    content = piece.detach().cpu().contiguous().flatten().view(torch.uint8)
    return file.write(content.numpy().data) if len(content) else 0
