"""What is trained around frozen integers: scales and zero points of stored weights, gains of norms, while they are being trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from ir import edit, numerics
from ir.encoding import Encoding
from ir.match import NORMS, find, operand
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from ir.rounding import SCALE_DTYPE
from ir.sites import layers
from ir.straight_through import round_through

Instead = dict[Node, Callable[..., Any]]


class TrainedWeight:
    """The scales `s e^p` and zero points `round(z + 10 d)` of one stored weight; `p` and `d` are trained, codes are not.

    Args:
        gm: the graph.
        node: the dequantize operator that the weight is read through.
        zero_points: train them, if there are any.
    """

    def __init__(self, gm: GraphModule, node: Node, *, zero_points: bool) -> None:
        self.gm, self.node, self.encoding = gm, node, Encoding.parse(str(node.args[3]))
        scale = edit.attribute(gm, self._at(1)).detach().float()
        self.first = scale
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.zero: Tensor | None = None if node.args[2] is None else edit.attribute(gm, self._at(2)).detach().float()
        self.shift = nn.Parameter(torch.zeros_like(scale)) if zero_points and self.zero is not None else None

    def _at(self, place: int) -> Node:
        found = self.node.args[place]
        assert isinstance(found, Node)
        return found

    @property
    def scale(self) -> Tensor:
        """As trained so far."""
        return (self.first * self.log_scale.exp()).clamp_min(numerics.TINY_HALF)

    @property
    def zero_point(self) -> Tensor | None:
        """As trained so far, whole numbers."""
        if self.zero is None or self.shift is None:
            return self.zero
        return round_through((self.zero + 10 * self.shift).clamp(*numerics.code_range(self.encoding)))

    def linear(self, x: Tensor, _weight: None, bias: Tensor | None = None) -> Tensor:
        """In place of `aten.linear`; nothing of the size of the weight is kept for the backward pass."""
        result: Tensor = checkpoint(self._linear, x, bias, use_reentrant=False)
        return result

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        codes = edit.attribute(self.gm, self._at(0)).float()
        shape, zero = tuple(codes.shape), self.zero_point
        levels = codes if zero is None else codes - numerics.expand(zero, self.encoding, shape)
        return nn.functional.linear(x, (levels * numerics.expand(self.scale, self.encoding, shape)).to(x.dtype), bias)

    def store(self) -> None:
        """Write what was trained into the graph."""
        edit.set_attribute(self.gm, self._at(1), numerics.stored_scale(self.scale.detach(), SCALE_DTYPE))
        zero = self.zero_point
        if self.shift is not None and zero is not None:
            edit.set_attribute(self.gm, self._at(2), zero.detach().to(torch.uint8))


class TrainedGain:
    """The gain `g (1 + p)` of a norm; one of ones where it has none yet."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.node = gm, node
        weight = operand(node, "weight")
        stored = isinstance(weight, Node) and weight.op == "get_attr"
        self.first = edit.attribute(gm, weight).detach().float() if stored else torch.ones(operand(node, "normalized_shape"))
        self.factor = nn.Parameter(torch.zeros_like(self.first))

    def norm(self, x: Tensor, shape: list[int], weight: Tensor | None = None, *rest: Any, **others: Any) -> Any:
        """In place of the norm's operator."""
        gain = (self.first * (1 + self.factor)).to(x.dtype if weight is None else weight.dtype)
        return self.node.target(x, shape, gain, *rest, **others)  # type: ignore[operator]

    def store(self) -> None:
        """Write what was trained into the graph."""
        gain, weight = (self.first * (1 + self.factor)).detach(), operand(self.node, "weight")
        if isinstance(weight, Node):
            edit.set_attribute(self.gm, weight, gain.to(edit.value(weight).dtype))
        else:
            name = f"{edit.module_path(self.node) or self.node.name}.gain"
            edit.set_operand(self.node, "weight", edit.add_attribute(self.gm, name, gain.to(edit.value(self.node).dtype), before=self.node))


def stored_linears(gm: GraphModule) -> dict[Node, list[Node]]:
    """The linears that read stored integers, by the dequantize operator they read them through."""
    found: dict[Node, list[Node]] = {}
    for layer in layers(gm):
        if layer.kind == "Linear" and layer.weight.target is DEQUANTIZE:
            found.setdefault(layer.weight, []).append(layer.node)
    return found


def norms(gm: GraphModule) -> list[Node]:
    """The norms whose gain is stored or absent, and belongs to them alone."""
    return [node for node in find(gm, *NORMS) if (weight := operand(node, "weight")) is None or _own(weight)]


def _own(weight: Any) -> bool:
    return isinstance(weight, Node) and weight.op == "get_attr" and len(weight.users) == 1


def straight_through(gm: GraphModule) -> Instead:
    """What lets gradients pass activations that are rounded: their values are rounded, their gradients are not."""
    instead: Instead = {}
    for node in find(gm, DEQUANTIZE):
        codes = node.args[0]
        if isinstance(codes, Node) and codes.target is QUANTIZE:
            instead |= {codes: _unchanged, node: _rounded}
    for node in find(gm, CHOOSE_QPARAMS):
        instead[node] = _without_gradient
    return instead


def _unchanged(x: Tensor, *_parameters: Any) -> Tensor:
    return x


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor | None, encoding: str, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        step: Tensor = DEQUANTIZE(QUANTIZE(x, scale, zero_point, encoding), scale, zero_point, encoding, dtype) - x
    return x + step


def _without_gradient(x: Tensor, *parameters: Any) -> Any:
    return CHOOSE_QPARAMS(x.detach(), *parameters)
