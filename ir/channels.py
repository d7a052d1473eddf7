"""`ChannelGroup`: all axes of stored tensors that see one space of channels, and whether a kind of map may be applied to it.

One analysis over the graph (`ir/channel_flow.py`, with a row for each operator in `ir/channel_rules.py`) finds them, without names of models.
Smoothing is a diagonal map of a group, rotation an orthogonal one, pruning a selection: a pass asks for groups, computes maps and applies
them (`ir/maps.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.fx import GraphModule, Node

from ir import edit
from ir.channel_flow import INVERTED, MIXING, Flow, Map, Use, label_shape
from ir.channel_rules import follow
from ir.signature import CACHE, Signature

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One axis of a stored tensor.

    Args:
        node: the get_attr node; or a norm without a gain, which gets one when a scale is applied.
        axis: of the tensor.
        channels: int64 `[axis length]`: the group's channel at each position, −1 where another group's is.
        power: 1 if the axis takes the map `M` itself, −1 if it takes the inverse transpose of `M`.
        writes: whether the tensor makes the channels (rows of a weight) or reads them (columns).
    """

    node: Node
    axis: int
    channels: torch.Tensor
    power: int
    writes: bool

    @property
    def path(self) -> str:
        """The dotted name of the tensor."""
        return str(self.node.target) if self.node.op == "get_attr" else f"{edit.module_path(self.node) or self.node.name}.weight"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are mapped together.

    Args:
        kind: of the map.
        blocks, block: channels mix within a block only; channel `c` is number `c % block` of block `c // block`.
        members: every axis that a map has to be applied to.
        reason: why no map but the identity is allowed; empty if one is.
    """

    kind: Map
    blocks: int
    block: int
    members: tuple[Member, ...]
    reason: str = ""

    @property
    def size(self) -> int:
        """The number of channels."""
        return self.blocks * self.block

    @property
    def writers(self) -> tuple[Member, ...]:
        """Axes that make the channels."""
        return tuple(member for member in self.members if member.writes)

    @property
    def readers(self) -> tuple[Member, ...]:
        """Axes that read them."""
        return tuple(member for member in self.members if not member.writes)

    def __str__(self) -> str:
        made, read = (", ".join(dict.fromkeys(member.path for member in side)) or "nothing" for side in (self.writers, self.readers))
        shape = f"{self.blocks} x {self.block}" if self.kind in MIXING else str(self.size)
        return f"{self.kind.value} {shape}: {made} -> {read}" + (f" (frozen: {self.reason})" if self.reason else "")


def channel_groups(gm: GraphModule, kind: Map) -> list[ChannelGroup]:
    """Every group of channels of a graph in normal form, for one kind of map, in the order of their first tensors.

    Groups that tolerate only the identity are among them, with the reason. The cost is linear in the number of channels of all values.
    """
    flow = Flow(gm, kind)
    cache: dict[str, Node] = {}
    signature: Signature | None = gm.meta.get("signature")
    ports = iter(signature.inputs) if signature else iter(())
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            port = next(ports, None)
            if port is not None and port.name.startswith(f"{CACHE}."):
                flow.labels[node] = flow.fresh(label_shape(node))
                cache[port.name.removeprefix(CACHE)] = node
        elif node.op == "call_function":
            labels = follow(flow, node)
            if labels is not None:
                flow.labels[node] = labels
    _close(flow, signature, cache)
    return _Solution(flow).groups()


def _close(flow: Flow, signature: Signature | None, cache: dict[str, Node]) -> None:
    """The graph's outputs: what goes into the cache comes out of it, all else is the caller's."""
    outputs = flow.gm.graph.output_node().args[0]
    names = [port.name for port in signature.outputs] if signature else [""] * len(outputs)  # type: ignore[arg-type]
    for node, name in zip(outputs, names, strict=True):  # type: ignore[arg-type]
        labels = flow.labels.get(node)  # type: ignore[arg-type]
        past = cache.get(name.removeprefix("present")) if name.startswith("present.") else None
        if past is not None and labels is not None and labels.shape == flow.labels[past].shape:
            flow.tie(flow.labels[past], labels)
            continue
        if past is not None:
            flow.bar(flow.labels[past], "what the cache takes in was not followed")
        for found in labels if isinstance(labels, tuple) else (labels,):
            if found is not None:
                flow.bar(found, "it is an output of the model")


class _Solution:
    """Ties, limits and bars of a flow, solved: a class for each channel, with its block and the reason that it is frozen."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        atoms = 2 * flow.count
        sides = [torch.cat([torch.empty(0, dtype=torch.int64), *(tie[side] for tie in flow.ties)]).numpy() for side in (0, 1)]
        row, column = (np.concatenate([side, side ^ 1]) for side in sides)
        _, component = connected_components(coo_array((np.ones(len(row), np.int8), (row, column)), shape=(atoms, atoms)), directed=False)
        least = np.full(atoms, atoms)
        np.minimum.at(least, component, np.arange(atoms))
        self.least: Ids = least[component]  # the least atom of each atom's component
        self.dual: Ids = self.least[np.arange(atoms) ^ 1]
        self.channel: Ids = np.minimum(self.least, self.dual) if flow.kind in INVERTED else self.least
        self.block: Ids = self.channel.copy()
        self.reasons: list[str] = [""]
        self.frozen: Ids = np.zeros(atoms, np.int64)
        self._freeze()
        if flow.kind in MIXING:
            self._mix()

    def _freeze(self) -> None:
        numbers: dict[str, int] = {"": 0}
        if self.flow.kind in INVERTED:
            numbers["the map would have to be its own inverse"] = 1
            self.frozen[self.least == self.dual] = 1
        for labels, reason in reversed(self.flow.bars):
            self.frozen[self.channel[labels.numpy()]] = numbers.setdefault(reason, len(numbers))
        self.reasons = list(numbers)
        self.frozen = self.frozen[self.channel]

    def _mix(self) -> None:
        """Channels lie in one block if no limit tells them apart; a frozen channel freezes its block."""
        self.block = np.zeros_like(self.channel)
        blocks = 1
        for limit in self.flow.limits:
            rows = self.channel[limit.numpy()]
            channels, first = np.unique(rows, return_index=True)
            _, fresh = np.unique(np.stack([self.block[channels], first // rows.shape[1]]), axis=1, return_inverse=True)
            self.block[channels] = blocks + fresh
            blocks += int(fresh.max()) + 1
        self.block = self.block[self.channel]
        frozen = np.zeros(blocks, np.int64)
        frozen[self.block[::-1]] = 0
        for number in range(len(self.reasons) - 1, 0, -1):
            frozen[self.block[self.frozen == number]] = number
        self.frozen = frozen[self.block]

    def groups(self) -> list[ChannelGroup]:
        """Channels with the same uses and the same reason, together."""
        uses = self.flow.uses
        key = np.zeros(len(self.channel), np.uint64)
        generator = np.random.default_rng(0)
        at = [self.channel[use.atoms.numpy()] for use in uses]
        for channels in at:
            key[np.unique(channels)] += generator.integers(1, 2**63, dtype=np.uint64)
        used = np.unique(np.concatenate([np.empty(0, np.int64), *at]))
        _, first, group = np.unique(np.stack([key[used], self.frozen[used].astype(np.uint64)]), axis=1, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))[group.reshape(-1)]  # groups by their first channel
        group_of = np.full(len(self.channel), -1)
        group_of[used] = order
        readers: dict[int, list[int]] = {}
        for index, channels in enumerate(at):
            for number in np.unique(group_of[channels]):
                readers.setdefault(int(number), []).append(index)
        return [self._group(used[order == number], [(uses[i], at[i]) for i in readers[number]]) for number in range(len(first))]

    def _group(self, channels: Ids, uses: list[tuple[Use, Ids]]) -> ChannelGroup:
        channels = channels[np.lexsort((channels, _first_of(self.block[channels], channels)))]
        _, counts = np.unique(self.block[channels], return_counts=True)
        even = len(set(counts.tolist())) == 1
        reason = self.reasons[int(self.frozen[channels[0]])] or ("" if even else "its blocks differ in size")
        number = np.full(len(self.channel), -1)
        number[channels] = np.arange(len(channels))
        members = tuple(member for use, at in uses for member in self._members(use, number[at]))
        blocks, block = (len(counts), int(counts[0])) if even else (1, len(channels))
        if not reason and self.flow.kind in MIXING and not all(_balanced(member, block) for member in members):
            reason = "a tensor reads its channels unevenly"
        return ChannelGroup(self.flow.kind, blocks, block, members, reason)

    def _members(self, use: Use, channels: Ids) -> Iterator[Member]:
        atoms = use.atoms.numpy()
        mirrored = self.least[atoms] != self.channel[atoms]
        for flipped in (False, True):
            own = np.where(mirrored == flipped, channels, -1)
            if (own >= 0).any():
                power = 1 if self.flow.kind not in INVERTED or use.writes != flipped else -1
                yield Member(use.node, use.axis, torch.from_numpy(own), power, use.writes)


def _first_of(block: Ids, channels: Ids) -> Ids:
    """For each channel, the least channel of its block."""
    _, inverse = np.unique(block, return_inverse=True)
    least = np.full(inverse.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, inverse, channels)
    return least[inverse]


def _balanced(member: Member, block: int) -> bool:
    """Whether every block is read whole, as often as it is."""
    counts = torch.bincount(member.channels[member.channels >= 0])
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % block)).reshape(-1, block)
    return bool((counts == counts[:, :1]).all())
