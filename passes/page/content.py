"""What sections of a page are made of; the template knows how each is shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text or a chart, its colour, and a note that is shown where the pointer rests."""

    text: str | Markup
    tone: str = ""
    note: str = ""


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Sheet:
    """A table; `words` are the columns of words, the others are of numbers."""

    kind: ClassVar[str] = "sheet"
    header: Sequence[str]
    rows: Sequence[Row]
    words: Sequence[int] = (0,)
    look: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """A chart or a table with a heading."""

    title: str
    body: "Markup | Sheet"


@dataclass(frozen=True)
class Panels:
    """Charts in rows, as many beside each other as there is room for."""

    kind: ClassVar[str] = "panels"
    panels: Sequence[Panel]
    look: str = ""


@dataclass(frozen=True)
class Legend:
    """What colours mean: `(tone, words)`."""

    kind: ClassVar[str] = "legend"
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    """Figures that count most: `(name, value, remark)`."""

    kind: ClassVar[str] = "cards"
    entries: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Listing:
    """Sentences; folded away under a summary, if there is one."""

    kind: ClassVar[str] = "listing"
    lines: Sequence[str]
    summary: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart by itself."""

    kind: ClassVar[str] = "figure"
    chart: Markup
    look: str = ""


Item = Sheet | Panels | Legend | Cards | Listing | Figure


@dataclass(frozen=True)
class Section:
    """A part of the page; one without items is left out."""

    name: str
    title: str
    items: Sequence[Item]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)


def breakable(text: str) -> Markup:
    """The text of a call, to be broken between its parts where it is too long for its place."""
    return Markup("<wbr>").join(re.split(r"(?<=[_(,=.])", text))


def brief(value: object) -> str:
    """A cell of a table of the report."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def megabytes(size: float) -> str:
    """Bytes as a number of MB."""
    return f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def percent(share: float) -> str:
    """A share, of one."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
