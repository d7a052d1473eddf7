"""Streaming runs over the calibration data: what passes learn of a graph's values."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import evaluate
from ir.sites import readers
from ir.statistics import Statistics
from passes.base import Context
from passes.calibration import naming, take_rows, tokens_in
from passes.portions import Portions

TOKENS = 16384  # that tell mean squares well enough


def watch(gm: GraphModule, ctx: Context, sources: Collection[Node], take: Callable[[Node, Tensor], None], doing: str) -> None:
    """Give `take` the values of `sources` on every batch, as soon as each is known; no more of the graph is run than they need.

    Where memory runs out, `take` gets the samples of a batch in portions; what it refuses since it is not finite is told with its sample.

    Args:
        sources: calls and inputs of the graph.
        doing: what the progress bar says.
    """
    wanted = set(sources)
    calls = evaluate.calls_for(gm, wanted)

    portions = Portions(gm, ctx)
    for index, batch in enumerate(ctx.track(ctx.calibration if wanted else (), doing)):

        def tap(node: Node, value: Any, index: int = index, batch: Sequence[Tensor] = batch) -> None:
            if node in wanted:
                with naming(value, batch, index, whole=not portions.rows):
                    take(node, value)

        given = evaluate.bind(gm, batch)
        for node, value in given.items():
            tap(node, value)
        portions.run(calls, given, [], tap)


def tokens_of(value: Tensor, ctx: Context, count: int) -> Tensor:
    """Of `count` tokens that are wanted over all batches this batch's share, evenly spaced: `[tokens, channels]`."""
    rows = value.flatten(0, -2)
    share = min(-(-count // len(ctx.calibration)), len(rows))
    return rows[torch.linspace(0, len(rows) - 1, share).long()]


def sampled(ctx: Context, tokens: int) -> Context:
    """A context with about that many tokens of the calibration data, spread over all batches; itself if it has no more."""
    share = tokens / max(sum(map(tokens_in, ctx.calibration)), 1)
    if share >= 1:
        return ctx
    return replace(ctx, calibration=[take_rows(batch, slice(max(1, round(share * len(batch[0]))))) for batch in ctx.calibration])


def observed(gm: GraphModule, ctx: Context, *, gram: bool = False, sketch: bool = True) -> Statistics:
    """Statistics of the inputs of all linears over the calibration data, by the path of the first layer that reads each tensor."""
    sources = {source: found[0].path for source, found in readers(gm).items()}
    statistics = Statistics()
    watch(gm, ctx, sources, lambda node, value: statistics.observe(sources[node], value, gram=gram, sketch=sketch), "observe")
    return statistics


def mean_squares(gm: GraphModule, ctx: Context, sources: Collection[Node]) -> dict[Node, Tensor]:
    """`E[x²] [channels]` of tensors that linears read, float32, from the statistics there are or a run of its own."""
    statistics = ctx.statistics or observed(gm, sampled(ctx, TOKENS), sketch=False)
    return {source: statistics[found[0].path].second_moment.float() for source, found in readers(gm).items() if source in sources}
