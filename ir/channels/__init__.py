"""Channel groups: all axes of stored tensors that see one space of channels, and whether a kind of map may be applied to it.

One analysis over the graph finds them, without names of models: `flow` holds labels that run beside the values, `rules` has a row for each
operator, `solve` makes groups of what they recorded. Smoothing is a diagonal map of a group, rotation an orthogonal one, pruning a
selection: a pass asks for groups, computes maps and applies them (`ir/maps.py`).
"""

import torch
from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import stored
from ir.channels.flow import Flow
from ir.channels.groups import ChannelGroup, Member
from ir.channels.maps import Map
from ir.channels.rules import follow
from ir.channels.shapes import label_shape
from ir.channels.solve import solve
from ir.signature import CACHE, PRESENT, Signature

__all__ = ["ChannelGroup", "Map", "Member", "channel_groups"]


def channel_groups(gm: GraphModule, kind: Map, *, copies: bool = False) -> list[ChannelGroup]:
    """Every group of channels of a graph in normal form, for one kind of map, in the order of their first tensors.

    With `copies`, for SELECT: where a value is repeated, as keys are for the queries of their group, its n-th copies are one channel, and
    what they are copies of stays.

    Groups that tolerate only the identity are among them, with the reason. The cost is linear in the number of channels of all values, up
    to sorting.
    """
    flow = Flow(gm, kind, copies)
    cache: dict[str, Node] = {}
    signature: Signature | None = gm.meta.get("signature")
    ports = iter(signature.inputs) if signature else iter(())
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            port = next(ports, None)
            if port is not None and port.cached:
                flow.labels[node] = flow.fresh(label_shape(edit.value(node)))
                cache[port.name.removeprefix(CACHE)] = node
        elif node.op == "get_attr":
            stored.see(flow, node)
        elif node.op == "call_function":
            follow(flow, node)
    _close(flow, signature, cache)
    stored.close(flow)
    return solve(flow)


def _close(flow: Flow, signature: Signature | None, cache: dict[str, Node]) -> None:
    """The graph's outputs: what goes into the cache comes out of it, all else is the caller's."""
    outputs = flow.gm.graph.output_node().args[0]
    names = [port.name for port in signature.outputs] if signature else [""] * len(outputs)  # type: ignore[arg-type]
    for node, name in zip(outputs, names, strict=True):  # type: ignore[arg-type]
        labels = flow.labels.get(node)
        past = cache.pop(name.removeprefix(PRESENT), None) if name.startswith(f"{PRESENT}.") else None
        if past is not None and labels is not None and labels.shape == flow.labels[past].shape:
            flow.tie(flow.labels[past], labels)
            flow.limit(flow.labels[past])
            flow.limit(labels)
            continue
        if past is not None:
            flow.bar(flow.labels[past], "what the cache takes in was not followed")
        if isinstance(labels, torch.Tensor):
            flow.bar(labels, "it is an output of the model")
    for past in cache.values():
        flow.bar(flow.labels[past], "what the cache takes in was not followed")
