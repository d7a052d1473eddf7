"""Where a graph keeps its key/value cache: new keys and values are appended to past ones, and the result is returned."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.match import aten, is_call, operand
from ir.ops import PACK, QUANTIZE
from ir.signature import CACHE, PRESENT, TOKENS, Signature
from ir.text import node_text


@dataclass(frozen=True)
class CacheSite:
    """Keys or values of one layer.

    Args:
        name: layer and part: `0.key`.
        past: the input that holds those of former calls, `[batch, heads, past, width]`.
        new: those of this call.
        joined: `cat([past, new])` along the tokens, which attention reads.
        slices: what drops old tokens of `joined` before it is returned, in order; empty unless a window slides.
    """

    name: str
    past: Node
    new: Node
    joined: Node
    slices: tuple[Node, ...] = ()

    @property
    def heads(self) -> int:
        """The number of heads."""
        return int(edit.value(self.past).shape[1])

    @property
    def width(self) -> int:
        """Elements of one head."""
        return int(edit.value(self.past).shape[3])

    @property
    def part(self) -> str:
        """`key` or `value`."""
        return self.name.rpartition(".")[2]


def cache_sites(gm: GraphModule) -> Iterator[tuple[str, CacheSite | str]]:
    """Every key and value of the cache that is kept in floating point, in order: its name, and its site or the reason why it has none."""
    signature: Signature = gm.meta["signature"]
    results = dict(zip((port.name for port in signature.outputs), gm.graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
    for port, past in zip(signature.inputs, evaluate.placeholders(gm), strict=True):
        if port.cached and port.torch_dtype.is_floating_point and not port.keeps_scales:
            name = port.name.removeprefix(f"{CACHE}.")
            yield name, _site(name, past, results.get(f"{PRESENT}.{name}"))


def rounded_sites(gm: GraphModule) -> Iterator[tuple[str, Node]]:
    """Every key and value of the cache that is kept as codes, in order: its name, and the operator that quantizes new ones."""
    signature: Signature = gm.meta["signature"]
    for port, result in zip(signature.outputs, gm.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if port in signature.coded:
            joined, _ = _behind_slices(result)
            new: Any = operand(joined, "tensors")[1]
            new = new.args[0] if is_call(new, PACK) else new
            if is_call(new, QUANTIZE):
                yield port.name.removeprefix(f"{PRESENT}."), new


def _site(name: str, past: Node, result: Node | None) -> CacheSite | str:
    """The site of one input, or why it is none."""
    if result is None:
        return f"the graph takes {CACHE}.{name} and returns no {PRESENT}.{name}"
    joined, slices = _behind_slices(result)
    dim = operand(joined, "dim") if is_call(joined, aten.cat.default) else None
    tensors: Any = operand(joined, "tensors") if dim is not None else ()
    if dim not in (TOKENS, TOKENS - 4) or len(tensors) != 2 or tensors[0] is not past:
        return f"{PRESENT}.{name} is {node_text(joined)}, not the past with new tokens appended"
    shape = edit.value(past).shape
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return f"{CACHE}.{name} is not [batch, heads, past, width] with fixed heads and width"
    others = [user for user in past.users if user is not joined and not is_call(user, aten.sym_size.int)]
    if others:
        return f"past tokens are also read by {node_text(others[0])}"
    return CacheSite(name, past, tensors[1], joined, slices)


def _behind_slices(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node before slices of the tokens, and these."""
    slices: list[Node] = []
    while is_call(node, aten.slice.Tensor) and operand(node, "dim") in (TOKENS, TOKENS - 4) and isinstance(node.args[0], Node):
        slices.insert(0, node)
        node = node.args[0]
    return node, tuple(slices)
