"""Layers on the page: their errors as bars, their widths as a map, what they read before and after."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from passes.page import charts, picture
from passes.page.charts import Bar, Column
from passes.page.content import Cell, Legend, Panel, Panels, Section, Sheet, brief
from passes.page.grid import grid, place
from passes.page.saved import LayerRow, ReadRow, Saved

T = TypeVar("T")
ALONE = 3  # places with fewer layers than this share one chart


def tone(row: LayerRow) -> str:
    """The colour of a layer: that of the width of its weight."""
    return "float" if row.encoding is None else f"b{row.encoding.weight.bits}"


def said(row: LayerRow) -> str:
    """A layer in words."""
    encoding = "floating point" if row.encoding is None else str(row.encoding)
    errors = {"error of the weight": row.error, "of the input": row.input_error}
    return f"{row.layer}: {encoding}" + "".join(f", {name} {error:.3g}" for name, error in errors.items() if error is not None)


def errors(report: Saved) -> Section:
    """The error of every rounded weight."""
    rows = {row.layer: row for row in report.layers if row.error is not None}
    values = [error for row in rows.values() for error in (row.error, row.input_error) if error is not None]

    def column(label: str, row: LayerRow) -> Column:
        error = row.error or 0.0
        marks = () if row.input_error is None else (row.input_error,)
        return Column(label, [Bar(0.0, error, tone(row), marks)], said(row))

    widths = sorted({(row.encoding.weight.bits, tone(row)) for row in rows.values() if row.encoding})
    entries = [(name, f"{bits} bit{'s' * (bits > 1)}") for bits, name in widths]
    entries += [("mark", "a line across: the input")] * any(row.input_error is not None for row in rows.values())
    panels = by_place(rows, column, values)
    lead = "‖Ŵ − W‖ / ‖W‖ of every weight as it was rounded, by layer; of inputs that are rounded ‖x̂ − x‖ / ‖x‖ on the probe."
    return Section("errors", "Error of each layer", [Panels(panels), Legend(entries)] if panels else [], lead)


def widths(report: Saved) -> Section:
    """The map of widths."""
    sheet = width_map(report)
    lead = "Bits of the weight; after a dot the weights that share a scale, if it is no whole channel; after a slash the bits of the "
    lead += "input. Places where nothing is rounded are left out."
    return Section("widths", "Widths", [sheet] if sheet else [], lead)


def width_map(report: Saved) -> Sheet | None:
    """Layers down, places across where something is rounded; None if nothing is."""
    places = {place(row.layer)[1] for row in report.layers if row.encoding}
    found = grid({row.layer: row for row in report.layers if place(row.layer)[1] in places})
    kept = {str(row.get("layer")): row.get("kept", 1.0) for row in report.tables.get("widths", [])}

    def cell(row: LayerRow | None) -> Cell | str:
        if row is None:
            return ""
        if row.encoding is None:
            return Cell("float", "w float", said(row))
        shown = picture.Cell(row.encoding, kept.get(row.layer, 1.0))
        return Cell(picture.label(shown, grouped=True), f"w {tone(row)}", said(row))

    rows = [[name or "–", *map(cell, own)] for name, own in found.rows]
    return Sheet([f"{found.shared}*" if found.shared else "", *found.columns], rows, look="map") if rows else None


def reads(report: Saved) -> Section:
    """Quantiles of what linears read, before the first pass and after the last."""
    rows = {row.layer: row for row in report.reads if row.after}
    values = [value for row in rows.values() for own in (row.before, row.after) for value in own or ()]

    def bars(row: ReadRow) -> list[Bar]:
        times = [(row.before, "was"), (row.after, "is")]
        return [Bar(own[0], own[-1], tone, own[1:-1]) for own, tone in times if own]

    def column(label: str, row: ReadRow) -> Column:
        told = [f"{name} {', '.join(map(brief, own))}" for name, own in (("before", row.before), ("after", row.after)) if own]
        return Column(label, bars(row), f"{row.layer}: 50, 99, 99.9, 100 %: " + "; ".join(told))

    panels = by_place(rows, column, values, log=True)
    lead = "Magnitudes that linears read on the probe: bars from the median to the greatest, lines across at 99 % and 99.9 %."
    legend = Legend([("was", "before the first pass"), ("is", "after the last, before rounding")])
    return Section("reads", "Activations before and after", [Panels(panels), legend] if panels else [], lead)


def by_place(rows: dict[str, T], column: Callable[[str, T], Column], values: Sequence[float], *, log: bool = False) -> list[Panel]:
    """A chart for each place within layers, a bar for each layer; places with few layers share one. All on one axis."""
    found = grid(rows)
    panels, alone = [], []
    for across, title in enumerate(found.columns):
        own = [(name, row[across]) for name, row in found.rows]
        present = [(name, row) for name, row in own if row is not None]
        if len(present) < ALONE:
            alone += [column(" ".join(filter(None, [name, title])), row) for name, row in present]
        else:
            panels.append(Panel(title, charts.columns(title, [column(name, row) for name, row in present], values, log=log)))
    if alone:
        panels.append(Panel("others" if panels else "layers", charts.columns("others", alone, values, log=log)))
    return panels
