"""Calibration batches are run whole, and in smaller portions where memory runs out."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.errors import DataError
from passes.base import Context

PHRASES = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc")  # of torch's errors, which on CPUs have no class
REMEDY = "give calibration in smaller batches or shorter windows, or use a machine with more memory"

Values = Mapping[Node, Any]
Take = Callable[[Node, Any], None]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


@dataclass
class Portions:
    """Runs a graph on calibration batches, one after the other; once memory ran out, on so many samples at a time.

    What is computed of each sample stays the same: samples of a batch do not know of one another.

    Args:
        gm: the graph.
        ctx: is told of it, in its notes.
        rows: samples at a time; 0 for whole batches.
    """

    gm: GraphModule
    ctx: Context
    rows: int = 0

    def run(self, nodes: Sequence[Node], given: Values, keep: Sequence[Node], take: Take | None = None) -> dict[Node, Any]:
        """As `ir.evaluate.evaluate`.

        Args:
            nodes, given, keep: as there; the graph's inputs are given.
            take: gets every node and its value once, or once for each portion of it; what it has got already it does not get again.

        Raises:
            DataError: there is not memory enough for one sample, or the graph does not keep samples apart.
        """
        lead = next(node for node in given if node.op == "placeholder")
        work = deque((portion, frozenset[Node]()) for portion in self._split(given, lead))
        found: list[dict[Node, Any]] = []
        while work:
            portion, done = work.popleft()
            seen = set(done)
            try:
                found.append(evaluate.evaluate(self.gm, nodes, portion, keep, _once(take, seen) if take else None))
                continue
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error)
            # Behind the handler, so that the values that the error's frames hold are free.
            self._shrink(len(portion[lead]), reason)
            work.extendleft((smaller, frozenset(seen)) for smaller in reversed(self._split(portion, lead)))
        return {node: _joined(node, lead, [values[node] for values in found]) for node in keep}

    def _shrink(self, rows: int, reason: str) -> None:
        if rows < 2:
            raise DataError(f"memory runs out on one sample: {reason.splitlines()[0]}", remedy=REMEDY)
        self.rows = (rows + 1) // 2
        self.ctx.notes.append(f"memory ran out on {rows} calibration samples at once: they were run {self.rows} at a time")

    def _split(self, given: Values, lead: Node) -> list[Values]:
        """Portions of a batch."""
        size = len(given[lead])
        if not self.rows or size <= self.rows:
            return [given]
        parts = {node: value.split(self.rows * (len(value) // size)) for node, value in given.items() if _apart(node, lead)}
        return [dict(given) | {node: split[i] for node, split in parts.items()} for i in range(-(-size // self.rows))]


def _once(take: Take, seen: set[Node]) -> Take:
    """Give each node once; memory that runs out meanwhile is no reason to begin again, since a part may be counted."""

    def tap(node: Node, value: Any) -> None:
        if node in seen:
            return
        try:
            take(node, value)
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                raise DataError(
                    "memory runs out on what is kept of a layer's input", where=edit.module_path(node), remedy=REMEDY
                ) from error
            raise
        seen.add(node)

    return tap


def _apart(node: Node, lead: Node) -> bool:
    """Whether a value has rows for each sample, by the symbol that stands for their number; else it is the same for all.

    Raises:
        DataError: the samples are not apart in it.
    """
    fake, symbol = edit.value(node), _symbol(edit.value(lead).shape[0])
    sizes = [_symbol(size) for size in fake.shape] if isinstance(fake, Tensor) else [_symbol(fake)]
    first, *others = sizes or [None]
    if symbol is None or any(symbol in getattr(size, "free_symbols", ()) for size in others):
        raise DataError("memory runs out, and the graph does not keep samples apart", where=edit.module_path(node), remedy=REMEDY)
    if first is None or symbol not in first.free_symbols:
        return False
    if symbol in (first / symbol).free_symbols or not isinstance(fake, Tensor):
        raise DataError("memory runs out, and the graph does not keep samples apart", where=edit.module_path(node), remedy=REMEDY)
    return True


def _symbol(size: Any) -> Any:
    """A size as an expression of symbols; None if it is a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _joined(node: Node, lead: Node, parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or not _apart(node, lead) else torch.cat(list(parts))
