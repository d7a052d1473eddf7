"""Maps of channel groups, applied to the stored tensors of their members: in float64, one tensor at a time, or differentiably.

A map `M` of channels `x` makes `x' = M x`: what writes them becomes `M W` along its rows, and what reads them `W M⁻¹` along its columns,
which along that axis is the inverse transpose. A map is given by

- factors `[channels]`, a diagonal matrix,
- matrices `[blocks, block, block]`, or
- orders `[blocks, block]` of whole numbers: channel `c` of a block becomes what was channel `order[c]` of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import ChannelGroup, Map, Member
from ir.errors import PassError
from ir.match import operand

ORTHOGONAL = 1e-6  # greatest error of an entry of M Mᵀ


def apply(gm: GraphModule, group: ChannelGroup, M: Tensor) -> None:
    """Change every member of a group, in place of the graph's tensors; the old ones are left as they were.

    Args:
        gm: the graph that the group was found in.
        group: of a kind that permutes, scales, rotates, or mixes by any invertible matrix.
        M: for a scale positive factors `[size]`, for a permutation orders `[blocks, block]`, else matrices `[blocks, block, block]`.

    Raises:
        PassError: the group is frozen, or `M` does not fit it.
    """
    if group.reason:
        raise PassError(f"the group tolerates no map: {group.reason}", where=str(group))
    if group.kind not in FITS:
        raise PassError(f"{group.kind.value} is not a map that can be applied", where=str(group))
    if not FITS[group.kind](group, M):
        raise PassError(f"a tensor of shape {list(M.shape)} and these values is no {group.kind.value} map", where=str(group))
    for member in group.members:
        node = member.node if member.node.op == "get_attr" else _gain(gm, member)
        old = edit.attribute(gm, node)
        wide = M.double() if M.is_floating_point() else M
        edit.set_attribute(gm, node, mapped(old.double(), member, wide).to(old.dtype))


def _orthogonal(group: ChannelGroup, M: Tensor) -> bool:
    if not _invertible(group, M):
        return False
    return bool(((M.double() @ M.double().mT - torch.eye(group.block, dtype=torch.float64, device=M.device)).abs() < ORTHOGONAL).all())


def _invertible(group: ChannelGroup, M: Tensor) -> bool:
    fits = M.shape == (group.blocks, group.block, group.block) and M.is_floating_point() and bool(torch.isfinite(M).all())
    return fits and not torch.linalg.inv_ex(M.double()).info.any()


def _positive(group: ChannelGroup, M: Tensor) -> bool:
    return M.shape == (group.size,) and M.is_floating_point() and bool((torch.isfinite(M) & (M > 0)).all())


def _orders(group: ChannelGroup, M: Tensor) -> bool:
    return M.shape == (group.blocks, group.block) and bool((M.sort().values == torch.arange(group.block, device=M.device)).all())


FITS: dict[Map, Callable[[ChannelGroup, Tensor], bool]] = {
    Map.PERMUTE: _orders,
    Map.SCALE: _positive,
    Map.ROTATE: _orthogonal,
    Map.LINEAR: _invertible,
}


def mapped(tensor: Tensor, member: Member, M: Tensor) -> Tensor:
    """`tensor` with `M` applied along the member's axis, in the tensor's dtype; differentiable in both."""
    if M.ndim == 1:
        factors = M if member.power == 1 else 1 / M
        own = torch.where(member.channels >= 0, factors[member.channels.clamp_min(0)], torch.ones_like(factors[:1]))
        return tensor * own.reshape([-1 if axis == member.axis else 1 for axis in range(tensor.ndim)])
    found, block = positions(member, M.shape[-1])
    rows = tensor.movedim(member.axis, 0)
    if M.ndim == 2:
        y = rows[found.gather(1, M[block]).flatten()]
    else:
        matrices = M if member.power == 1 else torch.linalg.inv(M).mT
        x = rows[found].flatten(2) if rows.ndim > 1 else rows[found].unsqueeze(-1)
        y = (matrices[block] @ x).reshape(-1, *rows.shape[1:])
    return rows.index_copy(0, found.flatten(), y).movedim(0, member.axis)


def positions(member: Member, size: int) -> tuple[Tensor, Tensor]:
    """Where copies of blocks lie along an axis `[copies, size]`, in the order of their channels, and which block each is `[copies]`.

    A channel that appears several times belongs to several copies, in the order of its positions.
    """
    at = (member.channels >= 0).nonzero()[:, 0]
    channels = member.channels[at]
    order = channels.argsort(stable=True)
    ranked = channels[order]
    turn = torch.arange(len(ranked)) - torch.searchsorted(ranked, ranked)  # how often the channel came before
    key = (ranked // size) * (len(ranked) + 1) + turn
    final = (key * size + ranked % size).argsort()
    return at[order][final].reshape(-1, size), ranked[final].reshape(-1, size)[:, 0] // size


def _gain(gm: GraphModule, member: Member) -> Node:
    """The gain of a norm: a new one of ones if it has none yet."""
    norm = member.node
    gain = operand(norm, "weight")
    if isinstance(gain, Node):
        return gain
    source = edit.value(operand(norm, "input"))
    ones = torch.ones(len(member.channels), dtype=source.dtype, device=source.device)
    gain = edit.add_attribute(gm, member.path, ones, before=norm)
    edit.set_operand(norm, "weight", gain)
    return gain
