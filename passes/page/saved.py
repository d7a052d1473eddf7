"""What `report.json` says, checked as it is read: it may come from anywhere."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from ir.errors import DataError
from ir.files import inside, read_json
from ir.sites import Mark

FILE = "report.json"

MOST = 1000  # passes: comparing them takes their square
Rows = list[dict[str, Any]]


class PassRow(BaseModel):
    """What one pass did."""

    text: str = Field(alias="pass")
    effect: str
    sites: int
    seconds: float
    difference: float | None


class CoverageRow(BaseModel):
    """Where the weight bytes went."""

    share: float
    effective_bits: float
    bytes_before: int
    bytes_after: int
    left: dict[str, int]


class SkipRow(BaseModel):
    """A layer that was left as it was."""

    path: str
    reason: str
    bytes: int


class LayerRow(BaseModel):
    """A layer: its encodings, `None` for floating point, and relative errors where operands are rounded."""

    layer: str
    encoding: Mark | None
    weights: int
    error: float | None = None
    input_error: float | None = Field(default=None, alias="input error")

    @field_validator("encoding", mode="before")
    @classmethod
    def _parsed(cls, text: object) -> object:
        return Mark.parse(text) if isinstance(text, str) and text else None


class ReadRow(BaseModel):
    """A tensor that linears read: quantiles of its magnitudes."""

    layer: str
    before: list[float] | None = None
    after: list[float]


class PartRow(BaseModel):
    """A part of the model: its bytes."""

    part: str
    before: int
    after: int


class Saved(BaseModel):
    """A report as it was saved; what older versions did not write is empty."""

    model: str
    pipeline: str
    backend: str
    seconds: float
    peak_bytes: int
    difference: float
    passes: list[PassRow] = Field(max_length=MOST)
    coverage: CoverageRow
    skipped: list[SkipRow] = []
    notes: list[str] = []
    tables: dict[str, Rows] = {}
    layers: list[LayerRow] = []
    reads: list[ReadRow] = []
    parts: list[PartRow] = []
    target: dict[str, Any] = {}
    measures: dict[str, dict[str, float]] = {}


def read(folder: Path) -> Saved:
    """The report in a folder.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / FILE
    try:
        return Saved.model_validate(read_json(inside(folder, FILE)))
    except DataError as error:
        raise DataError(f"not a report: {error.what}", where=str(path), remedy="name a folder that `fxpress compile` wrote") from error
    except (ArithmeticError, ValueError, RecursionError) as error:
        problem = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
        raise DataError(f"not a report: {problem}", where=str(path), remedy="name a folder that `fxpress compile` wrote") from error
