"""Learning masks: gates drawn from a generator's logits, soft in the model's loss, hard in the budget's, by AdamW."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import evaluate
from ir.errors import OptionError
from ir.signature import Signature
from passes.base import Context
from passes.learning.descent import shuffled, some_rows
from passes.learning.divergence import of_outputs, own_outputs
from passes.learning.masks import MaskGenerator, distance_to, gate, hard
from passes.memo.loops import State
from passes.memo.packed import like

LOSSES = ("divergence", "cross_entropy")
Gated = Callable[[Sequence[Tensor]], Mapping[Node, Callable[..., Any]]]  # from gates, what to call in place of calls
Distance = Callable[[Sequence[Tensor]], Tensor]  # from hard gates, how far they are from the budget


def check_loss(loss: str, where: str) -> None:
    """Refuse the name of a loss that there is not.

    Raises:
        OptionError: there are `LOSSES`.
    """
    if loss not in LOSSES:
        raise OptionError(f"there is no loss {loss!r}", where=f"{where}(loss=...)", remedy=f"there are {list(LOSSES)}")


def check_causal(gm: GraphModule, loss: str, where: str) -> None:
    """Refuse the cross entropy of a model without next tokens.

    Raises:
        OptionError: it is no causal language model.
    """
    signature: Signature | None = gm.meta.get("signature")
    if loss == "cross_entropy" and (signature is None or not signature.causal):
        raise OptionError("cross_entropy needs a causal language model", where=where, remedy="set loss='divergence'")


@dataclass(frozen=True)
class MaskLearning:
    """How masks are learned; the fields are options of the passes that do it.

    Args:
        steps: of AdamW.
        rate: learning rate.
        seed: of what is drawn.
        rows: samples of a batch in a step.
        strength: λ, of the budget in the loss.
        labels: the loss is the cross entropy of the calibration text, not the divergence from the model as it is.
    """

    steps: int
    rate: float
    seed: int
    rows: int = 4
    strength: float = 6.0
    labels: bool = False

    def logits(self, gm: GraphModule, ctx: Context, sizes: Sequence[int], distance: Distance, gated: Gated) -> list[Tensor]:
        """The logits of all masks in the end.

        Args:
            gm: the graph, whose weights stay.
            ctx: with calibration data.
            sizes: channels of each mask.
            distance: of what open gates take from the budget.
            gated: what gates do to the model.
        """
        form = like([torch.empty(size, device="meta") for size in sizes])
        return ctx.memo.kept("logits", partial(self._learned, gm, ctx, sizes, distance, gated), form)

    def _learned(self, gm: GraphModule, ctx: Context, sizes: Sequence[int], distance: Distance, gated: Gated) -> list[Tensor]:
        outputs = own_outputs(gm)
        nodes = evaluate.calls_for(gm, outputs)
        drawn = torch.Generator().manual_seed(self.seed)
        masks = MaskGenerator(sizes, drawn)
        optimizer = torch.optim.AdamW(masks.parameters(), lr=self.rate, weight_decay=0.05)
        samples = (some_rows(batch, self.rows, generator) for batch, generator in shuffled(list(ctx.calibration), self.seed))
        state = State(list(masks.parameters()), optimizer, [drawn], samples)
        for _ in ctx.memo.steps(ctx, range(self.steps), "learn masks", state):
            given = evaluate.bind(gm, next(samples))
            gates = [gate(logits, drawn) for logits in masks()]
            found = evaluate.evaluate(gm, nodes, given, list(outputs), instead=gated(gates), grad=True)
            loss = self._loss(gm, nodes, given, found, outputs) + self.strength * distance([hard(own) for own in gates])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            final: list[Tensor] = masks()
        return final

    def _loss(self, gm: GraphModule, nodes: Sequence[Node], given: Mapping[Node, Any], found: Mapping[Node, Any], outputs: Any) -> Tensor:
        if not self.labels:
            return of_outputs(found, evaluate.evaluate(gm, nodes, given, list(outputs)), outputs)
        ids = next(iter(given.values()))
        logits = next(found[node] for node, name in outputs.items() if name == "logits")
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def over_share(sizes: Sequence[int], weights: Sequence[int], share: float) -> Distance:
    """The distance from a share of all weights, where each open gate takes as many as one channel of its mask has."""
    total = float(sum(map(int.__mul__, sizes, weights)))

    def distance(opened: Sequence[Tensor]) -> Tensor:
        spent = torch.stack([own.sum() * count for own, count in zip(opened, weights, strict=True)]).sum() / total
        return distance_to(share, spent)

    return distance


def by_weight(logits: Sequence[Tensor], weights: Sequence[int]) -> list[Tensor]:
    """Logits as scores, from 0 up, that a budget compares by what channels weigh."""
    least = min(float(own.min()) for own in logits)
    return [(own - least) * count for own, count in zip(logits, weights, strict=True)]
