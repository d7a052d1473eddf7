"""Bring a graph to another device: its tensors, and the devices that its operators name."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ir import edit


def place(gm: GraphModule, device: torch.device) -> None:
    """Move a graph, in place; graphs and models that share its tensors keep theirs. Recorded values are not inferred again.

    Captured graphs make positions and masks by operators that name the device they were captured on (`arange`, `zeros`): they follow.
    """
    stored = {str(node.target): edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    moved = {key: tensor.detach().to(device) for key, tensor in {id(tensor): tensor for tensor in stored.values()}.items()}
    for name, tensor in stored.items():
        edit.store(gm, name, moved[id(tensor)])

    def follow(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, follow), map_aggregate(node.kwargs, follow)
    gm.recompile()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where kernels are launched meanwhile: several GPUs need to be told."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_of(gm: GraphModule) -> torch.device:
    """Where a graph's tensors are; the CPU if it has none."""
    tensors = [*gm.parameters(), *gm.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
