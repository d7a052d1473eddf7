"""`Slot`: where the latest state of a long loop is kept while it runs."""

import time
from collections.abc import Callable
from typing import TypeVar

from ir.errors import DataError
from passes.memo.folder import DAMAGE, Memo, Tensors
from passes.ranks import Ranks

T = TypeVar("T")


class Slot:
    """The latest state of a long loop."""

    def __init__(self, memo: Memo | None, key: str, name: str, what: str, of: str, ranks: Ranks) -> None:
        self.memo, self.key, self.name, self.what, self.of, self.ranks = memo, key, name, what, of, ranks
        self.saved, self.spent = time.perf_counter(), 0.0

    def restored(self, restore: Callable[[Tensors], T]) -> T | None:
        """What `restore` makes of the state; None if there is none, or if `restore` finds that it does not fit."""
        if self.memo is None:
            return None
        held = self.ranks.given(self.memo.get(self.key) if self.ranks.first else None)
        if held is None:
            return None
        try:
            return restore(held)
        except (DataError, *DAMAGE):
            if self.ranks.first:
                self.memo.damaged(self.key)
            return None

    def put(self, make: Callable[[], Tensors | None], seconds: float = 0.0) -> None:
        """Keep a state, if the last one is some seconds old, and twice as old as keeping it took; None is no state."""
        began = time.perf_counter()
        if self.memo is None or not (self.memo.writes and self.ranks.first) or began - self.saved < max(seconds, 2 * self.spent):
            return
        tensors = make()
        if tensors is not None:
            self.memo.put(self.key, tensors, self.what, self.of)
        self.saved = time.perf_counter()
        self.spent = self.saved - began

    def drop(self) -> None:
        """Remove the state."""
        if self.memo is not None and self.ranks.first:
            self.memo.forget(self.key)
