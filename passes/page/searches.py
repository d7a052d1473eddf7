"""What searches found, on the page: policies of smoothing; predicted losses beside measured ones."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, sqrt
from typing import Any

from markupsafe import Markup

from passes.page import charts, picture
from passes.page.charts import Series, Square
from passes.page.content import Figure, Item, Panel, Panels, Row, Section, Sheet, brief
from passes.page.saved import Saved
from passes.units import KL, NATS

MOST = 8  # contributions that are listed


def policies(report: Saved) -> Section:
    """The policies of smoothing that were tried."""
    key = "error over the best"
    rows = report.tables.get("policies", [])
    greatest = max((row[key] - 1 for row in rows), default=0.0) or 1.0
    found = {
        (row["alpha"], row["quantile"]): Square(
            1 - sqrt(max(row[key] - 1, 0.0) / greatest),
            str(row["taken"] or ""),
            f"α {row['alpha']:g}, quantile {brief(row['quantile'])}: {row[key]:.4g} times the least error, mean of {row['groups']} groups; "
            f"taken by {row['taken']}",
        )
        for row in rows
    }
    lead = "Scales s = a^α / w^(1−α), a the quantile of |x| or its mean, w the greatest weight. The stronger the colour, the less error: "
    lead += f"the palest is {1 + greatest:.3g} times the least. Numbers count the groups that took the policy."
    chart = [Figure(charts.squares("error by α and quantile", found, "α", "quantile"), "wide")] if found else []
    return Section("policies", "Smoothing: α × quantile", chart, lead)


def predicted(report: Saved) -> Section:
    """Predicted losses beside those that were measured."""
    panels = [*_budgets(report), *_sites(report)]
    items: list[Item] = [Panels(panels)] if panels else []
    if report.measures:
        columns = list(dict.fromkeys(key for values in report.measures.values() for key in values))
        rows: list[Row] = [[name, *(brief(values.get(key)) for key in columns)] for name, values in report.measures.items()]
        items.append(Sheet(["text", *columns], rows))
    return Section("predicted", "Predicted and measured", [*items, *_greatest(report)])


def _budgets(report: Saved) -> list[Panel]:
    rows = report.tables.get("budgets", [])
    if not rows:
        return []
    unit = picture.loss(rows)

    def points(key: str, chosen: Callable[[Mapping[str, Any]], bool]) -> list[tuple[float, float, str]]:
        taken = [row for row in rows if chosen(row) and row[key] is not None and isfinite(row[key])]
        return [(row["bits"], row[key], f"{row['bits']:.3f} bits: {row[key]:.4g} {unit}") for row in taken]

    series = [
        Series("predicted", "was", points(unit, lambda row: row["measured"] is None or row["chosen"]), line=True),
        Series("chosen, predicted", "is", points(unit, lambda row: row["chosen"]), size=6),
    ]
    if unit == NATS:
        series.append(Series("measured on held-out tokens", "hot", points("measured", lambda row: True), size=5))
        bits = next((row["bits"] for row in rows if row["chosen"]), 0.0)
        results = [(bits, values[KL], f"{name}: {values[KL]:.4g}") for name, values in report.measures.items() if KL in values]
        series.append(Series("the result on texts", "good", results, size=5))
    chart = charts.curves("predicted loss over the budget", series, "bits per weight", unit, log=True)
    return [Panel("Loss over the budget", _with_legend(chart, series))]


def _sites(report: Saved) -> list[Panel]:
    rows = report.tables.get("contributions", [])
    first = rows[0] if rows else {}
    sides = [next((key for key in first if key.startswith(word)), "") for word in ("predicted", "measured")]
    if not all(sides):
        return []
    points = [(row[sides[0]], row[sides[1]], f"{row['site']}, {row['encoding']}: {row[sides[0]]:.3g}, {row[sides[1]]:.3g}") for row in rows]
    series = [Series("sites", "is", points, size=4)]
    return [Panel("Contribution of each site; dashed where both are equal", charts.curves("contributions", series, *sides, diagonal=True))]


def _greatest(report: Saved) -> list[Sheet]:
    """The sites that cost most, measured if they were."""
    rows = report.tables.get("contributions", [])
    if not rows:
        return []
    header = [key for key in rows[0] if key != "weights"]
    key = next((name for name in header if name.startswith("measured")), header[-1])
    shown = sorted(rows, key=lambda row: -row[key])[:MOST]
    cells: list[Row] = [[brief(row.get(name)) for name in header] for row in shown]
    return [Sheet(header, cells, words=(0, 1), caption=f"greatest contributions, {len(shown)} of {len(rows)} sites")]


def _with_legend(chart: Markup, series: Sequence[Series]) -> Markup:
    entries = Markup("").join(Markup('<span><i class="{}"></i>{}</span>').format(one.tone, one.label) for one in series if one.points)
    return chart + Markup('<p class="legend">{}</p>').format(entries)
