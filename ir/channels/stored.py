"""Stored tensors that are looked at before they are used: cast, transposed, or an entry picked along one axis."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ir.channels.flow import Flow, Stored, nodes_of, where
from ir.channels.structure import TRANSPOSES, picked_axes
from ir.match import aten, is_float_cast, operand, operands

Axes = tuple[int | None, ...]


def see(flow: Flow, node: Node) -> bool:
    """Record what a node is of a stored tensor, if it is one of floats as it is, or seen from a side that `VIEWS` knows."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    if node.op == "get_attr":
        flow.stored[node] = Stored(node, tuple(range(value.ndim)))
        return True
    view = flow.stored.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if view is None or node.target not in VIEWS:
        return False
    axes = VIEWS[node.target](node, view.axes)
    if axes is not None:
        flow.stored[node] = Stored(view.node, axes)
    return axes is not None


def _transposed(node: Node, axes: Axes) -> Axes:
    a, b = (-1, -2) if node.target in TRANSPOSES else (operand(node, "dim0"), operand(node, "dim1"))
    moved = list(axes)
    if len(axes) > 1:
        moved[a], moved[b] = axes[b], axes[a]
    return tuple(moved)


def _sliced(node: Node, axes: Axes) -> Axes:
    return _put(axes, operand(node, "dim"), (None,))


def _selected(node: Node, axes: Axes) -> Axes:
    return _put(axes, operand(node, "dim"), ())


def _unsqueezed(node: Node, axes: Axes) -> Axes:
    at = operand(node, "dim") % (len(axes) + 1)
    return (*axes[:at], None, *axes[at:])


def _picked(node: Node, axes: Axes) -> Axes | None:
    at, width = picked_axes(node)
    return (*axes[: at[0]], *[None] * width, *axes[at[-1] + 1 :]) if at else None


def _put(axes: Axes, axis: int, new: Axes) -> Axes:
    axis %= len(axes)
    return (*axes[:axis], *new, *axes[axis + 1 :])


VIEWS: dict[Any, Callable[[Node, Axes], Axes | None]] = {
    **dict.fromkeys((*TRANSPOSES, aten.transpose.int), _transposed),
    aten.permute.default: lambda node, axes: tuple(axes[axis] for axis in operand(node, "dims")),
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.unsqueeze.default: _unsqueezed,
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), _picked),
    aten.to.dtype: lambda node, axes: axes if is_float_cast(node) else None,
}


def close(flow: Flow) -> None:
    """Bar what a map would change for a reader that was not followed: each has to have claimed every axis that carries channels."""
    readings: dict[object, list[tuple[Node, str]]] = {}
    for view, of in flow.stored.items():
        for user in view.users:
            if not (user in flow.stored and user.args[0] is view):
                names = [name for name, given in operands(user).items() if view in nodes_of(given)]
                readings.setdefault(of.node.target, []).extend((user, name) for name in names or [""])
    for use in flow.uses:
        for user, name in readings.get(use.node.target, ()) if use.node.op == "get_attr" else ():
            if use.axis not in flow.claimed.get((user, name), ()):
                flow.bar(use.atoms, f"{where(user)} reads {use.node.target} too")
