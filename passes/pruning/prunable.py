"""What can be pruned: units that only linears make and read, or branches, and why the rest is left."""

import re
from collections.abc import Collection, Iterable

from torch.fx import GraphModule

from ir import edit
from ir.channels import ChannelGroup, Map, Member, channel_groups
from ir.match import aten
from ir.sites import Layer, heads, layers, matches
from passes.pruning.branch_units import branch_units
from passes.pruning.kinds import BLOCKS, HEADS, INPUTS, LAYERS, MLP, OUTPUTS, QUERY_HEADS, Units, elements

PLACE = re.compile(r"\.\d+\.")  # of a layer among its like: reasons are told once for all
ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int)
BRANCHES = {INPUTS, OUTPUTS, BLOCKS, LAYERS}


def found_units(gm: GraphModule, what: Collection[str], ignore: Collection[str]) -> tuple[list[Units], dict[str, list[Layer]]]:
    """The units of these kinds, in graph order, and by reason the linears that have none, output heads left out."""
    linears: dict[str, list[Layer]] = {}
    for layer in layers(gm):
        if layer.kind == "Linear" and layer.weight.op == "get_attr":
            linears.setdefault(str(layer.weight.target), []).append(layer)
    groups: list[ChannelGroup] = []
    if BRANCHES.isdisjoint(what):
        groups = channel_groups(gm, Map.SELECT, copies=QUERY_HEADS in what)
        units = [made for group in groups if (made := _units(gm, group, linears)) is not None]
    else:
        units = branch_units(gm, what)
    held = {path for path, found in linears.items() if any(matches(layer, pattern) for layer in found for pattern in ignore)}
    asked = [own for own in units if own.what in what]
    free = [own for own in asked if held.isdisjoint(own.paths)]
    why = {path: "they are not asked for" for own in units for path in own.paths}
    if QUERY_HEADS in what:
        why |= {path: "each head of keys has one of queries" for own in units if own.what == HEADS for path in own.paths}
    why |= {path: "they are ignored" for own in asked for path in own.paths}
    taken = {path for own in free for path in own.paths}
    outputs = heads(gm)
    left: dict[str, list[Layer]] = {}
    for path, found in linears.items():
        if path not in taken and found[0].node not in outputs:
            left.setdefault(why.get(path) or _reason(groups, path), []).append(found[0])
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    return sorted(free, key=lambda own: min(order[node] for node in own.felt)), left


def annotated_units(
    gm: GraphModule, what: Collection[str], ignore: Collection[str], marked: set[str]
) -> tuple[list[Units], dict[str, list[Layer]]]:
    """The units whose linears are all annotated, and by reason the linears that have none.

    Args:
        gm: the graph.
        what, ignore: as of `found_units`.
        marked: names of the stored weights that are annotated.
    """
    units, left = found_units(gm, what, ignore)
    weights = {str(layer.weight.target): layer for layer in layers(gm) if layer.kind == "Linear"}
    stored = [own.paths & weights.keys() for own in units]
    for path in sorted({path for paths in stored if not paths <= marked for path in paths}):
        left.setdefault("not all linears of their units are annotated", []).append(weights[path])
    return [own for own, paths in zip(units, stored, strict=True) if paths <= marked], left


def _units(gm: GraphModule, group: ChannelGroup, linears: dict[str, list[Layer]]) -> Units | None:
    """A group's units; None if it is frozen, has but one, or is not between linears."""
    readers = [(layer, member) for member in group.readers for layer in linears.get(member.path, ())]
    written = any(member.path in linears for member in group.writers)
    if group.reason or group.size < 2 or not written or len(readers) < len(group.readers):
        return None
    weights = sum(elements(gm, member) for member in group.members) // group.size
    attending = [places[0] for node, places in group.values.items() if node.target in ATTENTION]
    if not attending:
        return Units(group, MLP, tuple(readers), weights)
    if _places(group.writers) > _places(group.readers):  # keys and values among them
        return Units(group, HEADS, tuple(readers), weights)
    return Units(group, QUERY_HEADS, tuple(readers), weights, rows=attending[0].shape[-3] // group.size)


def _places(members: Iterable[Member]) -> int:
    """How many rows or columns of matrices these are."""
    return sum(int((member.channels >= 0).sum()) for member in members if edit.value(member.node).ndim > 1)


def _reason(groups: Iterable[ChannelGroup], path: str) -> str:
    """Why a weight has no units: of its groups, the first between two weights, or else the one with the fewest."""
    own = [group for group in groups if any(member.path == path for member in group.members)]
    if not own:
        return "no addition to the residual stream is made of them alone"
    told = min(own, key=lambda group: (not (group.writers and group.readers), len(group.members)))
    return PLACE.sub(".*.", told.reason) or ("they are one unit" if told.size < 2 else "they are not between linears")
