"""`Flow`: which channels the axes of a graph's values carry, as labels that run through the graph beside the values.

A value of shape `[batch, heads, length, size]` has labels of shape `[1, heads, 1, size]`: an *atom*, a number, for every element along its
fixed axes. Reshapes, slices and repetitions are done to the labels as they are to the values, so grouped queries, fused projections and
interleaved heads need no rules of their own. What operators ask of the channels is recorded as ties, limits and bars, and solved at the end
(`ir/channels/solve.py`). A value without labels is one that no map changes.

Every atom `2a` has a dual `2a + 1`, which stands for the inverse (transposed) map: the two sides of a dot product are tied to each other's
duals. No atom appears twice in a value where maps mix channels: what is repeated gets atoms of its own, tied to the first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels.maps import INVERTED, MIXING, Map
from ir.channels.shapes import label_shape
from ir.match import operand, operands

Labels = Tensor  # int64, of the value's label shape


@dataclass(frozen=True)
class Use:
    """Where atoms meet a stored tensor: the get_attr node (or a norm), the axis, one atom for each of its entries."""

    node: Node
    axis: int
    atoms: Labels
    writes: bool


@dataclass(frozen=True)
class Stored:
    """A value that is a stored tensor seen from some side: of which of its axes each is the whole, None if it was cut or picked from."""

    node: Node
    axes: tuple[int | None, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return None not in self.axes


Rule = Callable[["Flow", Node], Any]  # what an operator does to channels


@dataclass
class Flow:
    """The state of one analysis, for one kind of map; with `copies`, copies of what is repeated are dropped, not what they are of."""

    gm: GraphModule
    kind: Map
    copies: bool = False
    labels: dict[Node, Any] = field(default_factory=dict)
    stored: dict[Node, Stored] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    limits: list[Labels] = field(default_factory=list)
    single: list[tuple[Labels, str]] = field(default_factory=list)
    bars: list[tuple[Labels, str]] = field(default_factory=list)
    claimed: dict[tuple[Node, str], set[int]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    count: int = 0
    _fixed: list[tuple[int, int]] = field(default_factory=list)  # ranges of atoms, in order
    _first: dict[tuple[str, str, int], Use] = field(default_factory=dict)

    # What rules read.

    def read(self, node: Node, name: str) -> Labels | None:
        """The labels of an operand, which the rule answers for; operands that no rule reads are barred."""
        found = self.labels.get(operand(node, name)) if isinstance(operand(node, name), Node) else None
        if not isinstance(found, torch.Tensor):
            return None
        self.taken.add(name)
        return found

    def view(self, node: Node, name: str) -> Stored | None:
        """The stored tensor that an operand is, or None."""
        given = operand(node, name)
        return self.stored.get(given) if isinstance(given, Node) else None

    def labelled(self, node: Node) -> dict[str, list[Labels]]:
        """The labels of all operands that have some, by name."""
        given_by_name = operands(node) or {"operand": node.all_input_nodes}
        found = {name: [self.labels[read] for read in nodes_of(given) if read in self.labels] for name, given in given_by_name.items()}
        return {name: [one for each in labels for one in flat(each)] for name, labels in found.items() if labels}

    # What rules say about atoms.

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New atoms."""
        start, self.count = self.count, self.count + int(torch.Size(shape).numel())
        return 2 * torch.arange(start, self.count).reshape(tuple(shape))

    def fixed(self, shape: Sequence[int], reason: str) -> Labels:
        """New atoms that tolerate no map."""
        start = self.count
        made = self.fresh(shape)
        self._fixed.append((start, self.count))
        self.bar(made, reason)
        return made

    def is_fixed(self, labels: Labels) -> bool:
        """Whether all of these are atoms that `fixed` made."""
        if not self._fixed:
            return False
        start, end = torch.tensor(self._fixed).T.contiguous()
        at = torch.searchsorted(start, labels.contiguous() // 2, right=True) - 1
        return bool(((at >= 0) & (labels // 2 < end[at.clamp_min(0)])).all())

    def refuse(self, node: Node, reason: str) -> Labels | None:
        """Bar all that a call reads; what comes out tolerates nothing."""
        for name, found in self.labelled(node).items():
            self.taken.add(name)
            for labels in found:
                self.bar(labels, reason)
        value = node.meta.get("val")
        return self.fixed(label_shape(value), reason) if isinstance(value, torch.Tensor) else None

    def bar(self, labels: Labels, reason: str) -> None:
        """No map but the identity."""
        self.bars.append((labels.flatten(), reason))

    def tie(self, a: Labels, b: Labels) -> None:
        """One map for both, element by element."""
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]  # torch's own
        self.ties.append((a.flatten(), b.flatten()))

    def contract(self, a: Labels, b: Labels) -> None:
        """A sum over products of both: a map on one is undone by its inverse transpose on the other."""
        self.tie(a, b ^ 1 if self.kind in INVERTED else b)

    def limit(self, labels: Labels, axis: int | None = None) -> None:
        """Channels mix within one row along this axis only, or, without one, within the value: what it lacks of a block, it cannot mix."""
        if self.kind in MIXING and labels.numel():
            self.limits.append(labels.reshape(1, -1) if axis is None else labels.movedim(axis, -1).reshape(-1, labels.shape[axis]))

    def meet(self, labels: Labels, axis: int) -> Labels:
        """The atoms along one axis `[n]`, after those of all other axes are tied to them."""
        rows = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
        if len(rows) > 1:
            self.tie(rows[1:], rows[:1])
        return rows[0]

    def merge(self, labels: Labels, axis: int) -> Labels:
        """Labels with an axis of size 1, after all along it are tied to the first."""
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1:
            self.limit(labels.movedim(axis, 0).reshape(labels.shape[axis], -1), -1)
            self.tie(labels, first)
        return first

    def whole(self, labels: Labels, axes: Iterable[int], reason: str) -> None:
        """Channels along these axes are kept or dropped together; where there are no others, none is dropped."""
        first = labels
        for axis in axes if labels.numel() else ():
            first = first.narrow(axis, 0, 1)
        if first.numel() == 1 < labels.numel():
            self.bar(labels, reason)
        elif first.shape != labels.shape:
            self.tie(labels, first)

    def distinct(self, labels: Labels) -> Labels:
        """Labels without an atom twice."""
        if self.kind not in MIXING or torch.unique(labels).numel() == labels.numel() or self.is_fixed(labels):
            return labels
        made = self.fresh(labels.shape)
        self.tie(made, labels)
        return made

    def spread(self, labels: Labels, shape: Sequence[int]) -> Labels:
        """Labels repeated to a shape."""
        wanted = torch.Size(shape).numel()
        if not _broadcasts(labels.shape, shape):
            self.bar(labels, "its shape was not followed")
            return self.fixed(shape, "its shape was not followed")
        repeated = labels.expand(tuple(shape))
        return repeated if labels.numel() == wanted else self.distinct(repeated)

    def copied(self, labels: Labels, axis: int, times: int) -> Labels:
        """The labels of a value repeated along an axis, copy beside copy: the n-th copies of all that is repeated are one channel."""
        self.bar(labels, "only copies of it are dropped")
        shape = [1] * labels.ndim
        shape[axis] = times
        made = torch.cat([self.fresh(shape)] * labels.shape[axis], axis)
        sizes = list(labels.shape)
        sizes[axis] *= times
        return made.expand(sizes)

    # Stored tensors.

    def use(self, call: Node, name: str, axis: int, atoms: Labels, *, writes: bool) -> None:
        """Record that an axis of a call's stored operand carries these atoms."""
        view = self.stored[operand(call, name)]
        own = view.axes[axis]
        assert own is not None
        self.claimed.setdefault((call, name), set()).add(own)
        self._carry(view.node, own, atoms, writes)

    def mark(self, norm: Node, atoms: Labels, *, writes: bool) -> None:
        """Record that a norm without a stored tensor makes or reads these atoms."""
        self._carry(norm, 0, atoms, writes)

    def _carry(self, node: Node, axis: int, atoms: Labels, writes: bool) -> None:
        """A tensor that is used twice has one map."""
        first = self._first.setdefault(
            (node.op, str(node.target) if node.op == "get_attr" else node.name, axis), Use(node, axis, atoms, writes)
        )
        self.limit(atoms)
        if first.atoms is atoms:
            self.uses.append(first)
        else:
            # Writers multiply, readers divide: what a tensor reads on one side and writes on the other has the inverse map there.
            self.tie(first.atoms, atoms if first.writes == writes or self.kind not in INVERTED else atoms ^ 1)


def nodes_of(given: object) -> list[Node]:
    """The nodes in an operand."""
    if isinstance(given, list | tuple):
        return [node for each in given for node in nodes_of(each)]
    return [given] if isinstance(given, Node) else []


def flat(labels: Any) -> list[Labels]:
    """The labels of all results of a node that have some."""
    return [one for one in (labels if isinstance(labels, tuple) else (labels,)) if one is not None]


def _broadcasts(have: Sequence[int], wanted: Sequence[int]) -> bool:
    if len(have) > len(wanted):
        return False
    return all(a in {1, b} for a, b in zip(reversed(have), reversed(wanted), strict=False))


def where(node: Node) -> str:
    """An operator and its place, for reasons."""
    return f"{operator_name(node).rpartition('::')[2]} in {edit.module_path(node) or node.name}"


def operator_name(node: Node) -> str:
    """An operator's name with its namespace, `aten::linear`."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name if schema else getattr(node.target, "__name__", node.target))
