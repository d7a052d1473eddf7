"""Random maps of channel groups, and all of them applied to a graph."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit, maps
from ir.channels import ChannelGroup, Map, channel_groups


def random_map(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """A map of the group's kind, far from the identity and well conditioned."""
    if group.kind is Map.PERMUTE:
        return torch.stack([torch.randperm(group.block, generator=generator) for _ in range(group.blocks)])
    if group.kind is Map.SCALE:
        return torch.exp(0.7 * torch.randn(group.size, dtype=torch.float64, generator=generator))
    normal = torch.randn(group.blocks, group.block, group.block, dtype=torch.float64, generator=generator)
    rotations = torch.linalg.qr(normal)[0]
    return rotations if group.kind is Map.ROTATE else rotations @ torch.diag(torch.linspace(0.5, 2, group.block, dtype=torch.float64))


def map_all(gm: GraphModule, kind: Map, seed: int = 0) -> list[ChannelGroup]:
    """Apply a random map to every group that tolerates one; returns all groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = channel_groups(gm, kind)
    for group in groups:
        if not group.reason:
            maps.apply(gm, group, random_map(group, generator))
    edit.clean(gm)
    return groups
