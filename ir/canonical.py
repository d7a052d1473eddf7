"""The normal form: one spelling for each thing that captured graphs say in many ways.

`canonicalize` applies the rows of `REWRITES` in order until none of them changes anything. A row is a name and a function that sweeps over
the graph once and says how often it applied.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ir.activations import raise_activations
from ir.edit import clean, drop_unread, replace, value
from ir.linear import fold_bias, raise_linear
from ir.match import aten, find, is_call, is_tensor, operand, operands
from ir.rmsnorm import raise_rms_norm
from ir.settle import settle_sizes
from ir.spelling import CASTS, join_reshapes, spell_casts, spell_reshapes

CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


def drop_checks(gm: GraphModule) -> int:
    """Drop what checks and constrains values without computing any.

    Before: `_assert_tensor_metadata(%x, dtype=float32)`
    After:  nothing
    """
    found = [*find(gm, *CHECKS), *gm.graph.find_nodes(op="call_module", target="_guards_fn")]
    for node in found:
        gm.graph.erase_node(node)
    drop_unread(gm)
    return len(found)


def _same(a: Node, b: Node) -> bool:
    """Whether two nodes' values are known to have the same dtype, device and shape."""
    x, y = value(a), value(b)
    if (x.dtype, x.device, x.ndim) != (y.dtype, y.device, y.ndim):
        return False
    return all(statically_known_true(m == n) for m, n in zip(x.shape, y.shape, strict=True))


def _neutral(number: float) -> Callable[[Node], bool]:
    """Whether the second operand is `number`, unscaled."""
    return lambda node: isinstance(node.args[1], int | float) and node.args[1] == number


def _always(node: Node) -> bool:
    return True


IDENTITIES: dict[Any, Callable[[Node], bool]] = {
    # Every rule holds where input and output also agree in dtype, device and shape. `reshape` above makes memory layout irrelevant.
    **dict.fromkeys(CASTS, _always),
    aten.reshape.default: _always,
    aten.expand.default: _always,
    aten.expand_as.default: _always,
    aten.repeat.default: _always,
    aten.contiguous.default: _always,
    aten.clone.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.positive.default: _always,
    aten.slice.Tensor: lambda node: operand(node, "step") == 1 and operand(node, "start") in {None, 0},
    aten.dropout.default: lambda node: not operand(node, "train") or operand(node, "p") == 0,
    aten.add.Tensor: _neutral(0),
    aten.add.Scalar: _neutral(0),
    aten.sub.Tensor: _neutral(0),
    aten.sub.Scalar: _neutral(0),
    aten.mul.Tensor: _neutral(1),
    aten.mul.Scalar: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.div.Scalar: _neutral(1),
    aten.pow.Tensor_Scalar: _neutral(1),
    aten.cat.default: lambda node: len(operand(node, "tensors")) == 1,
}


def drop_identities(gm: GraphModule) -> int:
    """Drop operators that return their input.

    Before: `slice(%x, 0, 0, 9223372036854775807)`, `dropout(%x, 0.1, False)`, `to.dtype(%x, float32)` of a float32, `mul(%x, 1.0)`
    After:  `%x`

    Limit: an input or parameter that is returned keeps its copy, so that callers never get the graph's own memory.
    """
    count = 0
    for node in find(gm, *IDENTITIES):
        x = operands(node).get("tensors", [node.args[0]])[0]
        returned = any(user.op == "output" for user in node.users) and x.op != "call_function"
        if is_tensor(x) and not returned and _same(x, node) and IDENTITIES[node.target](node):
            replace(node, x)
            count += 1
    return count


def drop_true_masks(gm: GraphModule) -> int:
    """Drop conjunctions with a mask of ones.

    Before: `__and__(new_ones(%y, [], dtype=bool), %mask)`
    After:  `%mask`
    """
    count = 0
    for node in find(gm, aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        for ones, mask in (node.args[:2], node.args[1::-1]):
            if (
                is_call(ones, aten.new_ones.default, aten.ones.default)
                and isinstance(mask, Node)
                and value(mask).dtype == torch.bool
                and _same(mask, node)
            ):
                replace(node, mask)
                count += 1
                break
    return count


def share_repeated(gm: GraphModule) -> int:
    """Compute once what is computed several times, sizes by what they are.

    Before: `%a = cos(%x)`, `%b = cos(%x)`, `%m = sym_size(%ids, 0)`, `%n = sym_size(%positions, 0)` of equal size
    After:  `%a`, `%m`

    Limit: random operators, and calls whose annotations differ, stay apart.
    """
    seen: dict[Any, Node] = {}
    count = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        first = seen.setdefault(_identity(node), node)
        if first is not node:
            replace(node, first)
            count += 1
    return count


def _identity(node: Node) -> tuple[Any, ...]:
    """What two calls share if they compute the same. Operands compare as text: it tells 1 from 1.0, and names of nodes are unique."""
    size = node.meta.get("val")
    if isinstance(size, torch.SymInt):
        return ("size", size.node.expr)
    return (node.target, repr(node.args), repr(sorted(node.kwargs.items())), repr(node.meta.get("custom")))


REWRITES: dict[str, Callable[[GraphModule], int]] = {
    "drop-checks": drop_checks,  # first: checks read values that nothing else reads
    "settle-sizes": settle_sizes,  # before all that asks for sizes
    "spell-casts": spell_casts,  # before identities: what is left of the casts changes nothing
    "spell-reshapes": spell_reshapes,  # before identities: lets them drop copies that only change memory layout
    "drop-identities": drop_identities,
    "drop-true-masks": drop_true_masks,
    "join-reshapes": join_reshapes,
    "share-repeated": share_repeated,
    "raise-linear": raise_linear,
    "fold-bias": fold_bias,
    "raise-rms-norm": raise_rms_norm,
    "raise-activations": raise_activations,
}


def canonicalize(gm: GraphModule) -> dict[str, int]:
    """Bring a flat graph to normal form, in place; a second call changes nothing.

    Returns:
        How often each rewrite applied; those that did not are left out.
    """
    total = dict.fromkeys(REWRITES, 0)
    before = None
    while total != before:
        before = dict(total)
        for name, rewrite in REWRITES.items():
            total[name] += rewrite(gm)
            drop_unread(gm)
    clean(gm)
    return {name: count for name, count in total.items() if count}
