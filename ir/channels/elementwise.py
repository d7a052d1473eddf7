"""Rows for operators that work element by element."""

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from ir import edit
from ir.channels.flow import Flow, Labels, Rule, where
from ir.channels.maps import ELEMENTWISE, Map
from ir.channels.shapes import label_shape, shared_axes
from ir.match import aten, is_float_cast, operand, operands

HOMOGENEOUS = (*ELEMENTWISE, Map.SCALE)


def total(flow: Flow, node: Node) -> Labels | None:
    """Both sides have one map; what has no labels, and is not zero, has none."""
    shape = label_shape(edit.value(node))
    a, b = flow.read(node, "self"), flow.read(node, "other")
    if a is not None and b is not None:
        return _joined(flow, a, b, shape)
    x, other = (flow.spread(a, shape), "other") if a is not None else (flow.spread(b, shape), "self")  # type: ignore[arg-type]
    varying = shared_axes(operand(node, other), x)
    if _is_vector(flow, node, other, x):
        flow.limit(x, -1)
        flow.use(node, other, -1, flow.meet(x, -1), writes=True)
    elif flow.kind is Map.SELECT:
        flow.whole(x, varying, f"{where(node)} adds what was not followed")
    elif flow.kind not in ELEMENTWISE or varying:
        flow.bar(x, f"{where(node)} adds what was not followed")
    flow.limit(x)
    return x


def _joined(flow: Flow, a: Labels, b: Labels, shape: tuple[int, ...]) -> Labels:
    """Two values with one map, element by element."""
    p, q = flow.spread(a, shape), flow.spread(b, shape)
    flow.tie(p, q)
    flow.limit(p)
    flow.limit(q)
    return p


def product(flow: Flow, node: Node) -> Labels | None:
    """Factors of channels pass scales from one side, factors of rows pass all maps."""
    shape = label_shape(edit.value(node))
    a, b = flow.read(node, "self"), flow.read(node, "other")
    divides = node.target is aten.div.Tensor
    if a is None or b is None:
        if divides and a is None:
            return flow.refuse(node, f"{where(node)} divides by it")
        return _scaled(flow, node, a, "other") if a is not None else _scaled(flow, node, b, "self")  # type: ignore[arg-type]
    if node.args[0] is not node.args[1]:
        for x, y, other in ((a, b, "other"), (b, a, "self")):
            of_rows = y.shape[-1:] in {(), (1,)} and x.shape[-1] > 1 and not (divides and other == "self")
            if of_rows and (flow.kind is not Map.SELECT or y.numel() == 1):
                flow.bar(y, f"{where(node)} scales rows of channels by it")
                return _scaled(flow, node, x, other)
    if flow.kind in ELEMENTWISE:
        return _joined(flow, a, b, shape)
    if flow.kind is Map.SCALE and node.args[0] is not node.args[1] and not divides:
        p, q = flow.spread(a, shape), flow.spread(b, shape)
        if flow.is_fixed(p):
            return q
        if not flow.is_fixed(q):
            flow.bar(q, f"{where(node)} passes the scales of its first operand")
        return p
    return flow.refuse(node, f"{where(node)} multiplies channel by channel")


def _scaled(flow: Flow, node: Node, labels: Labels, other: str) -> Labels:
    """A product with what no map changes."""
    varying = shared_axes(operand(node, other), labels)
    x = flow.spread(labels, label_shape(edit.value(node)))
    if flow.kind is Map.SCALE:
        return x
    flow.limit(x, -1 if varying else None)
    if not varying:
        return x
    if flow.kind in ELEMENTWISE and _is_vector(flow, node, other, x):
        flow.use(node, other, -1, flow.meet(x, -1), writes=True)
    elif flow.kind is Map.SELECT:
        flow.whole(x, varying, f"{where(node)} scales its channels")
    elif -1 in varying:
        flow.bar(x, f"{where(node)} scales its channels")
    return x


def _is_vector(flow: Flow, node: Node, name: str, x: Labels) -> bool:
    """Whether an operand is a stored tensor with one entry, or row of entries, for each channel of `x`'s last axis.

    What all heads share keeps its entries when some of them are dropped.
    """
    view = flow.view(node, name)
    return (
        view is not None
        and not (flow.kind is Map.SELECT and x.numel() > x.shape[-1])
        and bool(view.axes)
        and view.axes[-1] is not None
        and label_shape(edit.value(operand(node, name)))[-1] == x.shape[-1] > 1
    )


def unary(passes: Iterable[Map], what: str) -> Rule:
    """An operator of one operand."""
    allowed = frozenset(passes)

    def rule(flow: Flow, node: Node) -> Labels | None:
        x = flow.read(node, next(iter(operands(node))))
        if x is None or flow.kind not in allowed:
            return flow.refuse(node, f"{where(node)} {what}")
        flow.limit(x)
        return x

    return rule


def _cast(flow: Flow, node: Node) -> Labels | None:
    """From floats to floats."""
    if not is_float_cast(node):
        return flow.refuse(node, f"{where(node)} makes whole numbers of it")
    x = flow.read(node, "self")
    if x is not None:
        flow.limit(x)
    return x


def softmax(flow: Flow, node: Node) -> Labels | None:
    """Over other axes than those of the channels that are dropped."""
    x = flow.read(node, "self")
    if x is None or flow.kind is not Map.SELECT:
        return flow.refuse(node, f"no rule says what {where(node)} does to channels")
    flow.whole(x, [operand(node, "dim")], f"{where(node)} runs over all its channels")
    return x


_linear = unary(Map, "")

ROWS: dict[Any, Rule] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), total),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), product),
    aten.to.dtype: _cast,
    aten.softmax.int: softmax,
    **dict.fromkeys((aten.neg.default, aten.clone.default, aten.mul.Scalar, aten.div.Scalar), _linear),
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default, aten.abs.default), unary(HOMOGENEOUS, "is not linear")),
    **dict.fromkeys(
        (
            *(aten.silu.default, aten.gelu.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default, aten.elu.default),
            *(aten.hardtanh.default, aten.clamp.default, aten.square.default, aten.pow.Tensor_Scalar, aten.exp.default, aten.mish.default),
            *(aten.erf.default, aten.rsqrt.default, aten.sqrt.default, aten.add.Scalar, aten.sub.Scalar),
        ),
        unary(ELEMENTWISE, "is not linear"),
    ),
}
