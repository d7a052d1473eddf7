"""`Legal`: a graph that ONNX can state, with places that take no memory for the tensors that are made when they are written."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.onnx_qdq.forms import INTEGER, Form
from backends.onnx_qdq.layout import SAFE_BITS
from ir import edit
from ir.deferred import Deferred
from ir.encoding import Encoding

INLINE = 1024  # bytes: tensors up to that size are written into the model itself


@dataclass(frozen=True)
class Lowered:
    """A site after legalization: its weight's name, its module path, its form and how its weight is stored."""

    name: str
    path: str
    form: Form
    weight: str
    activation: str
    bits: int
    shape: tuple[int, int]

    @property
    def saturates(self) -> bool:
        """Whether signed codes of the weight can overflow in kernels without VNNI."""
        return self.form is INTEGER and Encoding.parse(self.weight).bits > SAFE_BITS


def key(name: str, part: str) -> str:
    """Where a part of a site's weight lives in the legalized graph: a flat name that no module of the model has."""
    return f"onnx_{name.replace('.', '__').replace('#', '__')}__{part}"


@dataclass(frozen=True)
class Legal:
    """A graph for export.

    Args:
        graph: the graph.
        sites: its quantized sites.
        waiting: what the tensors will be that are not made yet, by name.
    """

    graph: GraphModule
    sites: list[Lowered] = field(default_factory=list)
    waiting: dict[str, Deferred] = field(default_factory=dict)

    def attach(self, name: str, tensor: Deferred, before: Node) -> Node:
        """A get_attr node for a tensor. Small ones are made at once: the exporter looks at their values."""
        small = tensor.nbytes <= INLINE
        node = edit.add_attribute(self.graph, name, tensor.make().contiguous() if small else _standing(tensor), before=before)
        if not small:
            self.waiting[str(node.target)] = tensor
        return node

    def convert(self, node: Node, dtype: torch.dtype) -> None:
        """Let a get_attr node read its tensor in another dtype."""
        name, tensor = str(node.target), edit.attribute(self.graph, node).detach()
        if tensor.nbytes <= INLINE:
            edit.store(self.graph, name, tensor.to(dtype))
            return
        self.waiting[name] = Deferred(dtype, tuple(tensor.shape), lambda: tensor.to(dtype))
        edit.store(self.graph, name, _standing(self.waiting[name]))


def _standing(tensor: Deferred) -> Tensor:
    """What takes the place of a tensor that is yet to be made: its dtype and shape, and no memory."""
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
