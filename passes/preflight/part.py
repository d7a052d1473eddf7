"""A part of a model: its graph cut down to a few layers, over the same tensors."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ir import edit, residual
from passes.pruning.branch_units import branch_units
from passes.pruning.kinds import LAYERS, Units

Convert = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Kind:
    """Layers of a model that compute the same on weights of the same shapes.

    Args:
        places: which layers, in rising order.
        weights: of one.
    """

    places: tuple[int, ...]
    weights: int


def kinds(gm: GraphModule) -> list[Kind]:
    """The kinds of layers that a graph has, those with the most layers first; none where nothing is added to a residual stream."""
    units = branch_units(gm, (LAYERS,))
    forms = _forms(gm, units)
    found: dict[tuple[int, ...], list[int]] = {}
    for index, own in enumerate(units):
        found.setdefault(tuple(forms[branch.value] for branch in own.branches), []).append(index)
    made = [Kind(tuple(places), units[places[0]].weights) for places in found.values()]
    return sorted(made, key=lambda kind: -len(kind.places))


def part(gm: GraphModule, places: Collection[int]) -> tuple[GraphModule, Convert]:
    """The graph with some of its layers only, in a copy over the same tensors; and what brings flat inputs into its form.

    Raises:
        PassError: what another layer keeps is read elsewhere.
    """
    copy = edit.copied(gm)
    units = branch_units(copy, (LAYERS,))
    dropped = [branch for index, own in enumerate(units) if index not in places for branch in own.branches]
    convert: Convert = residual.drop(copy, dropped) if dropped else list
    edit.clean(copy)
    return copy, convert


def _forms(gm: GraphModule, units: Sequence[Units]) -> dict[Node, int]:
    """A number for each node: that of another which computes the same, up to values of tensors. The residual stream is always the same."""
    stream = {node for own in units for branch in own.branches for node in (branch.stream, branch.total)}
    numbers: dict[str, int] = {}
    found: dict[Node, int] = {}
    for node in gm.graph.nodes:
        found[node] = numbers.setdefault("stream" if node in stream else _form(node, found), len(numbers))
    return found


def _form(node: Node, known: dict[Node, int]) -> str:
    if node.op in {"placeholder", "get_attr"}:
        fake = edit.value(node)
        sizes = [size if isinstance(size, int) else None for size in getattr(fake, "shape", ())]
        return f"{node.op} {getattr(fake, 'dtype', '')} {sizes}"
    return f"{node.target} {map_aggregate((node.args, node.kwargs), lambda read: f'%{known[read]}' if isinstance(read, Node) else read)}"
