"""A value for each linear of a model as a grid: layers down, places within a layer across. The structure follows from paths alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from ir.errors import DataError

LARGEST = 1 << 20  # cells: reports of others may name anything a layer
T = TypeVar("T")


@dataclass(frozen=True)
class Grid(Generic[T]):
    """Values by row and column.

    Args:
        shared: what the names of all rows start with, said once.
        columns: names of places, as short as is clear.
        rows: of each row its name without `shared`, and a value, or None, for each column.
    """

    shared: str
    columns: list[str]
    rows: list[tuple[str, list[T | None]]]


def place(path: str) -> tuple[str, str]:
    """The row and the column of a path: cut after its last number, `layers.3` and `mlp.up`; without one before its last component."""
    parts = path.split(".")
    numbered = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    cut = numbered[-1] + 1 if numbered else len(parts) - 1
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def grid(values: Mapping[str, T]) -> Grid[T]:
    """The grid of values by path, rows and columns in the order that they first appear in."""
    places = {path: place(path) for path in values}
    columns = list(dict.fromkeys(column for _, column in places.values()))
    if len(columns) * len({row for row, _ in places.values()}) > LARGEST:
        raise DataError(f"a grid has at most {LARGEST} cells", remedy="name layers as a model does, model.layers.3.mlp.up")
    rows: dict[str, list[T | None]] = {row: [None] * len(columns) for row, _ in places.values()}
    across = {column: index for index, column in enumerate(columns)}
    for path, (row, column) in places.items():
        rows[row][across[column]] = values[path]
    shared = _shared([row for row in rows if row])
    return Grid(shared, _short(columns), [(row[len(shared) :], own) for row, own in rows.items()])


def merged(whole: Grid[T]) -> Grid[T]:
    """The grid with neighbouring rows of equal values as one, named by the first and the last."""
    runs = [[name for name, _ in run] for _, run in groupby(whole.rows, key=lambda row: row[1])]
    values = [own for own, _ in groupby(own for _, own in whole.rows)]
    return Grid(whole.shared, whole.columns, [(_span(names), own) for names, own in zip(runs, values, strict=True)])


def _shared(rows: list[str]) -> str:
    """The components that all rows start with, and a dot, leaving each at least one."""
    split = [row.split(".") for row in rows]
    count = 0
    while split and all(len(parts) > count + 1 and parts[count] == split[0][count] for parts in split):
        count += 1
    return "".join(f"{part}." for part in split[0][:count]) if split else ""


def _short(columns: list[str]) -> list[str]:
    """Last components, or whole names where two would be the same."""
    last = [column.rpartition(".")[2] for column in columns]
    return [short if last.count(short) == 1 else column for short, column in zip(last, columns, strict=True)]


def _span(names: list[str]) -> str:
    """`3`, or `3–7`; the part before the number is said once if both share it."""
    first, final = names[0], names[-1]
    if len(names) == 1:
        return first
    stem = first.rpartition(".")[0]
    return f"{first}–{final.rpartition('.')[2]}" if stem == final.rpartition(".")[0] else f"{first} – {final}"
