"""Bring a graph to another device: its tensors, and the devices that its operators name."""

from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate


def place(gm: GraphModule, device: torch.device) -> None:
    """Move a graph, in place; its recorded values are not inferred again.

    Captured graphs make positions and masks by operators that name the device they were captured on (`arange`, `zeros`): they follow.
    """

    def follow(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, follow), map_aggregate(node.kwargs, follow)
    gm.to(device)
    gm.recompile()


def device_of(gm: GraphModule) -> torch.device:
    """Where a graph's tensors are; the CPU if it has none."""
    tensors = [*gm.parameters(), *gm.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
