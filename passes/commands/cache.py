"""`fxpress cache`, and the options of `fxpress compile` that choose a cache."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from passes.commands.console import show

if TYPE_CHECKING:
    from passes.memo.folder import Memo

GB = 10**9
AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))  # seconds of a unit

Folder = Annotated[
    Path | None, typer.Option("--cache", help="Folder that results are kept in. [default: $FXPRESS_CACHE, or ~/.cache/fxpress]")
]
Size = Annotated[float, typer.Option("--cache-size", min=0, help="GB that it may take; what was used least recently goes.")]
Off = Annotated[bool, typer.Option("--no-cache", help="Keep nothing, and compute everything anew.")]
Clear = Annotated[bool, typer.Option("--clear", help="Remove all of it.")]


def memo(off: bool, folder: Path | None, size: float) -> "Memo | None":
    """The cache that options ask for."""
    from passes.memo.folder import Memo

    return None if off else Memo(folder, int(size * GB))


def cache(folder: Folder = None, clear: Clear = False) -> None:
    """List the results that compiles have kept, or remove them."""
    from passes.memo.folder import Memo

    kept = Memo(folder)
    if clear:
        typer.echo(f"{kept.clear() / 1e6:.1f} MB removed from {kept.folder}")
        return
    entries = kept.entries()
    table = Table("result", "of", "MB", "age", "last used", title_justify="left", title=str(kept.folder))
    for entry in entries:
        table.add_row(entry.what, entry.of, f"{entry.bytes / 1e6:.2f}", _ago(entry.made), _ago(entry.used))
    show(table, f"{len(entries)} results, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB")


def _ago(moment: float) -> str:
    """How long a moment is past, in the greatest unit that fits."""
    seconds = max(time.time() - moment, 0.0)
    return next((f"{seconds / unit:.0f} {name}" for unit, name in AGES if seconds >= unit), "0 s")
