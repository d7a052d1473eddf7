"""Run parts of a graph, holding only the values that are still needed."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ir import edit

Environment = dict[Node, Any]
Tap = Callable[[Node, Any], None]


def placeholders(gm: GraphModule) -> list[Node]:
    """The graph's inputs, in order."""
    return list(gm.graph.find_nodes(op="placeholder"))


def bind(gm: GraphModule, inputs: Sequence[Tensor]) -> Environment:
    """The environment that holds flat inputs."""
    return dict(zip(placeholders(gm), inputs, strict=True))


def ancestors(nodes: Iterable[Node], stop: Container[Node] = ()) -> set[Node]:
    """`nodes` and everything they depend on, not looking behind the nodes in `stop`."""
    found: set[Node] = set()
    frontier = [node for node in nodes if node not in stop]
    while frontier:
        node = frontier.pop()
        if node not in found:
            found.add(node)
            frontier += [operand for operand in node.all_input_nodes if operand not in stop]
    return found


def calls_for(gm: GraphModule, wanted: Iterable[Node]) -> list[Node]:
    """The calls that the values of `wanted` need, in order."""
    needed = ancestors(wanted)
    return [node for node in gm.graph.nodes if node.op == "call_function" and node in needed]


def evaluate(
    gm: GraphModule,
    nodes: Sequence[Node],
    given: Mapping[Node, Any],
    keep: Sequence[Node],
    tap: Tap | None = None,
    *,
    instead: Mapping[Node, Callable[..., Any]] = MappingProxyType({}),
    grad: bool = False,
    spend: bool = False,
) -> Environment:
    """Evaluate `nodes`, in order, from the values `given`, and return the values of `keep`.

    Args:
        nodes: calls to run; every operand is given, in `nodes` before its reader, or a stored tensor.
        given: values by node; those of stored tensors take their place.
        keep: the nodes whose values are wanted; every other value is dropped after its last reader.
        tap: called with every node of `nodes` and its value.
        instead: functions to call in place of a node's operator, with the same operands.
        grad: record gradients, with respect to what is given or what `tap` marks; stored tensors are constants.
        spend: drop what is `given` too after its last reader, from the caller's own dict.
    """
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    kept = set(keep)
    environment: Environment = given if spend and isinstance(given, dict) else dict(given)

    def operand(node: Node) -> Any:
        if node.op == "get_attr" and node not in given:
            return edit.attribute(gm, node).detach()
        return environment[node]

    with torch.set_grad_enabled(grad):
        for node in nodes:
            if node.op != "call_function":
                continue
            args, kwargs = map_arg((node.args, node.kwargs), operand)
            environment[node] = instead.get(node, node.target)(*args, **kwargs)  # type: ignore[operator]
            if tap is not None:
                tap(node, environment[node])
            for used in [*node.all_input_nodes, node]:
                if used not in kept and last.get(used, node) is node:
                    environment.pop(used, None)
        return {node: operand(node) for node in keep}


def run(gm: GraphModule, inputs: Sequence[Tensor], tap: Tap | None = None, *, grad: bool = False) -> tuple[Tensor, ...]:
    """The graph's flat outputs for flat inputs; `tap` and `grad` as of `evaluate`."""
    nodes = list(gm.graph.nodes)
    outputs = nodes[-1].args[0]
    assert isinstance(outputs, tuple)
    wanted: list[Node] = list(outputs)
    values = evaluate(gm, nodes[:-1], bind(gm, inputs), wanted, tap, grad=grad)
    return tuple(values[node] for node in wanted)
