"""Progress bars: what is being done and how long is left, on a terminal; quiet elsewhere, or plain lines where asked."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import track

WIDTH = 140  # of tables that go to a file or a pipe

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How a run tells what it is doing.

    Args:
        lines: where there is no terminal, print a plain line when each long loop ends.
        silent: show nothing: another process does.
    """

    lines: bool = False
    silent: bool = False

    def track(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """`items`, one by one, with a bar on standard error."""
        total = len(items) if isinstance(items, Sized) else None
        console = Console(stderr=True)
        if console.is_terminal and not self.silent:
            yield from track(items, description=doing, total=total, console=console, transient=True)
            return
        started = time.perf_counter()
        yield from items
        if self.lines:
            self.say(f"{doing}: {total if total is not None else 'all'} in {time.perf_counter() - started:.1f} s")

    def say(self, text: str) -> None:
        """A plain line on standard error, if lines are wanted."""
        if self.lines and not self.silent:
            print(text, file=sys.stderr, flush=True)

    def show(self, page: RenderableType) -> None:
        """A table on standard error, on a terminal or if lines are wanted."""
        console = Console(stderr=True, markup=False, highlight=False)
        if console.is_terminal:
            console.print(page)
        elif self.lines:
            Console(stderr=True, markup=False, highlight=False, width=WIDTH).print(page)
