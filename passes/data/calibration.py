"""Calibration data: whatever a caller has, as a list of flat inputs that fit the graph."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir.errors import DataError
from ir.signature import Signature

NOT_FINITE = "leave that sample out, or load the model in a wider dtype"


def flat_batches(gm: GraphModule, calibration: Iterable[Any] | None) -> list[list[Tensor]]:
    """The flat inputs of every batch.

    Args:
        calibration: batches: dicts of inputs, token tensors `[batch, length]` (or `[length]`), or what a `DataLoader` yields, tuples of a
            plain module's positional inputs among it. None for no calibration.

    Raises:
        DataError: no batch at all, wrong names, shapes or dtypes, values that are not finite; says which batch.
    """
    if calibration is None:
        return []
    signature: Signature = gm.meta["signature"]
    batches = []
    if not isinstance(calibration, Iterable):
        raise DataError(f"calibration is a list of batches, not {type(calibration).__name__}", remedy="pass calibration=[batch, ...]")
    for index, batch in enumerate(calibration):
        try:
            batches.append(_flat(signature, batch))
        except DataError as error:
            raise DataError(error.what, where=f"calibration batch {index}", remedy=error.remedy) from error
    if not batches:
        raise DataError("calibration is empty", remedy="give at least one batch; texts shorter than one window yield none")
    return batches


def tokens_in(batch: Sequence[Tensor]) -> int:
    """Tokens in a flat batch, by its first input: ids `[batch, length]`, or vectors along the last axis."""
    shape = batch[0].shape
    return int((shape[:-1] if batch[0].is_floating_point() else shape[:2]).numel())


def take_rows(batch: Sequence[Tensor], rows: Any) -> list[Tensor]:
    """Some samples of a flat batch: whatever picks rows of a tensor, applied to every input that has one a sample."""
    size = len(batch[0])
    return [value[rows] if value.ndim and len(value) == size else value for value in batch]


@contextmanager
def naming(value: Tensor, batch: Sequence[Tensor], index: int, *, whole: bool = True) -> Iterator[None]:
    """Say in errors over a value that is not finite, or its squares, which samples of a batch made it so.

    Args:
        value: computed of the batch, `[samples, …]`, or with tokens and samples in one axis.
        whole: the value is of all samples, not of some of them.
    """
    try:
        yield
    except DataError as error:
        bad = ~torch.isfinite(value.square())
        if not bad.any():
            raise
        count = len(batch[0]) if whole and len(value) % len(batch[0]) == 0 else 1
        samples = bad.reshape(count, -1).any(1).nonzero().flatten().tolist()
        named = f", sample{'s' if len(samples) > 1 else ''} {', '.join(map(str, samples))}" if count > 1 else ""
        where = ", ".join(filter(None, [error.where, f"calibration batch {index}{named}"]))
        raise DataError(error.what, where=where, remedy=NOT_FINITE) from error


def without_past(signature: Signature, batch: Sequence[Tensor]) -> list[Tensor]:
    """A flat batch for another graph of the same inputs: caches, if they are empty, in the heads that it keeps.

    Raises:
        DataError: a cache with tokens, in heads that the graph does not keep.
    """
    made = []
    for port, value in zip(signature.inputs, batch, strict=True):
        shape = [have if size is None else size for size, have in zip(port.shape, value.shape, strict=True)]
        if tuple(shape) != tuple(value.shape) and value.numel():
            raise DataError(f"input {port.name!r} has shape {list(value.shape)}, expected {shape}", remedy="calibrate without a cache")
        made.append(value if tuple(shape) == tuple(value.shape) else value.new_zeros(shape))
    return made


def _flat(signature: Signature, batch: Any) -> list[Tensor]:
    if isinstance(batch, Mapping):
        bound = signature.bind(**batch)
    else:
        values = list(batch) if isinstance(batch, tuple | list) else [batch]
        if not all(isinstance(value, Tensor) for value in values):
            raise DataError(f"a batch is a dict, a tensor or a tuple of tensors, not {type(batch).__name__}")
        if len(values) == 1 and values[0].ndim == 1 and len(signature.inputs[0].shape) == 2:
            values[0] = values[0][None]
        bound = signature.bind(*values)
    if any(not torch.isfinite(value).all() for value in bound if value.is_floating_point()):
        raise DataError("the inputs are not finite")
    if any(value.numel() == 0 for value, port in zip(bound, signature.inputs, strict=True) if "." not in port.name):
        raise DataError("the inputs are empty")
    return bound


def token_windows(text: str, tokenizer: Any, window: int = 256, count: int | None = None, seed: int | None = None) -> Tensor:
    """Windows of `window` tokens of a text, int64 `[n, window]`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        count: how many windows; all if None.
        seed: draw the windows in random order; in the text's order if None.

    Raises:
        DataError: the text has fewer tokens than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // window
    if available == 0:
        raise DataError(f"the text has {len(ids)} tokens, fewer than one window of {window}", remedy="give more text, or a smaller window")
    every = torch.tensor(ids[: available * window], dtype=torch.int64).reshape(available, window)
    if seed is not None:
        every = every[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
    return every if count is None else every[:count]
