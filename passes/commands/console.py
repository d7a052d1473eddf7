"""What commands show: pages, tables, progress."""

import logging
import sys
import warnings
import webbrowser
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from passes.progress import WIDTH, Progress


def browse(path: Path, no_open: bool) -> None:
    """Print where a page is; show it in a browser, if there is one."""
    typer.echo(path)
    if not no_open and not webbrowser.open(path.resolve().as_uri()):
        typer.echo("there is no browser to open it in", err=True)


def show(*parts: Any) -> None:
    """Print pages, tables and lines."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=WIDTH)
    for part in parts:
        console.print(part)


def progress() -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Progress(lines=not sys.stderr.isatty())


def quiet() -> None:
    """No remarks of exporters among ours."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


def megabytes(folder: Path) -> str:
    """The size of a folder's files; for a model on the Hub, that it has none."""
    sizes = [file.stat().st_size for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return f"{sum(sizes) / 1e6:.2f} MB" if sizes else "not in a local folder"
