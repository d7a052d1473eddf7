"""Streaming runs over the calibration data: what passes learn of a graph's values."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import evaluate
from ir.sites import readers
from ir.statistics import Statistics, TensorStatistics
from passes.base import Context
from passes.data.calibration import naming, take_rows, tokens_in
from passes.data.portions import Portions
from passes.memo.packed import STATISTICS
from passes.ranks import Ranks

Zeros = Callable[[], Sequence[Tensor]]
Take = Callable[[Sequence[Tensor], Node, Tensor], None]
TOKENS = 16384  # that tell mean squares well enough


def watch(gm: GraphModule, ctx: Context, sources: Collection[Node], take: Callable[[Node, Tensor], None], doing: str) -> None:
    """Give `take` the values of `sources` on every batch of this process, as soon as each is known.

    Where memory runs out, `take` gets the samples of a batch in portions; what it refuses since it is not finite is told with its sample.

    Args:
        sources: calls and inputs of the graph.
        doing: what the progress bar says.
    """
    run = _runner(gm, ctx, sources)
    for index in ctx.track(ctx.ranks.share(len(ctx.calibration)) if sources else (), doing):
        run(index, take)


def total(gm: GraphModule, ctx: Context, sources: Collection[Node], zeros: Zeros, take: Take, doing: str) -> list[Tensor]:
    """Sums over all batches of what the values of `sources` say.

    Args:
        sources, doing: as of `watch`.
        zeros: makes the sums of nothing.
        take: adds what a node's value has to sums.
    """
    run = _runner(gm, ctx, sources)
    return ctx.total(zeros, lambda index, _, sums: run(index, partial(take, sums)), doing) if sources else list(zeros())


def _runner(gm: GraphModule, ctx: Context, sources: Collection[Node]) -> Callable[[int, Callable[[Node, Tensor], None]], None]:
    """What gives a function the values of nodes on a batch; no more of the graph is run than they need."""
    wanted = set(sources)
    calls = evaluate.calls_for(gm, wanted)

    portions = Portions(gm, ctx)

    def run(index: int, take: Callable[[Node, Tensor], None]) -> None:
        batch = ctx.calibration[index]

        def tap(node: Node, value: Any) -> None:
            if node in wanted:
                with naming(value, batch, index, whole=not portions.rows):
                    take(node, value)

        given = evaluate.bind(gm, batch)
        for node, value in given.items():
            tap(node, value)
        portions.run(calls, given, [], tap)

    return run


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
    names = {source: found[0].path for source, found in readers(gm).items()}

    def measured() -> Statistics:
        return statistics(gm, ctx, names, "observe", gram=gram, sketch=sketch)

    return ctx.memo.kept("statistics", measured, STATISTICS)


def statistics(
    gm: GraphModule,
    ctx: Context,
    names: Mapping[Node, str],
    doing: str,
    *,
    gram: bool = False,
    sketch: bool = True,
    form: Callable[[Tensor], Tensor] = lambda value: value,
) -> Statistics:
    """Statistics of nodes' values over the calibration data, by their names.

    Extremes, sketches and moments do not depend on how many processes there are; Gram matrices by their rounding.

    Args:
        form: makes `[..., channels]` of a value.
    """
    count, ranks = len(ctx.calibration), ctx.ranks
    lanes = ranks.lanes(count)
    lane_of = {index: lane for lane, batches in enumerate(lanes) for index in batches}
    moments: dict[int, Statistics] = {}
    whole = Statistics()
    run = _runner(gm, ctx, names)

    def take(own: Statistics, node: Node, value: Tensor) -> None:
        own.observe(names[node], form(value), sketch=False)
        if gram or sketch:
            whole.observe(names[node], form(value), gram=gram, sketch=sketch)

    for index in ctx.track(ranks.share(count), doing):
        run(index, partial(take, moments.setdefault(lane_of[index], Statistics())))
    found = Statistics()
    for name in names.values() if count else ():
        found[name] = _merged(ranks, [lane % ranks.world for lane in range(len(lanes))], [own.pop(name) for own in moments.values()])
        if gram or sketch:
            mean, deviation = found[name].mean, found[name].deviation
            owners = list(range(min(ranks.world, len(lanes))))
            found[name] = replace(_merged(ranks, owners, [whole.pop(name)] if whole else []), mean=mean, deviation=deviation)
    return found


def _merged(ranks: Ranks, owners: Sequence[int], own: Sequence[TensorStatistics]) -> TensorStatistics:
    """The statistics of all items, in order."""
    found = ranks.collect(owners, [each.tensors() for each in own])
    return reduce(TensorStatistics.merge, map(TensorStatistics.from_tensors, found))


def mean_squares(gm: GraphModule, ctx: Context, sources: Collection[Node]) -> dict[Node, Tensor]:
    """`E[x²] [channels]` of tensors that linears read, float32, from the statistics there are or a run of its own."""
    known = ctx.statistics or observed(gm, sampled(ctx, TOKENS), sketch=False)
    return {source: known[found[0].path].second_moment.float() for source, found in readers(gm).items() if source in sources}
