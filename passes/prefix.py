"""`Prefix`: the inputs of layers, block after block, from a prefix of the graph that changes on the way; and from the model as it was."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate, numerics
from ir.blocks import Block, blocks
from ir.encoding import Encoding
from ir.errors import DataError
from ir.sites import Layer, before_rounding
from passes.base import Context
from passes.calibration import naming, tokens_in
from passes.portions import Portions

Values = dict[Node, Any]
Weights = Mapping[Node, Sequence[Tensor]]
Roundings = Mapping[Node, Collection[Encoding]]


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


@dataclass
class _Stream:
    """One graph run block by block: what enters the next block, for each batch."""

    gm: GraphModule
    outside: list[Node]
    portions: Portions
    entering: list[Values] = field(default_factory=list)

    def values(self, block: Block, index: int, batch: Sequence[Tensor], keep: Sequence[Node]) -> Values:
        """The values of `keep`, nodes of the block, for one batch."""
        given = evaluate.bind(self.gm, batch) | self.entering[index]
        needed = evaluate.ancestors(keep, stop=given)
        known = [node for node in (*self.outside, *block.nodes) if node in needed]
        # Since the graph was cut, weights have been rounded: what makes floats of their codes runs first.
        weights = [node for node in needed.difference(known) if node.op == "call_function"]
        return self.portions.run([*weights, *known], given, keep)


class Prefix:
    """Inputs of layers in the order that they run: change the layers that `inputs` yields, and what follows sees the change.

    The graph is cut at the residual stream, so memory holds the stream of all samples and one block's activations of one batch; twice the
    stream if `exact` asks for the model as it was, whose weights are then released block by block.

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
        self.now = _Stream(gm, outside, Portions(gm, ctx), [{} for _ in ctx.calibration])
        self.was: _Stream | None = None
        self.done: set[Node] = set()
        if exact:
            copy, self.twin = exact_copy(gm)
            self.was = _Stream(copy, [self.twin[node] for node in outside], Portions(copy, ctx), [{} for _ in ctx.calibration])
            self.done.update(self.was.outside)

    def inputs(self, doing: str) -> Iterator[Inputs]:
        """The inputs of all pending layers, tensor by tensor."""
        for block in self.ctx.track(self.cut, doing):
            for source in dict.fromkeys(node.args[0] for node in block.nodes if node in self.pending):
                assert isinstance(source, Node)
                yield self._inputs(block, source)
            if block is not self.cut[-1]:
                self._advance(block)

    def _inputs(self, block: Block, source: Node) -> Inputs:
        size = edit.value(source).shape[-1]
        layers = [self.pending[node] for node in block.nodes if node in self.pending and node.args[0] is source]
        wanted = {layer.node: self.weights[layer.node] for layer in layers if layer.node in self.weights}
        grams = {node: torch.zeros(weights[0].shape[1], size, size) for node, weights in wanted.items()}
        gram, cross, total = torch.zeros(size, size), torch.zeros(size, size) if self.was else None, torch.zeros(size)
        count = 0
        for index, batch in enumerate(self.ctx.calibration):
            x = self.now.values(block, index, batch, [source])[source].flatten(0, -2).float()
            gram.addmm_(x.T, x)
            _check_finite(gram, source, x, batch, index)
            total += x.sum(0)
            count += len(x)
            for node, weights in wanted.items():
                for of_group, w in zip(grams[node], weights[index].T, strict=True):
                    of_group.addmm_((x * w[:, None]).T, x)
            if self.was is not None and cross is not None:
                exact = self.twin[before_rounding(source)]
                cross.addmm_(self.was.values(self._twin(block), index, batch, [exact])[exact].flatten(0, -2).float().T, x)
        n = max(count, 1)
        of_groups = {node: found / n for node, found in grams.items()}
        return Inputs(layers, gram / n, None if cross is None else cross / n, of_groups, total / n)

    def _advance(self, block: Block) -> None:
        """Let both streams enter the next block."""
        for stream, own in ((self.now, block), (self.was, self._twin(block) if self.was else block)):
            if stream is not None:
                batches = enumerate(self.ctx.calibration)
                stream.entering = [stream.values(own, index, batch, own.exit) for index, batch in batches]
        if self.was is not None:
            self._release(self.was.gm, self._twin(block))

    def _release(self, copy: GraphModule, block: Block) -> None:
        """Drop the tensors of the model as it was that no later block reads."""
        self.done.update(block.nodes)
        for node in {read for call in block.nodes for read in call.all_input_nodes if read.op == "get_attr"}:
            if self.done.issuperset(node.users):
                edit.set_attribute(copy, node, edit.attribute(copy, node).new_empty(0))

    def _twin(self, block: Block) -> Block:
        """A block of the model as it was."""
        return Block(*(tuple(self.twin[node] for node in part) for part in (block.nodes, block.entry, block.exit)))


def still_inputs(
    gm: GraphModule, ctx: Context, pending: dict[Node, Layer], doing: str, roundings: Roundings = MappingProxyType({})
) -> Iterator[Inputs]:
    """The inputs of all pending layers of a graph that does not change meanwhile, tensor by tensor: every block runs once.

    Memory holds the stream of all samples, one block's activations of one batch, and the Gram matrices of one block, of its inputs and of
    the errors of each of their encodings.

    Args:
        gm, ctx, pending: as of `Prefix`.
        doing: what the progress bar says.
        roundings: encodings of inputs whose errors are wanted, by tensor; static ones are rounded over each batch's own range.
    """
    outside, cut = blocks(gm)
    stream = _Stream(gm, outside, Portions(gm, ctx), [{} for _ in ctx.calibration])
    for block in ctx.track(cut, doing):
        readers: dict[Node, list[Layer]] = {}
        for node in block.nodes:
            if node in pending:
                readers.setdefault(pending[node].site("input").operand, []).append(pending[node])
        grams = {source: torch.zeros(2 * (edit.value(source).shape[-1],)) for source in readers}
        totals = {source: torch.zeros(edit.value(source).shape[-1]) for source in readers}
        noise = {source: {encoding: torch.zeros_like(grams[source]) for encoding in roundings.get(source, ())} for source in readers}
        leaving = () if block is cut[-1] else block.exit
        count = 0
        for index, batch in enumerate(ctx.calibration):
            values = stream.values(block, index, batch, [*readers, *leaving])
            for source, gram in grams.items():
                x = values[source].flatten(0, -2).float()
                gram.addmm_(x.T, x)
                _check_finite(gram, source, x, batch, index)
                totals[source] += x.sum(0)
                for encoding, errors in noise[source].items():
                    e = x - numerics.fake_quantize(values[source], encoding).flatten(0, -2).float()
                    errors.addmm_(e.T, e)
            stream.entering[index] = {node: values[node] for node in leaving}
            count += tokens_in(batch)
        n = max(count, 1)
        for source, layers in readers.items():
            errors_of = {encoding: errors / n for encoding, errors in noise[source].items()}
            yield Inputs(layers, grams[source] / n, None, {}, totals[source] / n, errors_of)


def _check_finite(gram: Tensor, source: Node, x: Tensor, batch: Sequence[Tensor], index: int) -> None:
    """Refuse inputs `x` that are not finite, or whose Gram matrix is not; it had been until this batch."""
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
