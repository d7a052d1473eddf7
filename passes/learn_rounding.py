"""`learn_rounding`: choose the integers and scales of all weights together, by gradient on the model's own error."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import evaluate
from ir.errors import OptionError
from ir.memory import give_back
from ir.rounding import METHODS, Nearest
from ir.signature import Signature
from ir.sites import Layer
from ir.weights import round_layer, set_codes, unrounded
from passes.base import Context, Effect, Pass
from passes.data.evidence import rounded
from passes.data.sweep import Sweep, room_of
from passes.learning.codes import Codes
from passes.learning.descent import rate_at, shuffled, some_rows
from passes.learning.divergence import of_outputs, teacher
from passes.memo.loops import State

ROOM = 2**28  # bytes of activations of a step that are held at a time of any model
SHARE = 4  # of a greater one as many as its weights take, over this


@dataclass(frozen=True)
class LearnRounding(Pass):
    """Replace annotated weights by integer codes and scales that are learned on the model's divergence from itself.

    Before::

        %2 = aten.linear(%1, %w) {weight: u2[1,64]}

    After::

        %2 = fxpress.dequantize(%w_codes, %w_scale, %w_zero_point, 'u2[1,64]', float32); %3 = aten.linear(%1, %2)

    Codes are `round(w / s + z + v)`. The offsets `v` start where they give the codes of a method of `round_weights`, and move against the
    sign of their gradient, as SignRound's (2309.05516): by at most `rate (steps + 1) / 2`, so that what is learned stays near the start,
    also on text unlike the calibration data. Scales are learned by Adam. The loss is that of the whole model: KL(model ‖ rounded model) per
    token, or the relative squared error of outputs that are no logits; the model is the one before the first pass, also if units of it
    have been dropped since. Annotated inputs are rounded while learning, as they will be.

    A weight's gradient is used and dropped as soon as it is known: beside the model there are two bytes a weight for the offsets, one
    rounded weight, and the activations of `rows` samples, at most a quarter of the weights' bytes or 256 MB: of more, the graph is cut into
    parts, all but the last of which run twice. Before, there is what the start needs, of yaqa as much as a quarter of the weights' bytes.

    Args:
        start: method of `round_weights`, with its own options, that finds the codes to start from; what it needs is gathered from the model
            before rounding.
        steps: of the optimizer.
        rows: samples of a batch in a step.
        rate: first step of the offsets, falling linearly to zero.
        scale_rate: learning rate of the logarithms of scales, falling along a cosine.
        labels: share of the predictions to learn that the calibration text's next tokens take over, 0 to 1. The perplexity on such text
            falls, even below the model's own, and the divergence from the model grows: nothing for models that are tuned to chat.
        seed: of the order of samples.

    Raises:
        DataError: no calibration data.
        OptionError: a number that makes no sense; labels without a causal language model.
    """

    start: str = "yaqa"
    steps: int = 200
    rows: int = 4
    rate: float = 3e-3
    scale_rate: float = 2e-3
    labels: float = 0.0
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if self.start not in METHODS:
            raise OptionError(
                f"there is no rounding {self.start!r}", where="learn_rounding(start=...)", remedy=f"there are {list(METHODS)}"
            )
        if self.steps < 1 or self.rows < 1 or not self.rate > 0 or not self.scale_rate >= 0:
            raise OptionError("steps and rows are at least 1, rates positive", where=str(self))
        if not 0 <= self.labels <= 1:
            raise OptionError(f"labels is a share, not {self.labels}", where=str(self), remedy="set it from 0 to 1")

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        self.need_calibration(ctx)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """For labels a causal language model."""
        signature: Signature | None = gm.meta.get("signature")
        if self.labels and (signature is None or not signature.causal):
            raise OptionError("only a causal language model can learn from the next tokens", where=str(self), remedy="leave out labels")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, then store the codes; embeddings, which have no inputs to learn from, are rounded to nearest."""
        pending = unrounded(gm)
        linears = [layer for layer in pending if layer.kind == "Linear"]
        if linears:
            learned = list(self._begun(gm, ctx, linears))
            give_back()  # the start took factors, and matrices to factor them
            ctx.memo.filled("codes and scales", _learned(learned), lambda: self._descend(gm, ctx, learned))
            for codes in learned:
                set_codes(gm, codes.layer, codes.encoding, *codes.result())
        for layer in pending:  # last: the model that is learned from is the one that was given
            if layer.kind != "Linear":
                round_layer(gm, layer, Nearest(search=True))
        return len(pending)

    def _begun(self, gm: GraphModule, ctx: Context, linears: Sequence[Layer]) -> Iterator[Codes]:
        """The codes to start from."""
        rounding = METHODS[self.start]()
        for layer, codes, qparams in rounded(gm, ctx, {layer.node: layer for layer in linears}, rounding, propagation=0.0):
            yield Codes(gm, layer, codes, qparams)

    def _descend(self, gm: GraphModule, ctx: Context, learned: Sequence[Codes]) -> None:
        exact_outputs = teacher(_exact(gm, ctx), self.labels)
        sweep = Sweep(gm, {}, {codes.layer.node: codes.linear for codes in learned}, room_of(gm, ROOM, SHARE))
        optimizer = torch.optim.Adam([codes.log_scale for codes in learned], betas=(0.9, 0.95))
        samples = (some_rows(batch, self.rows, generator) for batch, generator in shuffled(list(ctx.calibration), self.seed))
        state = State(_learned(learned), optimizer, samples=samples)
        for step in ctx.memo.steps(ctx, range(self.steps), "learn rounding", state):
            rows = next(samples)
            for codes in learned:
                codes.rate = self.rate * (1 - step / self.steps)
            optimizer.param_groups[0]["lr"] = self.scale_rate * rate_at(step, self.steps)
            optimizer.zero_grad()
            sweep.run(rows, partial(_slope, sweep.outputs, dict(zip(sweep.outputs, exact_outputs(rows), strict=True))))
            optimizer.step()


def _slope(outputs: Mapping[Node, str], exact: dict[Node, Tensor], node: Node, value: Tensor) -> Tensor:
    """The gradient of the loss at an own output."""
    value.requires_grad_()
    (found,) = torch.autograd.grad(of_outputs({node: value}, {node: exact.pop(node)}, {node: outputs[node]}), value)
    return found


def _learned(codes: Sequence[Codes]) -> list[Tensor]:
    """What is learned of weights."""
    return [tensor for own in codes for tensor in (own.offset, own.log_scale)]


def _exact(gm: GraphModule, ctx: Context) -> GraphModule:
    """The model to learn from: as it was before the first pass, or before rounding if that took other inputs.

    It says more than the graph as it is, where units have been dropped: rounding can make up for a part of that.
    """
    was = ctx.original
    return gm if was is None or len(evaluate.placeholders(was)) != len(evaluate.placeholders(gm)) else was
