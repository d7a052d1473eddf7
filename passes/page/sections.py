"""The report as a page: its sections in the order they are read."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from ir.encoding import Encoding
from passes.page import charts, layers, searches
from passes.page.content import (
    Cards,
    Cell,
    Figure,
    Item,
    Legend,
    Listing,
    Page,
    Row,
    Section,
    Sheet,
    breakable,
    brief,
    duration,
    megabytes,
    percent,
)
from passes.page.grid import grid
from passes.page.saved import Rows, Saved
from passes.units import KL

SHOWN = {"widths", "contributions", "budgets", "policies", "cache"}  # tables that are drawn
MOST = 12  # rows of other tables and notes that are shown at once
TONES = 6  # of reasons


def page(report: Saved) -> Page:
    """The report of one compile."""
    made = [build(report) for build in SECTIONS]
    title = f"{report.model}, {report.coverage.effective_bits:.3f} effective bits"
    return Page(title, f"{report.pipeline} → {report.backend}", [section for section in made if section.items])


def summary(report: Saved) -> Section:
    """What counts most."""
    found = report.coverage
    cards = [
        ("effective bits", f"{found.effective_bits:.3f}", "a compressed weight, scales and zero points counted"),
        ("weights", f"{megabytes(found.bytes_before)} → {megabytes(found.bytes_after)} MB", smaller(found.bytes_before, found.bytes_after)),
        ("compressed", percent(found.share), "of the weight bytes"),
        ("error", brief(report.difference), "of the outputs on the probe, relative"),
    ]
    for name, values in report.measures.items():
        cards += [(key, f"{value:.4g}", name) for key, value in values.items() if key in {KL, "perplexity"}]
    cards.append(("time", duration(report.seconds), f"peak memory {megabytes(report.peak_bytes)} MB" if report.peak_bytes else ""))
    return Section("summary", "Summary", [Cards(cards)])


def smaller(before: float, after: float) -> str:
    """How many times less."""
    return f"{before / max(after, 1):.2f} times less"


def pipeline(report: Saved) -> Section:
    """Every pass with its time and its error."""
    longest = max((row.seconds for row in report.passes), default=0.0)
    greatest = max((row.difference or 0.0 for row in report.passes if row.effect == "change"), default=0.0)
    rows: list[Row] = []
    for row in report.passes:
        error = "" if row.difference is None else f"{row.difference:.2g}"
        changed = row.difference or 0.0 if row.effect == "change" else 0.0
        time = _measured(row.seconds, longest, "was", f"{row.seconds:.2f}")
        rows.append([Cell(breakable(row.text), "code"), row.effect, str(row.sites), time, _measured(changed, greatest, "is", error)])
    lead = "Errors are relative, of the outputs on the probe, caused by the pass; one that keeps the function may cause what rounding does."
    sheet = Sheet(["pass", "effect", "sites", "seconds", "error"], rows, words=(0, 1))
    return Section("pipeline", "Pipeline", [sheet] if rows else [], lead)


def _measured(value: float, greatest: float, tone: str, text: str) -> Markup:
    """A number with a bar beside it, or under it where there is little room."""
    return Markup('<span class="with">{}{}</span>').format(charts.meters([(value, tone)], greatest), text)


def cache(report: Saved) -> Section:
    """The widths of keys and values."""
    rows = report.tables.get("cache", [])
    found = grid({str(row["site"]): str(row["encoding"]) for row in rows})

    def cell(text: str | None) -> Cell:
        if not text:
            return Cell("" if text is None else "float", "" if text is None else "w float")
        bits = Encoding.parse(text).bits
        return Cell(str(bits), f"w b{bits}", text)

    body: list[Row] = [[name or "–", *map(cell, own)] for name, own in found.rows]
    return Section("cache", "Widths of the cache", [Sheet([found.shared, *found.columns], body, look="map")] if rows else [])


def coverage(report: Saved) -> Section:
    """Where the weight bytes went, and why not all are compressed."""
    found = report.coverage
    left = sorted(found.left.items(), key=lambda item: -item[1])
    parts = [("compressed", found.share * found.bytes_before, "is")]
    parts += [(reason, float(size), f"c{index % TONES}") for index, (reason, size) in enumerate(left)]
    total = max(found.bytes_before, 1)
    swatch = Markup('<i class="{}"></i>')
    rows = [[swatch.format(tone) + name, megabytes(size), percent(size / total)] for name, size, tone in parts]
    chart = charts.shares("shares of the weight bytes", [(size, tone, f"{name}: {percent(size / total)}") for name, size, tone in parts])
    items: list[Item] = [Figure(chart), Sheet(["weight bytes", "MB", "share"], rows)]
    skipped = [f"{skip.path}: {skip.reason} ({megabytes(skip.bytes)} MB)" for skip in report.skipped]
    return Section("coverage", "Coverage", [*items, *([Listing(skipped, f"{len(skipped)} layers left as they were")] if skipped else [])])


def parts(report: Saved) -> Section:
    """What each part of the model takes."""
    greatest = max((max(row.before, row.after) for row in report.parts), default=0)
    rows = []
    for row in sorted(report.parts, key=lambda row: -max(row.before, row.after)):
        bars = charts.meters([(row.before, "was"), (row.after, "is")], greatest)
        less = percent(row.after / row.before) if row.before else ""
        rows.append([row.part, megabytes(row.before), megabytes(row.after), less, bars])
    legend = Legend([("was", "before"), ("is", "after")])
    return Section("parts", "Size by part", [Sheet(["part", "before, MB", "after, MB", "left", ""], rows), legend] if rows else [])


def tables(report: Saved) -> Section:
    """Tables of single passes."""
    items: list[Item] = [plain(name, rows) for name, rows in report.tables.items() if rows and name not in SHOWN]
    return Section("tables", "Tables of passes", items)


def plain(name: str, rows: Rows) -> Sheet:
    """A table as it is in the report."""
    header = list(rows[0])
    left = next((index for index, key in enumerate(header) if isinstance(rows[0][key], float | int)), len(header))
    look = "long" if len(rows) > MOST else ""
    return Sheet(header, [[brief(row.get(key)) for key in header] for row in rows], range(left), look, f"{name}, {len(rows)} rows")


def notes(report: Saved) -> Section:
    """What passes remarked, and what the backend says of itself."""
    items: list[Item] = [Listing(report.notes[:MOST])] if report.notes else []
    if report.notes[MOST:]:
        items.append(Listing(report.notes[MOST:], f"{len(report.notes) - MOST} more"))
    if report.target:
        said = [f"{key}: {value if not isinstance(value, dict | list) else brief_tree(value)}" for key, value in report.target.items()]
        items.append(Listing(said, f"what {report.backend} says"))
    return Section("notes", "Notes", items)


def brief_tree(value: dict[str, Any] | list[Any]) -> str:
    """Nested data in one line, cut where it gets long."""
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


SECTIONS: Sequence[Callable[[Saved], Section]] = (
    summary,
    pipeline,
    layers.errors,
    layers.widths,
    cache,
    searches.policies,
    layers.reads,
    searches.predicted,
    coverage,
    parts,
    tables,
    notes,
)
