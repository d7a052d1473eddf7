"""Learned masks over units that may be dropped: which ones the model misses least when all go at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.base import Context
from passes.learning.mask_learning import MaskLearning, by_weight
from passes.pruning.kinds import Units


def mask_scores(gm: GraphModule, ctx: Context, units: Sequence[Units], share: float, learning: MaskLearning) -> list[Tensor]:
    """Logits of every unit by the weights that it has, after learning which to drop for a share of all weights (2606.07819; 2410.11988).

    A unit's gate multiplies what linears read of it, or what is written; the model's weights stay as they are.
    """
    weights = [own.weights for own in units]
    with torch.enable_grad():
        logits = learning.logits(gm, ctx, [own.size for own in units], weights, 1 - share, partial(_gated, units))
    return by_weight(logits, weights)


def _gated(units: Sequence[Units], gates: Sequence[Tensor]) -> Mapping[Node, Callable[..., Any]]:
    """What is called in place of linears that read units, or of calls that give them."""
    reads: dict[Node, Tensor] = {}
    writes: dict[Node, Tensor] = {}
    for own, opened in zip(units, gates, strict=True):
        for node, channels, at in (
            *((layer.node, member.channels, reads) for layer, member in own.readers),
            *((node, channels, writes) for node, channels in own.writes),
        ):
            factor = torch.cat([opened, opened.new_ones(1)])[channels]  # −1: no unit
            at[node] = at[node] * factor if node in at else factor
    return {node: partial(_call, node.target, reads.get(node), writes.get(node)) for node in {*reads, *writes}}


def _call(target: Any, reads: Tensor | None, writes: Tensor | None, x: Tensor, *others: Any, **named: Any) -> Tensor:
    value: Tensor = target(x if reads is None else x * reads.to(x.dtype), *others, **named)
    return value if writes is None else value * writes.to(value.dtype)
