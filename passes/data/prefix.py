"""`Prefix`: the inputs of layers, block after block, from a prefix of the graph that changes on the way; and from the model as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.blocks import Block, blocks
from ir.encoding import Encoding
from ir.errors import DataError
from ir.sites import Layer, before_rounding
from passes.base import Context
from passes.data.calibration import naming
from passes.data.portions import Portions
from passes.data.stream import Stream
from passes.data.walk import Walk
from passes.memo.folder import Tensors

Weights = Mapping[Node, Sequence[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What layers that read one tensor get, over all calibration tokens.

    Args:
        layers: the readers.
        gram: `X̂ᵀX̂ / tokens [K, K]`, `X̂` from the graph as it is now.
        cross: `XᵀX̂ / tokens [K, K]`, `X` from the graph as it was, without rounded activations; None if not asked for.
        grams: `Σ_t w_tg x̂_t x̂_tᵀ / tokens [groups, K, K]` of the readers whose tokens have weights.
        mean: of `X̂` over tokens `[K]`.
        noise: `E[Δx Δxᵀ] [K, K]`, `Δx` what rounding the inputs leaves, by the encodings that were asked for.
    """

    layers: list[Layer]
    gram: Tensor
    cross: Tensor | None
    grams: dict[Node, Tensor]
    mean: Tensor
    noise: dict[Encoding, Tensor] = field(default_factory=dict)


class Source(NamedTuple):
    """Layers that read one tensor, and how to get their inputs; the graph is run only if these are asked for."""

    layers: list[Layer]
    inputs: Callable[[], Inputs]


class Prefix:
    """Inputs of layers in the order that they run: change the layers that `inputs` yields, and what follows sees the change.

    The graph is cut at the residual stream, so memory holds the stream of all samples and one block's activations of one batch; twice the
    stream if `exact` asks for the model as it was, whose weights are then released block by block. Large streams are on disk where the
    graph has a store.

    Args:
        gm: the graph.
        ctx: with calibration data.
        pending: the layers whose inputs are wanted, by node.
        exact: keep the model as it was beside.
        weights: of tokens, for each batch `[tokens, groups]`, by the layers that want Gram matrices of groups.
    """

    def __init__(
        self, gm: GraphModule, ctx: Context, pending: dict[Node, Layer], *, exact: bool = False, weights: Weights = MappingProxyType({})
    ) -> None:
        self.gm, self.ctx, self.pending, self.weights = gm, ctx, pending, weights
        outside, self.cut = blocks(gm)
        own = ctx.ranks.share(len(ctx.calibration))
        self.now = Stream(gm, outside, own, Portions(gm, ctx))
        self.was: Stream | None = None
        self.done: set[Node] = set()
        if exact:
            copy, self.twin = exact_copy(gm)
            self.was = Stream(copy, [self.twin[node] for node in outside], own, Portions(copy, ctx))
            self.done.update(self.was.outside)

    def inputs(self, doing: str) -> Iterator[Inputs]:
        """The inputs of all pending layers, tensor by tensor."""
        return (source.inputs() for source in self.sources(doing))

    def sources(self, doing: str) -> Iterator[Source]:
        """All pending layers, tensor by tensor. What was rounded before needs no inputs: blocks are run when later ones need them."""
        walk = Walk(self.ctx.memo.latest(f"{doing}, the stream", own=True), self._advance, self._stored, self._restore)
        for number, block in enumerate(self.ctx.track(self.cut, doing)):
            for source in dict.fromkeys(node.args[0] for node in block.nodes if node in self.pending):
                assert isinstance(source, Node)
                layers = [self.pending[node] for node in block.nodes if node in self.pending and node.args[0] is source]
                yield Source(layers, partial(self._inputs, walk, number, source, layers))

    def _inputs(self, walk: Walk, number: int, source: Node, layers: list[Layer]) -> Inputs:
        walk.reach(number)
        block, size = self.cut[number], edit.value(source).shape[-1]
        wanted = {layer.node: self.weights[layer.node] for layer in layers if layer.node in self.weights}
        exact = self.twin[before_rounding(source)] if self.was is not None else None

        def zeros() -> list[Tensor]:
            cross = torch.zeros(size, size) if exact is not None else torch.zeros(0)
            of_groups = [torch.zeros(weights[0].shape[1], size, size) for weights in wanted.values()]
            return [torch.zeros((), dtype=torch.int64), torch.zeros(size), torch.zeros(size, size), cross, *of_groups]

        def take(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
            count, total, gram, cross, *of_groups = sums
            x = self.now.values(block, index, batch, [source])[source].flatten(0, -2).float()
            gram.addmm_(x.T, x)
            check_finite(gram, source, x, batch, index)
            total += x.sum(0)
            count += len(x)
            for of_layer, weights in zip(of_groups, wanted.values(), strict=True):
                for of_group, w in zip(of_layer, weights[index].T, strict=True):
                    of_group.addmm_((x * w[:, None]).T, x)
            if self.was is not None and exact is not None:
                cross.addmm_(self.was.values(self._twin(block), index, batch, [exact])[exact].flatten(0, -2).float().T, x)

        count, total, gram, cross, *of_groups = self.ctx.total(zeros, take)
        n = max(int(count), 1)
        grams = {node: found / n for node, found in zip(wanted, of_groups, strict=True)}
        return Inputs(layers, gram / n, None if exact is None else cross / n, grams, total / n)

    def _advance(self, number: int) -> None:
        """Let both streams enter the block after that of this number: what they have of this process's own batches."""
        self.now.enter(self.cut[number], self.ctx.calibration)
        if self.was is not None:
            self.was.enter(self._twin(self.cut[number]), self.ctx.calibration)
            self._release(self.was.gm, self._twin(self.cut[number]))

    def _stored(self) -> Tensors | None:
        """Both streams."""
        parts = [stream.stored(name) for name, stream in (("now", self.now), ("was", self.was)) if stream is not None]
        return {name: value for part in parts for name, value in (part or {}).items()} if all(part is not None for part in parts) else None

    def _restore(self, held: Tensors, number: int) -> None:
        """Let both streams enter the block of this number, as they were kept."""
        leaving = self.cut[number - 1]
        now = self.now.restored(held, "now", leaving.exit)
        if self.was is not None:
            self.was.entering = self.was.restored(held, "was", self._twin(leaving).exit)
            for block in self.cut[:number]:
                self._release(self.was.gm, self._twin(block))
        self.now.entering = now

    def _release(self, copy: GraphModule, block: Block) -> None:
        """Drop the tensors of the model as it was that no later block reads."""
        self.done.update(block.nodes)
        for node in {read for call in block.nodes for read in call.all_input_nodes if read.op == "get_attr"}:
            if self.done.issuperset(node.users):
                edit.set_attribute(copy, node, edit.attribute(copy, node).new_empty(0))

    def _twin(self, block: Block) -> Block:
        """A block of the model as it was."""
        return Block(*(tuple(self.twin[node] for node in part) for part in (block.nodes, block.entry, block.exit)))


def check_finite(gram: Tensor, source: Node, x: Tensor, batch: Sequence[Tensor], index: int) -> None:
    """Look at a Gram matrix that has just taken in the inputs `x [tokens, K]` of a batch.

    Raises:
        DataError: it is not finite, and had been until then.
    """
    if not torch.isfinite(gram).all():
        with naming(x, batch, index):
            raise DataError("the inputs of a layer are not finite on the calibration data", where=edit.module_path(source))


def exact_copy(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A graph over the same tensors that does not round activations, and where each node went."""
    copy = edit.copied(gm)
    twin = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    for node in list(copy.graph.nodes):
        if before_rounding(node) is not node:
            edit.replace(node, before_rounding(node))
    return copy, twin
