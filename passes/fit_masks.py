"""`fit_masks`: learn by gradient, under one budget, what is dropped and which channels of the rest are stored in a wider scheme."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import OptionError
from ir.schemes import FLOAT, bits_of, change_bits
from ir.sites import Layer, check_patterns, layers
from ir.split import split_off, splittable
from passes.base import Context, Effect, Pass
from passes.data.observation import mean_squares
from passes.learning.mask_learning import MaskLearning, check_causal, check_loss
from passes.pruning.dropping import drop, tell_left
from passes.pruning.joint_masks import JointMasks, Linear, Taken
from passes.pruning.kinds import HEADS, INPUTS, MLP, OUTPUTS, Units
from passes.pruning.prunable import annotated_units

BETWEEN, STREAM = (MLP, HEADS), (INPUTS, OUTPUTS)  # kinds that share weights: one after the other is dropped


@dataclass(frozen=True)
class FitMasks(Pass):
    """Drop units of channels, and give some of the rest a wider scheme, by masks that are learned together on the whole model's error.

    Before::

        %2 = aten.linear(%1, %w): [.., 256] {weight: u4[1,-1]}

    After::

        %4 = aten.linear(%3, %w_0): [.., 256] {weight: u8[1,-1]}; %6 = aten.linear(%5, %w_1): [.., 256] {weight: u4[1,-1]}; %7 = %4 + %6

    The published joint search (2606.07819; generator after 2410.11988): per branch, masks over the dims that it reads, those that it
    writes and the channels between its linears, and for every tensor that linears read one over channels in the wider scheme. Gates are
    drawn, soft in the model's loss and hard in the budget's `log(max(b, B)/min(b, B))`, `B = Σ in out (h f + l (1 − f)) / Σ IN OUT`, where
    in and out are the columns and rows that stay of IN and OUT, `f` the share of those columns in the wider scheme. In the end one shift of
    all logits opens as many gates as the budget has room for. What is dropped goes as by `prune`: what reads the rest is refitted, and cut.

    Limits: 1. those of `learn_masks` and `prune`; 2. heads and channels between linears are dropped before dims of the stream.

    Args:
        high: scheme of the chosen channels; the rest is as annotated.
        memory: budget: the share that is left of the annotated linears' size in FP16, scales and zero points counted.
        bits: budget in place of `memory`: bits for each weight that there is before units are dropped.
        kept: share of their weights that stays, for a fixed sparsity; 0: that is learned too.
        what: kinds of units that may go: "mlp", "heads", "inputs" and "outputs".
        loss, steps, rows, rate, strength, order, seed: as of `learn_masks`; 10 000 steps are published.
        multiple: channels that stay, and those that are chosen, are so many, or a multiple.
        compensate, damping, ignore: as of `prune`.

    Raises:
        DataError: no calibration data.
        OptionError: an option that there is not, a budget that nothing fits into; "cross_entropy" without a causal language model.
    """

    high: str = "W8A16"
    memory: float = 0.125
    bits: float = 0.0
    kept: float = 0.0
    what: tuple[str, ...] = (MLP, *STREAM)
    loss: str = "divergence"
    steps: int = 10_000
    rows: int = 4
    rate: float = 1e-3
    strength: float = 6.0
    multiple: int = 16
    order: bool = True
    compensate: bool = True
    damping: float = 0.01
    ignore: tuple[str, ...] = ()
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        bits_of(self.high, "fit_masks(high=...)")
        self.take_names("what", (*BETWEEN, *STREAM))
        self.take_several("ignore")
        check_loss(self.loss, self.name())
        shares = 0 < self.memory < 1 and 0 <= self.kept < 1
        if (
            not shares
            or min(self.bits, self.strength, self.damping) < 0
            or min(self.steps, self.rows, self.multiple) < 1
            or not self.rate > 0
        ):
            raise OptionError("shares lie between 0 and 1, counts are at least 1, rates positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        self.need_calibration(ctx)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Inputs in floating point, a budget that something fits into, patterns that match; for cross entropy a causal language model."""
        check_causal(gm, self.loss, str(self))
        if not ctx.part:
            check_patterns(self.ignore, layers(gm), "fit_masks(ignore=...)")
        masks, _ = self._masks(gm)
        least = masks.least(self.kept) if masks.linears else 0.0
        if least > self._budget:
            remedy = f"the least budget is memory={least / FLOAT + 5e-5:.4f}, or bits={least + 5e-4:.3f}"
            raise OptionError(f"nothing fits into {self}", remedy=remedy)

    @property
    def _budget(self) -> float:
        """Bits for each weight."""
        return self.bits or FLOAT * self.memory

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, drop, then split; returns the number of linears that changed."""
        masks, left = self._masks(gm)
        if not masks.linears:
            return 0
        tell_left(gm, ctx, left, by="fit_masks")
        learning = MaskLearning(self.steps, self.rate, self.seed, self.rows, self.strength, self.loss == "cross_entropy")
        distance = partial(masks.distance, bits=self._budget, kept=self.kept)
        with torch.enable_grad():
            logits = learning.logits(gm, ctx, masks.masks, distance, masks.gated)
        taken = masks.settled(logits, self._budget, self.kept)
        whole = splittable(gm)
        moments = mean_squares(gm, ctx, whole) if self.order else {}
        stay = [masks.stay(place, taken.units) for place in range(len(whole))]
        self._tell(ctx, masks, taken)
        self._drop(gm, ctx, taken.units)
        for (source, found), channels, wide in zip(whole.items(), stay, taken.wide, strict=True):
            self._widen(gm, found, torch.isin(channels, wide), moments[source][channels] if self.order else None)
        return len(masks.linears)

    def _masks(self, gm: GraphModule) -> tuple[JointMasks, dict[str, list[Layer]]]:
        """Every mask that there is, and by reason the linears without units."""
        whole = splittable(gm)
        units, left = self._units(gm)
        rows: dict[Node, list[tuple[int, Tensor]]] = {}
        columns: dict[Node, list[tuple[int, Tensor]]] = {}
        for place, own in enumerate(units):
            for member in own.group.members:
                (columns if member.axis else rows).setdefault(member.node, []).append((place, member.channels))
        linears = [
            Linear(layer, change_bits(layer, self.high), place, tuple(rows.get(layer.weight, ())), tuple(columns.get(layer.weight, ())))
            for place, found in enumerate(whole.values())
            for layer in found
        ]
        return JointMasks(units, linears, [int(edit.value(source).shape[-1]) for source in whole], self.multiple), left

    def _units(self, gm: GraphModule) -> tuple[list[Units], dict[str, list[Layer]]]:
        """Of kinds between linears first, then of the stream; a linear is left if no kind has units of it."""
        marked = {str(layer.weight.target) for found in splittable(gm).values() for layer in found}
        found = [annotated_units(gm, kinds, self.ignore, marked) for kinds in self._phases]
        taken = {path for units, _ in found for own in units for path in own.paths}
        left = {
            reason: rest
            for _, reasons in found
            for reason, layers_left in reasons.items()
            if (rest := [layer for layer in layers_left if str(layer.weight.target) not in taken])
        }
        return [own for units, _ in found for own in units], left

    @property
    def _phases(self) -> list[list[str]]:
        """Kinds that are dropped together."""
        return [kinds for phase in (BETWEEN, STREAM) if (kinds := [kind for kind in phase if kind in self.what])]

    def _drop(self, gm: GraphModule, ctx: Context, picked: Sequence[Tensor]) -> None:
        """Drop what does not stay, kinds that share weights one after the other."""
        rest = list(picked)
        marked = {str(layer.weight.target) for found in splittable(gm).values() for layer in found}
        for kinds in self._phases:
            units, _ = annotated_units(gm, kinds, self.ignore, marked)
            now, rest = rest[: len(units)], rest[len(units) :]
            drop(gm, ctx, list(zip(units, now, strict=True)), compensate=self.compensate, damping=self.damping, bias=False)

    def _widen(self, gm: GraphModule, found: Sequence[Layer], wide: Tensor, size: Tensor | None) -> None:
        """Split off the wide channels of those that stay."""
        if wide.all():
            for layer in found:
                layer.annotate(change_bits(layer, self.high))
        elif wide.any():
            split_off(gm, found[0].site("input").operand, found, wide.nonzero()[:, 0], self.high, size)

    def _tell(self, ctx: Context, masks: JointMasks, taken: Taken) -> None:
        """What goes and what is wide, in a note and a table."""
        size, left, wide = (found / masks.weights for found in (masks.size(taken), masks.left(taken), masks.wide(taken)))
        ctx.notes.append(
            f"fit_masks: {left:.2%} of the weights stay, {wide:.2%} in {self.high}: "
            f"{size:.3f} bits for each that there was, {size / FLOAT:.4f} of FP16"
        )
        ctx.tables["pruned"] = [
            {"layer": own.path, "units": own.what, "kept": len(stay), "of": own.size}
            for own, stay in zip(masks.units, taken.units, strict=True)
        ]
