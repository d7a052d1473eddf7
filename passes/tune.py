"""`tune`: the last mile: train scales, zero points and gains of norms against the model as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from ir import evaluate
from ir.errors import OptionError
from passes.base import Context, Effect, Pass
from passes.learning.descent import descend, needs_two, shuffled, some_rows, split
from passes.learning.divergence import of_outputs, own_outputs, teacher
from passes.learning.trained import TrainedGain, TrainedWeight, norms, stored_linears, straight_through

PARTS = ("scales", "zero_points", "gains")


@dataclass(frozen=True)
class Tune(Pass):
    """Train what stands around the integers of rounded weights; the integers stay as they are.

    Before, and after: the same graph with other scales; a norm without a gain gets one.

    The loss is the divergence from the model as it was before the first pass (of outputs that are no logits, the relative squared error),
    as in the second phase of EfficientQAT (2407.11062), with Adam and warm-up; the best of four looks at an eighth of the data, which is
    not trained on, is kept. Rounded activations pass gradients on as if they were not rounded.

    Limits: 1. of stored linears; embeddings keep their scales. 2. Gains stay in floating point, a number for each channel of a norm.

    Args:
        steps: of Adam.
        rows: samples of a batch in a step.
        rate: the greatest learning rate: of logarithms of scales and of gains; zero points, in steps of the codes, learn ten times as fast.
        parts: what is trained: "scales", "zero_points", "gains".
        seed: of the order of samples.

    Raises:
        DataError: fewer than two batches of calibration data.
        OptionError: nothing rounded to train around.
    """

    steps: int = 200
    rows: int = 4
    rate: float = 1e-3
    parts: tuple[str, ...] = ("scales", "gains")
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        self.take_names("parts", PARTS)
        if self.steps < 1 or self.rows < 1 or not self.rate > 0:
            raise OptionError("steps and rows are at least 1, the rate is positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Batches to learn from, and one to hold out."""
        needs_two(ctx, self.name())

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Rounded weights, and inputs as the model had them."""
        if not stored_linears(gm):
            raise OptionError("tune trains what stands around integers, and there are none", remedy="put round_weights before tune")
        if ctx.original is None:
            raise OptionError("the model as it was is not known", where="tune", remedy="run the pipeline by passes.compile")
        if len(evaluate.placeholders(ctx.original)) != len(evaluate.placeholders(gm)):
            raise OptionError("the graph takes other inputs than the model as it was", remedy="put tune before quantize_cache")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Train; returns the number of tensors that were, at least in part."""
        original = ctx.original
        assert original is not None
        users = stored_linears(gm)
        weights = {node: TrainedWeight(gm, node, zero_points="zero_points" in self.parts) for node in users}
        gains = [TrainedGain(gm, node) for node in norms(gm)] if "gains" in self.parts else []
        instead = straight_through(gm) | {user: own.linear for node, own in weights.items() for user in users[node]}
        instead |= {own.node: own.norm for own in gains}
        outputs, exact = own_outputs(gm), teacher(original)
        nodes = [node for node in evaluate.calls_for(gm, outputs) if node not in weights]

        def loss(rows: Sequence[torch.Tensor]) -> torch.Tensor:
            target = dict(zip(outputs, exact(rows), strict=True))
            given = evaluate.bind(gm, rows) | dict.fromkeys(weights)
            return of_outputs(
                evaluate.evaluate(gm, nodes, given, list(outputs), instead=instead, grad=torch.is_grad_enabled()), target, outputs
            )

        learned, held = split(list(ctx.calibration))
        samples = (some_rows(batch, self.rows, generator) for batch, generator in shuffled(learned, self.seed))
        parameters: list[nn.Parameter] = [own.factor for own in gains]
        if "scales" in self.parts:
            parameters += [own.log_scale for own in weights.values()]
        parameters += [own.shift for own in weights.values() if own.shift is not None]
        steps = partial(ctx.memo.steps, ctx, range(self.steps), "tune")
        descent = partial(descend, parameters, loss, samples, held, rate=self.rate, steps=steps, count=self.steps)
        with torch.enable_grad():
            ctx.memo.filled("trained", parameters, descent)
        trained: list[TrainedWeight | TrainedGain] = [*weights.values(), *gains]
        for own in trained:
            own.store()
        return len(parameters)
