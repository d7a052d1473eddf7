"""Files of safetensors that are written one tensor at a time: a tensor may be made when its turn comes, and is forgotten after.

The format is eight bytes with the length of a header, the header as JSON, padded to eight bytes, and the tensors one behind another. The
library that reads it wants all tensors at once to write it; files of ours are the same, byte for byte.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ir.errors import DataError
from ir.files import appearing

CHUNK = 1 << 24  # bytes written at once

# The order in which the library writes: dtypes as here, and names within one.
_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: index for index, dtype in enumerate(_NAMES)}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when it is written.

    Args:
        dtype: its dtype.
        shape: its shape.
        make: returns it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "Deferred":
        """A tensor that there is already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Deferred], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of safetensors with one tensor in memory at a time; it appears whole or not at all.

    Args:
        path: of the file.
        tensors: by name, on the CPU.
        metadata: texts by name.

    Raises:
        DataError: the format has no such dtype, or a tensor is made otherwise than it was announced.
        OSError: the disk is full, or cannot be written.
    """
    waiting = {name: tensor if isinstance(tensor, Deferred) else Deferred.of(tensor) for name, tensor in tensors.items()}
    for name, tensor in waiting.items():
        if tensor.dtype not in _NAMES:
            raise DataError(f"files of safetensors hold no {tensor.dtype}", where=name)
    names = sorted(waiting, key=lambda name: (_ORDER[waiting[name].dtype], name.encode()))
    with appearing(path) as draft, draft.open("wb") as file:
        file.write(_header({name: waiting[name] for name in names}, metadata))
        for name in names:
            _write(file, name, waiting[name])


def _header(tensors: Mapping[str, Deferred], metadata: Mapping[str, str] | None) -> bytes:
    stated: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        stated[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(stated, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, name: str, tensor: Deferred) -> None:
    made = tensor.make().detach()
    if (made.dtype, tuple(made.shape)) != (tensor.dtype, tensor.shape):
        raise DataError(f"{made.dtype} {list(made.shape)} was made where {tensor.dtype} {list(tensor.shape)} was announced", where=name)
    for chunk in torch.split(made.contiguous().reshape(-1).view(torch.uint8), CHUNK):
        file.write(chunk.numpy().data)
