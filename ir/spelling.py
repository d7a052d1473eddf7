"""One spelling for casts and for changes of shape."""

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ir.edit import emit, replace, set_operand, value
from ir.match import aten, find, is_call, operand

CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)


def spell_casts(gm: GraphModule) -> int:
    """Write every change of dtype as `to.dtype`.

    Before: `type_as(%x, %y)`, `to.device(%x, cpu, torch.bool)`, `to.dtype_layout(%x, dtype=torch.bool, layout=..., device=cpu)`
    After:  `to.dtype(%x, torch.bool)`
    """
    count = 0
    for node in find(gm, *CASTS):
        x, new = node.args[0], value(node)
        plain = is_call(node, aten.to.dtype) and len(node.args) == 2 and not node.kwargs
        if isinstance(x, Node) and not plain and value(x).device == new.device and value(x).dtype != new.dtype:
            replace(node, emit(gm, aten.to.dtype, (x, new.dtype), before=node))
            count += 1
    return count


def spell_reshapes(gm: GraphModule) -> int:
    """Write every change of shape that keeps the order of elements as `reshape`, which does not ask how memory is laid out.

    Before: `view(%x, [%s0, %s1, -1, 16])`, `flatten(%x, 2)`
    After:  `reshape(%x, [%s0, %s1, -1, 16])`, `reshape(%x, [0:s0, 1:s1, 64])`
    """
    count = 0
    for node in find(gm, *RESHAPES):
        given = is_call(node, aten.view.default, aten._unsafe_view.default)
        shape = operand(node, "size") if given else _sizes(gm, node)
        if shape is not None:
            replace(node, emit(gm, aten.reshape.default, (node.args[0], shape), before=node))
            count += 1
    return count


def _sizes(gm: GraphModule, node: Node) -> list[Any] | None:
    """Operands for a reshape to the shape of a node: sizes that vary are read off its input, the last that its input lacks is inferred."""
    x = node.args[0]
    sizes: list[Any] = []
    for size in value(node).shape:
        axis = next((axis for axis, known in enumerate(value(x).shape) if statically_known_true(known == size)), None)  # type: ignore[arg-type]
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(-1 if axis is None else emit(gm, aten.sym_size.int, (x, axis), before=node))
    return sizes if sizes.count(-1) <= 1 else None


def join_reshapes(gm: GraphModule) -> int:
    """Let a reshape read what the reshape before it reads.

    Before: `%b = reshape(%a, [-1, 64])`, `reshape(%b, [%s0, %s1, 64])`
    After:  `reshape(%a, [%s0, %s1, 64])`
    """
    count = 0
    for node in find(gm, aten.reshape.default):
        before = node.args[0]
        if is_call(before, aten.reshape.default) and isinstance(before, Node):
            set_operand(node, "self", before.args[0])
            count += 1
    return count
