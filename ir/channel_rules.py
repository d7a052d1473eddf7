"""What operators do to channels: one row for each, in `RULES`.

A row takes the flow and the node, records ties, limits, bars and uses, and returns the labels of the node's value: None if it carries no
channels. Rows are called only if an operand has labels, or for layers. An operator without a row bars what it reads, and says so.
"""

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any, TypeGuard

import torch
from torch.fx import Node

from ir import edit
from ir.channel_flow import Flow, Labels, Map, label_shape, varies
from ir.match import aten, operand, operands

Rule = Callable[[Flow, Node], Any]

ELEMENTWISE = frozenset({Map.SELECT, Map.PERMUTE})
HOMOGENEOUS = ELEMENTWISE | {Map.SCALE}


def where(node: Node) -> str:
    """An operator and its place, for reasons."""
    name = getattr(node.target, "_schema", None)
    return f"{name.name.split('::')[-1] if name else node.target} in {edit.module_path(node) or node.name}"


def _labels(flow: Flow, value: object) -> Labels | None:
    return flow.labels.get(value) if isinstance(value, Node) else None


# Layers: they close the space of their input and open the one of their output.


def _linear(flow: Flow, node: Node) -> Labels | None:
    x, weight, bias = (operand(node, name) for name in ("input", "weight", "bias"))
    read = _labels(flow, x)
    if weight.op != "get_attr":
        if read is not None:
            flow.bar(read, f"the weight of {where(node)} is computed, or quantized already")
        return flow.fixed(node, f"the weight of {where(node)} is computed, or quantized already")
    if read is None:
        read = flow.fixed(x, f"what {where(node)} reads was not followed")
    atoms = flow.meet(read, -1)
    if flow.kind is Map.CENTER:
        flow.bar(atoms, f"{where(node)} reads it without a norm")
    flow.limit(atoms)
    flow.use(weight, 1, atoms, writes=False)
    written = flow.use(weight, 0, flow.fresh([edit.value(weight).shape[0]]), writes=True)
    if isinstance(bias, Node):
        flow.use(bias, 0, written, writes=True)
    flow.limit(written)
    return written.expand(label_shape(node))


def _embedding(flow: Flow, node: Node) -> Labels | None:
    weight = operand(node, "weight")
    if weight.op != "get_attr":
        return flow.fixed(node, f"the weight of {where(node)} is computed, or quantized already")
    written = flow.use(weight, 1, flow.fresh([edit.value(weight).shape[1]]), writes=True)
    flow.limit(written)
    return written.expand(label_shape(node))


# Norms: a rotation passes, scales start anew behind them.


def _norm(flow: Flow, node: Node, x: Labels, bias: object) -> Labels | None:
    axes = len(operand(node, "normalized_shape"))
    gain = operand(node, "weight")
    place = edit.module_path(node) or node.name
    centers = node.target is aten.layer_norm.default
    if axes != 1:
        flow.bar(x, f"{where(node)} normalizes several axes at once")
        return flow.fixed(node, f"{where(node)} normalizes several axes at once")
    flow.limit(x)
    if flow.kind is Map.SCALE:
        flow.bar(x, f"the norm {place} weighs its channels by their size")
        written = flow.use(gain if isinstance(gain, Node) else node, 0, flow.fresh([x.shape[-1]]), writes=True)
        if isinstance(bias, Node):
            flow.use(bias, 0, written, writes=True)
        return written.expand(label_shape(node))
    if flow.kind is Map.SELECT:
        flow.bar(x, f"the norm {place} runs over all its channels")
        return flow.fixed(node, f"the norm {place} runs over all its channels")
    if flow.kind is Map.CENTER:
        if not centers:
            flow.bar(x, f"the norm {place} does not subtract the mean")
        return flow.fixed(node, f"it comes from the norm {place}")
    if flow.kind is Map.PERMUTE:
        atoms = flow.meet(x, -1)
        for vector in (gain, bias):
            if isinstance(vector, Node):
                flow.use(vector, 0, atoms, writes=True)
        return x
    reason = f"the norm {place} " + (
        "has a gain that is not folded" if isinstance(gain, Node) or isinstance(bias, Node) else "subtracts the mean (center_norm folds it)"
    )
    if flow.kind is Map.LINEAR or isinstance(gain, Node) or isinstance(bias, Node) or centers:
        reason = f"the norm {place} fixes the length of its vectors" if flow.kind is Map.LINEAR else reason
        flow.bar(x, reason)
        return flow.fixed(node, reason)
    return x


def _rms_norm(flow: Flow, node: Node) -> Labels | None:
    return _norm(flow, node, flow.labels[node.args[0]], None)  # type: ignore[index]


def _layer_norm(flow: Flow, node: Node) -> Labels | None:
    return _norm(flow, node, flow.labels[node.args[0]], operand(node, "bias"))  # type: ignore[index]


# Products of values.


def _attend(flow: Flow, node: Node, v: Labels) -> Labels:
    """Tokens are mixed, channels are not: each head's own."""
    flow.limit(v)
    if flow.kind is Map.SELECT:
        flow.bar(v, f"all heads of {where(node)} have one size")
    return v


def _attention(flow: Flow, node: Node) -> Labels | None:
    q, k, v = (_labels(flow, operand(node, name)) for name in ("query", "key", "value"))
    groups = label_shape(node)[1]
    if operand(node, "enable_gqa"):
        k, v = (None if x is None else x.repeat_interleave(groups // x.shape[1], 1) for x in (k, v))
    _contract(flow, node, q, k)
    return None if v is None else _attend(flow, node, v).expand(label_shape(node))


def _contract(flow: Flow, node: Node, q: Labels | None, k: Labels | None) -> None:
    """A dot product over the last axis of both."""
    known = [x for x in (q, k) if x is not None]
    for x in known:
        flow.limit(x)
        if flow.kind in {Map.SELECT, Map.CENTER}:
            flow.bar(x, f"{where(node)} compares them")
    if q is not None and k is not None:
        flow.contract(q, k)
    elif known:
        flow.bar(known[0], f"{where(node)} compares them with what was not followed")


def _matmul(flow: Flow, node: Node) -> Labels | None:
    a, b = (_labels(flow, x) for x in node.args[:2])
    if b is None:
        return _unknown(flow, node)
    contracted = not varies(node.args[1], -2) and b.shape[-2] > 1  # type: ignore[arg-type]
    if contracted:
        _contract(flow, node, a, b.movedim(-2, -1))
        return None
    if a is not None:
        return _unknown(flow, node)
    return _attend(flow, node, b).expand(label_shape(node))


# Elementwise operators.


def _sum(flow: Flow, node: Node) -> Labels | None:
    """Both sides have one map; what is not labelled, and not zero, has none."""
    a, b = node.args[:2]
    known = [x for x in (_labels(flow, a), _labels(flow, b)) if x is not None]
    if len(known) == 2:
        flow.tie(*known)
        return torch.broadcast_tensors(*known)[0].expand(label_shape(node))
    x, other = known[0].expand(label_shape(node)), b if _labels(flow, a) is not None else a
    if _is_vector(other, x):
        atoms = flow.meet(x, -1)
        flow.limit(atoms)
        flow.use(other, len(label_shape(other)) - 1, atoms, writes=True)
        return x
    if flow.kind not in ELEMENTWISE or _spans(other, x):
        flow.bar(x, f"{where(node)} adds what was not followed")
    return x


def _product(flow: Flow, node: Node) -> Labels | None:
    a, b = node.args[:2]
    known = [x for x in (_labels(flow, a), _labels(flow, b)) if x is not None]
    if len(known) == 1:
        x = known[0].expand(label_shape(node))
        other = b if _labels(flow, a) is not None else a
        if node.target is aten.div.Tensor and other is a:
            return _unknown(flow, node)
        if flow.kind in ELEMENTWISE and _is_vector(other, x):
            flow.use(other, len(label_shape(other)) - 1, flow.meet(x, -1), writes=True)
        elif _spans(other, x) and flow.kind is not Map.SCALE:
            flow.bar(x, f"{where(node)} scales its channels")
        return x
    p, q = (x.expand(label_shape(node)) for x in known)
    if flow.kind in ELEMENTWISE:
        flow.tie(p, q)
        return p
    if flow.kind is Map.SCALE and a is not b and node.target is aten.mul.Tensor:
        if flow.is_fixed(p):
            return q
        if not flow.is_fixed(q):
            flow.bar(q, f"{where(node)} passes the scales of its first operand")
        return p
    return _unknown(flow, node, f"{where(node)} multiplies channel by channel")


def _is_vector(other: object, x: Labels) -> TypeGuard[Node]:
    """Whether an operand is a stored tensor with one entry for each channel of `x`'s last axis."""
    return isinstance(other, Node) and other.op == "get_attr" and x.shape[-1] > 1 and label_shape(other)[-1:] == x.shape[-1:]


def _spans(other: object, x: Labels) -> bool:
    """Whether an operand without labels has values of its own along an axis that `x` tells channels apart on."""
    if not isinstance(other, Node) or not isinstance(edit.value(other), torch.Tensor):
        return False
    shape = label_shape(other)
    return any(size > 1 and have > 1 for size, have in zip(reversed(shape), reversed(x.shape), strict=False))


def _unary(passes: Iterable[Map], what: str) -> Rule:
    """An operator of one operand that works element by element."""
    allowed = frozenset(passes)

    def rule(flow: Flow, node: Node) -> Labels | None:
        if flow.kind in allowed:
            return flow.labels[node.args[0]].expand(label_shape(node))  # type: ignore[index]
        return _unknown(flow, node, f"{where(node)} {what}")

    return rule


def _unknown(flow: Flow, node: Node, reason: str = "") -> Labels | None:
    """Bar every operand with labels; what comes out tolerates nothing."""
    reason = reason or f"no rule says what {where(node)} does to channels"
    for read in node.all_input_nodes:
        found = flow.labels.get(read)
        for labels in found if isinstance(found, tuple) else (found,):
            if labels is not None:
                flow.bar(labels, reason)
    return flow.fixed(node, reason) if isinstance(node.meta.get("val"), torch.Tensor) else None


# Structure: done to the labels as to the values.


def _reshape(flow: Flow, node: Node) -> Labels | None:
    labels = flow.labels[node.args[0]]  # type: ignore[index]
    shape = label_shape(node)
    if labels.numel() == torch.Size(shape).numel():
        return labels.reshape(shape)
    return _unknown(flow, node, f"{where(node)} was not followed")


def _expand(flow: Flow, node: Node) -> Labels | None:
    return flow.labels[node.args[0]].expand(label_shape(node))  # type: ignore[index]


def _moved(flow: Flow, node: Node) -> Labels | None:
    return node.target(flow.labels[node.args[0]], *node.args[1:])  # type: ignore[operator,index]


def _cut(flow: Flow, node: Node) -> Any:
    """Slices, chunks and selections: along an axis of channels, of the labels; along tokens, nothing."""
    given = operands(node)
    axis, source = given["dim"], node.args[0]
    labels = flow.labels[source]  # type: ignore[index]
    if varies(source, axis) or labels.shape[axis] == 1:  # type: ignore[arg-type]
        if isinstance(edit.value(node), torch.Tensor):
            return labels.select(axis, 0) if node.target is aten.select.int else labels
        return tuple(labels for _ in edit.value(node))
    return node.target(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _item(flow: Flow, node: Node) -> Any:
    found = flow.labels[node.args[0]]  # type: ignore[index]
    return found[node.args[1]] if isinstance(found, tuple | list) else None


def _cat(flow: Flow, node: Node) -> Labels | None:
    tensors, axis = operand(node, "tensors"), operand(node, "dim")
    found = [flow.labels.get(tensor) for tensor in tensors]
    known = [labels for labels in found if labels is not None]
    if len(known) < len(found):
        return _unknown(flow, node, f"{where(node)} joins them with what was not followed")
    if node.target is aten.stack.default:
        return torch.stack(known, axis)
    if varies(node, axis):
        for labels in known[1:]:
            flow.tie(labels, known[0])
        return known[0]
    return torch.cat(known, axis)


def _filled(flow: Flow, node: Node) -> Labels | None:
    x, mask, fill = node.args[:3]
    labels = _labels(flow, x)
    if labels is None or fill != 0 or _spans(mask, labels):
        return _unknown(flow, node)
    return labels.expand(label_shape(node))


def _kept(flow: Flow, node: Node) -> Labels | None:
    return flow.labels[node.args[0]]  # type: ignore[index]


RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _product),
    **dict.fromkeys((aten.neg.default, aten.to.dtype, aten.clone.default, aten.dropout.default), _unary(Map, "")),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar), _unary(Map, "")),
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default, aten.abs.default), _unary(HOMOGENEOUS, "is not linear")),
    **dict.fromkeys(
        (
            *(aten.silu.default, aten.gelu.default, aten.tanh.default, aten.sigmoid.default, aten.softplus.default, aten.elu.default),
            *(aten.hardtanh.default, aten.clamp.default, aten.square.default, aten.pow.Tensor_Scalar, aten.exp.default, aten.mish.default),
            *(aten.add.Scalar, aten.sub.Scalar),
        ),
        _unary(ELEMENTWISE, "is not linear"),
    ),
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints), _reshape),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), _expand),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default, aten.repeat_interleave.self_int), _moved),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.unbind.int), _cut),
    **dict.fromkeys((aten.split_with_sizes.default, aten.flip.default), _cut),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    aten.masked_fill.Scalar: _filled,
    getitem: _item,
}
LAYERS = (aten.linear.default, aten.embedding.default)  # they open spaces, whatever they read


def follow(flow: Flow, node: Node) -> Any:
    """The labels of a call's value; None if it carries no channels."""
    if not isinstance(edit.value(node), torch.Tensor | tuple | list):
        return None
    if node.target not in LAYERS and not any(read in flow.labels for read in node.all_input_nodes):
        return None
    return RULES.get(node.target, _unknown)(flow, node)
