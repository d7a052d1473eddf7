"""The report: what every pass did, what is covered and what is not and why, sizes, and errors."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from torch.fx import GraphModule

from ir.sites import floats, layers, quantized
from passes.base import Record, Skip
from passes.page import picture
from passes.units import KL, NATS

OTHERS = "parameters of operators without a quantized form (norms, biases, tables)"


@dataclass(frozen=True)
class Coverage:
    """Where the weight bytes of the model went.

    Args:
        total: bytes of all stored tensors before quantization; shared ones count once.
        compressed: bytes of the tensors that are quantized now, as they were before.
        stored: bytes that the result needs, with scales and zero points.
        elements: quantized weights.
        bits: bits that they take, with scales and zero points.
        left: for each reason, the bytes that were left as they were.
    """

    total: int
    compressed: int
    stored: int
    elements: int
    bits: int
    left: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the weight bytes that is compressed."""
        return self.compressed / max(self.total, 1)

    @property
    def effective_bits(self) -> float:
        """Bits per quantized weight, scales and zero points counted."""
        return self.bits / max(self.elements, 1)


def coverage(gm: GraphModule, skipped: Iterable[Skip]) -> Coverage:
    """Account for every stored tensor of a graph."""
    reasons = {skip.path: skip.reason for skip in skipped}
    compressed = elements = bits = 0
    for node, _, codes, used in quantized(gm):
        compressed += codes.numel() * node.args[4].itemsize  # type: ignore[union-attr]
        elements += codes.numel()
        bits += used
    why: dict[str, str] = {}
    for layer in layers(gm):
        if layer.weight.op == "get_attr":
            why.setdefault(str(layer.weight.target), reasons.get(layer.path, "not annotated"))  # a shared weight goes by its first reader
    left: dict[str, int] = {}
    for node, tensor in floats(gm):
        reason = why.get(str(node.target), OTHERS)
        left[reason] = left.get(reason, 0) + tensor.nbytes
    rest = sum(left.values())
    return Coverage(compressed + rest, compressed, -(-bits // 8) + rest, elements, bits, left)


def left_out(gm: GraphModule, skipped: Iterable[Skip]) -> list[Skip]:
    """The skips that still hold: a later pass may have quantized the layer after all, or have left it out for another reason."""
    covered = {layer.path for layer in layers(gm) if layer.weight.op != "get_attr"}
    return list({skip.path: skip for skip in skipped if skip.path not in covered}.values())


@dataclass
class Report:
    """Everything worth knowing about one compile; `str` and `rich` print it, `to_json` saves it."""

    model: str
    pipeline: str
    backend: str
    trace: Sequence[Record]
    coverage: Coverage
    skipped: Sequence[Skip]
    notes: Sequence[str]
    difference: float
    seconds: float
    peak_bytes: int
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    reads: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    target: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    lowering: int = 0  # how many of the notes, the last ones, are the backend's

    @property
    def predicted(self) -> float | None:
        """The KL of the model from itself that `assign_bits` predicted for its choice, nats a token; None where it did not."""
        rows = self.tables.get("widths", [])
        return sum(row[NATS] for row in rows) if rows and all(NATS in row for row in rows) else None

    def measured(self) -> dict[str, dict[str, float]]:
        """`measures`, the predicted divergence beside every one that was measured."""
        found: dict[str, dict[str, float]] = {}
        for name, values in self.measures.items():
            row = found[name] = dict[str, float]()
            for key, value in values.items():
                row[key] = value
                if key == KL and self.predicted is not None:
                    row["KL predicted"] = self.predicted
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for `report.json`."""
        return {
            "model": self.model,
            "pipeline": self.pipeline,
            "backend": self.backend,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "difference": self.difference,
            "passes": [
                {"pass": r.text, "effect": r.effect.value, "sites": r.sites, "seconds": r.seconds, "difference": r.difference}
                for r in self.trace
            ],
            "coverage": {
                "share": self.coverage.share,
                "effective_bits": self.coverage.effective_bits,
                "bytes_before": self.coverage.total,
                "bytes_after": self.coverage.stored,
                "left": self.coverage.left,
            },
            "skipped": [vars(skip) for skip in self.skipped],
            "notes": list(self.notes),
            "tables": self.tables,
            "layers": self.layers,
            "reads": self.reads,
            "parts": self.parts,
            "target": self.target,
            "measures": self.measured(),
        }

    def page(self) -> list[RenderableType]:
        """The page that the command line prints."""
        passes = Table("pass", "effect", "sites", "seconds", "error", title=f"{self.model} → {self.backend}", title_justify="left")
        for r in self.trace:
            passes.add_row(r.text, r.effect.value, str(r.sites), f"{r.seconds:.2f}", "" if r.difference is None else f"{r.difference:.2g}")
        sizes = Table("weights", "MB", "share", title_justify="left")
        c = self.coverage
        sizes.add_row("before", f"{c.total / 1e6:.2f}", "100 %")
        sizes.add_row("after", f"{c.stored / 1e6:.2f}", f"{c.stored / max(c.total, 1):.1%}")
        sizes.add_row(f"compressed, {c.effective_bits:.3f} effective bits", f"{c.compressed / 1e6:.2f}", f"{c.share:.1%}")
        for reason, size in sorted(c.left.items(), key=lambda item: -item[1]):
            sizes.add_row(f"left: {reason}", f"{size / 1e6:.2f}", f"{size / max(c.total, 1):.1%}")
        shown: list[RenderableType] = [passes, sizes]
        for title, rows in self.tables.items():
            if rows:
                shown += picture.DRAWN[title](rows) if title in picture.DRAWN else [_table(title, rows)]
        if self.measures:
            columns = list(dict.fromkeys(key for values in self.measured().values() for key in values))
            measures = Table("text", *columns, title_justify="left")
            for name, values in self.measured().items():
                measures.add_row(name, *(f"{values[key]:.4g}" if key in values else "" for key in columns))
            shown.append(measures)
        return [*shown, *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        page = io.StringIO()
        console = Console(width=140, file=page, markup=False)
        for part in self.page():
            console.print(part)
        return page.getvalue()


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    return table
