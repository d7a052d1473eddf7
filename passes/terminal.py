"""What commands print: tables and sentences, as wide as the terminal, or as wide as files are read."""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from passes.progress import Progress

WIDTH = 140  # of pages that go to a file or a pipe


def show(*parts: Any) -> None:
    """Print what rich can draw, part under part."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=WIDTH)
    for part in parts:
        console.print(part)


def progress() -> "Progress":
    """Bars on a terminal, plain lines elsewhere."""
    from passes.progress import Progress

    return Progress(lines=not sys.stderr.isatty())
