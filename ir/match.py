"""Finding things in a graph: nodes by operator, operands by schema name, expressions by shape.

A pattern is an `Op` over patterns, a `Var` that binds what it meets, `OneOf` several, `Cast` of one, or a plain value that has to be equal:

    SQUARE = OneOf(Op(aten.square.default, Var("x")), Op(aten.pow.Tensor_Scalar, Var("x"), 2))
    MEAN = Op(aten.mean.dim, SQUARE, Var("dims"), True)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

aten = torch.ops.aten

Bindings = Mapping[str, Any]
NORMS = (aten.rms_norm.default, aten.layer_norm.default)

Operand: TypeAlias = Any  # what fx passes: a node, a number, a dtype, None, or lists of these


def find(gm: GraphModule, *targets: Callable[..., Any]) -> list[Node]:
    """The calls of any of the targets, in the graph's order."""
    wanted = set(targets)
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in wanted]


def is_call(value: object, *targets: Callable[..., Any]) -> TypeGuard[Node]:
    """Whether `value` is a node that calls one of the targets."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def is_tensor(value: object) -> TypeGuard[Node]:
    """Whether `value` is a node with a tensor as its value."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def operands(node: Node) -> dict[str, Operand]:
    """Everything a call passes, defaults included, by schema name in schema order; empty for calls without a schema (sizes' arithmetic)."""
    if not isinstance(node.target, OpOverload):
        return {}
    values = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


def operand(node: Node, name: str) -> Operand:
    """The operand of that schema name, or its default.

    Raises:
        KeyError: the operator has no such operand.
    """
    return operands(node)[name]


class Var:
    """Matches anything and binds it; a second meeting has to be the same thing."""

    def __init__(self, name: str) -> None:
        self.name = name


class Op:
    """Matches a call of `target` (or one of a tuple of targets) whose first operands match; the others have their defaults."""

    def __init__(self, target: OpOverload | tuple[OpOverload, ...], *operands: object, commutes: bool = False) -> None:
        self.targets = target if isinstance(target, tuple) else (target,)
        self.orders = (operands, (operands[1], operands[0], *operands[2:])) if commutes else (operands,)


class OneOf:
    """Matches what one of the patterns matches, the first that does."""

    def __init__(self, *patterns: object) -> None:
        self.patterns = patterns


class Cast:
    """Matches the pattern behind any floating-point casts; with `widening`, only behind casts that lose nothing."""

    def __init__(self, pattern: object, *, widening: bool = False) -> None:
        self.pattern, self.widening = pattern, widening


def match(pattern: object, value: object) -> dict[str, Any] | None:
    """What the pattern's variables are bound to in the first way that it matches, or None."""
    found = next(_ways(pattern, value, {}), None)
    return None if found is None else dict(found)


def _ways(pattern: object, value: object, bound: Bindings) -> Iterator[Bindings]:
    """Every way in which `pattern` matches `value` beside what is already bound."""
    if isinstance(pattern, Var):
        if pattern.name not in bound:
            yield {**bound, pattern.name: value}
        elif _same(bound[pattern.name], value):
            yield bound
    elif isinstance(pattern, Op):
        yield from _op_ways(pattern, value, bound)
    elif isinstance(pattern, OneOf):
        for alternative in pattern.patterns:
            yield from _ways(alternative, value, bound)
    elif isinstance(pattern, Cast):
        yield from _ways(pattern.pattern, behind_casts(value, widening=pattern.widening), bound)
    elif _same(pattern, value):
        yield bound


def _op_ways(pattern: Op, value: object, bound: Bindings) -> Iterator[Bindings]:
    if not is_call(value, *pattern.targets):
        return
    assert isinstance(value.target, OpOverload)
    values = list(operands(value).values())
    defaults = [argument.default_value for argument in value.target._schema.arguments]
    for order in pattern.orders:
        if len(order) > len(values) or values[len(order) :] != defaults[len(order) :]:
            continue
        ways: list[Bindings] = [bound]
        for inner, given in zip(order, values, strict=False):
            ways = [further for way in ways for further in _ways(inner, given, way)]
        yield from ways


def _same(a: object, b: object) -> bool:
    """Identical nodes, or equal values."""
    return a is b if isinstance(a, Node) or isinstance(b, Node) else bool(a == b)


def behind_casts(value: object, *, widening: bool = False) -> Operand:
    """The value before floating-point casts, or before those that lose nothing."""
    while is_call(value, aten.to.dtype) and is_float_cast(value, widening=widening):
        value = value.args[0]
    return value


def is_float_cast(node: Node, *, widening: bool = False) -> bool:
    """Whether a node in normal form casts from one floating-point dtype to another; with `widening`, to one that holds every value."""
    if not is_call(node, aten.to.dtype):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if not (before.is_floating_point and after.is_floating_point):
        return False
    return not widening or torch.promote_types(before, after) == after
