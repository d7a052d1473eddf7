"""How long a target takes for linears: a table that is measured once, and that budgets in milliseconds are counted by."""

import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ir.capture import capture
from ir.encoding import Encoding
from ir.errors import DataError
from ir.files import appearing, read_json
from ir.sites import Layer, Mark, layers
from passes.backend import Backend
from passes.base import Context
from passes.budget.forms import Form
from passes.pipeline import Pipeline

FORMAT = "fxpress-latency-1"
COPIES = 4  # linears in the greater of two models; the time of a model itself falls out of the difference
ROUNDS, RUNS = 9, 20
LEAST = 1e-6  # milliseconds: what is too quick to tell from nothing still counts as something
Kind = tuple[int, int, str, str]  # rows and columns of a weight, encodings of the input ("" if it has none) and of the weight


def kind(layer: Layer, form: Form) -> Kind:
    """What the time of a linear depends on."""
    return *form.shape_of(layer), str(form.input or ""), str(form.weight)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one linear on one token, by its kind, on the backend and machine that they were measured on."""

    backend: str
    milliseconds: dict[Kind, float]

    def of(self, layer: Layer, form: Form) -> float:
        """The time of a layer in a form."""
        return self.milliseconds[kind(layer, form)]

    def save(self, path: Path) -> None:
        """Write it, under a temporary name first."""
        rows = [[*key, time] for key, time in self.milliseconds.items()]
        with appearing(path) as draft:
            draft.write_text(json.dumps({"format": FORMAT, "backend": self.backend, "milliseconds": rows}, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: Path, backend: str, wanted: Collection[Kind]) -> "LatencyTable":
        """Read a table.

        Raises:
            DataError: the file is none, is of another backend, or lacks a kind that is wanted.
        """
        remedy = "remove the file to measure anew"
        try:
            data = read_json(path)
            found = {(int(n), int(k), str(x), str(w)): float(time) for n, k, x, w, time in data["milliseconds"]}
            known = data["format"] == FORMAT
        except DataError as error:
            raise DataError(f"this is no table of latencies: {error.what}", where=str(path), remedy=remedy) from error
        except (ArithmeticError, ValueError, KeyError, TypeError) as error:
            raise DataError("this is no table of latencies", where=str(path), remedy=remedy) from error
        if not all(math.isfinite(time) and time > 0 for time in found.values()):
            raise DataError("this table has latencies that are no times", where=str(path), remedy=remedy)
        if not known or data.get("backend") != backend:
            raise DataError(f"these latencies are of {data.get('backend')}, not of {backend}", where=str(path), remedy=remedy)
        missing = [key for key in wanted if key not in found]
        if missing:
            raise DataError(f"the latencies lack {missing[0]}", where=str(path), remedy=remedy)
        return cls(backend, found)

    @classmethod
    def measured(cls, ctx: Context, backend: Backend, wanted: Iterable[Kind]) -> "LatencyTable":
        """Measure every kind on this machine, one after the other: memory holds the linears of one kind."""
        kinds = list(dict.fromkeys(wanted))
        return cls(backend.name, {key: _milliseconds(backend, key) for key in ctx.track(kinds, "latencies")})


def _milliseconds(backend: Backend, key: Kind) -> float:
    """One linear's share of the time of a model of several; the median of rounds in which that and a model of one take turns."""
    small, great = (_executable(backend, key, copies) for copies in (1, COPIES))
    x = torch.randn(1, 1, key[1], generator=torch.Generator().manual_seed(0))
    differences = [_time(great, x) - _time(small, x) for _ in range(ROUNDS)]
    return max(statistics.median(differences) / (COPIES - 1), LEAST)


class _Copies(nn.Module):
    """Linears over one input, added up."""

    def __init__(self, rows: int, columns: int, copies: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(copies))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / columns**0.5

    def forward(self, x: Tensor) -> Any:
        return sum(linear(x) for linear in self.linears)


def _executable(backend: Backend, key: Kind, copies: int) -> Callable[..., Any]:
    """A model of several linears of one kind, lowered."""
    rows, columns, given, mark = key
    gm = capture(_Copies(rows, columns, copies).eval(), (torch.randn(2, 3, columns),))
    ctx = Context(probe=gm.meta["example"], backend=backend)
    Pipeline.parse("canonicalize").execute(gm, ctx)
    for layer in layers(gm):
        layer.annotate(Mark(Encoding.parse(given) if given else None, Encoding.parse(mark)))
    Pipeline.parse("quantize").execute(gm, ctx)
    return backend.lower(gm, gm.meta["example"], ctx.notes)


def _time(run: Callable[..., Any], x: Tensor) -> float:
    """Milliseconds of one call."""
    run(x)
    started = time.perf_counter()
    for _ in range(RUNS):
        run(x)
    return 1000 * (time.perf_counter() - started) / RUNS
