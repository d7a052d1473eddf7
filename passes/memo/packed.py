"""How results are dicts of tensors and come back from them; what does not fit is a `DataError`, which the memo takes for damage."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ir import numerics, packing
from ir.encoding import Encoding
from ir.errors import DataError
from ir.numerics import QParams
from ir.rounding import SCALE_DTYPE
from ir.statistics import Statistics
from passes.memo.folder import Tensors

T = TypeVar("T")
Coded = tuple[Tensor, QParams]  # of one weight


@dataclass(frozen=True)
class Form(Generic[T]):
    """A way to a dict of tensors and back."""

    store: Callable[[T], Tensors]
    restore: Callable[[Tensors], T]


def same_kind(tensor: Tensor, found: Tensor) -> None:
    """Refuse a tensor of another shape or dtype.

    Raises:
        DataError: it is one.
    """
    if tensor.shape != found.shape or tensor.dtype != found.dtype:
        raise DataError(f"a tensor is {found.dtype} {list(found.shape)}, not {tensor.dtype} {list(tensor.shape)}")


def like(examples: Sequence[Tensor]) -> Form[list[Tensor]]:
    """Tensors of the shapes and dtypes of examples, which may be on the device `meta`."""

    def restore(held: Tensors) -> list[Tensor]:
        found = [held[str(index)] for index in range(len(examples))]
        for example, tensor in zip(examples, found, strict=True):
            same_kind(example, tensor)
        return found

    return Form(lambda tensors: {str(index): tensor for index, tensor in enumerate(tensors)}, restore)


def numbers(count: int) -> Form[list[float]]:
    """So many numbers."""
    form = like([torch.empty(count, dtype=torch.float64, device="meta")])
    return Form(
        lambda values: form.store([torch.tensor(values, dtype=torch.float64)]),
        lambda held: [float(value) for value in form.restore(held)[0]],
    )


def coded(weights: Sequence[tuple[tuple[int, ...], Encoding]]) -> Form[list[Coded]]:
    """Codes and parameters of weights, by their shapes and encodings; codes side by side in bytes where they fill these."""

    def store(found: list[Coded]) -> Tensors:
        tensors = {}
        for index, ((codes, qparams), (_, encoding)) in enumerate(zip(found, weights, strict=True)):
            tensors[f"{index}.codes"] = codes if packing.misfit(codes, encoding) else packing.pack(codes, encoding)
            tensors[f"{index}.scale"] = qparams.scale
            if qparams.zero_point is not None:
                tensors[f"{index}.zero_point"] = qparams.zero_point
        return tensors

    return Form(store, lambda held: [_coded(held, str(index), *weight) for index, weight in enumerate(weights)])


def _coded(held: Tensors, name: str, shape: tuple[int, ...], encoding: Encoding) -> Coded:
    codes = torch.empty(shape, dtype=numerics.storage_dtype(encoding), device="meta")
    stored = held[f"{name}.codes"]
    if not packing.misfit(codes, encoding):
        same_kind(torch.empty((*shape[:-1], shape[-1] // packing.per_byte(encoding)), dtype=torch.uint8, device="meta"), stored)
        stored = packing.unpack(stored, encoding)
    same_kind(codes, stored)
    scale, zero_point = held[f"{name}.scale"], held.get(f"{name}.zero_point")
    same_kind(torch.empty(encoding.scale_shape(shape), dtype=SCALE_DTYPE, device="meta"), scale)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise DataError("zero points have the shape of scales")
    return stored, QParams(scale, zero_point)


def _text(data: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def _store_table(table: Mapping[tuple[str, str], float]) -> Tensors:
    return {"names": _text([list(names) for names in table]), "values": torch.tensor(list(table.values()), dtype=torch.float64)}


def _restore_table(held: Tensors) -> dict[tuple[str, str], float]:
    names = json.loads(held["names"].numpy().tobytes())
    return {(str(one), str(other)): float(value) for (one, other), value in zip(names, held["values"], strict=True)}


TABLE: Form[dict[tuple[str, str], float]] = Form(_store_table, _restore_table)  # numbers by pairs of names
STATISTICS: Form[Statistics] = Form(Statistics.tensors, Statistics.from_tensors)
