"""Branches of the residual stream: what is added to it, found by the additions, and taken away with the cache that it keeps."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ir import edit, evaluate
from ir.errors import PassError
from ir.match import aten, is_call, is_tensor, operand
from ir.signature import PRESENT, Port, Signature
from ir.sites import Layer, layers

Convert = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Branch:
    """`total = stream + value`, where `value` is computed from `stream` by linears.

    Args:
        total: the addition.
        stream: what goes past the branch.
        value: what the branch adds.
        layers: its linears, in graph order.
        nodes: its calls, of which those are that keep keys and values.
    """

    total: Node
    stream: Node
    value: Node
    layers: tuple[Layer, ...]
    nodes: frozenset[Node]

    @property
    def first(self) -> tuple[Layer, ...]:
        """The linears that read the stream, before any other."""
        behind = self._behind()
        return tuple(layer for layer in self.layers if behind[layer.node].isdisjoint(behind))

    @property
    def last(self) -> tuple[Layer, ...]:
        """The linears that write to the stream, behind all others."""
        read = set[Node]().union(*self._behind().values())
        return tuple(layer for layer in self.layers if layer.node not in read)

    def _behind(self) -> dict[Node, set[Node]]:
        """What each linear depends on, of the branch and of what is not computed from the stream."""
        return {layer.node: evaluate.ancestors(layer.node.all_input_nodes, stop=(self.stream,)) for layer in self.layers}


def branches(gm: GraphModule) -> list[Branch]:
    """The branches of a graph, in order; of additions within one another the inner ones."""
    known = {layer.node: layer for layer in layers(gm) if layer.kind == "Linear"}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    found = [branch for node in order if (branch := _branch(node, known, order)) is not None]
    totals = {branch.total for branch in found}
    return [branch for branch in found if totals.isdisjoint(branch.nodes)]


def _branch(node: Node, known: Mapping[Node, Layer], order: Mapping[Node, int]) -> Branch | None:
    if not is_call(node, aten.add.Tensor) or operand(node, "alpha") != 1 or not all(is_tensor(given) for given in node.args[:2]):
        return None
    terms: list[Node] = [*node.args[:2]]  # type: ignore[list-item]
    stream, value = sorted(terms, key=order.__getitem__)
    if stream.op != "call_function" or edit.value(stream).shape != edit.value(value).shape:
        return None
    inside = _between(stream, value, order)
    own = tuple(known[call] for call in inside if call in known)
    return Branch(node, stream, value, own, frozenset(inside)) if own else None


def _between(stream: Node, value: Node, order: Mapping[Node, int]) -> list[Node]:
    """What depends on `stream` and gives `value`, in order; looks at nothing before the stream, so that all branches take linear time."""
    behind: set[Node] = set()
    frontier = [value]
    while frontier:
        node = frontier.pop()
        if node not in behind and order[node] > order[stream]:
            behind.add(node)
            frontier += node.all_input_nodes
    return _reached([stream], sorted(behind, key=order.__getitem__))


def _reached(start: Iterable[Node], nodes: Iterable[Node]) -> list[Node]:
    """Those of `nodes`, given in order, that depend on `start` by way of one another."""
    known, found = set(start), []
    for node in nodes:
        if not known.isdisjoint(node.all_input_nodes):
            known.add(node)
            found.append(node)
    return found


def drop(gm: GraphModule, dropped: Sequence[Branch]) -> Convert:
    """Take branches away; layers that keep keys and values are counted anew.

    Args:
        gm: the graph, which is changed in place.
        dropped: of its branches.

    Returns:
        What brings flat inputs of the graph as it was into the form of the graph as it is: without what dropped branches kept.

    Raises:
        PassError: what a branch keeps is read elsewhere, or no layer would keep any.
    """
    signature: Signature = gm.meta["signature"]
    inside = frozenset[Node]().union(*(branch.nodes for branch in dropped))
    results: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    totals = {branch.total for branch in dropped}
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    without = inside.union(_reached(inside, (node for node in order if node not in totals)))
    gone = {
        port.name.removeprefix(f"{PRESENT}.")
        for port, node in zip(signature.outputs, results, strict=True)
        if port.cached and node in without
    }
    if gone and len(gone) == sum(port.cached for port in signature.inputs):
        raise PassError("no attention would be left, and no cache", remedy="drop less, or keep one with ignore=")
    for branch in sorted(dropped, key=lambda branch: -order[branch.total]):  # what one branch reads may be the total of the one before
        edit.replace(branch.total, branch.stream)
    outputs = [(port, node) for port, node in zip(signature.outputs, results, strict=True) if not _of(port, gone)]
    inputs = list(zip(signature.inputs, evaluate.placeholders(gm), strict=True))
    edit.set_outputs(gm, [node for _, node in outputs])
    edit.drop_unread(gm)
    kept = [node for port, node in inputs if port.cached and not _of(port, gone)]
    for port, node in inputs:
        if _of(port, gone):
            _release(gm, node, kept, port.name)
    stays = [not _of(port, gone) for port, _ in inputs]
    gm.meta["signature"] = replace(
        signature,
        inputs=_counted(port for port, _ in inputs if not _of(port, gone)),
        outputs=_counted(port for port, _ in outputs),
    )

    def convert(flat: Sequence[Tensor]) -> list[Tensor]:
        return [value for value, stay in zip(flat, stays, strict=True) if stay]

    if "example" in gm.meta:
        gm.meta["example"] = convert(gm.meta["example"])
    return convert


def _of(port: Port, gone: Collection[str]) -> bool:
    """Whether a port is of a cache that is gone."""
    return port.cached and port.name.partition(".")[2] in gone


def _release(gm: GraphModule, past: Node, kept: Sequence[Node], name: str) -> None:
    """Drop an input of the cache; who reads its sizes reads those of another."""
    for user in list(past.users):
        other = next((node for node in kept if is_call(user, aten.sym_size.int) and _same_size(past, node, operand(user, "dim"))), None)
        if other is None:
            what = "no other layer has a cache of its length" if is_call(user, aten.sym_size.int) else f"{user.name} reads it too"
            raise PassError(f"the branch that keeps {name} cannot be dropped: {what}", remedy="leave it, with ignore=, or drop less")
        user.update_arg(0, other)
    gm.graph.erase_node(past)


def _same_size(a: Node, b: Node, axis: int) -> bool:
    return statically_known_true(edit.value(a).shape[axis] == edit.value(b).shape[axis])


def _counted(ports: Iterable[Port]) -> tuple[Port, ...]:
    """Ports with the layers of the cache counted from 0."""
    numbers: dict[str, int] = {}

    def counted(port: Port) -> Port:
        kind, layer, part = port.name.split(".")
        return replace(port, name=f"{kind}.{numbers.setdefault(layer, len(numbers))}.{part}")

    return tuple(counted(port) if port.cached else port for port in ports)
