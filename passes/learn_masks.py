"""`learn_masks`: learn by gradient which input channels are stored in a wider scheme."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import OptionError
from ir.schemes import bits_of, change_bits
from ir.sites import Layer
from ir.split import rows_of, split_best, splittable
from ir.weights import stored_bits
from passes.base import Context, Effect, Pass
from passes.data.observation import mean_squares
from passes.learning.mask_learning import MaskLearning, by_weight, check_causal, check_loss, over_share
from passes.learning.masks import mixed_linear


@dataclass(frozen=True)
class LearnMasks(Pass):
    """Split annotated linears into channels of a wider scheme and the rest, by masks that are learned on the whole model's error.

    Before, and after: as of `split_channels`.

    The published method (2606.07819; generator after 2410.11988): a small network makes one binary mask for each tensor that linears read;
    its gates are drawn (Gumbel), soft in the model's loss and hard, straight-through, in the budget's `log(max(b, B)/min(b, B))`, where `B`
    is the share of weights in the wider scheme. The model's weights stay as they are. How many channels a layer gets is learned; in the end
    those with the greatest logits are taken that the budget has room for.

    Limits: 1. two schemes; 2. masks are learned on weights rounded to nearest, whatever rounds
    them later, and static inputs on each batch's own range.

    Args:
        high: scheme of the chosen channels; the rest is as annotated.
        share: of all annotated weights, to choose.
        bits: budget in place of `share`: bits per weight of the annotated linears, with scales and zero points.
        loss: "divergence" from the model as it is; or "cross_entropy" of the calibration text, as published, for causal language models.
        steps: of AdamW.
        rows: samples of a batch in a step.
        rate: learning rate.
        strength: λ, of the budget in the loss.
        multiple: channels of a layer are chosen that many at a time.
        order: sort channels within a part by their mean square; else they keep their order.
        seed: of what is drawn.

    Raises:
        DataError: no calibration data.
        OptionError: an option that there is not; "cross_entropy" of a model that is no causal language model.
    """

    high: str = "W8A8"
    share: float = 0.125
    bits: float = 0.0
    loss: str = "divergence"
    steps: int = 2000
    rows: int = 4
    rate: float = 1e-3
    strength: float = 6.0
    multiple: int = 16
    order: bool = True
    seed: int = 0
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        bits_of(self.high, "learn_masks(high=...)")
        check_loss(self.loss, self.name())
        if (
            not 0 < self.share < 1
            or self.bits < 0
            or min(self.steps, self.rows, self.multiple) < 1
            or not self.rate > 0
            or self.strength < 0
        ):
            raise OptionError("a share lies between 0 and 1, counts are at least 1, rates positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        self.need_calibration(ctx)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Inputs in floating point; and for cross entropy a causal language model."""
        splittable(gm)
        check_causal(gm, self.loss, str(self))

    def _share(self, whole: Mapping[Node, Sequence[Layer]]) -> float:
        """The share to choose: the greatest, in thousandths, that the budget has room for."""
        if not self.bits:
            return self.share
        found = [layer for found in whole.values() for layer in found]
        room = self.bits * sum(edit.value(layer.weight).numel() for layer in found)

        def size(share: int) -> int:
            return sum(_size(layer, self.high, share / 1000) for layer in found)

        fitting = bisect_right(range(1, 1000), room, key=size)
        if not fitting:
            least = self.bits * size(1) / room
            raise OptionError(f"no channel in {self.high} fits into {self}", remedy=f"the least budget is bits={least:.3f}")
        return fitting / 1000

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, then split; returns the number of linears that became two."""
        whole = splittable(gm)
        if not whole:
            return 0
        share = self._share(whole)
        rows = [rows_of(found) for found in whole.values()]
        with torch.enable_grad():
            logits = self._learned(gm, ctx, whole, rows, share)
        scores = dict(zip(whole, by_weight(logits, rows), strict=True))
        order = mean_squares(gm, ctx, whole) if self.order else {}
        taken, changed = split_best(gm, whole, scores, share, self.multiple, self.high, order)
        ctx.notes.append(f"learn_masks: {taken:.2%} of the weights in {self.high}, in {changed} linears")
        return changed

    def _learned(
        self, gm: GraphModule, ctx: Context, whole: Mapping[Node, Sequence[Layer]], rows: Sequence[int], share: float
    ) -> list[Tensor]:
        """The logits of all masks."""
        pairs = [
            (place, layer.node, layer.mark, change_bits(layer, self.high)) for place, found in enumerate(whole.values()) for layer in found
        ]

        def gated(gates: Sequence[Tensor]) -> dict[Node, partial[Tensor]]:
            return {node: partial(mixed_linear, low, high, gates[place]) for place, node, low, high in pairs}

        learning = MaskLearning(self.steps, self.rate, self.seed, self.rows, self.strength, self.loss == "cross_entropy")
        sizes = [int(edit.value(source).shape[-1]) for source in whole]
        return learning.logits(gm, ctx, sizes, over_share(sizes, rows, share), gated)


def _size(layer: Layer, high: str, share: float) -> int:
    """Bits of a linear with a share of its channels in another scheme."""
    (N, K), (_, low), (_, wide) = edit.value(layer.weight).shape, layer.mark, change_bits(layer, high)
    chosen = round(share * K)
    return sum(stored_bits((N, count), encoding) for count, encoding in ((chosen, wide), (K - chosen, low)) if count)
