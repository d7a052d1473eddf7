"""Elements of SVG, and axes. Text and attributes are escaped; colours are classes, which the page's style sheet knows in light and dark."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

TICKS = 4  # about as many on an axis
WIDE = 5.0  # ratio of its ends from which a logarithmic axis has decades marked
LETTER = 6.2  # width of a letter of an axis, in the units of a chart


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """An element: `class_` is written `class`, other underscores as hyphens, numbers short; attributes that are None are left out."""
    given = {key.rstrip("_").replace("_", "-"): _short(value) for key, value in attributes.items() if value is not None}
    written = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in given.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(inside))


def words(text: str, x: float, y: float, anchor: str = "middle", **attributes: object) -> Markup:
    """A line of text."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, **attributes)


def drawing(width: float, height: float, label: str, parts: Iterable[str]) -> Markup:
    """A whole picture, which scales with its place on the page."""
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, laid out from `start` to `end`, along their logarithms if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> "Axis":
        """An axis with room for values, from zero if `zero`; on a logarithmic one only positive values count."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(found), max(found)) if found else (0.1, 1.0)
        if log:
            return cls(low / 1.15, high * 1.15, start, end, log)
        low = min(low, 0.0) if zero else low
        room = 0.06 * (high - low) or abs(high) or 1.0
        return cls(low if zero and low == 0 else low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The place of a value; the axis's end, of one beyond it."""
        low, high, place = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low) if self.log else value))
        share = (place - low) / ((high - low) or 1.0)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log and self.high > WIDE * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [step * 10.0**decade for decade in decades for step in steps if self.low <= step * 10.0**decade <= self.high]
                if len(found) >= TICKS - 1:
                    break
            return found[:: -(-len(found) // (2 * TICKS))]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (factor * step) <= TICKS + 1)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def number(value: float) -> str:
    """A number of an axis, as short as is clear."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
