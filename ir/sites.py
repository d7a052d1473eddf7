"""`Site`: operand of a node, the place where a value is read; annotations live there as text that survives `torch.export`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.ops import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten
KEY = "fxpress"  # the entry of `node.meta["custom"]` that holds {operand: encoding text}

# Operators with quantized forms: the class name that `targets` and `ignore` know them by, and the operands that may be quantized.
QUANTIZABLE: dict[Any, tuple[str, dict[str, int]]] = {
    aten.linear.default: ("Linear", {"input": 0, "weight": 1}),
    aten.embedding.default: ("Embedding", {"weight": 0}),
}


@dataclass(frozen=True)
class Site:
    """Operand `name` of `node`."""

    node: Node
    name: str

    @property
    def operand(self) -> Node:
        """The node whose value is read here."""
        value = self.node.args[QUANTIZABLE[self.node.target][1][self.name]]
        assert isinstance(value, Node)
        return value

    @property
    def encoding(self) -> Encoding | None:
        """The encoding annotated here, if any."""
        text = self.node.meta.get("custom", {}).get(KEY, {}).get(self.name)
        return None if text is None else Encoding.parse(text)

    @property
    def rounded(self) -> Encoding | None:
        """The encoding that a quantized value read here has, if it is one."""
        return Encoding.parse(str(self.operand.args[3])) if self.operand.target is DEQUANTIZE else None

    def annotate(self, encoding: Encoding | None) -> None:
        """Set or remove the annotation."""
        custom = dict(self.node.meta.get("custom") or {})
        marks = {name: text for name, text in custom.get(KEY, {}).items() if name != self.name}
        custom[KEY] = marks if encoding is None else {**marks, self.name: str(encoding)}
        self.node.meta["custom"] = custom

    def read(self, new: Node) -> None:
        """Read `new` here instead."""
        self.node.update_arg(QUANTIZABLE[self.node.target][1][self.name], new)


class Mark(NamedTuple):
    """The encodings of a linear's operands: of its input, None for floating point, and of its weight.

    Text form: the weight's, and after a slash the input's if it has one: `i4[1,-1]/i8[1,-1]dynamic`.
    """

    input: Encoding | None
    weight: Encoding

    def __str__(self) -> str:
        return str(self.weight) if self.input is None else f"{self.weight}/{self.input}"

    @classmethod
    def parse(cls, text: str) -> "Mark":
        """The mark that `text` states; the exact inverse of `str`.

        Raises:
            OptionError: `text` is none.
        """
        weight, slash, given = text.partition("/")
        return cls(Encoding.parse(given) if slash else None, Encoding.parse(weight))


@dataclass(frozen=True)
class Layer:
    """A node with quantizable operands, and what people call it."""

    node: Node
    path: str

    @property
    def kind(self) -> str:
        """The class name that `targets` and `ignore` use."""
        return QUANTIZABLE[self.node.target][0]

    def site(self, name: str) -> Site:
        """Its operand `name`."""
        return Site(self.node, name)

    @property
    def weight(self) -> Node:
        """The get_attr node of its weight, or the node that computes it."""
        return self.site("weight").operand

    @property
    def mark(self) -> Mark:
        """The encodings of a linear that is annotated."""
        weight = self.site("weight").encoding
        assert weight is not None
        return Mark(self.site("input").encoding, weight)

    def annotate(self, mark: Mark) -> None:
        """Set the encodings of a linear."""
        self.site("input").annotate(mark.input)
        self.site("weight").annotate(mark.weight)

    @property
    def input_rounded(self) -> bool:
        """Whether a linear reads what is rounded already."""
        return self.site("input").operand.target is DEQUANTIZE


def layers(gm: GraphModule) -> list[Layer]:
    """All nodes with quantizable operands whose weight is a stored tensor, in graph order, by unique paths."""
    found = [
        node for node in gm.graph.nodes if node.op == "call_function" and node.target in QUANTIZABLE and stored_weight(node) is not None
    ]
    seen: dict[str, int] = {}
    result = []
    for node in found:
        path = edit.module_path(node) or str(stored_weight(node)).rpartition(".")[0]
        seen[path] = seen.get(path, 0) + 1
        result.append(Layer(node, path if seen[path] == 1 else f"{path}#{seen[path]}"))
    return result


def readers(gm: GraphModule) -> dict[Node, list[Layer]]:
    """The linears of a graph by the tensor they read, in graph order. Statistics of a tensor go by the path of its first reader."""
    found: dict[Node, list[Layer]] = {}
    for layer in layers(gm):
        if layer.kind == "Linear":
            found.setdefault(layer.site("input").operand, []).append(layer)
    return found


def chosen(gm: GraphModule, operand: str = "weight") -> list[Layer]:
    """The linears that a recipe means: those with `operand` annotated if there are any, else all but output heads; in graph order."""
    linears = [layer for layer in layers(gm) if layer.kind == "Linear"]
    outputs = heads(gm)
    return [layer for layer in linears if layer.site(operand).encoding] or [layer for layer in linears if layer.node not in outputs]


def before_rounding(node: Node) -> Node:
    """What is rounded, if `node` is an activation after rounding; else the node itself."""
    if node.target is DEQUANTIZE and isinstance(node.args[0], Node) and node.args[0].target is QUANTIZE:
        source = node.args[0].args[0]
        assert isinstance(source, Node)
        return source
    return node


def stored_weight(node: Node) -> Node | None:
    """The get_attr node behind a layer's weight, through a dequantize if it is quantized; None if the weight is computed."""
    weight = node.args[QUANTIZABLE[node.target][1]["weight"]]
    if isinstance(weight, Node) and weight.target is DEQUANTIZE:
        weight = weight.args[0]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def heads(gm: GraphModule) -> set[Node]:
    """The output heads: linears that score as many classes as some embedding has rows, and whose result no other layer reads."""
    found = layers(gm)
    rows = {edit.value(layer.weight).shape[0] for layer in found if layer.kind == "Embedding"}
    feeding: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if any(user.target in QUANTIZABLE or user in feeding for user in node.users):
            feeding.add(node)
    return {
        layer.node for layer in found if layer.kind == "Linear" and edit.value(layer.weight).shape[0] in rows and layer.node not in feeding
    }


def downstream(node: Node) -> set[Node]:
    """All nodes that depend on `node`."""
    reached: set[Node] = set()
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if user not in reached:
                reached.add(user)
                frontier.append(user)
    return reached


def matches(layer: Layer, pattern: str) -> bool:
    """Whether a pattern names the layer: its class, its whole path, its last component, or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer.path) is not None
    return pattern in {layer.kind, layer.path, layer.path.rpartition(".")[2]}


def check_patterns(patterns: Iterable[str], known: Iterable[Layer], option: str) -> None:
    """Refuse patterns that match no layer.

    Raises:
        OptionError: the pattern, with the names it could have meant; or a bad regular expression.
    """
    known = list(known)
    for pattern in patterns:
        try:
            hit = any(matches(layer, pattern) for layer in known)
        except re.error as error:
            raise OptionError(f"{pattern!r} is not a regular expression: {error}", where=option) from error
        if not hit:
            names = sorted({layer.path.rpartition(".")[2] for layer in known} | {layer.kind for layer in known})
            raise OptionError(f"{pattern!r} matches no layer", where=option, remedy=f"layers end in {names}")


def floats(gm: GraphModule) -> Iterator[tuple[Node, Tensor]]:
    """Every stored tensor that is no part of a quantized one, with its node; tensors that share memory once, by the first."""
    parts = {str(operand.target) for node, *_ in quantized(gm) for operand in node.all_input_nodes}
    seen: set[int] = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = edit.attribute(gm, node)
        if str(node.target) not in parts and (tensor.data_ptr() not in seen or not tensor.numel()):
            seen.add(tensor.data_ptr())
            yield node, tensor


def quantized(gm: GraphModule) -> Iterator[tuple[Node, Encoding, Tensor, int]]:
    """Every stored quantized tensor: its dequantize node, its encoding, its codes, and its bits with scales and zero points counted."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        if node.target is not DEQUANTIZE:
            continue
        codes, scale, zero_point, text = node.args[:4]
        assert isinstance(codes, Node)
        if codes.op != "get_attr" or str(codes.target) in seen:
            continue
        seen.add(str(codes.target))
        encoding, tensor = Encoding.parse(str(text)), edit.attribute(gm, codes)
        scales = edit.attribute(gm, scale) if isinstance(scale, Node) else torch.empty(0)
        bits = tensor.numel() * encoding.bits + scales.numel() * 8 * scales.dtype.itemsize
        if isinstance(zero_point, Node):
            bits += scales.numel() * encoding.bits
        yield node, encoding, tensor, bits
