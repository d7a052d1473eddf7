"""`ChannelGroup`: all axes of stored tensors that see one space of channels, and whether a kind of map may be applied to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ir import edit
from ir.channels.maps import MIXING, Map


@dataclass(frozen=True)
class Member:
    """One axis of a stored tensor.

    Args:
        node: the get_attr node; or a norm: one without a gain, which gets one when a scale is applied, or one that reads what is centred.
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
        values: of a selection: where the channels lie in the values of nodes: for each result of a node int64 in its label shape, the
            group's channel of each element, −1 where there is none. Empty for other maps, and if none is allowed.
    """

    kind: Map
    blocks: int
    block: int
    members: tuple[Member, ...]
    reason: str = ""
    values: Mapping[Node, tuple[torch.Tensor, ...]] = field(default_factory=dict, compare=False, repr=False)

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
