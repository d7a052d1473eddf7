"""`learn_rounding`: choose the integers and scales of all weights together, by gradient on the model's own error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from ir import evaluate
from ir.errors import DataError, OptionError
from ir.rounding import Nearest
from ir.weights import round_layer, set_codes, unrounded
from passes.base import Context, Effect, Pass
from passes.codes import Codes
from passes.descent import rate_at, shuffled, some_rows
from passes.divergence import of_outputs, own_outputs
from passes.observation import mean_squares


@dataclass(frozen=True)
class LearnRounding(Pass):
    """Replace annotated weights by integer codes and scales that are learned on the model's divergence from itself.

    Before::

        %2 = aten.linear(%1, %w) {weight: u2[1,64]}

    After::

        %2 = fxpress.dequantize(%w_codes, %w_scale, %w_zero_point, 'u2[1,64]', float32); %3 = aten.linear(%1, %2)

    Codes are `round(w / s + z + v)` with offsets `v` between −½ and ½, so that every weight becomes one of its two neighbours: what is
    learned stays near the model, also on text unlike the calibration data. Offsets move against the sign of their gradient, as SignRound's
    (2309.05516), scales by Adam. The loss is that of the whole model: KL(model ‖ rounded model) per token, or the relative squared error
    of outputs that are no logits. Annotated inputs are rounded while learning, as they will be.

    A weight's gradient is used and dropped as soon as it is known: beside the model there are two bytes a weight for the offsets, one
    rounded weight, and the activations of `rows` samples.

    Args:
        steps: of the optimizer.
        rows: samples of a batch in a step.
        rate: first step of the offsets, falling linearly to zero.
        scale_rate: learning rate of the logarithms of scales, falling along a cosine.
        seed: of the order of samples.

    Raises:
        DataError: no calibration data.
        OptionError: a number that makes no sense.
    """

    steps: int = 200
    rows: int = 4
    rate: float = 1e-2
    scale_rate: float = 1e-3
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not self.rate > 0 or not self.scale_rate >= 0:
            raise OptionError("steps and rows are at least 1, rates positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        if not ctx.calibration:
            raise DataError("learn_rounding needs calibration data", remedy="pass calibration=[{'input_ids': ids}, ...]")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, then store the codes; embeddings, which have no inputs to learn from, are rounded to nearest."""
        pending = unrounded(gm)
        linears = [layer for layer in pending if layer.kind == "Linear"]
        if linears:
            read = mean_squares(gm, ctx, {layer.site("input").operand for layer in linears})
            learned = [Codes(gm, layer, read[layer.site("input").operand]) for layer in linears]
            with torch.enable_grad():
                self._descend(gm, ctx, learned)
            for codes in learned:
                set_codes(gm, codes.layer, codes.encoding, *codes.result())
        for layer in pending:  # last: the model that is learned from is the one that was given
            if layer.kind != "Linear":
                round_layer(gm, layer, Nearest(search=True))
        return len(pending)

    def _descend(self, gm: GraphModule, ctx: Context, learned: Sequence[Codes]) -> None:
        outputs = own_outputs(gm)
        nodes = evaluate.calls_for(gm, outputs)
        instead = {codes.layer.node: codes.linear for codes in learned}
        optimizer = torch.optim.Adam([codes.log_scale for codes in learned], betas=(0.9, 0.95))
        samples = shuffled(list(ctx.calibration), self.seed)
        for step in ctx.track(range(self.steps), "learn rounding"):
            batch, generator = next(samples)
            given = evaluate.bind(gm, some_rows(batch, self.rows, generator))
            exact = evaluate.evaluate(gm, nodes, given, list(outputs))
            for codes in learned:
                codes.rate = self.rate * (1 - step / self.steps)
            optimizer.param_groups[0]["lr"] = self.scale_rate * rate_at(step, self.steps)
            optimizer.zero_grad()
            found = evaluate.evaluate(gm, nodes, given, list(outputs), instead=instead, grad=True)
            of_outputs(found, exact, outputs).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
