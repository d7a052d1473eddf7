"""What dropping units costs, measured: for branches, which are few, and too great for an estimate at the point where they are whole."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import evaluate
from passes.base import Context
from passes.data.observation import sampled
from passes.learning.divergence import of_outputs, own_outputs
from passes.memo.packed import like
from passes.pruning.kinds import Units


def losses(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int) -> list[Tensor]:
    """The divergence `[1]`, nats a token, from the model as it is without each unit alone; units are branches.

    Args:
        tokens: of the calibration data; one run over them for every unit, so that time grows with the square of the layers.
    """
    form = like([torch.empty(1, device="meta")] * len(units))
    return ctx.memo.kept("losses", partial(_losses, gm, ctx, units, tokens), form)


def _losses(gm: GraphModule, ctx: Context, units: Sequence[Units], tokens: int) -> list[Tensor]:
    outputs = own_outputs(gm)
    nodes = evaluate.calls_for(gm, outputs)
    batches = sampled(ctx, tokens).calibration
    found: dict[int, list[float]] = {}
    for index in ctx.track(ctx.ranks.share(len(batches)), "measure units"):
        given, found[index] = evaluate.bind(gm, batches[index]), []
        exact = evaluate.evaluate(gm, nodes, given, list(outputs))
        for own in units:
            instead = {branch.value: partial(_nothing, branch.value.target) for branch in own.branches}
            found[index].append(float(of_outputs(evaluate.evaluate(gm, nodes, given, list(outputs), instead=instead), exact, outputs)))
    every = sorted(pair for said in ctx.ranks.everyone(list(found.items())) for pair in said)
    return list(torch.tensor([of_units for _, of_units in every]).mean(0, keepdim=True).T)


def _nothing(target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Zeros in place of a call's value."""
    return torch.zeros_like(target(*args, **kwargs))
