"""Raising matrix products with a parameter to `aten.linear`, whatever they are written with."""

from torch.fx import GraphModule, Node

from ir.edit import add_attribute, attribute, emit, replace, value
from ir.match import OneOf, Op, Var, aten, find, is_call, match

X, W, B = Var("x"), Var("weight"), Var("bias")

PRODUCT = OneOf(
    Op(aten.addmm.default, B, X, W),
    Op(aten.mm.default, X, W),
    Op(aten.matmul.default, X, W),
)
TRANSPOSED = OneOf(
    Op(aten.t.default, W),
    Op(
        aten.transpose.int,
        W,
        0,
        1,
    ),
    Op(aten.transpose.int, W, 1, 0),
    Op(aten.transpose.int, W, -1, -2),
    Op(aten.transpose.int, W, -2, -1),
    Op(aten.permute.default, W, [1, 0]),
    Op(aten.numpy_T.default, W),
    Op(aten.mT.default, W),
)
BIASED = Op(aten.add.Tensor, Op(aten.linear.default, X, W), B, commutes=True)


def raise_linear(gm: GraphModule) -> int:
    """Raise products with a parameter, such as GPT-2's `Conv1D`, to `aten.linear`.

    Before: `reshape(addmm(%b, reshape(%x, [-1, 64]), %w), [%s0, %s1, 192])`, `%w` of shape [in, out]
    After:  `linear(%x, %w_transposed, %b)`, with a new parameter `….weight_transposed` of shape [out, in]

    Limit: parameters of other than two axes are left to `matmul`.
    """
    transposed: dict[str, Node] = {}
    count = 0
    for node in find(gm, aten.addmm.default, aten.mm.default, aten.matmul.default):
        found = match(PRODUCT, node)
        weight = None if found is None else _weight(gm, found["weight"], transposed)
        if found is None or weight is None or found["x"].meta["val"].ndim < 2 or not _is_bias(found.get("bias"), value(weight).shape[0]):
            continue
        _write(gm, node, found["x"], weight, found.get("bias"))
        count += 1
    return count


def _is_bias(node: Node | None, size: int) -> bool:
    return node is None or (node.op == "get_attr" and tuple(value(node).shape) == (size,))


def _weight(gm: GraphModule, factor: Node, transposed: dict[str, Node]) -> Node | None:
    """The parameter [out, in] for a product's right factor [in, out]; None if the factor is not a parameter."""
    found = match(TRANSPOSED, factor)
    if found is not None:
        weight: Node = found["weight"]
        return weight if weight.op == "get_attr" and value(weight).ndim == 2 else None
    if factor.op != "get_attr" or value(factor).ndim != 2:
        return None
    name = str(factor.target)
    if name not in transposed:
        tensor = attribute(gm, factor).detach().t().contiguous()
        transposed[name] = add_attribute(gm, f"{name}_transposed", tensor, before=factor.next)
    return transposed[name]


def _write(gm: GraphModule, node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    """Replace a product by a linear that reads what `x` was flattened from; the reshape after it, now an identity, falls later."""
    before = x.args[0] if is_call(x, aten.reshape.default) else x
    flattened = before is not x and isinstance(before, Node) and value(before).shape[-1] == value(x).shape[-1]
    source = before if flattened else x
    operands = (source, weight) if bias is None else (source, weight, bias)
    new = emit(gm, aten.linear.default, operands, before=node)
    if flattened:
        shape = [size if isinstance(size, int) else -1 for size in value(node).shape]
        new = emit(gm, aten.reshape.default, (new, shape), before=node)
    replace(node, new)


def fold_bias(gm: GraphModule) -> int:
    """Let a linear without bias take the parameter that is added to it.

    Before: `add(linear(%x, %w), %b)`
    After:  `linear(%x, %w, %b)`
    """
    count = 0
    for product in find(gm, aten.linear.default):
        if len(product.users) != 1:
            continue
        (total,) = product.users
        found = match(BIASED, total)
        if found is None or not isinstance(found["bias"], Node) or not _is_bias(found["bias"], value(product).shape[-1]):
            continue
        if value(found["bias"]).dtype == value(product).dtype:
            replace(total, emit(gm, aten.linear.default, (found["x"], found["weight"], found["bias"]), before=total, like=product))
            count += 1
    return count
