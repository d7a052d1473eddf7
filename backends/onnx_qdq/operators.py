"""Operators that stand for a whole quantized site between legalization and export. They have shapes but no bodies.

fxpress_onnx::blocked(x, codes, scale, zero_point?, bias?, rows, bits, block)           x [.., K] -> [.., rows]
fxpress_onnx::integer(x, codes, scale, zero_point?, bias?, step?, offset?, low, high, clip)   x [.., K] -> [.., N]
fxpress_onnx::gather(ids, codes, scale, zero_point?, columns, bits, block)              ids [..]  -> [.., columns]
fxpress_onnx::shared(x, codes, scale, zero_point?, bias?, columns, bits, block)         x [.., K] -> [.., N], codes as of gather
"""

from collections.abc import Callable

import torch
from torch import Tensor

torch.library.define(
    "fxpress_onnx::blocked",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int rows, int bits, int block) -> Tensor",
)
torch.library.define(
    "fxpress_onnx::integer",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, Tensor? step, Tensor? offset, int low, "
    "int high, float clip) -> Tensor",
)
torch.library.define(
    "fxpress_onnx::gather", "(Tensor ids, Tensor codes, Tensor scale, Tensor? zero_point, int columns, int bits, int block) -> Tensor"
)
torch.library.define(
    "fxpress_onnx::shared",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, int columns, int bits, int block) -> Tensor",
)


def _blocked(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, rows: int, bits: int, block: int
) -> Tensor:
    return x.new_empty([*x.shape[:-1], rows])


def _integer(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    step: Tensor | None,
    offset: Tensor | None,
    low: int,
    high: int,
    clip: float,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[1]])


def _gather(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, bits: int, block: int) -> Tensor:
    return scale.new_empty([*ids.shape, columns])


def _shared(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, columns: int, bits: int, block: int
) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[0]])


_FAKES: dict[str, Callable[..., Tensor]] = {"blocked": _blocked, "integer": _integer, "gather": _gather, "shared": _shared}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fxpress_onnx::{_name}", _fake)
