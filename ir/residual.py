"""Branches of the residual stream: what is added to it, found by the additions, and taken away with the cache that it keeps."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ir import edit, evaluate
from ir.errors import PassError
from ir.match import aten, is_call, is_tensor, operand
from ir.signature import PRESENT, Port, Signature
from ir.sites import Layer, downstream, layers

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
        return tuple(layer for layer in self.layers if not self._others(layer, evaluate.ancestors([layer.node])))

    @property
    def last(self) -> tuple[Layer, ...]:
        """The linears that write to the stream, behind all others."""
        return tuple(layer for layer in self.layers if not self._others(layer, downstream(layer.node)))

    @property
    def attends(self) -> bool:
        """Whether tokens read one another in it."""
        return any(is_call(node, aten.scaled_dot_product_attention.default, aten.softmax.int) for node in self.nodes)

    def _others(self, layer: Layer, among: Collection[Node]) -> bool:
        return any(other.node in among for other in self.layers if other.node is not layer.node)


def branches(gm: GraphModule) -> list[Branch]:
    """The branches of a graph, in order; of additions within one another the inner ones."""
    known = layers(gm)
    found = [branch for node in gm.graph.nodes if (branch := _branch(node, known)) is not None]
    totals = {branch.total for branch in found}
    return [branch for branch in found if totals.isdisjoint(branch.nodes)]


def _branch(node: Node, known: Sequence[Layer]) -> Branch | None:
    if not is_call(node, aten.add.Tensor) or operand(node, "alpha") != 1 or not all(is_tensor(given) for given in node.args[:2]):
        return None
    for stream, value in (node.args[:2], node.args[1::-1]):
        assert isinstance(stream, Node) and isinstance(value, Node)
        if stream.op != "call_function" or edit.value(stream).shape != edit.value(value).shape:
            continue
        behind = evaluate.ancestors([value], stop=(stream,))
        if any(stream in reader.all_input_nodes for reader in behind):
            inside = frozenset(behind & downstream(stream))
            own = tuple(layer for layer in known if layer.node in inside and layer.kind == "Linear")
            if own:
                return Branch(node, stream, value, own, inside)
    return None


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
    gone = {
        port.name.removeprefix(f"{PRESENT}.")
        for port, node in zip(signature.outputs, results, strict=True)
        if port.cached and not inside.isdisjoint(evaluate.ancestors([node], stop=totals))
    }
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
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
