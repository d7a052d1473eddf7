"""How much each unit matters: criteria of pruning, a row for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import Member
from passes.base import Context
from passes.gradients import take_gradients
from passes.observation import mean_squares
from passes.prunable import Units, source, summed


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
    """`‖writers‖ · ‖readers‖`: the norms of a unit's rows in all tensors that make it, and of its columns in those that read it."""

    def norm(own: Units, writes: bool) -> Tensor:
        members = own.group.writers if writes else own.group.readers
        return sum((summed(_squares(gm, member.node, member.axis), member, own.size) for member in members), torch.zeros(own.size)).sqrt()

    return [norm(own, True) * norm(own, False) for own in units]


def wanda(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int, seed: int) -> list[Tensor]:
    """`(Σ_j ‖W_:j‖² E[x_j²])^½` over the columns of a unit: Wanda (2306.11695, section 3) summed over what goes together."""
    moments = mean_squares(gm, ctx, {source(layer) for own in units for layer, _ in own.readers})
    scores = []
    for own in units:
        parts = [summed(_squares(gm, member.node, member.axis) * moments[source(layer)], member, own.size) for layer, member in own.readers]
        scores.append(torch.stack(parts).sum(0).sqrt())
    return scores


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
    """The mean over tokens of a function of `Σ_j g_j x_j`, `g` the gradient of a sampled log likelihood at what readers read."""
    sums = [torch.zeros(own.size, dtype=torch.float64) for own in units]
    at: dict[Node, list[tuple[int, Member]]] = {}
    for index, own in enumerate(units):
        for x, member in {source(layer): member for layer, member in own.readers}.items():
            at.setdefault(x, []).append((index, member))

    def add(node: Node, x: Tensor, gradient: Tensor) -> None:
        product = (x * gradient).flatten(0, -2).double()
        for index, member in at[node]:
            sums[index] += of(summed(product, member, units[index].size)).sum(0)

    seen = take_gradients(gm, ctx, at, add, tokens, seed)
    return [(total / max(seen, 1)).float() for total in sums]


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, calibrated=False),
    "wanda": Criterion(wanda),
    "taylor": Criterion(taylor, absolute=True),
    "fisher": Criterion(fisher, absolute=True),
}
