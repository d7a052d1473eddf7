"""`Flow`: which channels the axes of a graph's values carry, as labels that run through the graph beside the values.

A value of shape `[batch, heads, length, size]` has labels of shape `[1, heads, 1, size]`: an *atom*, a number, for every element along its
fixed axes. Reshapes, slices and repetitions are done to the labels as they are to the values, so grouped queries, fused projections and
interleaved heads need no rules of their own. What operators ask of the channels is recorded as ties, limits and bars, and solved at the end.

Every atom `2a` has a dual `2a + 1`, which stands for the inverse (transposed) map: the two sides of a dot product are tied to each other's
duals.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit


class Map(Enum):
    """What may be done to the channels of a group without a change of the function.

    PERMUTE reorders them, SELECT drops some, SCALE multiplies each by a number, ROTATE mixes them by an orthogonal matrix, LINEAR by any
    invertible one. CENTER subtracts their mean.
    """

    SELECT = "select"
    PERMUTE = "permute"
    SCALE = "scale"
    ROTATE = "rotate"
    LINEAR = "linear"
    CENTER = "center"


INVERTED = (Map.SCALE, Map.LINEAR)  # maps whose inverse transpose is another map
MIXING = (Map.ROTATE, Map.LINEAR, Map.CENTER)  # maps of whole blocks of channels

Labels = Tensor  # int64, of the value's label shape


@dataclass(frozen=True)
class Use:
    """Where atoms meet a stored tensor: the get_attr node (or a norm that has no gain yet), the axis, one atom for each of its entries."""

    node: Node
    axis: int
    atoms: Labels
    writes: bool


@dataclass
class Flow:
    """The state of one analysis, for one kind of map."""

    gm: GraphModule
    kind: Map
    labels: dict[Node, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    limits: list[Labels] = field(default_factory=list)
    bars: list[tuple[Labels, str]] = field(default_factory=list)
    count: int = 0
    _fixed: list[tuple[int, int]] = field(default_factory=list)  # ranges of atoms, in order
    _axes: dict[tuple[str, int], Labels] = field(default_factory=dict)

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New atoms."""
        start, self.count = self.count, self.count + int(torch.Size(shape).numel())
        return 2 * torch.arange(start, self.count).reshape(tuple(shape))

    def fixed(self, node: Node, reason: str) -> Labels:
        """New atoms for a node's value that tolerate no map."""
        start = self.count
        made = self.fresh(label_shape(node))
        self._fixed.append((start, self.count))
        self.bar(made, reason)
        return made

    def is_fixed(self, labels: Labels) -> bool:
        """Whether these are atoms that `fixed` made."""
        atom = int(labels.flatten()[0]) // 2
        index = bisect_right(self._fixed, (atom, self.count)) - 1
        return index >= 0 and self._fixed[index][0] <= atom < self._fixed[index][1]

    def tie(self, a: Labels, b: Labels) -> None:
        """One map for both, element by element."""
        a, b = torch.broadcast_tensors(a, b)
        self.ties.append((a.flatten(), b.flatten()))

    def contract(self, a: Labels, b: Labels) -> None:
        """A sum over products of both: a map on one is undone by its inverse transpose on the other."""
        self.tie(a, b ^ 1 if self.kind in INVERTED else b)

    def limit(self, labels: Labels, axis: int = -1) -> None:
        """Channels mix along this axis only, within one row of it."""
        self.limits.append(labels.movedim(axis, -1).reshape(-1, labels.shape[axis]))

    def bar(self, labels: Labels, reason: str) -> None:
        """No map but the identity."""
        self.bars.append((labels.flatten(), reason))

    def meet(self, labels: Labels, axis: int) -> Labels:
        """The atoms along one axis `[n]`, after those of all other axes are tied to them."""
        rows = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
        if len(rows) > 1:
            self.tie(rows[1:], rows[:1])
        return rows[0]

    def use(self, node: Node, axis: int, atoms: Labels, *, writes: bool) -> Labels:
        """Record that a stored tensor's axis carries these atoms. A tensor that is used twice has one map."""
        found = self._axes.setdefault((str(node.target) if node.op == "get_attr" else node.name, axis), atoms)
        if found is atoms:
            self.uses.append(Use(node, axis, atoms, writes))
            return atoms
        first = next(use for use in self.uses if use.atoms is found)
        # Writers multiply, readers divide: a tensor that does both would need a map that is its own inverse.
        self.tie(found, atoms if first.writes == writes or self.kind not in INVERTED else atoms ^ 1)
        return found


def label_shape(node: Node) -> tuple[int, ...]:
    """A value's shape with what varies from call to call taken as 1: `[s, 4·s, 64]` is `[1, 4, 64]`."""
    return tuple(_fixed_part(size) for size in edit.value(node).shape)


def _fixed_part(size: Any) -> int:
    if isinstance(size, int):
        return size
    return abs(int(size.node.expr.as_coeff_Mul()[0])) or 1


def varies(node: Node, axis: int) -> bool:
    """Whether the size of an axis is symbolic."""
    return not isinstance(edit.value(node).shape[axis], int)
