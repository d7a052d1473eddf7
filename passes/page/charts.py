"""Charts of the page: bars by layer, curves and points, a map of two settings, shares of a whole."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from passes.page.svg import LETTER, Axis, drawing, number, tag, words

WIDTH, HEIGHT = 320.0, 160.0  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 42.0, 8.0, 8.0, 22.0
WIDEST = 22.0  # bar


class Bar(NamedTuple):
    """A bar from one value to another, in the colour of a tone, with marks across it."""

    low: float
    high: float
    tone: str
    marks: Sequence[float] = ()


class Column(NamedTuple):
    """Bars side by side, None where one is missing, above a label; the note is shown where the pointer rests."""

    label: str
    bars: Sequence[Bar | None]
    note: str


class Series(NamedTuple):
    """Points `(x, y, note)` in one colour, joined by a line if told so."""

    label: str
    tone: str
    points: Sequence[tuple[float, float, str]]
    line: bool = False
    size: float = 3.0


def columns(title: str, shown: Sequence[Column], values: Sequence[float], *, log: bool = False) -> Markup:
    """Bars over labels, on an axis that has room for `values`, so that several charts share it."""
    axis = Axis.over(values, HEIGHT - BOTTOM, TOP, log=log, zero=not log)
    parts = _scale(axis, LEFT, WIDTH - RIGHT)
    slot = (WIDTH - LEFT - RIGHT) / max(len(shown), 1)
    every = max(1, math.ceil(max((len(column.label) + 1 for column in shown), default=1) * LETTER / slot)) if len(shown) > 6 else 1
    for index, column in enumerate(shown):
        middle = LEFT + (index + 0.5) * slot
        width = min(0.8 * slot, WIDEST * max(len(column.bars), 1)) / max(len(column.bars), 1)
        first = middle - width * len(column.bars) / 2
        drawn = [_bar(bar, first + place * width, width, axis) for place, bar in enumerate(column.bars) if bar and math.isfinite(bar.high)]
        hover = tag("rect", class_="hover", x=middle - slot / 2, y=TOP, width=slot, height=HEIGHT - TOP - BOTTOM)
        parts.append(tag("g", tag("title", column.note), *drawn, hover))
        if index % every == 0:
            parts.append(words(_cut(column.label, every * slot), middle, HEIGHT - 7))
    return drawing(WIDTH, HEIGHT, title, parts)


def curves(title: str, series: Sequence[Series], x: str, y: str, *, log: bool = False, diagonal: bool = False) -> Markup:
    """Points and lines over two axes; `diagonal` draws the line on which both are equal."""
    width, height, left, bottom = 560.0, 300.0, 58.0, 44.0
    points = [point for one in series for point in one.points]
    down = Axis.over([point[1] for point in points], height - bottom, TOP, log=log)
    across = Axis.over([point[0] for point in points], left, width - 12)
    parts = _scale(down, left, width - 12)
    parts += [words(number(tick), across.at(tick), height - bottom + 16) for tick in across.ticks()]
    parts += [words(x, (left + width) / 2, height - 6), words(y, 0, 0, transform=f"translate(12 {(height - bottom) / 2:g}) rotate(-90)")]
    if diagonal:
        low, high = max(across.low, down.low), min(across.high, down.high)
        parts.append(tag("path", class_="grid dashed", d=_path([(across.at(v), down.at(v)) for v in (low, high)])))
    for one in series:
        places = [(across.at(px), down.at(py)) for px, py, _ in one.points]
        if one.line:
            parts.append(tag("path", class_=f"line {one.tone}", d=_path(places)))
        for (cx, cy), (_, _, note) in zip(places, one.points, strict=True):
            parts.append(tag("circle", tag("title", note), class_=one.tone, cx=cx, cy=cy, r=one.size))
    return drawing(width, height, title, parts)


class Square(NamedTuple):
    """A square of a map: how strong its colour is, 0 to 1, what stands in it, and its note."""

    strength: float
    text: str
    note: str


def squares(title: str, found: Mapping[tuple[float, float | str], Square], x: str, y: str) -> Markup:
    """A map over two settings, every value of each a row or a column of its own; words come after numbers."""
    across = sorted({place[0] for place in found})
    down = sorted({place[1] for place in found}, key=lambda value: (isinstance(value, str), value))
    left, bottom, side = 70.0, 40.0, 24.0
    width, height = left + side * len(across) + 12, TOP + side * len(down) + bottom
    parts = []
    for (px, py), square in found.items():
        at_x, at_y = left + side * across.index(px), TOP + side * (len(down) - 1 - down.index(py))
        note = tag("title", square.note)
        parts.append(
            tag("rect", note, class_="heat", x=at_x, y=at_y, width=side - 2, height=side - 2, fill_opacity=0.08 + 0.92 * square.strength)
        )
        if square.text:
            parts.append(words(square.text, at_x + side / 2 - 1, at_y + side / 2 + 3, class_="on" if square.strength > 0.5 else None))
    every = max(1, math.ceil(max(len(number(value)) for value in across) * LETTER / side))
    for index, value in enumerate(across):
        if index % every == 0:
            parts.append(words(number(value), left + side * (index + 0.5) - 1, height - bottom + 14))
    for index, name in enumerate(down):
        text = name if isinstance(name, str) else f"{name:.5g}"
        parts.append(words(text, left - 6, TOP + side * (len(down) - 0.5 - index) + 3, "end"))
    parts += [words(x, (left + width) / 2, height - 6), words(y, 0, 0, transform=f"translate(11 {(height - bottom) / 2:g}) rotate(-90)")]
    return drawing(width, height, title, parts)


def shares(title: str, parts: Sequence[tuple[float, str, str]]) -> Markup:
    """A bar cut in shares `(size, tone, note)`."""
    total = sum(size for size, _, _ in parts) or 1.0
    drawn, done = [], 0.0
    for size, tone, note in parts:
        drawn.append(tag("rect", tag("title", note), class_=tone, x=100 * done / total, y=0, width=100 * size / total, height=6))
        done += size
    return tag("svg", *drawn, viewBox="0 0 100 6", preserveAspectRatio="none", class_="shares", role="img", aria_label=title)


def meters(values: Sequence[tuple[float, str]], greatest: float) -> Markup:
    """Thin bars under one another, `(value, tone)`, of full length at the greatest value: for a cell of a table."""
    step = 6 / max(len(values), 1)
    drawn = [
        tag("rect", class_=tone, x=0, y=index * step, width=100 * min(max(value, 0.0) / (greatest or 1.0), 1.0), height=0.8 * step)
        for index, (value, tone) in enumerate(values)
    ]
    return tag("svg", *drawn, viewBox="0 0 100 6", preserveAspectRatio="none", class_="meter", aria_hidden="true")


def _scale(axis: Axis, left: float, right: float) -> list[Markup]:
    """The lines and numbers of an axis that runs upwards."""
    parts = [tag("path", class_="grid", d=_path([(left, axis.start), (right, axis.start)]))]
    for tick in axis.ticks():
        y = axis.at(tick)
        parts += [tag("path", class_="grid", d=_path([(left, y), (right, y)])), words(number(tick), left - 5, y + 3.5, "end")]
    return parts


def _bar(bar: Bar, x: float, width: float, axis: Axis) -> Markup:
    low, high = axis.at(bar.low), axis.at(bar.high)
    inner = max(width - 1, 0.5)
    marks = [tag("rect", class_="mark", x=x, y=axis.at(mark) - 0.6, width=inner, height=1.2) for mark in bar.marks]
    return tag("g", tag("rect", class_=bar.tone, x=x, y=high, width=inner, height=max(low - high, 0.8)), *marks)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places) if places else ""


def _cut(label: str, room: float) -> str:
    most = max(1, int(room / LETTER))
    return label if len(label) <= most else label[: most - 1] + "…"
