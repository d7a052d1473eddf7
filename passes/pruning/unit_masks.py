"""Learned masks over units that may be dropped: which ones the model misses least when all go at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.base import Context
from passes.learning.mask_learning import MaskLearning, by_weight, over_share
from passes.pruning.kinds import Units


def mask_scores(gm: GraphModule, ctx: Context, units: Sequence[Units], share: float, learning: MaskLearning) -> list[Tensor]:
    """Logits of every unit by the weights that it has, after learning which to drop for a share of all weights (2606.07819; 2410.11988).

    A unit's gate multiplies what linears read of it, or what is written; the model's weights stay as they are.
    """
    sizes, weights = [own.size for own in units], [own.weights for own in units]
    with torch.enable_grad():
        logits = learning.logits(gm, ctx, sizes, over_share(sizes, weights, 1 - share), partial(_gated, units))
    return by_weight(logits, weights)


def factors_of(units: Sequence[Units], gates: Sequence[Tensor]) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
    """By call, the gates of what it reads and of what it gives, `[channels]` each."""
    reads: dict[Node, Tensor] = {}
    writes: dict[Node, Tensor] = {}
    for own, opened in zip(units, gates, strict=True):
        for node, channels, at in (
            *((layer.node, member.channels, reads) for layer, member in own.readers),
            *((node, channels, writes) for node, channels in own.writes),
        ):
            factor = at_channels(opened, channels)
            at[node] = at[node] * factor if node in at else factor
    return reads, writes


def at_channels(opened: Tensor, channels: Tensor) -> Tensor:
    """The gate of each channel's unit; −1 is no unit, and open."""
    return torch.cat([opened, opened.new_ones(1)])[channels]


def _gated(units: Sequence[Units], gates: Sequence[Tensor]) -> Mapping[Node, Callable[..., Any]]:
    """What is called in place of linears that read units, or of calls that give them."""
    reads, writes = factors_of(units, gates)
    return {node: partial(call_gated, node.target, reads.get(node), writes.get(node)) for node in {*reads, *writes}}


def call_gated(target: Any, reads: Tensor | None, writes: Tensor | None, x: Tensor, *others: Any, **named: Any) -> Tensor:
    """A call whose first operand and result are multiplied by gates."""
    value: Tensor = target(x if reads is None else x * reads.to(x.dtype), *others, **named)
    return value if writes is None else value * writes.to(value.dtype)
