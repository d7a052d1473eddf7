"""Cut a graph where little crosses: at the residual stream, found by liveness and not by name.

The *stream* is everything that depends on a layer (a linear or an embedding). What does not, masks and rotary tables, follows from the
inputs and is recomputed for every block instead of being kept.

A position is a cut if as few stream values are alive there as anywhere between the first and the last layer: in a transformer that is one
tensor, the residual stream, and the blocks are its attentions and its MLPs.
"""

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ir.sites import QUANTIZABLE, downstream


@dataclass(frozen=True)
class Block:
    """A run of stream nodes, the stream values it reads from before it and those that later blocks read."""

    nodes: tuple[Node, ...]
    entry: tuple[Node, ...]
    exit: tuple[Node, ...]


def blocks(gm: GraphModule) -> tuple[list[Node], list[Block]]:
    """The nodes outside of the stream, in order, and the blocks of the stream, in order, each with at least one layer."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    sources = [node for node in calls if node.target in QUANTIZABLE]
    in_stream = set(sources).union(*(downstream(node) for node in sources)) if sources else set()
    outside = [node for node in calls if node not in in_stream]
    stream = [node for node in calls if node in in_stream]
    alive = _alive(stream)
    layers = [index for index, node in enumerate(stream) if node.target in QUANTIZABLE]
    if not layers:
        return outside, []
    inner = range(layers[0], layers[-1]) or range(layers[0], layers[0] + 1)
    least = min(len(alive[index]) for index in inner)
    cuts = [index + 1 for index in inner if len(alive[index]) == least]
    spans: list[tuple[int, int]] = []
    start = 0
    for end in [*cuts, len(stream)]:
        has_layer = any(start <= index < end for index in layers)
        if has_layer or (end == len(stream) and not spans):
            spans.append((start, end))
            start = end
        elif end == len(stream) and start < end:
            spans[-1] = (spans[-1][0], end)
    return outside, [
        Block(tuple(stream[a:b]), tuple(alive[a - 1]) if a else (), tuple(alive[b - 1]) if b < len(stream) else ()) for a, b in spans
    ]


def _alive(stream: list[Node]) -> list[list[Node]]:
    """After each stream node, the stream values that later calls still read."""
    position = {node: index for index, node in enumerate(stream)}
    last = {node: max((position[user] for user in node.users if user in position), default=-1) for node in stream}
    result: list[list[Node]] = []
    current: list[Node] = []
    for index, node in enumerate(stream):
        current = [value for value in [*current, node] if last[value] > index]
        result.append(current)
    return result
