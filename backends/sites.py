"""Find the quantized sites of a graph: a linear or an embedding that reads a dequantized weight."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import ir.ops
from ir.edit import attribute, module_path
from ir.encoding import Encoding
from ir.errors import GraphError

assert ir.ops is not None  # imported for the operators that it registers

FXPRESS = torch.ops.fxpress
ATEN = torch.ops.aten
OPERATORS: Mapping[Any, str] = {ATEN.linear.default: "linear", ATEN.embedding.default: "embedding"}
WEIGHT_OPERAND: Mapping[Any, int] = {ATEN.linear.default: 1, ATEN.embedding.default: 0}


@dataclass(frozen=True)
class Weight:
    """A quantized weight as the graph holds it: codes [N, K], scales and zero points by block."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    encoding: Encoding


@dataclass(frozen=True)
class Activation:
    """The rounding of a site's input: the float that is rounded, and its scale and zero point unless they are dynamic."""

    source: Node
    encoding: Encoding
    scale: Node
    zero_point: Node | None


@dataclass(frozen=True)
class QuantizedSite:
    """A linear or embedding `node` whose weight is dequantized from constants, with its input's rounding if there is one.

    Its `name` is that of the weight, with `#2` for its second reader and so on.
    """

    node: Node
    weight: Weight
    activation: Activation | None
    name: str

    @property
    def operator(self) -> str:
        """`linear` or `embedding`."""
        return OPERATORS[self.node.target]

    @property
    def path(self) -> str:
        """Where users find the site: the module path, or the weight's name."""
        return module_path(self.node) or self.name


def is_call(node: object, target: object) -> bool:
    """Whether `node` calls the operator `target`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target == target


def quantized_sites(gm: GraphModule) -> Iterator[QuantizedSite]:
    """Every quantized linear and embedding, in graph order."""
    readers: dict[str, int] = {}
    for node in list(gm.graph.nodes):
        index = WEIGHT_OPERAND.get(node.target)
        if index is None or not is_call(node.args[index], FXPRESS.dequantize.default):
            continue
        dequantize = node.args[index]
        source = dequantize.args[0]
        if source.op != "get_attr":
            continue
        name = weight_name(source)
        readers[name] = readers.get(name, 0) + 1
        unique = name if readers[name] == 1 else f"{name}#{readers[name]}"
        activation = activation_of(node) if node.target == ATEN.linear.default else None
        yield QuantizedSite(node, weight_of(gm, dequantize), activation, unique)


def weight_name(codes: Node) -> str:
    """The weight's own name, from the name of its codes."""
    return re.sub(r"[._]codes(_\d+)?$", "", str(codes.target))


def weight_of(gm: GraphModule, dequantize: Node) -> Weight:
    """The constants that a weight's dequantize reads."""
    codes, scale, zero_point, encoding = dequantize.args[:4]
    operands = [operand for operand in (codes, scale, zero_point) if operand is not None]
    if any(not isinstance(operand, Node) or operand.op != "get_attr" for operand in operands):
        raise GraphError("a weight's codes, scales and zero points are constants", where=str(dequantize))
    tensors = [None if operand is None else attribute(gm, operand) for operand in (codes, scale, zero_point)]  # type: ignore[arg-type]
    assert tensors[0] is not None and tensors[1] is not None
    return Weight(tensors[0], tensors[1], tensors[2], Encoding.parse(str(encoding)))


def activation_of(node: Node) -> Activation | None:
    """The rounding of a linear's input; None if it reads a float."""
    dequantize = node.args[0]
    if not isinstance(dequantize, Node) or not is_call(dequantize, FXPRESS.dequantize.default):
        return None
    quantize = dequantize.args[0]
    if not isinstance(quantize, Node) or not is_call(quantize, FXPRESS.quantize.default):
        return None
    x, scale, zero_point, encoding = quantize.args
    assert isinstance(x, Node) and isinstance(scale, Node)
    return Activation(x, Encoding.parse(str(encoding)), scale, zero_point if isinstance(zero_point, Node) else None)
