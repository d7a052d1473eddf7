"""`Walk`: go through the blocks of a graph as far as it is needed, from the latest place that an earlier run has kept."""

from collections.abc import Callable

import torch

from passes.memo.folder import Tensors
from passes.memo.slot import Slot


class Walk:
    """Where streams of activations are: what enters the block `at` is known.

    Args:
        slot: keeps the streams, each time in place of the last.
        advance: lets them enter the block after that of a number.
        stored: what enters the next block, as tensors; None if it is something else.
        restore: lets them enter the block of a number as they were stored.
    """

    def __init__(
        self,
        slot: Slot,
        advance: Callable[[int], None],
        stored: Callable[[], Tensors | None],
        restore: Callable[[Tensors, int], None],
    ) -> None:
        self.slot, self.advance, self.stored, self.restore = slot, advance, stored, restore
        self.at, self.begun = 0, False

    def reach(self, number: int) -> None:
        """Go on until what enters the block of this number is known."""
        if not self.begun:
            self.begun = True
            self.at = self.slot.restored(lambda held: self._from(held, number)) or 0
        while self.at < number:
            self.advance(self.at)
            self.reached(self.at + 1)

    def reached(self, number: int) -> None:
        """Say that what enters the block of this number is known, and keep it."""
        self.at = number
        self.slot.put(self._state)

    def _state(self) -> Tensors | None:
        found = self.stored()
        return {**found, "block": torch.tensor(self.at)} if found else None

    def _from(self, held: Tensors, number: int) -> int:
        """The place that was kept, if it is not behind the one that is wanted."""
        place = int(held["block"])
        if not 0 < place <= number:
            return 0
        self.restore(held, place)
        return place
