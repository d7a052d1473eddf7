"""How much each unit matters: criteria of pruning, a row for each."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import Member
from ir.sites import Layer, readers
from passes.base import Context
from passes.data.gradients import total_gradients
from passes.data.observation import TOKENS, mean_squares, sampled, total
from passes.memo.packed import like
from passes.pruning.kinds import Units, summed


@dataclass(frozen=True)
class Criterion:
    """A criterion of pruning.

    Args:
        scores: of every unit `[units]` of all groups; the least are dropped.
        calibrated: whether it needs calibration data.
        absolute: whether scores of different groups compare; else the share of a group's total is taken for this.
    """

    scores: Callable[[GraphModule, Context, Sequence[Units], int, int], list[Tensor]]
    calibrated: bool = True
    absolute: bool = False


def magnitude(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int) -> list[Tensor]:
    """`‖writers‖ · ‖readers‖`: the norms of a unit's rows in all tensors that make it, and of its columns in those that read it, if any."""

    def norm(own: Units, members: Sequence[Member]) -> Tensor:
        parts = [summed(_squares(gm, member.node, member.axis), member.channels, own.size) for member in members]
        return torch.stack(parts).sum(0).sqrt() if parts else torch.ones(own.size)

    return [norm(own, own.group.writers) * norm(own, own.group.readers) for own in units]


def wanda(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int) -> list[Tensor]:
    """`(Σ_j ‖W_:j‖² E[x_j²])^½` over the columns of a unit: Wanda (2306.11695, section 3) summed over what goes together.

    Of what no linear reads, `(Σ_j E[y_j²])^½`; of branches as a share of what they are added up to.
    """
    totals = {node: branch.total for own in units for branch in own.branches for node in [branch.value]}
    moments = _moments(gm, ctx, {node for own in units for node in own.felt} | set(totals.values()))
    scores = []
    for own in units:
        parts = [
            summed(_squares(gm, member.node, member.axis) * moments[source(layer)], member.channels, own.size)
            for layer, member in own.readers
        ]
        for node, channels in own.writes:
            share = 1 / moments[totals[node]].sum().clamp_min(1e-30) if node in totals else 1.0
            parts.append(summed(moments[node], channels, own.size) * share)
        scores.append(torch.stack(parts).sum(0).sqrt())
    return scores


def _moments(gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> dict[Node, Tensor]:
    """`E[x²] [channels]`, float32: of tensors that linears read from the statistics there are, if there are."""
    found = mean_squares(gm, ctx, nodes) if set(readers(gm)).issuperset(nodes) else {}
    at = {node: 2 * place for place, node in enumerate(node for node in nodes if node not in found)}

    def zeros() -> list[Tensor]:
        return [sums for node in at for sums in (torch.zeros(edit.value(node).shape[-1], dtype=torch.float64), torch.zeros(()).long())]

    def add(sums: Sequence[Tensor], node: Node, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        sums[at[node]].add_(rows.square().sum(0))
        sums[at[node] + 1].add_(len(rows))

    sums = total(gm, sampled(ctx, TOKENS), at, zeros, add, "observe")
    return found | {node: (sums[place] / max(int(sums[place + 1]), 1)).float() for node, place in at.items()}


def source(layer: Layer) -> Node:
    """The tensor that a linear reads."""
    return layer.site("input").operand


def _squares(gm: GraphModule, node: Node, axis: int) -> Tensor:
    """The sum of squares at each place along an axis."""
    return edit.attribute(gm, node).detach().float().movedim(axis, 0).square().reshape(edit.value(node).shape[axis], -1).sum(1)


def taylor(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int) -> list[Tensor]:
    """`E|Σ_j g_j x_j|` over a unit's activations (1611.06440, section 2.2), per token."""
    return _felt(gm, ctx, units, tokens, seed, torch.abs)


def fisher(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int) -> list[Tensor]:
    """`½ E[(Σ_j g_j x_j)²]`: the divergence that dropping a unit causes, to second order, in nats a token (1801.05787, section 2)."""
    return [0.5 * found for found in _felt(gm, ctx, units, tokens, seed, torch.square)]


def _felt(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The mean over tokens of a function of `Σ_j g_j x_j`, `g` the gradient of a sampled log likelihood where dropping a unit is felt."""
    at: dict[Node, list[tuple[int, Tensor]]] = {}
    for index, own in enumerate(units):
        for x, channels in own.felt.items():
            at.setdefault(x, []).append((index, channels))

    def zeros() -> list[Tensor]:
        return [torch.zeros(own.size, dtype=torch.float64) for own in units]

    def add(sums: Sequence[Tensor], node: Node, x: Tensor, gradient: Tensor) -> None:
        product = (x * gradient).flatten(0, -2).double()
        for index, channels in at[node]:
            sums[index].add_(of(summed(product, channels, units[index].size)).sum(0))

    def found() -> list[Tensor]:
        sums, seen = total_gradients(gm, ctx, at, zeros, add, tokens, seed)
        return [(total / max(seen, 1)).float() for total in sums]

    return ctx.memo.kept("scores", found, like([total.float() for total in zeros()]))


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, calibrated=False),
    "wanda": Criterion(wanda),
    "taylor": Criterion(taylor, absolute=True),
    "fisher": Criterion(fisher, absolute=True),
}
