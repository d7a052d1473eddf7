"""Units of the residual stream: dims that a branch reads or writes, branches, and layers."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import ChannelGroup, Map, Member
from ir.match import operand
from ir.residual import Branch, branches
from ir.sites import Layer
from passes.pruning.kinds import BLOCKS, INPUTS, LAYERS, OUTPUTS, Units, elements

LAYER = re.compile(r".*?\.\d+(?=\.|$)")  # the path of the layer that a module is in


def branch_units(gm: GraphModule, what: Collection[str]) -> list[Units]:
    """All units of these kinds, in graph order; linears that other nodes read the weights of too are left."""
    found = branches(gm)
    makers: dict[str, Callable[[], Iterable[Units]]] = {
        INPUTS: lambda: (_inputs(gm, layers) for branch in found for layers in _by_source(branch.first)),
        OUTPUTS: lambda: (_output(gm, layer) for branch in found for layer in branch.last if _own(layer.weight)),
        BLOCKS: lambda: (_whole(gm, BLOCKS, [branch]) for branch in found),
        LAYERS: lambda: (_whole(gm, LAYERS, own) for own in _by_layer(found)),
    }
    return [own for kind, make in makers.items() if kind in what for own in make()]


def _own(stored: Node) -> bool:
    """Whether a stored tensor has one reader."""
    return stored.op == "get_attr" and len(stored.users) == 1


def _by_source(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Linears that read one tensor, all of whose weights are their own."""
    found: dict[Node, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.site("input").operand, []).append(layer)
    return [own for own in found.values() if all(_own(layer.weight) for layer in own)]


def _inputs(gm: GraphModule, layers: Sequence[Layer]) -> Units:
    channels = torch.arange(edit.value(layers[0].weight).shape[1])
    readers = tuple((layer, Member(layer.weight, 1, channels, -1, False)) for layer in layers)
    group = _group(len(channels), [member for _, member in readers])
    return Units(group, INPUTS, readers, _weights(gm, group))


def _output(gm: GraphModule, layer: Layer) -> Units:
    channels = torch.arange(edit.value(layer.weight).shape[0])
    group = _group(len(channels), _rows(layer, channels))
    return Units(group, OUTPUTS, (), _weights(gm, group), writes=((layer.node, channels),))


def _whole(gm: GraphModule, kind: str, found: Sequence[Branch]) -> Units:
    """All branches as one unit."""
    members = [
        member
        for branch in found
        for layer in branch.layers
        for member in _rows(layer, torch.zeros(edit.value(layer.weight).shape[0], dtype=torch.int64))
    ]
    writes = tuple((branch.value, torch.zeros(edit.value(branch.value).shape[-1], dtype=torch.int64)) for branch in found)
    group = _group(1, members)
    return Units(group, kind, (), _weights(gm, group), writes=writes, branches=tuple(found))


def _by_layer(found: Sequence[Branch]) -> list[list[Branch]]:
    """Branches by the layer that they are in: their modules' common list and number."""
    layers: dict[str, list[Branch]] = {}
    for branch in found:
        path = edit.module_path(branch.total)
        place = LAYER.match(path)
        layers.setdefault(place[0] if place else branch.total.name, []).append(branch)
    return list(layers.values())


def _rows(layer: Layer, channels: Tensor) -> list[Member]:
    """The rows of a linear, and its bias."""
    bias = operand(layer.node, "bias")
    return [Member(node, 0, channels, 1, True) for node in (layer.weight, bias) if isinstance(node, Node) and node.op == "get_attr"]


def _group(size: int, members: Sequence[Member]) -> ChannelGroup:
    return ChannelGroup(Map.SELECT, size, 1, tuple(members))


def _weights(gm: GraphModule, group: ChannelGroup) -> int:
    return sum(elements(gm, member) for member in group.members) // group.size
