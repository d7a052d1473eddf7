"""Heads of queries in line: the best of every group first, so that the same place of each group can be dropped."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from passes.pruning.kinds import Units, heads_of


def lined_up(gm: GraphModule, own: Units, score: Tensor) -> Tensor:
    """Reorder the heads within each group of queries, which keeps the function, by their scores, the greatest first.

    Args:
        gm: the graph, whose weights are reordered.
        own: units of query heads.
        score: of every head, as of `own.single`.

    Returns:
        Scores `[units]`: of the n-th heads of all groups together.
    """
    order = score.view(own.rows, own.size).argsort(dim=1, descending=True, stable=True)
    for member in own.group.members:
        heads = heads_of(member.channels, own.size, own.rows)
        places = torch.arange(len(heads))
        for row, units in enumerate(order.tolist()):
            for unit, taken in enumerate(units):
                places[heads == row * own.size + unit] = (heads == row * own.size + taken).nonzero()[:, 0]
        tensor = edit.attribute(gm, member.node).detach()
        edit.set_attribute(gm, member.node, tensor.index_select(member.axis, places))
    return score.view(own.rows, own.size).gather(1, order).sum(0)
