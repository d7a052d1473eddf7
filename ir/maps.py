"""Maps of channel groups, applied to the stored tensors of their members: in float64, one tensor at a time, or differentiably.

A map `M` of channels `x` makes `x' = M x`: what writes them becomes `M W` along its rows, and what reads them `W M⁻¹` along its columns, which
along that axis is the inverse transpose. A diagonal map is given by its factors `[channels]`, any other by a matrix for each block.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from ir.channels import ChannelGroup, Member
from ir.errors import PassError
from ir.match import operand


def apply(gm: GraphModule, group: ChannelGroup, M: Tensor) -> None:
    """Change every member of a group, in place of the graph's tensors; the old ones are left as they were.

    Args:
        gm: the graph that the group was found in.
        group: of a kind that scales or mixes.
        M: factors `[size]`, or matrices `[blocks, block, block]`; finite.

    Raises:
        PassError: the group is frozen, or `M` does not fit it.
    """
    if group.reason:
        raise PassError(f"the group tolerates no map: {group.reason}", where=str(group))
    if M.shape not in {(group.size,), (group.blocks, group.block, group.block)} or not torch.isfinite(M).all():
        raise PassError(f"a map of shape {list(M.shape)} that is finite does not fit", where=str(group))
    for member in group.members:
        node = member.node
        if node.op != "get_attr":
            node = _new_gain(gm, member)
        old = edit.attribute(gm, node)
        edit.set_attribute(gm, node, mapped(old.double(), member, M.double()).to(old.dtype))


def mapped(tensor: Tensor, member: Member, M: Tensor) -> Tensor:
    """`tensor` with `M` applied along the member's axis, in the tensor's dtype; differentiable in both."""
    if M.ndim == 1:
        factors = M if member.power == 1 else 1 / M
        own = torch.where(member.channels >= 0, factors[member.channels.clamp_min(0)], torch.ones_like(factors[:1]))
        return tensor * own.reshape([-1 if axis == member.axis else 1 for axis in range(tensor.ndim)])
    matrices = M if member.power == 1 else torch.linalg.inv(M).mT
    positions, block = _positions(member, M.shape[-1])
    rows = tensor.movedim(member.axis, 0)
    x = rows[positions].flatten(2) if rows.ndim > 1 else rows[positions].unsqueeze(-1)
    y = (matrices[block] @ x).reshape(-1, *rows.shape[1:])
    return rows.index_copy(0, positions.flatten(), y).movedim(0, member.axis)


def _positions(member: Member, size: int) -> tuple[Tensor, Tensor]:
    """Where the blocks lie along an axis `[found, size]`, in the order of their channels, and which block each is `[found]`."""
    at = (member.channels >= 0).nonzero()[:, 0]
    channels = member.channels[at]
    order = channels.argsort(stable=True)
    ranked = channels[order]
    start = torch.searchsorted(ranked, ranked)
    turn = torch.arange(len(ranked)) - start  # which time a channel appears
    key = (ranked // size) * (len(ranked) + 1) + turn
    final = (key * size + ranked % size).argsort()
    positions = at[order][final].reshape(-1, size)
    return positions, ranked[final].reshape(-1, size)[:, 0] // size


def _new_gain(gm: GraphModule, member: Member) -> torch.fx.Node:
    """A gain of ones for a norm that has none."""
    norm = member.node
    source = operand(norm, "input")
    ones = torch.ones(len(member.channels), dtype=edit.value(source).dtype, device=edit.value(source).device)
    gain = edit.add_attribute(gm, member.path, ones, before=norm)
    edit.set_operand(norm, "weight", gain)
    return gain
