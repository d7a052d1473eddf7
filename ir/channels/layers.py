"""Rows for layers, norms and products: what closes a space of channels and opens another.

Norms that a model spells out, and that the normal form leaves spelled out, freeze what they read: their squares and means are not linear.
"""

from typing import Any

import torch
from torch.fx import Node

from ir import edit
from ir.channels.flow import Flow, Labels, Rule, where
from ir.channels.maps import Map
from ir.channels.shapes import label_shape, shared_axes
from ir.match import aten, operand, operands

# Layers.


def linear(flow: Flow, node: Node) -> Labels | None:
    """Columns of the weight read, its rows and the bias write."""
    return _weigh(flow, node, "input", -1, "weight", reads=1, writes=0)


def embedding(flow: Flow, node: Node) -> Labels | None:
    """The second axis of the table writes; which row is read is not a channel."""
    view = flow.view(node, "weight")
    if view is None or view.axes[1] is None:
        return flow.refuse(node, f"the weight of {where(node)} is computed, or quantized already")
    return _written(flow, node, "weight", 1, -1)


def _weigh(flow: Flow, node: Node, x: str, axis: int, weight: str, *, reads: int, writes: int) -> Labels | None:
    """A product of `x` along an axis with a stored weight, in whose axis of the same place the result lies."""
    view = flow.view(node, weight)
    if view is None or view.axes[reads] is None or view.axes[writes] is None:
        return flow.refuse(node, f"the weight of {where(node)} is computed, or quantized already")
    read = flow.read(node, x)
    if read is None:
        read = flow.fixed(label_shape(edit.value(operand(node, x))), f"what {where(node)} reads was not followed")
    flow.limit(read, axis)
    atoms = flow.meet(read, axis)
    if flow.kind is Map.CENTER:
        flow.bar(atoms, f"{where(node)} reads it without a norm")
    flow.use(node, weight, reads, atoms, writes=False)
    return _written(flow, node, weight, writes, axis)


def _written(flow: Flow, node: Node, weight: str, writes: int, axis: int) -> Labels:
    """The labels of what a weight's axis writes, and its bias with it."""
    size = label_shape(edit.value(operand(node, weight)))[writes]
    written = flow.fresh([size])
    flow.use(node, weight, writes, written, writes=True)
    if isinstance(operands(node).get("bias"), Node):
        _vector(flow, node, "bias", written)
    out = flow.spread(written.reshape([size] + [1] * (-1 - axis)), label_shape(edit.value(node)))
    flow.limit(out, axis)
    return out


def _vector(flow: Flow, node: Node, name: str, atoms: Labels) -> None:
    """A gain or bias beside what writes these atoms."""
    view = flow.view(node, name)
    if view is None or view.axes != (0,):
        flow.bar(atoms, f"the {name} of {where(node)} is computed")
    else:
        flow.use(node, name, 0, atoms, writes=True)


# Norms: a rotation passes, scales start anew behind them.


def norm(flow: Flow, node: Node) -> Labels | None:
    """RMS norm and layer norm over the last axis."""
    x, place = flow.read(node, "input"), edit.module_path(node) or node.name
    if len(operand(node, "normalized_shape")) != 1:
        return flow.refuse(node, f"{where(node)} normalizes several axes at once")
    if flow.kind is Map.SCALE:
        if x is not None:
            flow.bar(x, f"the norm {place} weighs its channels by their size")
        return _gained(flow, node)
    if x is None:
        return None
    flow.limit(x, -1)
    if flow.kind is Map.CENTER:
        return _centered(flow, node, x, place)
    if flow.kind is Map.PERMUTE:
        for name in _vectors(node):
            _vector(flow, node, name, flow.meet(x, -1))
        return x
    if flow.kind is Map.SELECT and x.numel() > x.shape[-1]:  # a norm of each head
        flow.whole(x, [-1], f"the norm {place} runs over all its channels")
        return x
    reason = _obstacle(flow.kind, node)
    return flow.refuse(node, f"the norm {place} {reason}") if reason else x


def _vectors(node: Node) -> list[str]:
    return [name for name in ("weight", "bias") if isinstance(operands(node).get(name), Node)]


def _obstacle(kind: Map, node: Node) -> str:
    """Why a norm lets no map of this kind pass, if so."""
    if kind is Map.SELECT:
        return "runs over all its channels"
    if kind is Map.LINEAR:
        return "fixes the length of its vectors"
    if _vectors(node):
        return "has a gain or bias that is not folded"
    return "subtracts the mean (center_norm folds it)" if node.target is aten.layer_norm.default else ""


def _centered(flow: Flow, node: Node, x: Labels, place: str) -> Labels:
    flow.mark(node, flow.meet(x, -1), writes=False)
    flow.single += [(row, f"the norm {place} runs over more than these channels") for row in x.reshape(-1, x.shape[-1])]
    if node.target is not aten.layer_norm.default:
        flow.bar(x, f"the norm {place} does not subtract the mean")
    return flow.fixed(label_shape(edit.value(node)), f"it comes from the norm {place}")


def _gained(flow: Flow, node: Node) -> Labels:
    """Scales that a norm's gain makes: a norm without one gets it when they are applied."""
    written = flow.fresh(label_shape(edit.value(operand(node, "input")))[-1:])
    if not isinstance(operand(node, "weight"), Node):
        flow.mark(node, written, writes=True)
    for name in _vectors(node):
        _vector(flow, node, name, written)
    return written


# Products of values.


def attention(flow: Flow, node: Node) -> Labels | None:
    """Queries and keys meet in a dot product, values are mixed over tokens."""
    q, k, v = (flow.read(node, name) for name in ("query", "key", "value"))
    if operand(node, "enable_gqa"):
        heads = label_shape(edit.value(node))[-3]
        k, v = (None if x is None else _repeated(flow, x, heads // x.shape[-3]) for x in (k, v))
    scores = _contract(flow, node, q, k)
    if flow.kind is Map.SELECT:
        return _attend(flow, node, scores, v, operand(node, "attn_mask"))
    return None if v is None else _mix(flow, node, v, -1)


def _repeated(flow: Flow, x: Labels, times: int) -> Labels:
    """Heads of keys or values for each of their queries."""
    if flow.copies and times > 1:
        return flow.copied(x, -3, times)
    return flow.distinct(x.repeat_interleave(times, -3))


def matmul(flow: Flow, node: Node) -> Labels | None:
    """A product of the first two operands."""
    left, right, *_ = operands(node)
    return _multiply(flow, node, left, right)


def added_matmul(flow: Flow, node: Node) -> Labels | None:
    """A product that is added to something."""
    out = _multiply(flow, node, "batch1", "batch2")
    if out is not None:
        flow.bar(out, f"{where(node)} adds it to what was not followed")
    return out


def _multiply(flow: Flow, node: Node, left: str, right: str) -> Labels | None:
    """With a stored weight a linear, over channels a dot product, over tokens a mixture."""
    a, b = flow.read(node, left), flow.read(node, right)
    if any(edit.value(operand(node, name)).ndim < 2 for name in (left, right)):
        return flow.refuse(node, f"{where(node)} is of a vector")
    if flow.view(node, right) is not None:
        return _weigh(flow, node, left, -1, right, reads=-2, writes=-1)
    if flow.view(node, left) is not None:
        return _weigh(flow, node, right, -2, left, reads=-1, writes=-2)
    if (a is not None and a.shape[-1] > 1) or (b is not None and b.shape[-2] > 1):
        return _contract(flow, node, a, None if b is None else b.mT)
    if flow.kind is Map.SELECT:
        return _attend(flow, node, a, b, None)
    if a is not None and b is not None:
        return flow.refuse(node, f"{where(node)} multiplies channels by channels")
    if a is not None:
        return _mix(flow, node, a, -2)
    return None if b is None else _mix(flow, node, b, -1)


def _contract(flow: Flow, node: Node, q: Labels | None, k: Labels | None) -> Labels | None:
    """A dot product over the last axis of both, of every row of one with every row of the other.

    Heads that may be dropped are those of its result too; to other maps the result is invariant.
    """
    known = [flow.merge(x, -2) for x in (q, k) if x is not None]
    for x in known:
        flow.limit(x, -1)
        if flow.kind is Map.CENTER:
            flow.bar(x, f"{where(node)} compares them")
        if flow.kind is Map.SELECT:
            flow.whole(x, [-1], f"{where(node)} compares them")
    if len(known) == 2 and known[0].shape[-1] == known[1].shape[-1] and _align(known[0], known[1]):
        flow.contract(*known)
        return torch.broadcast_tensors(*known)[0].narrow(-1, 0, 1) if flow.kind is Map.SELECT else None  # type: ignore[no-untyped-call]  # torch's own
    for x in known:
        flow.bar(x, f"{where(node)} compares them with what was not followed")
    return None


def _attend(flow: Flow, node: Node, scores: Labels | None, v: Labels | None, mask: object) -> Labels | None:
    """Heads that may be dropped: scores and values have the same."""
    if scores is None and v is None:
        return None
    if scores is None or v is None or not _align(scores, v) or v.shape[-1] == 1 < scores.shape[-2]:
        return flow.refuse(node, f"{where(node)} mixes them with what was not followed")
    flow.whole(scores, shared_axes(mask, scores), f"{where(node)} has a mask for each head")
    flow.whole(v, [-1], f"all heads of {where(node)} have one size")
    flow.tie(v.narrow(-1, 0, 1), scores)
    return flow.spread(v, label_shape(edit.value(node)))


def _align(a: Labels, b: Labels) -> bool:
    return all(m == n or 1 in {m, n} for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


def _mix(flow: Flow, node: Node, v: Labels, axis: int) -> Labels:
    """Tokens are mixed, channels are not: in each row along their axis by weights of its own."""
    flow.limit(v, axis)
    out = flow.spread(v, label_shape(edit.value(node)))
    flow.limit(out, axis)
    return out


ROWS: dict[Any, Rule] = {
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    **dict.fromkeys((aten.rms_norm.default, aten.layer_norm.default), norm),
    aten.scaled_dot_product_attention.default: attention,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, torch.ops.aten._grouped_mm.default), matmul),
    aten.baddbmm.default: added_matmul,
    "transformers::grouped_mm_fallback": matmul,  # known by name: it exists once transformers has traced a mixture of experts
}
