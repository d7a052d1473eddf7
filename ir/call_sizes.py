"""Numbers in calls that count elements along an axis: what they become when some elements are dropped, a row for each operator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from ir import edit
from ir.match import aten, operand, operands

Keeps = Sequence[Tensor]  # for each axis of a value, bool: which of its elements stay; one element for an axis that varies
Kept = Mapping[Node, Sequence[Keeps]]  # of every value that loses elements, for each of its results


def resize(node: Node, kept: Kept) -> None:
    """Change the numbers of a call whose value loses elements; the value is not inferred again."""
    if node.target in ROWS:
        ROWS[node.target](node, kept)


def count(keep: Tensor) -> int:
    """How many elements stay."""
    return int(keep.sum())


def _shape(name: str) -> Callable[[Node, Kept], None]:
    """The shape of the result, in which −1 and sizes that vary stay."""

    def change(node: Node, kept: Kept) -> None:
        given: Sequence[Any] = operand(node, name)
        keeps = kept[node][0][-len(given) :]
        edit.set_operand(node, name, [count(keep) if isinstance(n, int) and n != -1 else n for n, keep in zip(given, keeps, strict=True)])

    return change


def _slice(node: Node, kept: Kept) -> None:
    """Where a slice starts and ends."""
    keep = _source(node, kept)
    for name in ("start", "end") if keep is not None else ():
        place = operand(node, name)
        if keep is not None and isinstance(place, int) and place < len(keep):
            edit.set_operand(node, name, count(keep[:place]))


def _narrow(node: Node, kept: Kept) -> None:
    keep = _source(node, kept)
    if keep is not None:
        start, length = operand(node, "start") % len(keep), operand(node, "length")
        edit.set_operand(node, "start", count(keep[:start]))
        edit.set_operand(node, "length", count(keep[start : start + length]))


def _source(node: Node, kept: Kept) -> Tensor | None:
    """What stays of the first operand along the axis that is cut; None if it is all, or varies."""
    source, axis = node.args[0], operand(node, "dim")
    if not isinstance(source, Node) or source not in kept or not isinstance(edit.value(source).shape[axis], int):
        return None
    return kept[source][0][axis]


def _sections(name: str) -> Callable[[Node, Kept], None]:
    """Sizes of parts, or the one size of all: whether all have it still, inference tells."""

    def change(node: Node, kept: Kept) -> None:
        if isinstance(edit.value(node)[0].shape[operand(node, "dim")], int):
            sizes = [count(keeps[operand(node, "dim")]) for keeps in kept[node]]
            edit.set_operand(node, name, sizes if isinstance(operand(node, name), list | tuple) else max(sizes))

    return change


def _repeats(node: Node, kept: Kept) -> None:
    """How often, if copies are dropped, and the size of the result, which the caller may state."""
    source, axis = node.args[0], operand(node, "dim")
    size = count(kept[node][0][axis])
    if isinstance(source, Node) and isinstance(edit.value(source).shape[axis], int):
        edit.set_operand(node, "repeats", size // edit.value(source).shape[axis])
    if operands(node)["output_size"] is not None:
        edit.set_operand(node, "output_size", size)


ROWS: dict[Any, Callable[[Node, Kept], None]] = {
    aten.reshape.default: _shape("shape"),
    aten.expand.default: _shape("size"),
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.split.Tensor: _sections("split_size"),
    aten.split_with_sizes.default: _sections("split_sizes"),
    aten.repeat_interleave.self_int: _repeats,
}
