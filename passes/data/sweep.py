"""`Sweep`: through a graph and back, some rows and a run of blocks at a time, so that memory holds the activations of these alone."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.blocks import blocks
from ir.store import Store
from passes.data.calibration import take_rows, tokens_in
from passes.learning.divergence import own_outputs

ROOM = 2**25  # bytes of activations that may be held at a time of any model
SHARE = 8  # of a greater one as many as its weights take, over this
Slope = Callable[[Node, Tensor], Tensor]  # an own output and its value; the gradient there
Take = Callable[[Node, Tensor, Tensor], None]
Values = dict[Node, Any]


def room_of(gm: GraphModule, least: int, share: int) -> int:
    """Bytes that something may take beside a graph: a share of its weights' bytes, and no less than what hardly matters."""
    return max(least, sum(tensor.nbytes for tensor in gm.parameters()) // share)


class Sweep:
    """Gradients of a graph's own outputs, taken where they are watched.

    `pieces` are as many rows of a batch as have `room` bytes of activations. Of more, `run` cuts the graph at the residual stream into
    parts: it goes through without gradients first, keeping what enters each part, and then through each part once more and back, the last
    one first. So one block's activations of one row fit always, for at most one more run of the graph.

    Args:
        gm: the graph.
        watched: calls whose gradients are wanted, and the node, the call itself or one that it reads, whose value goes with each.
        instead: as of `evaluate`; what these do with gradients is wanted too.
        room: bytes of activations; 0 for a share of the weights' bytes, or `ROOM`.
    """

    def __init__(
        self,
        gm: GraphModule,
        watched: Mapping[Node, Node],
        instead: Mapping[Node, Callable[..., Any]] = MappingProxyType({}),
        room: int = 0,
    ) -> None:
        self.gm, self.watched, self.instead = gm, watched, instead
        self.outputs = own_outputs(gm)
        self.room = room or room_of(gm, ROOM, SHARE)
        calls = evaluate.calls_for(gm, self.outputs)
        outside, cut = blocks(gm)
        # What is watched outside of the stream would run, and get a part of its gradient, in each part.
        self.outside = [] if self.wanted(outside) else outside
        spans = [block.nodes for block in cut] if self.outside else [tuple(calls)]
        needed = set(calls)
        self.cut = [[node for node in span if node in needed] for span in spans]
        self.entries = [block.entry for block in cut] if self.outside else [()]
        self.store: Store | None = gm.meta.get(edit.STORE)
        self.behind = {node: _weights(span) for span, entry in zip(self.cut, self.entries, strict=True) for node in entry}

    def wanted(self, nodes: Collection[Node]) -> bool:
        """Whether the gradient of any is."""
        return any(node in self.watched or node in self.instead for node in nodes)

    def pieces(self, batch: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The batch, some rows at a time."""
        rows = len(batch[0])
        step = max(1, int(self.room * rows / max(sum(self._bytes(span, batch) for span in self.cut), 1)))
        for start in range(0, rows, step):
            yield take_rows(batch, slice(start, start + step)) if step < rows else list(batch)

    def run(self, rows: Sequence[Tensor], slope: Slope, take: Take | None = None) -> None:
        """Through and back.

        Args:
            rows: flat inputs.
            slope: is called once for each own output that has a gradient, the last one first.
            take: is called with every watched call, the value that goes with it and the gradient, as soon as that is known.
        """
        given, parts = evaluate.bind(self.gm, rows), self._parts(rows)
        leaving = [self.entries[stop] if stop < len(self.cut) else () for _, stop in parts]
        entering: list[Values] = [{}]
        for part, keep in zip(parts[:-1], leaving, strict=False):
            entering.append(evaluate.evaluate(self.gm, self._calls(part, keep), given | entering[-1], keep, instead=self.instead))
        gradients: dict[Node, Tensor] = {}
        for index in reversed(range(len(parts))):
            earlier = self.wanted([node for span in self.cut[: parts[index][0]] for node in span])
            values = {node: _leaf(value, earlier) for node, value in entering.pop().items()}
            found = self._through(parts[index], given | values, leaving[index], take)
            _back(found, gradients, {node: partial(slope, node) for node in self.outputs if node in found and node not in values})
            gradients = {node: value.grad for node, value in values.items() if isinstance(value, Tensor) and value.grad is not None}
            if not earlier:
                return

    def _through(self, part: tuple[int, int], given: Values, leaving: Sequence[Node], take: Take | None) -> Values:
        """What leaves a part, own outputs among it, from a run whose watched values have hooks."""
        own = [node for span in self.cut[slice(*part)] for node in span]
        keep = [*leaving, *(node for node in self.outputs if node in own and node not in leaving)]
        sources = {self.watched[node] for node in own if node in self.watched}
        held: Values = {node: value.detach() for node, value in given.items() if node in sources}
        waiting: Values = {}
        inside = {node for entry in self.entries[slice(*part)] for node in entry}
        for node in inside & given.keys():
            self._count_back(node, given[node])

        def watch(node: Node, value: Any) -> None:
            if node in inside:
                self._count_back(node, value)
            if node in sources:
                held[node] = value.detach()
            if take is not None and node in self.watched:
                if not value.requires_grad:
                    value.requires_grad_()
                waiting[node] = held[self.watched[node]]
                value.register_hook(lambda gradient: take(node, waiting.pop(node), gradient))

        return evaluate.evaluate(self.gm, self._calls(part, keep), given, keep, watch, instead=self.instead, grad=True)

    def _count_back(self, node: Node, value: Any) -> None:
        """Count a block's weights as read again once the gradient at what enters it is known: on the way back they are."""
        if self.store is not None and getattr(value, "requires_grad", False):
            value.register_hook(partial(_read, self.store, self.behind[node]))

    def _calls(self, part: tuple[int, int], keep: Sequence[Node]) -> list[Node]:
        """The calls of a part, and those outside of the stream that it needs."""
        entry = self.entries[part[0]]
        own = [node for span in self.cut[slice(*part)] for node in span]
        needed = evaluate.ancestors(keep, stop=entry)
        return [node for node in (*self.outside, *own) if node in needed]

    def _parts(self, rows: Sequence[Tensor]) -> list[tuple[int, int]]:
        """From which block to before which the parts go: each has room, or is a single block."""
        parts, size = [(0, 1)], self._bytes(self.cut[0], rows)
        for index, span in enumerate(self.cut[1:], 1):
            own = self._bytes(span, rows)
            fits = size + own <= self.room
            size = size + own if fits else own
            parts[-1:] = [(parts[-1][0], index + 1)] if fits else [parts[-1], (index, index + 1)]
        return parts

    def _bytes(self, nodes: Sequence[Node], rows: Sequence[Tensor]) -> int:
        """At most what activations of rows take."""
        tokens = tokens_in(rows)
        return sum(_bytes(node, tokens, tokens // len(rows[0])) for node in nodes)


def _bytes(node: Node, tokens: int, length: int) -> int:
    """Of a call's value: sizes that vary are those of rows and tokens, a third one tokens that are attended to; views take nothing."""
    fake = edit.value(node)
    if not isinstance(fake, Tensor) or not fake.is_floating_point() or getattr(node.target, "is_view", False):
        return 0
    fixed = [size for size in fake.shape if isinstance(size, int)]
    varying = fake.ndim - len(fixed)
    return math.prod(fixed) * fake.dtype.itemsize * tokens * (length if varying > 2 else 1)


def _weights(nodes: Collection[Node]) -> int:
    """Bytes of the weights that calls read."""
    read = {source for node in nodes for source in node.all_input_nodes if source.op == "get_attr"}
    return sum(edit.value(source).nbytes for source in read)


def _read(store: Store, size: int, _: Tensor) -> None:
    store.count(size)


def _leaf(value: Any, earlier: bool) -> Any:
    """What enters a part: a value whose gradient goes on to earlier parts, if these want any."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_(earlier)


def _back(found: Values, gradients: dict[Node, Tensor], slopes: Mapping[Node, Callable[[Tensor], Tensor]]) -> None:
    """From the gradients at what leaves a part, and those at own outputs; holds neither longer than it must."""
    for node in reversed(list(slopes)):
        if found[node].requires_grad:
            own = slopes[node](found[node].detach())
            gradients[node] = gradients[node] + own if node in gradients else own
    roots = [node for node in gradients if found[node].requires_grad]
    if roots:
        torch.autograd.backward([found.pop(node) for node in roots], [gradients.pop(node) for node in roots])
