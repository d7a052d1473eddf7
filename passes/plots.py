"""Pictures of a report: widths over the model, and loss over the budget. matplotlib is an extra, and is imported only to draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import DataError, OptionError
from passes.grid import Grid
from passes.picture import COLOURS, DARK, Cell, cells, label, loss
from passes.units import KL, NATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
FORMATS = ("png", "svg")
ROTATED = 12  # columns from which their names stand upright
CELLS = 600  # up to which every cell has its number


def plot(folder: Path) -> list[Path]:
    """Write `allocation` and `budgets` into a folder that has a report, as png and svg; returns the files.

    Raises:
        DataError: no report, or one without a choice of widths.
        OptionError: matplotlib is not installed.
    """
    report = _read(folder)
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise OptionError("plots need matplotlib", remedy="pip install fxpress[plots]") from error
    drawn = {"allocation": allocation(report), "budgets": budgets(report)}
    return [_saved(figure, folder / f"{name}.{kind}") for name, figure in drawn.items() for kind in FORMATS]


def allocation(report: Mapping[str, Any]) -> "Figure":
    """The widths of all linears: layers down, places across, in the order of the model."""
    from matplotlib.colors import BoundaryNorm, ListedColormap  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    found = cells(report["tables"]["widths"])
    widths = [[float("nan") if cell is None else cell.mark.weight.bits for cell in own] for _, own in found.rows]
    used = [cell.mark for _, own in found.rows for cell in own if cell]
    fewer = any(cell.kept < 1 for _, own in found.rows for cell in own if cell)
    upright = len(found.columns) > ROTATED or any(len(column) > 10 for column in found.columns)
    size = (3.2 + (1.0 if fewer else 0.75) * len(found.columns), 1.6 + 0.34 * len(found.rows) + 0.9 * upright)
    figure = Figure(figsize=(max(size[0], 6.0), max(size[1], 3.0)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(widths, cmap=ListedColormap(COLOURS), norm=BoundaryNorm([bits + 0.5 for bits in range(9)], 8), aspect="auto")
    if len(found.rows) * len(found.columns) <= CELLS:
        _label(axes, found)
    axes.set_xticks(range(len(found.columns)), found.columns, rotation=90 * upright)
    axes.set_yticks(range(len(found.rows)), [name or "–" for name, _ in found.rows])
    axes.set_xticks([place - 0.5 for place in range(len(found.columns) + 1)], minor=True)
    axes.set_yticks([place - 0.5 for place in range(len(found.rows) + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    said = ["after a dot the weights of a group, where it is not a whole channel"] * any(mark.weight.block[-1] != -1 for mark in used)
    said += ["after a slash the bits of the input"] * any(mark.input for mark in used)
    said += ["then the share of weights kept"] * fewer
    if said:
        axes.set_xlabel("; ".join(["bits", *said]), fontsize=9)
    axes.set_ylabel(f"{found.shared}*" if found.shared else "")
    what = "weights and inputs" if any(mark.input for mark in used) else "weights"
    axes.set_title(
        f"{report['model']}: widths of {what}, {report['coverage']['effective_bits']:.3f} effective bits", loc="left", fontsize=11
    )
    patches = [
        Patch(color=COLOURS[bits - 1], label=f"{bits} bit{'s' * (bits > 1)}") for bits in sorted({mark.weight.bits for mark in used})
    ]
    figure.legend(handles=patches, loc="outside right upper", frameon=False)
    return figure


def budgets(report: Mapping[str, Any]) -> "Figure":
    """The predicted loss over the budget, what was measured, and the divergence of the result on texts."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    rows: Rows = report["tables"]["budgets"]
    unit = loss(rows)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    line = [row for row in rows if row["measured"] is None or row["chosen"]]
    axes.plot(*_points(line, unit), color=COLOURS[1], marker="o", markersize=3, linewidth=1.4, label="predicted")
    chosen = [row for row in rows if row["chosen"]]
    axes.plot(*_points(chosen, unit), color=COLOURS[1], marker="o", markersize=9, linestyle="none", label="chosen, predicted")
    measured = [row for row in rows if row["measured"] is not None] if unit == NATS else []
    if measured:
        axes.plot(
            *_points(measured, "measured"), color="#d95f02", marker="D", markersize=6, linestyle="none", label="measured, held-out tokens"
        )
    if unit == NATS and chosen:
        _results(axes, report["measures"], chosen[0]["bits"])
    axes.set_yscale("log")
    axes.set(xlabel="bits per weight, scales and zero points counted", ylabel=f"KL from the original, {unit}" if unit == NATS else unit)
    axes.set_title(f"{report['model']}: predicted loss over the budget", loc="left", fontsize=11)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _results(axes: "Axes", measures: Mapping[str, Mapping[str, float]], bits: float) -> None:
    """The divergence of the whole result on every text that it was measured on, with its perplexity."""
    for marker, (name, values) in zip("^vs<>p*" * len(measures), measures.items(), strict=False):
        if KL in values:
            said = f", perplexity {values['perplexity']:.2f}" if "perplexity" in values else ""
            axes.plot(
                [bits], [values[KL]], color=COLOURS[4], marker=marker, markersize=8, linestyle="none", label=f"result on {name}{said}"
            )


def _label(axes: "Axes", found: Grid[Cell]) -> None:
    """Width and group in every cell."""
    for down, (_, own) in enumerate(found.rows):
        for across, cell in enumerate(own):
            if cell is not None:
                colour = "white" if cell.mark.weight.bits <= DARK else "black"
                axes.text(across, down, label(cell, grouped=True), ha="center", va="center", color=colour, fontsize=8.5)


def _points(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    return [row["bits"] for row in rows], [row[key] for row in rows]


def _saved(figure: "Figure", path: Path) -> Path:
    # Without a date, and with names of parts that are not drawn at random: the same report gives the same file.
    from matplotlib import rc_context  # noqa: PLC0415 (an extra)

    with rc_context({"svg.hashsalt": "fxpress"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
    return path


def _read(folder: Path) -> dict[str, Any]:
    """The report in a folder, with the tables that are drawn."""
    path = folder / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = not (report["tables"].get("widths") and report["tables"].get("budgets"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a report: {error}", where=str(path), remedy="name a folder that `fxpress compile` wrote") from error
    if missing:
        raise DataError(
            "the report has no choice of widths to draw", where=str(path), remedy="compile with assign_bits, or the preset mixed"
        )
    return report
