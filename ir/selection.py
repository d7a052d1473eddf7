"""Drop channels of a graph for good: stored tensors are cut, numbers in calls change, shapes are inferred again, and caches shrink."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.call_sizes import Keeps, Kept, count, resize
from ir.channels import ChannelGroup, Map
from ir.errors import PassError
from ir.signature import Port, Signature
from ir.text import node_text, where

Selection = Sequence[tuple[ChannelGroup, Tensor]]
Convert = Callable[[Sequence[Tensor]], list[Tensor]]


def select(gm: GraphModule, selection: Selection) -> Convert:
    """Keep some channels of groups and drop the others, in place of the graph; tensors of the caller are left as they were.

    Args:
        gm: the graph that the groups were found in.
        selection: groups of kind SELECT, each with the channels that stay, int64 in rising order.

    Returns:
        What brings flat inputs of the graph as it was into the form of the graph as it is: caches lose the heads that were dropped.

    Raises:
        PassError: a group is frozen, or what is to stay is no selection of it; or a call that cannot follow.
    """
    for group, channels in selection:
        _check(group, channels)
    cut = _tensors(gm, selection)
    for node, keeps in cut.items():
        edit.set_attribute(gm, node, taken(edit.attribute(gm, node).detach(), keeps))
    kept = _values(selection)
    inputs = [kept[node][0] if node in kept else None for node in evaluate.placeholders(gm)]
    _infer(gm, kept, set(cut))

    def convert(flat: Sequence[Tensor]) -> list[Tensor]:
        return [value if keeps is None else taken(value, keeps) for value, keeps in zip(flat, inputs, strict=True)]

    _follow(gm, convert)
    return convert


def stays(group: ChannelGroup, channels: Tensor, places: Tensor) -> Tensor:
    """Which elements stay, bool: all but those of `places` (as in members and values) whose channel is not among `channels`."""
    table = torch.zeros(group.size + 1, dtype=torch.bool)
    table[channels] = True
    table[group.size] = True  # what −1 points to: no channel of this group
    return table[places]


def taken(tensor: Tensor, keeps: Keeps) -> Tensor:
    """What of a tensor stays, as a tensor of its own."""
    for axis, keep in enumerate(keeps):
        if not keep.all():
            tensor = tensor.index_select(axis, keep.nonzero()[:, 0].to(tensor.device))
    return tensor.contiguous()


def _check(group: ChannelGroup, channels: Tensor) -> None:
    if group.reason or group.kind is not Map.SELECT:
        raise PassError(f"no channel can be dropped: {group.reason or f'the map is to {group.kind.value}'}", where=str(group))
    rising = bool((channels[1:] > channels[:-1]).all())
    if not len(channels) or not rising or int(channels[0]) < 0 or int(channels[-1]) >= group.size:
        raise PassError("what stays is at least one channel, each once, in rising order", where=str(group))


def _tensors(gm: GraphModule, selection: Selection) -> dict[Node, list[Tensor]]:
    """What stays of stored tensors, along every axis; several groups may lie along one."""
    found: dict[Node, list[Tensor]] = {}
    for group, channels in selection:
        for member in group.members:
            whole = [torch.ones(size, dtype=torch.bool) for size in edit.attribute(gm, member.node).shape]
            found.setdefault(member.node, whole)[member.axis] &= stays(group, channels, member.channels)
    return found


def _values(selection: Selection) -> dict[Node, list[Keeps]]:
    """What stays of every value that loses something."""
    masks: dict[Node, list[Tensor]] = {}
    for group, channels in selection:
        for node, results in group.values.items():
            own = [stays(group, channels, places) for places in results]
            masks[node] = [a & b for a, b in zip(masks[node], own, strict=True)] if node in masks else own
    return {node: [_along(mask) for mask in found] for node, found in masks.items() if not all(bool(mask.all()) for mask in found)}


def _along(mask: Tensor) -> Keeps:
    """What stays along each axis: the analysis sees to it that channels lie along one axis only."""
    if not mask.numel():
        return [torch.ones(size, dtype=torch.bool) for size in mask.shape]
    return [mask.movedim(axis, 0).flatten(1).any(1) if mask.ndim > 1 else mask for axis in range(mask.ndim)]


def _infer(gm: GraphModule, kept: Kept, cut: set[Node]) -> None:
    """Change the numbers in calls, and infer every value again that depends on a changed one."""
    changed = set(cut)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node in kept:
            fake = edit.value(node)
            edit.set_input(node, _sizes(fake, kept[node][0]), fake.dtype)
            changed.add(node)
        elif node.op == "call_function" and (node in kept or not changed.isdisjoint(node.all_input_nodes)):
            before = edit.value(node)
            resize(node, kept)
            _infer_one(node, kept.get(node, ()))
            if node in kept or _fixed(edit.value(node)) != _fixed(before):
                changed.add(node)


def _infer_one(node: Node, kept: Sequence[Keeps]) -> None:
    """Infer a call's value, and compare it with what its channels say."""
    place = f"{where(node)}\n{node_text(node)}"
    wanted = [_sizes(fake, keeps) for fake, keeps in zip(_each(edit.value(node)), kept, strict=False)]
    try:
        edit.infer(node)
    except (RuntimeError, ValueError) as error:
        raise PassError(
            f"a call cannot follow the channels that were dropped: {error}", where=f"{where(node)}\n{node_text(node)}"
        ) from error
    for fake, sizes in zip(_each(edit.value(node)), wanted, strict=False):
        if _fixed(fake) != [size if isinstance(size, int) else None for size in sizes]:
            raise PassError(f"a call gives {list(fake.shape)} in place of {sizes}", where=place)


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _sizes(fake: Tensor, keeps: Keeps) -> list[Any]:
    """The sizes of a value without what is dropped; those that vary as they are."""
    return [count(keep) if isinstance(size, int) else size for size, keep in zip(fake.shape, keeps, strict=True)]


def _fixed(value: Any) -> Any:
    """Sizes that can be compared: None for those that vary."""
    if isinstance(value, tuple | list):
        return [_fixed(each) for each in value]
    return [size if isinstance(size, int) else None for size in value.shape] if isinstance(value, torch.Tensor) else None


def _follow(gm: GraphModule, convert: Convert) -> None:
    """Let the signature and the example follow the graph."""
    signature: Signature | None = gm.meta.get("signature")
    if signature is not None:
        results = gm.graph.output_node().args[0]
        gm.meta["signature"] = replace(
            signature,
            inputs=_ports(signature.inputs, evaluate.placeholders(gm)),
            outputs=_ports(signature.outputs, results),  # type: ignore[arg-type]
        )
    if "example" in gm.meta:
        gm.meta["example"] = convert(gm.meta["example"])


def _ports(ports: Sequence[Port], nodes: Sequence[Node]) -> tuple[Port, ...]:
    return tuple(Port.of(port.name, edit.value(node)) for port, node in zip(ports, nodes, strict=True))
