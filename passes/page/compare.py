"""Two compiles side by side: as a page, and as a table for the terminal."""

from collections.abc import Callable
from difflib import SequenceMatcher

from rich.table import Table

from passes.page import charts
from passes.page.charts import Bar, Column
from passes.page.content import (
    Cell,
    Item,
    Legend,
    Listing,
    Page,
    Panel,
    Panels,
    Row,
    Section,
    Sheet,
    breakable,
    brief,
    duration,
    megabytes,
    percent,
)
from passes.page.layers import by_place, said, width_map
from passes.page.saved import LayerRow, PassRow, Saved

Names = tuple[str, str]
Pair = tuple[Saved, Saved]

FIGURES: dict[str, Callable[[Saved], str]] = {
    "model": lambda report: report.model,
    "backend": lambda report: report.backend,
    "effective bits": lambda report: f"{report.coverage.effective_bits:.3f}",
    "weights before, MB": lambda report: megabytes(report.coverage.bytes_before),
    "weights after, MB": lambda report: megabytes(report.coverage.bytes_after),
    "compressed": lambda report: percent(report.coverage.share),
    "error on the probe": lambda report: brief(report.difference),
    "time": lambda report: duration(report.seconds),
    "peak memory, MB": lambda report: megabytes(report.peak_bytes),
}


def figures(pair: Pair) -> list[tuple[str, str, str]]:
    """The figures that count, of both."""
    rows = [(name, of(pair[0]), of(pair[1])) for name, of in FIGURES.items()]
    texts = dict.fromkeys(name for report in pair for name in report.measures)
    keys = dict.fromkeys(key for report in pair for values in report.measures.values() for key in values)
    for text in texts:
        for key in keys:
            values = [brief(report.measures.get(text, {}).get(key)) for report in pair]
            if any(values):
                rows.append((f"{key}, {text}", values[0], values[1]))
    return rows


def steps(pair: Pair) -> list[tuple[PassRow | None, PassRow | None]]:
    """The passes of both, those of one name beside each other."""
    first, second = (report.passes for report in pair)
    names = [[row.text.partition("(")[0] for row in rows] for rows in (first, second)]
    found: list[tuple[PassRow | None, PassRow | None]] = []
    for _, a, b, c, d in SequenceMatcher(None, names[0], names[1], autojunk=False).get_opcodes():
        for place in range(max(b - a, d - c)):
            found.append((first[a + place] if a + place < b else None, second[c + place] if c + place < d else None))
    return found


def terminal(pair: Pair, names: Names) -> list[Table]:
    """The tables that the command line prints: figures, and passes that differ."""
    shown = Table("", *names, title="compared", title_justify="left")
    for row in figures(pair):
        shown.add_row(*row)
    other = Table(*names, title="passes that differ", title_justify="left")
    differing = [(a.text if a else "", b.text if b else "") for a, b in steps(pair) if not (a and b and a.text == b.text)]
    for texts in differing:
        other.add_row(*texts)
    return [shown, other] if differing else [shown]


def page(pair: Pair, names: Names) -> Page:
    """The comparison as a page."""
    sections = [build(pair, names) for build in (_summary, _steps, _errors, _widths, _parts, _notes)]
    return Page(" and ".join(names), " · ".join(report.model for report in pair), [section for section in sections if section.items])


def _summary(pair: Pair, names: Names) -> Section:
    rows: list[Row] = [[name, Cell(a, "" if a == b else "a"), Cell(b, "" if a == b else "b")] for name, a, b in figures(pair)]
    return Section("summary", "Summary", [Sheet(["", *names], rows, look="both")])


def _steps(pair: Pair, names: Names) -> Section:
    rows: list[Row] = []
    for a, b in steps(pair):
        same = a is not None and b is not None and a.text == b.text
        cells: list[Cell | str] = []
        for row, tone in ((a, "a"), (b, "b")):
            cells.append(Cell(breakable(row.text) if row else "–", "code" if same else f"code {tone}"))
            cells.append(f"{row.seconds:.2f}" if row else "")
            cells.append("" if row is None or row.difference is None else f"{row.difference:.2g}")
        rows.append(cells)
    sheet = Sheet([names[0], "s", "error", names[1], "s", "error"], rows, words=(0, 3), look="both")
    return Section("steps", "Pipelines", [sheet], "Passes in colour differ, in themselves or in their options.")


def _errors(pair: Pair, names: Names) -> Section:
    found: dict[str, dict[int, LayerRow]] = {}
    for side, report in enumerate(pair):
        for row in report.layers:
            if row.error is not None:
                found.setdefault(row.layer, {})[side] = row
    values = [row.error or 0.0 for own in found.values() for row in own.values()]

    def column(label: str, own: dict[int, LayerRow]) -> Column:
        bars = [Bar(0.0, own[side].error or 0.0, "ab"[side]) if side in own else None for side in (0, 1)]
        return Column(label, bars, "\n".join(f"{names[side]}: {said(row)}" for side, row in own.items()))

    items: list[Item] = [Panels(by_place(found, column, values)), Legend([("a", names[0]), ("b", names[1])])] if found else []
    return Section("errors", "Error of each layer", items, "‖Ŵ − W‖ / ‖W‖ of every weight as it was rounded.")


def _widths(pair: Pair, names: Names) -> Section:
    maps = [(name, width_map(report)) for name, report in zip(names, pair, strict=True)]
    panels = [Panel(name, found) for name, found in maps if found is not None]
    return Section("widths", "Widths", [Panels(panels, "two")] if panels else [])


def _parts(pair: Pair, names: Names) -> Section:
    sizes = [{row.part: row for row in report.parts} for report in pair]
    parts = dict.fromkeys(part for own in sizes for part in own)
    greatest = max((row.after for own in sizes for row in own.values()), default=0)
    rows: list[Row] = []
    for part in parts:
        after = [own[part].after if part in own else 0 for own in sizes]
        rows.append([part, *map(megabytes, after), charts.meters([(after[0], "a"), (after[1], "b")], greatest)])
    return Section("parts", "Size by part, MB", [Sheet(["part", *names, ""], rows)] if rows else [])


def _notes(pair: Pair, names: Names) -> Section:
    items: list[Item] = []
    for side, name in enumerate(names):
        one, other = pair[side], pair[1 - side]
        reasons = [[f"left out {skip.path}: {skip.reason}" for skip in report.skipped] for report in (one, other)]
        lines = [note for note in one.notes if note not in other.notes] + [line for line in reasons[0] if line not in reasons[1]]
        if lines:
            items.append(Listing(lines, f"only {name}: {len(lines)}"))
    return Section("notes", "Notes that differ", items)
