"""Tables of searches under a budget on the report's page: widths as coloured grids, contributions, budgets as one line."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ir.encoding import Encoding
from ir.sites import Mark
from passes.page.grid import Grid, grid, merged

Rows = Sequence[Mapping[str, Any]]
T = TypeVar("T")

# Of 1 to 8 bits, from viridis: brighter is wider, to every reader; narrow widths, the most common, are furthest apart. Pages use them too.
COLOURS = ("#440154", "#414487", "#2a788e", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")
DARK = 3  # up to this width the colour needs white text
GREATEST = 6  # contributions that are shown
BARS = "▁▂▃▄▅▆▇█"


def widths(rows: Rows) -> list[RenderableType]:
    """The grid of widths, equal neighbouring layers in one row."""
    found = merged(cells(rows))
    used = [cell for _, own in found.rows for cell in own if cell]
    groups = len({cell.mark.weight.block for cell in used})
    parts = [", after a dot the size of groups"] * (groups > 1)
    parts += [", after a slash those of the input"] * any(cell.mark.input for cell in used)
    parts += [", then the share of weights kept"] * any(cell.kept < 1 for cell in used)
    title = f"widths in bits{''.join(parts)}"
    return [_table(found, title, lambda cell: _cell(cell, groups > 1))]


def cache(rows: Rows) -> list[RenderableType]:
    """The grid of widths of keys and values, equal neighbouring layers in one row."""
    found = merged(grid({str(row["site"]): str(row["encoding"]) for row in rows}))
    return [
        _table(found, "cache, widths in bits", lambda text: _cell(Cell(Mark(None, Encoding.parse(text))), False) if text else Text("float"))
    ]


class Cell(NamedTuple):
    """What the table `widths` says of a linear: its encodings, and the share of its weights that is kept."""

    mark: Mark
    kept: float = 1.0


def cells(rows: Rows) -> Grid[Cell]:
    """The grid of what the table `widths` says."""
    return grid({str(row["layer"]): Cell(Mark.parse(str(row["encoding"])), row.get("kept", 1.0)) for row in rows})


def label(cell: Cell, grouped: bool) -> str:
    """The width of a weight, after a dot its group if it is no whole channel, after a slash the width of the input: `4·64/8`.

    Then the share of the weights that is kept, if some are not: `4·64 75%`.
    """
    mark = cell.mark
    group = f"·{mark.weight.block[-1]}" if grouped and mark.weight.block[-1] != -1 else ""
    kept = f" {cell.kept:.0%}" if cell.kept < 1 else ""
    return f"{mark.weight.bits}{group}" + (f"/{mark.input.bits}" if mark.input else "") + kept


def contributions(rows: Rows) -> list[RenderableType]:
    """The sites with the greatest contributions, measured ones if there are any."""
    key = next((key for key in rows[0] if key.startswith("measured")), None) or next(key for key in rows[0] if key.startswith("predicted"))
    total = sum(row[key] for row in rows)
    greatest = sorted(rows, key=lambda row: -row[key])[:GREATEST]
    columns = [column for column in rows[0] if column != "weights"]
    table = Table(*columns, "share", title=f"greatest contributions, {len(greatest)} of {len(rows)} sites", title_justify="left")
    for row in greatest:
        cells = (f"{row[column]:.3g}" if isinstance(row[column], float) else str(row[column]) for column in columns)
        table.add_row(*cells, f"{row[key] / total:.1%}" if total else "")
    return [table]


def interactions(rows: Rows) -> list[RenderableType]:
    """The pairs of sites with the strongest interactions, as they come."""
    title = f"strongest interactions, {min(GREATEST, len(rows))} of {len(rows)} pairs: what two sites cost together beyond each alone"
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[:GREATEST]:
        table.add_row(*(f"{cell:+.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    return [table]


def budgets(rows: Rows) -> list[RenderableType]:
    """A line of bars: the logarithm of the predicted loss over the budget; and a line for each budget that was measured or chosen."""
    unit = loss(rows)
    heights = [math.log(max(row[unit], 1e-30)) for row in rows if row["chosen"] or row["measured"] is None]
    low, high = min(heights), max(heights)
    bars = "".join(BARS[round((height - low) / max(high - low, 1e-30) * (len(BARS) - 1))] for height in heights)
    ends = (f"{row['bits']:.2f} bits: {row[unit]:.3g}" for row in (rows[0], rows[-1]))
    lines = [f"budgets, predicted {unit} (logarithm): {next(ends)} {bars} {next(ends)}"]
    for row in rows:
        if row["chosen"] or row["measured"] is not None:
            found = "" if row["measured"] is None else f", {row['measured']:.4g} measured on held-out tokens"
            lines.append(f"  {row['bits']:.3f} bits: {row[unit]:.4g} predicted{found}{', chosen' if row['chosen'] else ''}")
    return [Text("\n".join(lines))]


def smoothing(rows: Rows) -> list[RenderableType]:
    """One line for what all groups took."""
    ranges = []
    for name in ("alpha", "quantile"):
        taken = sorted({row[name] for row in rows})
        ranges.append(f"{name} {taken[0]}" + (f" to {taken[-1]:.4g}" if len(taken) > 1 else ""))
    return [Text(f"smoothing of {len(rows)} groups of channels: {', '.join(ranges)}")]


def unseen(rows: Rows) -> list[RenderableType]:
    """Nothing: the table is for the page."""
    return []


def loss(rows: Rows) -> str:
    """The column of the predicted loss in the tables `widths` and `budgets`: its unit."""
    return next(key for key in rows[0] if key not in {"bits", "measured", "chosen", "layer", "encoding", "weights", "kept"})


DRAWN: dict[str, Callable[[Rows], list[RenderableType]]] = {
    "widths": widths,
    "cache": cache,
    "contributions": contributions,
    "interactions": interactions,
    "budgets": budgets,
    "smoothing": smoothing,
    "policies": unseen,
}


def _table(found: Grid[T], title: str, cell: Callable[[T], Text]) -> Table:
    table = Table(f"{found.shared}*" if found.shared else "", title=title, title_justify="left")
    for column in found.columns:
        table.add_column(column, justify="center")
    for name, own in found.rows:
        table.add_row(name, *(Text("") if value is None else cell(value) for value in own))
    return table


def _cell(cell: Cell, grouped: bool) -> Text:
    bits = cell.mark.weight.bits
    return Text(f" {label(cell, grouped)} ", style=f"{'white' if bits <= DARK else 'black'} on {COLOURS[bits - 1]}")
