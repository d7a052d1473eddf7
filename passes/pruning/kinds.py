"""Kinds of units that can be dropped, and `Units`, a group of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import ChannelGroup, Member
from ir.residual import Branch
from ir.sites import Layer

MLP, HEADS, QUERY_HEADS, INPUTS, OUTPUTS, BLOCKS, LAYERS = "mlp", "heads", "query_heads", "inputs", "outputs", "blocks", "layers"
KINDS = (MLP, HEADS)  # the usual ones
ALL = (MLP, HEADS, QUERY_HEADS, INPUTS, OUTPUTS, BLOCKS, LAYERS)
CHANNELS = (MLP, INPUTS, OUTPUTS)  # single channels, of which many may be dropped; the others are coarse
WHOLE = (BLOCKS, LAYERS)  # branches of the residual stream, which stay or go
TOGETHER = ((MLP, HEADS), (MLP, QUERY_HEADS), (INPUTS, OUTPUTS), (BLOCKS,), (LAYERS,))  # kinds that share no weights


@dataclass(frozen=True)
class Units:
    """Units that are dropped one by one: channels between linears, heads of keys and what goes with them, dims that are read or written.

    Args:
        group: the axes of stored tensors that the units lie along; of kind SELECT.
        what: the kind.
        readers: the linears that read the units, with the columns that belong to each.
        weights: of one unit, in all tensors.
        writes: what is computed from the units where no linear reads them: nodes, with the unit of each channel.
        branches: that are dropped as a whole; the group has one unit.
        rows: how many heads one unit has: one of each group of queries.
    """

    group: ChannelGroup
    what: str
    readers: tuple[tuple[Layer, Member], ...]
    weights: int
    writes: tuple[tuple[Node, Tensor], ...] = ()
    branches: tuple[Branch, ...] = ()
    rows: int = 1

    @property
    def size(self) -> int:
        """How many units there are."""
        return self.group.size

    @property
    def paths(self) -> set[str]:
        """The tensors that make or read them."""
        return {member.path for member in self.group.members}

    @property
    def path(self) -> str:
        """What people call it: the first linear that reads it, or the one that writes it; of branches what all their linears are in."""
        if self.readers:
            return self.readers[0][0].path
        paths = [layer.path.split(".") for branch in self.branches for layer in branch.layers]
        if not paths:
            return self.group.members[0].path.rpartition(".")[0]
        alike = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
        return ".".join(alike)

    @property
    def felt(self) -> dict[Node, Tensor]:
        """The values that lose something when units are dropped, with the unit of each channel, −1 for none."""
        return {layer.site("input").operand: member.channels for layer, member in self.readers} | dict(self.writes)

    @property
    def single(self) -> "Units":
        """The same with each head a unit of its own, in the order of the groups of queries."""
        if self.rows == 1:
            return self

        def alone(member: Member) -> Member:
            return replace(member, channels=heads_of(member.channels, self.size, self.rows))

        group = replace(self.group, blocks=self.size * self.rows, members=tuple(map(alone, self.group.members)), values={})
        readers = tuple((layer, alone(member)) for layer, member in self.readers)
        return replace(self, group=group, readers=readers, weights=self.weights // self.rows, rows=1)


def heads_of(channels: Tensor, size: int, rows: int) -> Tensor:
    """For each place its head, `row · size + unit`: the places of a unit lie row after row; −1 stays."""
    made = torch.full_like(channels, -1)
    for unit in range(size):
        own = (channels == unit).nonzero()[:, 0]
        made[own] = torch.arange(rows).repeat_interleave(len(own) // rows) * size + unit
    return made


def summed(values: Tensor, channels: Tensor, size: int) -> Tensor:
    """Sums `[..., size]` over the places of each unit of values `[..., places]`."""
    own = channels >= 0
    out = torch.zeros(*values.shape[:-1], size, dtype=values.dtype, device=values.device)
    return out.index_add_(-1, channels[own].to(values.device), values[..., own])


def elements(gm: GraphModule, member: Member) -> int:
    """How many numbers of a stored tensor belong to any unit."""
    tensor = edit.attribute(gm, member.node)
    return int((member.channels >= 0).sum()) * tensor.numel() // tensor.shape[member.axis]
