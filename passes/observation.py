"""The streaming run that statistics come from."""

from typing import Any

from torch.fx import GraphModule, Node

from ir import evaluate
from ir.sites import readers
from ir.statistics import Statistics
from passes.base import Context


def observed(gm: GraphModule, ctx: Context, *, gram: bool = False) -> Statistics:
    """Statistics of the inputs of all linears over the calibration data, by the path of the first layer that reads each tensor."""
    sources = {source: found[0].path for source, found in readers(gm).items()}
    statistics = Statistics()

    def tap(node: Node, value: Any) -> None:
        if node in sources:
            statistics.observe(sources[node], value, gram=gram)

    for batch in ctx.track(ctx.calibration, "observe"):
        for node, value in evaluate.bind(gm, batch).items():
            tap(node, value)
        evaluate.run(gm, batch, tap)
    return statistics
