"""Reports as pages: one file of HTML with everything in it, no script, nothing fetched; light and dark, wide and narrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from ir.errors import DataError, OptionError
from ir.files import appearing
from passes.page import compare, sections
from passes.page.content import Page
from passes.page.picture import COLOURS, DARK
from passes.page.saved import read

FILE = "report.html"
OURS = '<meta name="generator" content="fxpress">'  # a page that may be replaced has it near its beginning

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def html(page: Page) -> str:
    """A page as HTML."""
    widths = [(bits, colour, "#fff" if bits <= DARK else "#111") for bits, colour in enumerate(COLOURS, 1)]
    return _TEMPLATES.get_template("page.html").render(page=page, widths=widths, generator=OURS)


def write_report(folder: Path) -> Path:
    """Write `report.html` beside the `report.json` of a folder; returns its path.

    Raises:
        DataError: there is no report, a damaged one, or the page cannot be written.
    """
    report = read(folder)
    with _drawing(folder):
        text = html(sections.page(report))
    return _written(text, folder / FILE)


def write_comparison(first: Path, second: Path, out: Path) -> tuple[Path, list[Table]]:
    """Write the page of two folders' reports side by side; returns its path, and tables for a terminal.

    Raises:
        DataError: no report in one of them, a damaged one, or the page cannot be written.
        OptionError: `out` exists, and is no page of fxpress.
    """
    pair, names = (read(first), read(second)), _names(first, second)
    if out.exists() and not (out.is_file() and OURS in out.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise OptionError("it exists, and fxpress did not write it", where=str(out), remedy="choose another, --out NAME.html")
    with _drawing(first, second):
        text, tables = html(compare.page(pair, names)), compare.terminal(pair, names)
    return _written(text, out), tables


@contextmanager
def _drawing(*folders: Path) -> Iterator[None]:
    """Tables of a report are as a pass left them, or as somebody else wrote them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        where = ", ".join(map(str, folders))
        problem = f"a table of the report cannot be drawn: {type(error).__name__}: {error}"
        raise DataError(problem, where=where, remedy="name a folder that `fxpress compile` wrote") from error


def _names(first: Path, second: Path) -> tuple[str, str]:
    """What two folders are called: by their last parts that differ, A and B if they are the same."""
    for a, b in ((first.name, second.name), (str(first), str(second))):
        if a and b and a != b:
            return a, b
    return "A", "B"


def _written(text: str, path: Path) -> Path:
    try:
        with appearing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot write: {error.strerror or error}", where=str(path), remedy="free space, or choose another place"
        ) from error
    return path
