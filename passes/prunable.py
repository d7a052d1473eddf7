"""What can be pruned: units of channels that only linears make and read, and why the rest is left."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import ChannelGroup, Map, Member, channel_groups
from ir.match import aten
from ir.sites import Layer, heads, layers, matches

MLP, HEADS = "mlp", "heads"
KINDS = (MLP, HEADS)
PLACE = re.compile(r"\.\d+\.")  # of a layer among its like: reasons are told once for all
ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int)


@dataclass(frozen=True)
class Units:
    """A group of channels, each of which, a *unit*, can be dropped: a channel between linears, or a head of keys and what goes with it.

    Args:
        group: of kind SELECT.
        what: "mlp" or "heads".
        readers: the linears that read the units, with the columns that belong to each.
        weights: of one unit, in all tensors.
    """

    group: ChannelGroup
    what: str
    readers: tuple[tuple[Layer, Member], ...]
    weights: int

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.group.size

    @property
    def paths(self) -> set[str]:
        """The tensors that make or read them."""
        return {member.path for member in self.group.members}

    @property
    def path(self) -> str:
        """What people call it: the first linear that reads it."""
        return self.readers[0][0].path


def found_units(gm: GraphModule, what: Collection[str], ignore: Collection[str]) -> tuple[list[Units], dict[str, list[Layer]]]:
    """The units of these kinds, in graph order, and by reason the linears that have none, output heads left out."""
    linears: dict[str, list[Layer]] = {}
    for layer in layers(gm):
        if layer.kind == "Linear" and layer.weight.op == "get_attr":
            linears.setdefault(str(layer.weight.target), []).append(layer)
    groups = channel_groups(gm, Map.SELECT)
    units = [made for group in groups if (made := _units(gm, group, linears)) is not None]
    held = {path for path, found in linears.items() if any(matches(layer, pattern) for layer in found for pattern in ignore)}
    asked = [own for own in units if own.what in what]
    free = [own for own in asked if held.isdisjoint(own.paths)]
    why = {path: "they are not asked for" for own in units for path in own.paths}
    why |= {path: "they are ignored" for own in asked for path in own.paths}
    taken = {path for own in free for path in own.paths}
    outputs = heads(gm)
    left: dict[str, list[Layer]] = {}
    for path, found in linears.items():
        if path not in taken and found[0].node not in outputs:
            left.setdefault(why.get(path) or _reason(groups, path), []).append(found[0])
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    return sorted(free, key=lambda own: order[own.readers[0][0].node]), left


def _units(gm: GraphModule, group: ChannelGroup, linears: dict[str, list[Layer]]) -> Units | None:
    """A group's units; None if it is frozen, has but one, or is not between linears."""
    readers = [(layer, member) for member in group.readers for layer in linears.get(member.path, ())]
    written = any(member.path in linears for member in group.writers)
    if group.reason or group.size < 2 or not written or len(readers) < len(group.readers):
        return None
    what = HEADS if any(node.target in ATTENTION for node in group.values) else MLP
    weights = sum(_elements(gm, member) for member in group.members)
    return Units(group, what, tuple(readers), weights // group.size)


def _elements(gm: GraphModule, member: Member) -> int:
    tensor = edit.attribute(gm, member.node)
    return int((member.channels >= 0).sum()) * tensor.numel() // tensor.shape[member.axis]


def _reason(groups: Iterable[ChannelGroup], path: str) -> str:
    """Why a weight has no units: of its groups, the first between two weights, or else the one with the fewest."""
    own = [group for group in groups if any(member.path == path for member in group.members)]
    told = min(own, key=lambda group: (not (group.writers and group.readers), len(group.members)))
    return PLACE.sub(".*.", told.reason) or ("they are one unit" if told.size < 2 else "they are not between linears")


def summed(values: Tensor, member: Member, size: int) -> Tensor:
    """Sums `[..., size]` over the places of each unit of values `[..., places]` along a member's axis."""
    own = member.channels >= 0
    out = torch.zeros(*values.shape[:-1], size, dtype=values.dtype, device=values.device)
    return out.index_add_(-1, member.channels[own].to(values.device), values[..., own])


def source(layer: Layer) -> Node:
    """The tensor that a linear reads."""
    return layer.site("input").operand
