"""Linears that read or write only some channels of what keeps its width: gathered before them, put back in place behind them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.match import aten, operand
from ir.selection import taken
from ir.sites import Layer


def read_some(gm: GraphModule, found: Sequence[Layer], keep: Tensor) -> None:
    """Let linears that read one tensor `x [.., K]` read some of its channels: `x_K W_Kᵀ + b`.

    Args:
        gm: the graph, which is changed in place.
        found: linears that read it, their weights in floating point.
        keep: bool `[K]`.
    """
    first = found[0]
    x = first.site("input").operand
    channels = edit.add_attribute(gm, f"{first.path.partition('#')[0]}.reads", keep.nonzero()[:, 0].int(), before=first.node)
    gathered = edit.emit(gm, aten.index_select.default, (x, edit.value(x).ndim - 1, channels), before=first.node)
    for layer in found:
        weight = edit.attribute(gm, layer.weight).detach()
        edit.set_attribute(gm, layer.weight, taken(weight, [torch.ones(len(weight), dtype=torch.bool), keep]))
        layer.site("input").read(gathered)


def write_some(gm: GraphModule, node: Node, keep: Tensor, *, filled: bool = False) -> Node | None:
    """Let a linear write some of its channels, the others become zero: `y_K = x W_K:ᵀ + b_K`, gathered to their old places, times 0 or 1.

    Every runtime gathers and multiplies fast; an addition by index it does not.

    Args:
        gm: the graph, which is changed in place.
        node: a linear, its weight in floating point.
        keep: bool `[N]`.
        filled: add a stored vector `[N]` of zeros, which may be given values for the channels that are not written.

    Returns:
        The get_attr node of that vector, if asked for.
    """
    stored, bias = operand(node, "weight"), operand(node, "bias")
    weight = edit.attribute(gm, stored).detach()
    edit.set_attribute(gm, stored, taken(weight, [keep, torch.ones(weight.shape[1], dtype=torch.bool)]))
    if bias is not None:
        edit.set_attribute(gm, bias, taken(edit.attribute(gm, bias).detach(), [keep]))
    edit.infer(node)
    behind, name = node.next, str(stored.target).rpartition(".")[0]
    places = edit.add_attribute(gm, f"{name}.places", (keep.cumsum(0) - 1).clamp_min(0).int(), before=behind)
    there = edit.add_attribute(gm, f"{name}.there", keep.to(weight.dtype), before=behind)
    spread = edit.emit(gm, aten.index_select.default, (node, edit.value(node).ndim - 1, places), before=behind, like=node)
    whole = edit.emit(gm, aten.mul.Tensor, (spread, there), before=behind, like=node)
    fill = edit.add_attribute(gm, f"{name}.fill", torch.zeros(len(keep), dtype=weight.dtype), before=behind) if filled else None
    last = whole if fill is None else edit.emit(gm, aten.add.Tensor, (whole, fill), before=behind, like=node)
    node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not spread)
    return fill
