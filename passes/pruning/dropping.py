"""Drop units of channels that were picked: refit what reads them, cut the tensors, and say what has no units to drop."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, residual
from ir.match import operand
from ir.narrowing import read_some, write_some
from ir.refit import refit
from ir.selection import select, stays
from ir.sites import Layer, layers
from passes.base import Context
from passes.data.prefix import Prefix, Source
from passes.pruning.kinds import INPUTS, OUTPUTS, Units

Picked = Sequence[tuple[Units, Tensor]]  # units, with those that stay in rising order


def drop(gm: GraphModule, ctx: Context, picked: Picked, *, compensate: bool, damping: float, bias: bool) -> int:
    """Refit block after block, if `compensate`, then cut; returns the number of groups that lost units.

    Args:
        gm: the graph, changed in place; the calibration data follows.
        ctx: with calibration data, to refit.
        picked: all units of a group may stay.
        compensate, damping, bias: as of `prune`.
    """
    fewer = [(own, channels) for own, channels in picked if len(channels) < own.size]
    fills = _write_less(gm, fewer, filled=compensate and bias)  # before refitting, which sees what is written no more
    if compensate and fewer:
        _refit(gm, ctx, fewer, damping, bias, fills)
    _cut(gm, ctx, fewer)
    return len(fewer)


@dataclass(frozen=True)
class _Fill:
    """A vector that makes up for the mean of what a linear does not write any more: its node, and the rows and biases that are gone."""

    node: Node
    gone: Tensor
    W: Tensor
    b: Tensor | float

    def give(self, gm: GraphModule, mean: Tensor) -> None:
        """Fill in `W E[x] + b`."""
        value = torch.zeros(len(self.gone), dtype=torch.float64)
        value[self.gone] = self.W.double() @ mean.double() + self.b
        edit.set_attribute(gm, self.node, value.to(self.W.dtype))


def _write_less(gm: GraphModule, picked: Picked, *, filled: bool) -> dict[Node, _Fill]:
    """Drop dims that are written."""
    fills = {}
    for own, channels in picked:
        if own.what == OUTPUTS:
            node = own.writes[0][0]
            keep = stays(own.group, channels, torch.arange(own.size))
            stored, bias = operand(node, "weight"), operand(node, "bias")
            W = edit.attribute(gm, stored).detach()[~keep]
            b = edit.attribute(gm, bias).detach()[~keep] if bias is not None else 0.0
            fill = write_some(gm, node, keep, filled=filled)
            if fill is not None:
                fills[node] = _Fill(fill, ~keep, W, b)
    return fills


def _cut(gm: GraphModule, ctx: Context, picked: Picked) -> None:
    """Drop for good what else does not stay."""
    for own, channels in picked:
        if own.what == INPUTS:
            read_some(gm, [layer for layer, _ in own.readers], stays(own.group, channels, torch.arange(own.size)))
    ctx.rebind(select(gm, [(own.group, channels) for own, channels in picked if own.group.values]))
    whole = [branch for own, _ in picked for branch in own.branches]
    if whole:
        ctx.rebind(residual.drop(gm, whole))


def tell_left(gm: GraphModule, ctx: Context, left: Mapping[str, Sequence[Layer]], by: str) -> None:
    """Note the linears that have no units to drop, with the reason and their share of the weight bytes.

    Args:
        left: by reason.
        by: the name of the pass.
    """
    tensors = {node: edit.attribute(gm, node).nbytes for node in gm.graph.find_nodes(op="get_attr")}
    for reason, found in left.items():
        share = sum(tensors[layer.weight] for layer in found) / max(sum(tensors.values()), 1)
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        ctx.notes.append(f"{by}: left out {found[0].path}{more}, {share:.1%} of the weight bytes: {reason}")


def has_bias(layer: Layer) -> bool:
    """Whether a linear has a bias of its own, which refitting may change."""
    old = operand(layer.node, "bias")
    return isinstance(old, Node) and old.op == "get_attr" and len(old.users) == 1


def _refit(gm: GraphModule, ctx: Context, picked: Picked, damping: float, bias: bool, fills: Mapping[Node, _Fill]) -> None:
    """Refit what reads, in the order that it runs; columns that read what is dropped become zero."""
    keeps: dict[Node, Tensor] = {}
    pending: dict[Node, Layer] = {layer.node: layer for layer in layers(gm) if layer.node in fills}
    for own, channels in picked:
        for layer, member in own.readers:
            keep = stays(own.group, channels, member.channels)
            keeps[layer.node] = keeps[layer.node] & keep if layer.node in keeps else keep
            pending[layer.node] = layer
    if not pending:  # nothing reads branches but the residual stream
        return
    for source in Prefix(gm, ctx, pending).sources("refit"):
        fewer = [layer for layer in source.layers if layer.node in keeps]
        adds = {layer.node for layer in fewer if has_bias(layer) or (bias and operand(layer.node, "bias") is None)}
        mean, fitted = torch.empty(edit.value(source.layers[0].node.all_input_nodes[0]).shape[-1]), _empty(gm, fewer, adds)
        fit = partial(_fit, gm, source, fewer, keeps, damping, mean, fitted)
        ctx.memo.filled(f"refit of {source.layers[0].path}", [mean, *(part for pair in fitted for part in pair if part is not None)], fit)
        for layer in source.layers:
            if layer.node in fills:
                fills[layer.node].give(gm, mean)
        for layer, (W, change) in zip(fewer, fitted, strict=True):
            edit.set_attribute(gm, layer.weight, W)
            if change is not None:
                _add_bias(gm, layer, change)


Fitted = Sequence[tuple[Tensor, Tensor | None]]  # weights, and what is added to biases


def _empty(gm: GraphModule, layers: Sequence[Layer], adds: Collection[Node]) -> Fitted:
    """Room for what `_fit` finds."""
    found = []
    for layer in layers:
        W = edit.attribute(gm, layer.weight).detach()
        found.append((torch.empty_like(W), W.new_empty(len(W), dtype=torch.float64) if layer.node in adds else None))
    return found


def _fit(
    gm: GraphModule, source: Source, layers: Sequence[Layer], keeps: Mapping[Node, Tensor], damping: float, mean: Tensor, fitted: Fitted
) -> None:
    """Fill in the mean of the inputs, and what refitting makes of weights and biases."""
    inputs = source.inputs()
    mean.copy_(inputs.mean)
    for layer, (W, change) in zip(layers, fitted, strict=True):
        old = edit.attribute(gm, layer.weight).detach()
        new, more = refit(old, inputs.gram, keeps[layer.node], damping, None if change is None else inputs.mean)
        W.copy_(new)
        if change is not None and more is not None:
            change.copy_(more)


def _add_bias(gm: GraphModule, layer: Layer, change: Tensor) -> None:
    old = operand(layer.node, "bias")
    if old is not None:
        own = edit.attribute(gm, old).detach()
        edit.set_attribute(gm, old, (own.double() + change).to(own.dtype))
        return
    name = f"{str(layer.weight.target).rpartition('.')[0]}.bias"
    dtype = edit.value(layer.weight).dtype
    edit.set_operand(layer.node, "bias", edit.add_attribute(gm, name, change.to(dtype), before=layer.node))
