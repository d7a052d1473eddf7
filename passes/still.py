"""`still_inputs`: the inputs of layers, block after block, of a graph that does not change meanwhile."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch.fx import GraphModule, Node

from ir import edit, numerics
from ir.blocks import blocks
from ir.encoding import Encoding
from ir.sites import Layer
from passes.base import Context
from passes.calibration import tokens_in
from passes.memo import Tensors
from passes.prefix import Inputs, Source, finite
from passes.stream import Stream, contiguous
from passes.walk import Walk

Roundings = Mapping[Node, Collection[Encoding]]


def still_inputs(
    gm: GraphModule, ctx: Context, pending: dict[Node, Layer], doing: str, roundings: Roundings = MappingProxyType({})
) -> Iterator[Inputs]:
    """The inputs of all pending layers of a graph that does not change meanwhile, tensor by tensor; as `still_sources`."""
    return (source.inputs() for source in still_sources(gm, ctx, pending, doing, roundings))


def still_sources(
    gm: GraphModule, ctx: Context, pending: dict[Node, Layer], doing: str, roundings: Roundings = MappingProxyType({})
) -> Iterator[Source]:
    """All pending layers of a graph that does not change meanwhile, tensor by tensor: every block runs once, if its inputs are asked for.

    Memory holds the stream of all samples, one block's activations of one batch, and the Gram matrices of one block, of its inputs and of
    the errors of each of their encodings.

    Args:
        gm, ctx, pending: as of `Prefix`.
        doing: what the progress bar says.
        roundings: encodings of inputs whose errors are wanted, by tensor; static ones are rounded over each batch's own range.
    """
    still = _Still(gm, ctx, roundings)
    walk = Walk(ctx.memo.latest(f"{doing}, the stream"), still.advance, still.stored, still.restore)
    for number, block in enumerate(ctx.track(still.cut, doing)):
        readers: dict[Node, list[Layer]] = {}
        for node in block.nodes:
            if node in pending:
                readers.setdefault(pending[node].site("input").operand, []).append(pending[node])
        found: dict[Node, Inputs] = {}
        for source, layers in readers.items():
            yield Source(layers, partial(still.inputs, walk, number, readers, found, source))


class _Still:
    """A graph that does not change, run block by block."""

    def __init__(self, gm: GraphModule, ctx: Context, roundings: Roundings) -> None:
        self.gm, self.ctx, self.roundings = gm, ctx, roundings
        outside, self.cut = blocks(gm)
        self.stream = Stream(gm, outside, [{} for _ in ctx.calibration])

    def advance(self, number: int) -> None:
        """Let the stream enter the block after that of this number."""
        self.stream.enter(self.cut[number], self.ctx.calibration)

    def stored(self) -> Tensors | None:
        """The stream."""
        return self.stream.stored("now")

    def restore(self, held: Tensors, number: int) -> None:
        """Let the stream enter the block of this number, as it was kept."""
        self.stream.entering = self.stream.restored(held, "now", self.cut[number - 1].exit)

    def inputs(self, walk: Walk, number: int, readers: dict[Node, list[Layer]], found: dict[Node, Inputs], source: Node) -> Inputs:
        """The inputs of a tensor's readers; those of a whole block are found at once, and the stream enters the next one."""
        if not found:
            walk.reach(number)
            found.update(self._of_block(number, readers))
            walk.reached(number + 1)
        return found[source]

    def _of_block(self, number: int, readers: dict[Node, list[Layer]]) -> dict[Node, Inputs]:
        block = self.cut[number]
        grams = {source: torch.zeros(2 * (edit.value(source).shape[-1],)) for source in readers}
        totals = {source: torch.zeros(edit.value(source).shape[-1]) for source in readers}
        noise = {source: {encoding: torch.zeros_like(grams[source]) for encoding in self.roundings.get(source, ())} for source in readers}
        leaving = () if block is self.cut[-1] else block.exit
        count = 0
        for index, batch in enumerate(self.ctx.calibration):
            values = self.stream.values(block, index, batch, [*readers, *leaving])
            for source, gram in grams.items():
                x = values[source].flatten(0, -2).float()
                gram.addmm_(x.T, x)
                totals[source] += x.sum(0)
                for encoding, errors in noise[source].items():
                    e = x - numerics.fake_quantize(values[source], encoding).flatten(0, -2).float()
                    errors.addmm_(e.T, e)
            self.stream.entering[index] = {node: contiguous(values[node]) for node in leaving}
            count += tokens_in(batch)
        n = max(count, 1)
        errors_of = {source: {encoding: errors / n for encoding, errors in own.items()} for source, own in noise.items()}
        return {
            source: Inputs(layers, finite(grams[source], source) / n, None, {}, totals[source] / n, errors_of[source])
            for source, layers in readers.items()
        }
