"""Curves as SVG, panel by panel: how many times faster than torch in bfloat16, by tokens."""

import math
from collections.abc import Mapping, Sequence
from html import escape

PANEL, HEIGHT, LEFT, TOP, BOTTOM, COLUMNS = 300, 200, 40, 26, 30, 3
COLOURS = ("#1f6feb", "#d1690e", "#2c8a3d", "#8250df", "#b42318", "#57606a", "#0e7c86")
STYLE = "text{font:11px sans-serif;fill:#222}.grid{stroke:#ddd}.one{stroke:#888;stroke-dasharray:4 3}.title{font-weight:bold}"
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8)

Curves = Mapping[str, Mapping[int, float]]  # who -> tokens -> ratio


def panels(found: Mapping[str, Curves]) -> str:
    """A picture with a panel for every title; ratios are on one logarithmic axis, tokens at even steps."""
    names = sorted({who for curves in found.values() for who in curves}, key=lambda who: (who != "fxpress", who))
    colours = {who: COLOURS[index % len(COLOURS)] for index, who in enumerate(names)}
    ratios = [ratio for curves in found.values() for curve in curves.values() for ratio in curve.values()] or [1.0]
    low, high = min([*ratios, 0.8]) / 1.1, max([*ratios, 1.25]) * 1.1
    rows = math.ceil(len(found) / COLUMNS)
    width, height = COLUMNS * PANEL, rows * HEIGHT + 24
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>', f"<style>{STYLE}</style>"]
    for index, (title, curves) in enumerate(found.items()):
        x, y = index % COLUMNS * PANEL, index // COLUMNS * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(title, curves, low, high, colours)}</g>')
    for index, who in enumerate(names):
        x = LEFT + index * 150
        parts.append(f'<rect x="{x}" y="{height - 16}" width="10" height="10" fill="{colours[who]}"/>{_text(who, x + 14, height - 7)}')
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>\n'


def _panel(title: str, curves: Curves, low: float, high: float, colours: Mapping[str, str]) -> str:
    tokens = sorted({m for curve in curves.values() for m in curve})
    foot, right = HEIGHT - BOTTOM, PANEL - 10

    def across(m: int) -> float:
        return LEFT + 12 + tokens.index(m) * (right - LEFT - 24) / max(len(tokens) - 1, 1)

    def up(ratio: float) -> float:
        return foot - math.log(ratio / low) / math.log(high / low) * (foot - TOP)

    parts = [_text(title, PANEL / 2, 16, "middle", "title")]
    for tick in (tick for tick in TICKS if low <= tick <= high):
        shade = "one" if tick == 1 else "grid"
        parts.append(f'<path class="{shade}" d="M{LEFT} {up(tick):.1f}H{right}"/>{_text(f"{tick:g}", LEFT - 5, up(tick) + 4, "end")}')
    parts += [_text(str(m), across(m), foot + 16, "middle") for m in tokens]
    for who, curve in curves.items():
        places = [(across(m), up(ratio)) for m, ratio in sorted(curve.items())]
        parts.append(f'<path fill="none" stroke-width="2" stroke="{colours[who]}" d="{_path(places)}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[who]}"/>' for x, y in places]
    return "".join(parts)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _text(words: str, x: float, y: float, anchor: str = "start", shade: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{shade}">{escape(words)}</text>'
