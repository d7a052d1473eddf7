"""A written model in parts: where the graph is cut at the residual stream, and the piece of the model between two cuts.

The cuts of the graph leave the exporter as further outputs, so that they are known in the model whatever its values are called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import onnx_ir as onir
import torch
from torch.fx import GraphModule, Node

from ir import edit
from ir.blocks import blocks
from ir.signature import Port, Signature
from ir.sites import QUANTIZABLE

FLOATS = "float32"


@dataclass(frozen=True)
class Part:
    """A block of a graph, and what goes into it and comes out of it.

    Args:
        label: the module that has its layers.
        entry: the stream's values that it reads.
        exit: the stream's values that it leaves behind, and the graph's outputs that it computes.
    """

    label: str
    entry: tuple[Node, ...]
    exit: tuple[Node, ...]


def parts(gm: GraphModule) -> list[Part]:
    """The blocks of a graph. Outputs that none of them computes, because they depend on no layer, are left out."""
    given: tuple[Node, ...] = tuple(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    return [
        Part(_label(block.nodes), block.entry, (*block.exit, *(node for node in dict.fromkeys(given) if node in set(block.nodes))))
        for block in blocks(gm)[1]
    ]


def _label(nodes: Sequence[Node]) -> str:
    """What the paths of a block's layers have in common, which is the path of a single one."""
    paths = [edit.module_path(node).partition("#")[0].split(".") for node in nodes if node.target in QUANTIZABLE]
    common = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in common) or ".".join(paths[0])


def seams(found: Sequence[Part]) -> list[Node]:
    """The values of the stream at the cuts between parts."""
    return list(dict.fromkeys(node for part in found for node in part.entry))


def opened(gm: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """A copy of a graph that returns the values of further nodes too, as any copy made from it will."""
    copy = edit.copied(gm)
    twin = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    given: tuple[Node, ...] = tuple(copy.graph.output_node().args[0])  # type: ignore[arg-type]
    edit.set_outputs(copy, [*given, *(twin[node] for node in nodes)])
    return copy


def port_of(node: Node) -> Port:
    """A value of the stream as the model has it, whose floats are all of one dtype."""
    port = Port.of(node.name, edit.value(node))
    return replace(port, dtype=FLOATS) if port.torch_dtype.is_floating_point else port


def extracted(whole: onir.Model, entry: Mapping[str, Port], exit: Sequence[str], signature: Signature) -> onir.Model:
    """The piece of a written model that computes values from others; its weights stay in the model's file.

    Args:
        whole: the model, loaded. The types of the values that go in are set.
        entry: the stream's values that go in, by their names in the model.
        exit: the names of what comes out.
        signature: the model's, of whose inputs the piece has those that it reads.
    """
    named = onir.convenience.create_value_mapping(whole.graph)
    for name, port in entry.items():
        named[name].type = onir.TensorType(onir.DataType[_NAMES[port.torch_dtype]])
        named[name].shape = onir.Shape([f"{port.name}_{axis}" if size is None else size for axis, size in enumerate(port.shape)])
    inputs = [port.name for port in signature.inputs]
    graph = onir.convenience.extract(whole.graph, [*entry, *inputs], exit)
    for v in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(v)
    return onir.Model(graph, ir_version=whole.ir_version)


_NAMES = {
    torch.float32: "FLOAT",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
}
