"""Rows for operators that move, cut, join and repeat elements: done to the labels as to the values."""

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.fx import Node

from ir import edit
from ir.channels.flow import Flow, Labels, Rule, where
from ir.channels.maps import MIXING, Map
from ir.channels.shapes import fixed_factor, in_order, label_shape, shared_axes
from ir.match import aten, operand, operands

TRANSPOSES = (aten.t.default, aten.mT.default, aten.numpy_T.default)  # of the last two axes, or the only two


def reshape(flow: Flow, node: Node) -> Labels | None:
    """The same elements in the same order."""
    labels, source = flow.read(node, "self"), edit.value(operand(node, "self"))
    assert labels is not None
    shape = label_shape(edit.value(node))
    if labels.numel() != prod(shape) or not in_order(source.shape, edit.value(node).shape):
        return flow.refuse(node, f"{where(node)} was not followed")
    if flow.kind is Map.SELECT and any(fixed_factor(n) > 1 for n in (*source.shape, *edit.value(node).shape) if not isinstance(n, int)):
        return flow.refuse(node, f"{where(node)} computes a size from their number")
    return labels.reshape(shape)


def expand(flow: Flow, node: Node) -> Labels | None:
    """Repeated along axes of size 1."""
    flow.taken.add("other")  # `expand_as` reads its shape only
    labels, shape = flow.read(node, "self"), label_shape(edit.value(node))
    if not flow.copies or labels is None:
        return labels
    repeated = [axis for axis in range(-labels.ndim, 0) if labels.shape[axis] == 1 < shape[axis]]
    return flow.copied(labels, repeated[0], shape[repeated[0]]) if len(repeated) == 1 else labels


def interleave(flow: Flow, node: Node) -> Labels | None:
    """Repeated along an axis, copy beside copy."""
    labels, times, axis = flow.read(node, "self"), operand(node, "repeats"), operand(node, "dim")
    if flow.copies and labels is not None and isinstance(times, int) and times > 1 and isinstance(edit.value(node).shape[axis], int):
        return flow.copied(labels, axis, times)
    return moved(flow, node)


def moved(flow: Flow, node: Node) -> Labels | None:
    """The operator itself, if its other operands are numbers."""
    labels = flow.read(node, "self")
    assert labels is not None
    if any(read is not node.args[0] for read in node.all_input_nodes):
        return flow.refuse(node, f"{where(node)} depends on sizes that vary")
    kwargs = {name: given for name, given in node.kwargs.items() if name != "output_size"}
    return flow.distinct(node.target(labels, *node.args[1:], **kwargs))  # type: ignore[operator]


def repeat(flow: Flow, node: Node) -> Labels | None:
    """Repeated along axes that carry no channels."""
    labels = flow.read(node, "self")
    shape = label_shape(edit.value(node))
    assert labels is not None
    if any(1 < have != wanted for have, wanted in zip(reversed(labels.shape), reversed(shape), strict=False)):
        return flow.refuse(node, f"{where(node)} repeats channels")
    return labels


def cut(flow: Flow, node: Node) -> Any:
    """Slices, chunks and selections: along an axis of channels, of the labels; along tokens, nothing."""
    name = next(iter(operands(node)))
    axis, source, result = operands(node)["dim"], edit.value(operand(node, name)), edit.value(node)
    labels = flow.read(node, name)
    assert labels is not None
    if isinstance(source.shape[axis], int):
        if any(read is not node.args[0] for read in node.all_input_nodes):
            return flow.refuse(node, f"{where(node)} cuts at places that vary")
        if flow.kind is Map.SELECT and (node.target in {aten.select.int, aten.unbind.int} or operands(node).get("step", 1) != 1):
            flow.whole(labels, [axis], f"{where(node)} picks some of them")
        return node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    tokens = flow.merge(labels, axis)
    if node.target in {aten.select.int, aten.unbind.int}:
        tokens = tokens.squeeze(axis)
    return tokens if isinstance(result, torch.Tensor) else (tokens,) * len(result)


def flip(flow: Flow, node: Node) -> Labels | None:
    """The other way round."""
    labels, source = flow.read(node, "self"), edit.value(operand(node, "self"))
    assert labels is not None
    for axis in operand(node, "dims"):
        labels = labels if isinstance(source.shape[axis], int) else flow.merge(labels, axis)
    return labels.flip(operand(node, "dims"))


def cat(flow: Flow, node: Node) -> Labels | None:
    """Side by side along channels, one map for all along tokens."""
    tensors, axis = operand(node, "tensors"), operand(node, "dim")
    found = [flow.labels.get(tensor) for tensor in tensors]
    if any(not isinstance(labels, torch.Tensor) for labels in found):
        return flow.refuse(node, f"{where(node)} joins them with what was not followed")
    flow.taken.add("tensors")
    known: list[Labels] = [labels for labels in found if labels is not None]
    if node.target is aten.stack.default:
        return torch.stack(_apart(flow, known), axis)
    if isinstance(edit.value(node).shape[axis], int):
        return torch.cat(_apart(flow, known), axis)
    first, *others = (flow.merge(labels, axis) for labels in known)
    for labels in others:
        flow.tie(labels, first)
    for labels in (first, *others):
        flow.limit(labels)
    return first


def _apart(flow: Flow, known: list[Labels]) -> list[Labels]:
    """Labels of values that share no atoms: those of values with one origin may tell their copies of a block apart in ways of their own."""
    joined = torch.cat([labels.flatten() for labels in known])
    if flow.kind not in MIXING or torch.unique(joined).numel() == joined.numel():
        return known
    made = [flow.fresh(labels.shape) for labels in known]
    for new, labels in zip(made, known, strict=True):
        flow.tie(new, labels)
        flow.limit(new)
        flow.limit(labels)
    return made


def filled(flow: Flow, node: Node) -> Labels | None:
    """Zeros at tokens: any map keeps them."""
    labels = flow.read(node, "self")
    if labels is None or operand(node, "value") != 0:
        return flow.refuse(node, f"{where(node)} puts other numbers in their place")
    if shared_axes(operand(node, "mask"), labels):
        return flow.refuse(node, f"{where(node)} tells its channels apart")
    flow.limit(labels)
    return labels


def reduced(flow: Flow, node: Node) -> Labels | None:
    """Sums and means over other axes than that of the channels."""
    labels, dims = flow.read(node, "self"), operand(node, "dim")
    assert labels is not None
    axes = sorted({axis % labels.ndim for axis in dims or range(labels.ndim)})
    if labels.shape[-1] > 1 and labels.ndim - 1 in axes:
        return flow.refuse(node, f"{where(node)} adds up its channels")
    if flow.kind is Map.SELECT:
        flow.whole(labels, axes, f"{where(node)} adds up some of them")
    for axis in axes:
        labels = flow.merge(labels, axis)
    for axis in [] if operand(node, "keepdim") else reversed(axes):
        labels = labels.squeeze(axis)
    flow.limit(labels)
    return labels


def picked(flow: Flow, node: Node) -> Labels | None:
    """Tokens picked by index."""
    labels, source = flow.read(node, "self"), edit.value(operand(node, "self"))
    axes, width = picked_axes(node)
    if labels is None or not axes or any(labels.shape[axis] > 1 and isinstance(source.shape[axis], int) for axis in axes):
        return flow.refuse(node, f"{where(node)} picks channels")
    for axis in axes:
        labels = flow.merge(labels, axis)
    return labels.reshape(*labels.shape[: axes[0]], *[1] * width, *labels.shape[axes[-1] + 1 :])


def picked_axes(node: Node) -> tuple[list[int], int]:
    """The axes that a call picks from by whole numbers, and how many take their place; no axes if they are not side by side."""
    given = operands(node)
    if "indices" not in given:
        return [given["dim"] % edit.value(given["self"]).ndim], 1
    picks = {axis: edit.value(index) for axis, index in enumerate(given["indices"]) if index is not None}
    axes = list(picks)
    if any(index.dtype == torch.bool for index in picks.values()) or any(b != a + 1 for a, b in pairwise(axes)):
        return [], 0
    return axes, max(index.ndim for index in picks.values())


def item(flow: Flow, node: Node) -> Labels | None:
    """One of several results."""
    source, index = node.args
    assert isinstance(index, int)
    found: Any = flow.labels.get(source)  # type: ignore[arg-type]
    return found[index] if isinstance(found, tuple) else None


def no_channels(flow: Flow, node: Node) -> None:
    """Only the shape is read."""
    flow.taken.add(next(iter(operands(node))))


ROWS: dict[Any, Rule] = {
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), reshape),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), expand),
    **dict.fromkeys((*TRANSPOSES, aten.transpose.int, aten.permute.default), moved),
    aten.repeat_interleave.self_int: interleave,
    aten.repeat.default: repeat,
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.unbind.int), cut),
    **dict.fromkeys((aten.split_with_sizes.default, aten.narrow.default), cut),
    aten.flip.default: flip,
    **dict.fromkeys((aten.cat.default, aten.stack.default), cat),
    aten.masked_fill.Scalar: filled,
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), reduced),
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), picked),
    **dict.fromkeys((aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default), no_channels),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default), no_channels),
}
