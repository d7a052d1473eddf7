"""What a flow recorded, solved: which atoms are one channel, which channels are one block, what is frozen, and the groups that follow."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.fx import Node

from ir.channels.flow import Flow, Use, flat, where
from ir.channels.groups import ChannelGroup, Member
from ir.channels.maps import INVERTED, MIXING, Map

Ids = NDArray[np.int64]
Values = dict[Node, tuple[torch.Tensor, ...]]

UNEVEN = "its channels are not read as whole blocks"


def solve(flow: Flow) -> list[ChannelGroup]:
    """The groups of a flow, in the order of their first channels."""
    return _Solution(flow).groups()


class _Solution:
    """A class for each atom: its channel, its block, and the reason that it is frozen."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.atoms = 2 * flow.count
        a, b = (_joined([tie[side].numpy() for tie in flow.ties]) for side in (0, 1))
        self.least: Ids = _classes(np.concatenate([a, a ^ 1]), np.concatenate([b, b ^ 1]), self.atoms)
        self.dual: Ids = self.least[np.arange(self.atoms) ^ 1]
        self.channel: Ids = np.minimum(self.least, self.dual) if flow.kind in INVERTED else self.least
        self.block: Ids = self.channel.copy()
        self.reasons: dict[str, int] = {"": 0}
        self.frozen: Ids = np.zeros(self.atoms, np.int64)
        if flow.kind in INVERTED:
            self._freeze(np.flatnonzero(self.least == self.dual), "the map would have to be its own inverse")
        for labels, reason in flow.bars:
            self._freeze(labels.numpy(), reason)
        self.frozen = self.frozen[self.channel]
        if flow.kind in MIXING:
            self._mix()
        if flow.kind is Map.SELECT:
            self._hold()

    def _freeze(self, atoms: Ids, reason: str) -> None:
        """Freeze the channels of atoms, unless they are frozen already."""
        number = self.reasons.setdefault(reason, len(self.reasons))
        channels = self.channel[atoms]
        self.frozen[channels[self.frozen[channels] == 0]] = number

    def _mix(self) -> None:
        """Channels lie in one block if no limit tells them apart; a frozen channel freezes its block."""
        self.block = np.zeros(self.atoms, np.int64)
        blocks = 1
        for limit in self.flow.limits:
            rows = self.channel[limit.numpy()]
            channels, first = np.unique(rows, return_index=True)
            _, fresh = np.unique(np.stack([self.block[channels], first // rows.shape[1]]), axis=1, return_inverse=True)
            fresh = fresh.reshape(-1)
            self.block[channels] = blocks + fresh
            blocks += int(fresh.max()) + 1
        self.block = np.unique(self.block[self.channel], return_inverse=True)[1].reshape(-1)
        size = np.bincount(self.block[np.unique(self.channel)])
        for row, reason in self.flow.single:
            atoms = row.numpy()
            if size[self.block[atoms[0]]] != len(atoms) or (self.block[atoms] != self.block[atoms[0]]).any():
                self._freeze(atoms, reason)
        self._freeze(np.flatnonzero(self._uneven()[self.block]), UNEVEN)
        self.frozen = self.frozen[self.channel]
        least = np.full(self.block.max(initial=0) + 1, len(self.reasons))
        np.minimum.at(least, self.block, np.where(self.frozen == 0, len(self.reasons), self.frozen))
        self.frozen = least[self.block] % len(self.reasons)

    def _hold(self) -> None:
        """What a value keeps has a shape of its own: channels that lie along one axis only, others along it alike, or they are frozen."""
        for node, labels in self.flow.labels.items():
            for each in flat(labels):
                channels = self.channel[each.numpy()]
                if channels.size and not any(_along(channels, axis) for axis in range(channels.ndim)):
                    self._freeze(each.numpy().ravel(), f"{where(node)} cuts them into parts of one size")
        self.frozen = self.frozen[self.channel]

    def _uneven(self) -> NDArray[np.bool_]:
        """The blocks that some value does not hold as whole copies, or whose copies two values tell apart in two ways.

        The n-th atoms of all channels of a block in a row are one copy of it.
        """
        present = np.unique(self.channel[_joined([limit.numpy().ravel() for limit in self.flow.limits])])
        size = np.bincount(self.block[present], minlength=self.block.max(initial=0) + 1)
        uneven = np.zeros(len(size), bool)
        pairs: list[tuple[Ids, Ids]] = []
        for limit in self.flow.limits:
            atoms = limit.numpy().ravel()
            channel, row = self.channel[atoms], np.repeat(np.arange(len(limit)), limit.shape[1])
            mirrored = self.least[atoms] != channel
            turn = _turns(np.stack([row, channel, mirrored]))
            _, first, copy, counts = np.unique(
                np.stack([row, self.block[atoms], mirrored, turn]), axis=1, return_index=True, return_inverse=True, return_counts=True
            )
            uneven[self.block[atoms[first[counts != size[self.block[atoms[first]]]]]]] = True
            pairs.append((atoms, atoms[first[copy.reshape(-1)]]))
        copy = _classes(_joined([a for a, _ in pairs]), _joined([b for _, b in pairs]), self.atoms)
        held = np.unique(_joined([a for a, _ in pairs]))
        members = np.bincount(copy[held], minlength=self.atoms)[copy[held]]
        uneven[self.block[held[members != size[self.block[held]]]]] = True
        return uneven

    def groups(self) -> list[ChannelGroup]:
        """Channels with the same uses, the same size of their blocks, and the same reason, together."""
        uses = self.flow.uses
        key = np.zeros(self.atoms, np.uint64)
        generator = np.random.default_rng(0)
        at = [self.channel[use.atoms.numpy()] for use in uses]
        for channels in at:
            key[np.unique(channels)] += generator.integers(1, 2**63, dtype=np.uint64)
        used = np.unique(_joined(at))
        if not len(used):
            return []
        _, block, size = np.unique(self.block[used], return_inverse=True, return_counts=True)
        columns = np.stack([key[used], self.frozen[used].astype(np.uint64), size[block.reshape(-1)].astype(np.uint64)])
        _, first, group = np.unique(columns, axis=1, return_index=True, return_inverse=True)
        group = np.argsort(np.argsort(first))[group.reshape(-1)]  # groups by their first channel
        order = np.lexsort((used, _first_of(self.block[used], used), group))
        parts = np.split(used[order], np.cumsum(np.bincount(group))[:-1])
        group_of, place = np.full(self.atoms, -1), np.empty(self.atoms, np.int64)
        group_of[used] = group
        for channels in parts:
            place[channels] = np.arange(len(channels))
        members: list[list[Member]] = [[] for _ in parts]
        for use, channels in zip(uses, at, strict=True):
            for number in np.unique(group_of[channels]):
                members[number] += self._members(use, np.where(group_of[channels] == number, place[channels], -1))
        values = self._values(group_of, place) if self.flow.kind is Map.SELECT else {}
        return [
            self._group(channels, tuple(found), values.get(number, {}))
            for number, (channels, found) in enumerate(zip(parts, members, strict=True))
        ]

    def _group(self, channels: Ids, members: tuple[Member, ...], values: Values) -> ChannelGroup:
        blocks = len(np.unique(self.block[channels]))
        reason = list(self.reasons)[int(self.frozen[channels[0]])]
        return ChannelGroup(self.flow.kind, blocks, len(channels) // blocks, members, reason, {} if reason else values)

    def _values(self, group_of: Ids, place: Ids) -> dict[int, Values]:
        """Where the channels of each group lie in values."""
        found: dict[int, Values] = {}
        for node, labels in self.flow.labels.items():
            at = [self.channel[each.numpy()] for each in flat(labels)]
            for number in np.unique(group_of[_joined([channels.ravel() for channels in at])]):
                own = tuple(torch.from_numpy(np.where(group_of[channels] == number, place[channels], -1)) for channels in at)
                found.setdefault(int(number), {})[node] = own
        return found

    def _members(self, use: Use, channels: Ids) -> Iterator[Member]:
        atoms = use.atoms.numpy()
        mirrored = self.least[atoms] != self.channel[atoms]
        for flipped in (False, True):
            own = np.where(mirrored == flipped, channels, -1)
            if (own >= 0).any():
                power = 1 if self.flow.kind not in INVERTED or use.writes != flipped else -1
                yield Member(use.node, use.axis, torch.from_numpy(own), power, use.writes)


def _along(channels: Ids, axis: int) -> bool:
    """Whether channels are told apart by their place along an axis only."""
    first = channels[tuple(slice(None) if at == axis else slice(1) for at in range(channels.ndim))]
    return bool((channels == first).all())


def _joined(arrays: list[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int64), *arrays])


def _classes(a: Ids, b: Ids, count: int) -> Ids:
    """For each of `count` numbers, the least that it is connected with."""
    _, component = connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), shape=(count, count)), directed=False)
    least = np.full(count, count)
    np.minimum.at(least, component, np.arange(count))
    return least[component]


def _turns(keys: Ids) -> Ids:
    """For each column, how often it came before."""
    order = np.lexsort(keys[::-1])
    ranked = keys[:, order]
    new = np.concatenate([[True], (ranked[:, 1:] != ranked[:, :-1]).any(0)]) if keys.shape[1] else np.empty(0, bool)
    start = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    turn = np.empty(len(new), np.int64)
    turn[order] = np.arange(len(new)) - start
    return turn


def _first_of(block: Ids, channels: Ids) -> Ids:
    """For each channel, the least channel of its block."""
    _, inverse = np.unique(block, return_inverse=True)
    least = np.full(inverse.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, inverse, channels)
    return least[inverse]
