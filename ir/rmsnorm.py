"""Raising hand-written root mean square norms to `aten.rms_norm`.

    y = γ · x / sqrt(mean(x²) + ε)      (Zhang and Sennrich, arXiv 1910.07467)

Models spell it in many ways. They differ in how the square, the mean and the root are written, which is a matter of rows in the patterns
below, and in where the casts are and what the gain is, which `_grow` follows through the graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ir.edit import add_attribute, attribute, emit, replace, value
from ir.match import Cast, OneOf, Op, Var, aten, behind_casts, find, is_call, is_float_cast, is_tensor, match

X, EPS, DIMS, SIZE = Cast(Var("x"), widening=True), Var("eps"), Var("dims"), Var("size")

SQUARE = OneOf(
    Op(aten.pow.Tensor_Scalar, X, 2),
    Op(aten.square.default, X),
    Op(aten.mul.Tensor, X, X),
)
MEAN = OneOf(
    Op(aten.mean.dim, SQUARE, DIMS, True),
    Op((aten.div.Tensor, aten.div.Scalar), Op(aten.sum.dim_IntList, SQUARE, DIMS, True), SIZE),
)
SHIFTED = OneOf(
    Op((aten.add.Tensor, aten.add.Scalar), Cast(MEAN), EPS, commutes=True),
    MEAN,  # no ε
)
ROOT = OneOf(
    Op(aten.sqrt.default, Cast(SHIFTED)),
    Op(aten.pow.Tensor_Scalar, Cast(SHIFTED), 0.5),
)
INVERSE_ROOT = OneOf(
    Op(aten.rsqrt.default, Cast(SHIFTED)),
    Op(aten.pow.Tensor_Scalar, Cast(SHIFTED), -0.5),
    Op(aten.reciprocal.default, Cast(ROOT)),
)
NORMALIZED = OneOf(
    Op(aten.mul.Tensor, X, Cast(INVERSE_ROOT), commutes=True),
    Op(aten.div.Tensor, X, Cast(ROOT)),
)


@dataclass(frozen=True)
class _Norm:
    """What was recognised: `last` is γ · source / rms(source), `gain` the expression of γ."""

    source: Node
    eps: float
    last: Node
    gain: Node | None = None


def raise_rms_norm(gm: GraphModule) -> int:
    """Raise hand-written RMS norms over the last axis, keeping the function up to rounding.

    Before: `%m = mean(pow(to(%x, float32), 2), [-1], True)`, `mul(%w, to(mul(to(%x, float32), rsqrt(add(%m, 1e-6))), bfloat16))`
    After:  `rms_norm(%x, [64], %w, 1e-6)`

    `aten.rms_norm` computes in float32 and rounds once, at the end, so the result is at least as exact as the spelling it replaces. A gain
    that is computed from one parameter, Gemma's `1 + w`, becomes a parameter `….gain` in the dtype that it was computed in;
    `gm.meta["computed"]` holds, by its name, the name of the parameter it came from, that parameter, and the gain.

    Limits: 1. only over the last axis, of fixed size. 2. a gain that is not a vector of that size stays a multiplication of its own.
    """
    gains: dict[Node, Node] = {}
    count = 0
    for node in find(gm, aten.mul.Tensor, aten.div.Tensor):
        norm = _recognise(node)
        if norm is not None:
            _write(gm, _grow(norm), gains)
            count += 1
    return count


def _recognise(node: Node) -> _Norm | None:
    """The gainless norm that a multiplication or division completes."""
    found = match(NORMALIZED, node)
    if found is None or not isinstance(found["x"], Node):
        return None
    source, eps = found["x"], found.get("eps", 0.0)
    fake: Tensor = value(source)
    size = fake.shape[-1] if fake.ndim else None
    last_only = bool(fake.ndim and found["dims"]) and [dim % fake.ndim for dim in found["dims"]] == [fake.ndim - 1]
    if not last_only or not isinstance(size, int) or not isinstance(eps, int | float) or found.get("size", size) != size:
        return None
    return _Norm(source, float(eps), node) if fake.is_floating_point() else None


def _grow(norm: _Norm) -> _Norm:
    """Take in the casts and the gain that follow, as long as nothing else reads what is in between."""
    size, node, gain = value(norm.source).shape[-1], norm.last, norm.gain
    while len(node.users) == 1:
        previous, node = node, next(iter(node.users))
        if is_float_cast(node):
            if is_float_cast(node, widening=True):
                continue  # a reader's own cast, unless a gain follows
        elif gain is None and _is_gain(other := _factor(node, previous), size):
            gain = other
        else:
            break
        norm = _Norm(norm.source, norm.eps, node, gain)
    return norm


def _factor(node: Node, known: Node) -> Node | None:
    """The other factor of a product."""
    if not is_call(node, aten.mul.Tensor):
        return None
    factors = [factor for factor in node.args if factor is not known]
    return factors[0] if len(factors) == 1 and isinstance(factors[0], Node) else None


def _is_gain(node: Node | None, size: int) -> bool:
    return node is not None and tuple(value(node).shape) == (size,) and _parameter(node) is not None


def _parameter(node: Node) -> Node | None:
    """The only parameter that a vector is computed from; None if it reads an input, a matrix, several parameters or none."""
    if not is_tensor(node) or value(node).ndim > 1:
        return None
    if node.op == "get_attr":
        return node
    if not isinstance(node.target, OpOverload):
        return None
    sources = {_parameter(read) for read in node.all_input_nodes}
    return sources.pop() if len(sources) == 1 else None


def _evaluate(gm: GraphModule, node: Node) -> Tensor:
    """The value of an expression of parameters."""
    if node.op == "get_attr":
        return attribute(gm, node)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda read: _evaluate(gm, read))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def _gain(gm: GraphModule, expression: Node, gains: dict[Node, Node]) -> Node:
    """The parameter with the expression's value: the one it reads, or a new one."""
    plain: Node = behind_casts(expression, widening=True)
    if plain.op == "get_attr":
        return plain
    if plain not in gains:
        parameter = _parameter(plain)
        assert parameter is not None
        name = f"{str(parameter.target).rpartition('.')[0]}.gain".removeprefix(".")
        gains[plain] = made = add_attribute(gm, name, _evaluate(gm, plain), before=parameter.next)
        origin = (str(parameter.target), attribute(gm, parameter).detach(), attribute(gm, made).detach())
        gm.meta["computed"] = {**gm.meta.get("computed", {}), str(made.target): origin}
    return gains[plain]


def _write(gm: GraphModule, norm: _Norm, gains: dict[Node, Node]) -> None:
    """Replace the norm's last node by `aten.rms_norm`, cast where the source's dtype differs from the result's."""
    last, x = norm.last, norm.source
    gain = None if norm.gain is None else _gain(gm, norm.gain, gains)
    wanted = value(last).dtype
    if torch.promote_types(value(x).dtype, wanted) != value(x).dtype:
        x = emit(gm, aten.to.dtype, (x, wanted), before=last)
    new = emit(gm, aten.rms_norm.default, (x, [value(x).shape[-1]], gain, norm.eps), before=last)
    if value(new).dtype != wanted:
        new = emit(gm, aten.to.dtype, (new, wanted), before=last)
    replace(last, new)
