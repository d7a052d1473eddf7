"""`Stream`: one graph run block by block, with what enters the next block for every batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.blocks import Block
from ir.errors import DataError
from ir.store import HANDED_OUT, Store
from passes.data.portions import Portions
from passes.memo.folder import Tensors

Values = dict[Node, Any]


@dataclass
class Stream:
    """A graph, its nodes outside of the residual stream, and what enters the next block, for each batch of this process.

    Args:
        gm: the graph.
        outside: nodes.
        own: the numbers of the batches.
        portions: run them.
        entering: values by batch.
    """

    gm: GraphModule
    outside: list[Node]
    own: Sequence[int]
    portions: Portions
    entering: dict[int, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entering = {index: {} for index in self.own}

    def values(self, block: Block, index: int, batch: Sequence[Tensor], keep: Sequence[Node]) -> Values:
        """The values of `keep`, nodes of the block, for one batch."""
        for value in self.entering[index].values():
            edit.counted(self.gm, value)
        given = evaluate.bind(self.gm, batch) | self.entering[index]
        needed = evaluate.ancestors(keep, stop=given)
        known = [node for node in (*self.outside, *block.nodes) if node in needed]
        # Since the graph was cut, weights have been rounded: what makes floats of their codes runs first.
        weights = [node for node in needed.difference(known) if node.op == "call_function"]
        return self.portions.run([*weights, *known], given, keep)

    def enter(self, block: Block, calibration: Sequence[Sequence[Tensor]]) -> None:
        """Run a block, and let what leaves it enter the next one: in one order in memory, as it is when it was kept on disk."""
        for index in self.own:
            values = self.values(block, index, calibration[index], block.exit)
            self.entering[index] = self.leaving(values)

    def leaving(self, values: Values) -> Values:
        """What enters the next block, of one batch; on disk if the graph has a store, and the values of all batches are large."""
        store: Store | None = self.gm.meta.get(edit.STORE)
        if store is None or len(self.own) * sum(value.nbytes for value in values.values()) < HANDED_OUT:
            return {node: contiguous(value) for node, value in values.items()}
        return {node: store.keep(contiguous(value), apart=True) for node, value in values.items()}

    def stored(self, name: str) -> Tensors | None:
        """All that enters the next block, by names that begin with one; None if not all of it are tensors."""
        found = {f"{name}.{index}.{place}": value for index, values in self.entering.items() for place, value in enumerate(values.values())}
        return found if all(isinstance(value, Tensor) for value in found.values()) else None

    def restored(self, held: Tensors, name: str, nodes: Sequence[Node]) -> dict[int, Values]:
        """What `stored` gave, as the values of `nodes`.

        Raises:
            DataError: tensors of another kind.
        """
        found = {index: {node: held[f"{name}.{index}.{place}"] for place, node in enumerate(nodes)} for index in self.own}
        for node, value in (pair for values in found.values() for pair in values.items()):
            if value.dtype != edit.value(node).dtype or value.ndim != edit.value(node).ndim:
                raise DataError("the stream is of another kind", where=edit.module_path(node))
        return found


def contiguous(value: Any) -> Any:
    """A tensor in one order in memory; anything else as it is."""
    return value.contiguous() if isinstance(value, Tensor) else value
