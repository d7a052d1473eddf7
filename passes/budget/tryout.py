"""Try a choice out: how far the model is from itself after it and the passes that follow, measured on a copy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from passes.base import Context
from passes.data.calibration import tokens_in
from passes.learning.divergence import of_outputs, own_outputs, teacher
from passes.pipeline import Pipeline


def promising(kept: Sequence[float], measured: Sequence[float]) -> list[int]:
    """The numbers of choices that none beats in both: what it keeps of the weights, and what it measures; of equals the first.

    What follows wins back more of what rounding costs than of what dropping does: so of choices the one with less of both stays ahead.
    """
    order = sorted(range(len(kept)), key=lambda index: (-kept[index], measured[index]))
    least, found = math.inf, []
    for index in order:
        if measured[index] < least:
            least = measured[index]
            found.append(index)
    return sorted(found)


def try_out(
    gm: GraphModule, ctx: Context, held: Sequence[Sequence[Tensor]], change: Callable[[GraphModule, Context], object], finish: Pipeline
) -> float:
    """`KL(model ‖ changed model)` after the passes of `finish`, nats a token; of outputs that are no logits the relative squared error.

    Args:
        gm: the graph, which stays as it is; the copy shares its tensors.
        ctx: with the calibration data that passes may see.
        held: batches to measure on.
        change: the choice, made in the copy.
        finish: run after it, without the checks of their effects.
    """
    copy = edit.copied(gm)
    own = replace(ctx, skipped=[], notes=[], tables={}, statistics=None)
    change(copy, own)
    edit.clean(copy)
    for step in finish:
        step.requires(copy, own)
        step.run(copy, own)
        edit.clean(copy)
    exact, found, outputs = teacher(gm), teacher(copy), own_outputs(gm)
    total = 0.0
    for batch in held:
        after, before = (dict(zip(outputs, run(batch), strict=True)) for run in (found, exact))
        total += tokens_in(batch) * float(of_outputs(after, before, outputs))
    return total / max(sum(map(tokens_in, held)), 1)
