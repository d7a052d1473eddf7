"""`still_inputs`: the inputs of layers, block after block, of a graph that does not change meanwhile."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, numerics
from ir.blocks import blocks
from ir.encoding import Encoding
from ir.sites import Layer
from passes.base import Context
from passes.data.calibration import tokens_in
from passes.data.portions import Portions
from passes.data.prefix import Inputs, Source, check_finite
from passes.data.stream import Stream
from passes.data.walk import Walk
from passes.memo.folder import Tensors

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
    walk = Walk(ctx.memo.latest(f"{doing}, the stream", own=True), still.advance, still.stored, still.restore)
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
        self.stream = Stream(gm, outside, ctx.ranks.share(len(ctx.calibration)), Portions(gm, ctx))

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
        block, count = self.cut[number], max(sum(map(tokens_in, self.ctx.calibration)), 1)
        roundings = {source: list(self.roundings.get(source, ())) for source in readers}
        leaving = () if block is self.cut[-1] else block.exit

        def zeros() -> list[Tensor]:
            sizes = {source: edit.value(source).shape[-1] for source in readers}
            return [torch.zeros(shape) for source, K in sizes.items() for shape in ((K,), (K, K), *((K, K) for _ in roundings[source]))]

        def by_source(sums: Sequence[Tensor]) -> dict[Node, tuple[Tensor, Tensor, dict[Encoding, Tensor]]]:
            rest = iter(sums)
            return {source: (next(rest), next(rest), {each: next(rest) for each in found}) for source, found in roundings.items()}

        def take(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
            values = self.stream.values(block, index, batch, [*readers, *leaving])
            for source, (total, gram, noise) in by_source(sums).items():
                x = values[source].flatten(0, -2).float()
                gram.addmm_(x.T, x)
                check_finite(gram, source, x, batch, index)
                total.add_(x.sum(0))
                for encoding, errors in noise.items():
                    e = x - numerics.fake_quantize(values[source], encoding).flatten(0, -2).float()
                    errors.addmm_(e.T, e)
            self.stream.entering[index] = self.stream.leaving({node: values[node] for node in leaving})

        found = {}
        for source, (total, gram, noise) in by_source(self.ctx.total(zeros, take)).items():
            errors_of = {encoding: errors / count for encoding, errors in noise.items()}
            found[source] = Inputs(readers[source], gram / count, None, {}, total / count, errors_of)
        return found
