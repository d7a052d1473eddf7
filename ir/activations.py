"""Raising hand-written activation functions to their operators."""

import math
from collections.abc import Mapping

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ir.edit import emit, replace
from ir.match import OneOf, Op, Var, aten, find, match

X = Var("x")


class _Near:
    """A number, up to the digits that people type."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int | float) and math.isclose(self.number, other, rel_tol=1e-7)

    __hash__ = None  # type: ignore[assignment]


def _mul(a: object, b: object) -> Op:
    return Op((aten.mul.Tensor, aten.mul.Scalar), a, b, commutes=True)


def _add(a: object, b: object) -> Op:
    return Op((aten.add.Tensor, aten.add.Scalar), a, b, commutes=True)


CUBE = OneOf(Op(aten.pow.Tensor_Scalar, X, 3), _mul(_mul(X, X), X))
INNER = _mul(_add(X, _mul(CUBE, _Near(0.044715))), _Near(math.sqrt(2 / math.pi)))
HALF_STEP = _add(Op(aten.tanh.default, INNER), 1)
ERROR_STEP = _add(Op(aten.erf.default, OneOf(Op(aten.div.Tensor, X, _Near(math.sqrt(2))), _mul(X, _Near(math.sqrt(0.5))))), 1)

ACTIVATIONS: tuple[tuple[Op, OpOverload, Mapping[str, str]], ...] = (
    # pattern, operator, its options
    (_mul(_mul(X, 0.5), HALF_STEP), aten.gelu.default, {"approximate": "tanh"}),
    (_mul(_mul(X, HALF_STEP), 0.5), aten.gelu.default, {"approximate": "tanh"}),
    (_mul(_mul(X, 0.5), ERROR_STEP), aten.gelu.default, {}),
    (_mul(_mul(X, ERROR_STEP), 0.5), aten.gelu.default, {}),
    (_mul(X, Op(aten.sigmoid.default, X)), aten.silu.default, {}),
)


def raise_activations(gm: GraphModule) -> int:
    """Raise spelled-out GELU and SiLU to their operators.

    Before: `mul(mul(%x, 0.5), add(tanh(mul(add(%x, mul(pow(%x, 3.0), 0.044715)), 0.79788456)), 1.0))`
    After:  `gelu(%x, approximate="tanh")`
    """
    count = 0
    for node in find(gm, aten.mul.Tensor, aten.mul.Scalar):
        for pattern, target, options in ACTIVATIONS:
            found = match(pattern, node)
            if found is not None and isinstance(found["x"], Node):
                replace(node, emit(gm, target, (found["x"],), options, before=node))
                count += 1
                break
    return count
