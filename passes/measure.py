"""Measures of a language model on text: perplexity, divergence from the original, greedy text."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from passes.decoding import Growing, decode

Model = Callable[..., Any]  # called as model(input_ids=[B, T]), returns an object with .logits [B, T, V]


@torch.no_grad()
def perplexity(model: Model, ids: Tensor, batch: int = 10) -> float:
    """exp of the mean next-token cross-entropy (natural logarithm) over all positions of all windows.

    Args:
        model: anything callable as `model(input_ids=ids)` with `.logits`.
        ids: int64 `[windows, length]`.
    """
    total = 0.0
    for chunk in torch.split(ids, batch):
        logits = model(input_ids=chunk).logits.float()
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


@torch.no_grad()
def divergence(model: Model, reference: Model, ids: Tensor, batch: int = 10) -> float:
    """Mean `KL(reference ‖ model)` per token, in nats, over all positions of `ids` `[windows, length]`."""
    total = 0.0
    for chunk in torch.split(ids, batch):
        p = reference(input_ids=chunk).logits.float().log_softmax(-1)
        q = model(input_ids=chunk).logits.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return total / ids.numel()


@torch.no_grad()
def agreement(model: Model, reference: Model, ids: Tensor, batch: int = 10) -> float:
    """Share of the positions of `ids` `[windows, length]` at which both find the same token most likely."""
    total = 0
    for chunk in torch.split(ids, batch):
        total += int((model(input_ids=chunk).logits.argmax(-1) == reference(input_ids=chunk).logits.argmax(-1)).sum())
    return total / ids.numel()


def greedy(model: Model, ids: Tensor, tokens: int, mask: Tensor | None = None, end: int | None = None) -> Iterator[Tensor]:
    """Greedy decoding with the model's cache: yields the next token of every row, int64 `[batch]`, `tokens` times.

    Args:
        ids: the prompt, int64 `[batch, length]`; shorter rows are padded on the left.
        mask: int64 `[batch, length]`, 0 where padded; all ones if None.
        end: rows that have produced this token go on with it, and decoding stops once all have.
    """
    return decode(Growing(model), ids, tokens, mask, end)
