"""Masks over units and over input channels that are learned together: what they do, what they take, and which of them stay open."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ir import edit
from ir.selection import stays
from ir.sites import Layer, Mark
from ir.weights import stored_bits
from passes.learning.masks import OFFSET, distance_to, mixed_linear
from passes.pruning import keeping
from passes.pruning.kinds import Units
from passes.pruning.unit_masks import at_channels, call_gated, factors_of

FARTHEST, HALVINGS = 64.0, 50  # of the shift of logits that is looked for
Gates = Sequence[Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear that masks act on.

    Args:
        layer: as it is annotated.
        high: its encodings in the wider scheme.
        place: of the mask over its input channels, among those of all inputs.
        rows, columns: units that its rows and columns belong to: their place among all units, and the unit of each, −1 for none.
    """

    layer: Layer
    high: Mark
    place: int
    rows: tuple[tuple[int, Tensor], ...]
    columns: tuple[tuple[int, Tensor], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, as it is."""
        N, K = edit.value(self.layer.weight).shape
        return int(N), int(K)

    def bits(self, rows: int, low: int, high: int) -> int:
        """That it takes with so many rows, and columns in each scheme."""
        parts = ((low, self.layer.mark.weight), (high, self.high.weight))
        return sum(stored_bits((rows, count), encoding) for count, encoding in parts if rows and count)

    def each(self) -> tuple[float, float]:
        """Bits of a weight in either scheme, scales of whole columns counted."""
        N, K = self.shape
        return self.bits(N, K, 0) / (N * K), self.bits(N, 0, K) / (N * K)


@dataclass(frozen=True)
class Taken:
    """What stays and what is wide: for each group of units and each input, which of their channels, rising."""

    units: list[Tensor]
    wide: list[Tensor]


@dataclass(frozen=True)
class JointMasks:
    """One mask for each group of units, open where they stay, then one for each input, open where channels are in the wider scheme.

    Args:
        units: that may go.
        linears: that are annotated.
        sizes: channels of each input.
        multiple: what counts of channels are multiples of.
    """

    units: Sequence[Units]
    linears: Sequence[Linear]
    sizes: Sequence[int]
    multiple: int

    @property
    def masks(self) -> list[int]:
        """The size of each mask."""
        return [*(own.size for own in self.units), *self.sizes]

    @property
    def weights(self) -> int:
        """Of all linears, before anything goes."""
        return sum(N * K for N, K in (one.shape for one in self.linears))

    @cached_property
    def _readers(self) -> dict[int, Linear]:
        """Of each input a linear that reads it: all read the same channels."""
        return {one.place: one for one in self.linears}

    def gated(self, gates: Gates) -> Mapping[Node, Callable[..., Any]]:
        """What is called in place of the linears: `Ŵ = F(P_inᵀ W P_out, M)` (2606.07819)."""
        reads, writes = factors_of(self.units, gates[: len(self.units)])
        wide = gates[len(self.units) :]

        def call(one: Linear) -> Callable[..., Any]:
            node, both = one.layer.node, partial(mixed_linear, one.layer.mark, one.high, wide[one.place])
            return partial(call_gated, both, reads.get(node), writes.get(node))

        return {one.layer.node: call(one) for one in self.linears}

    def distance(self, opened: Gates, bits: float, kept: float) -> Tensor:
        """From the budget in bits for each weight there was, and, if it is not 0, from the share of weights that stays."""
        spent, stay = torch.zeros(()), torch.zeros(())
        for one in self.linears:
            rows, columns = (self._gates(at, opened, size) for at, size in zip((one.rows, one.columns), one.shape, strict=True))
            low, high = one.each()
            spent = spent + rows.sum() * (columns * (low + (high - low) * opened[len(self.units) + one.place])).sum()
            stay = stay + rows.sum() * columns.sum()
        far = distance_to(bits, spent / self.weights)
        return far + distance_to(kept, stay / self.weights) if kept else far

    def _gates(self, at: Sequence[tuple[int, Tensor]], opened: Gates, size: int) -> Tensor:
        factor = torch.ones(size)
        for place, channels in at:
            factor = factor * at_channels(opened[place], channels)
        return factor

    def settled(self, logits: Gates, bits: float, kept: float) -> Taken:
        """What the budget has room for: one shift of all logits opens masks until it is met; of units first where `kept` says how many."""
        if not kept:
            shift = _greatest(lambda shift: self.size(self._taken(logits, shift, shift)) <= bits * self.weights)
            return self._taken(logits, shift, shift)
        units = _greatest(lambda shift: self.left(self._taken(logits, shift, -FARTHEST)) <= kept * self.weights)
        wide = _greatest(lambda shift: self.size(self._taken(logits, units, shift)) <= bits * self.weights)
        return self._taken(logits, units, wide)

    def least(self, kept: float) -> float:
        """Bits for each weight of the smallest result, of which a share of the weights stays if it is not 0."""
        logits = [torch.linspace(-1, 1, size) for size in self.masks]
        return self.size(self.settled(logits, 0.0, kept)) / self.weights

    def size(self, taken: Taken) -> int:
        """Bits of all linears."""
        return sum(one.bits(rows, columns - wide, wide) for one, rows, columns, wide in self._counts(taken))

    def left(self, taken: Taken) -> int:
        """Weights of all linears."""
        return sum(rows * columns for _, rows, columns, _ in self._counts(taken))

    def wide(self, taken: Taken) -> int:
        """Weights in the wider scheme."""
        return sum(rows * wide for _, rows, _, wide in self._counts(taken))

    def _counts(self, taken: Taken) -> Iterator[tuple[Linear, int, int, int]]:
        """Of every linear the rows, the columns, and those of them that are wide."""
        for one in self.linears:
            rows, columns = (self._stay(at, taken.units, size) for at, size in zip((one.rows, one.columns), one.shape, strict=True))
            yield one, int(rows.sum()), int(columns.sum()), len(taken.wide[one.place])

    def _stay(self, at: Sequence[tuple[int, Tensor]], units: Sequence[Tensor], size: int) -> Tensor:
        keep = torch.ones(size, dtype=torch.bool)
        for place, channels in at:
            keep &= stays(self.units[place].group, units[place], channels)
        return keep

    def stay(self, place: int, units: Sequence[Tensor]) -> Tensor:
        """The channels of an input that are still read, rising."""
        one = self._readers[place]
        return self._stay(one.columns, units, one.shape[1]).nonzero()[:, 0]

    def _taken(self, logits: Gates, units: float, wide: float) -> Taken:
        """What is open with two shifts, in multiples; of units some always."""
        picked = []
        for own, logit in zip(self.units, logits, strict=False):
            step = keeping.step(own, self.multiple)
            count = own.size if _open(logit, units) == own.size else max(_open(logit, units) // step * step, min(step, own.size))
            picked.append(keeping.greatest(logit, count))
        chosen = []
        for place, logit in enumerate(logits[len(self.units) :]):
            left = self.stay(place, picked)
            count = _open(logit[left], wide)
            count = count if count == len(left) else count // self.multiple * self.multiple
            chosen.append(left[keeping.greatest(logit[left], count)])
        return Taken(picked, chosen)


def _open(logit: Tensor, shift: float) -> int:
    """How many gates are open without noise."""
    return int((logit + OFFSET + shift > 0).sum())


def _greatest(fits: Callable[[float], bool]) -> float:
    """The greatest shift that fits, or the least if none does."""
    low, high = -FARTHEST, FARTHEST
    if fits(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
