"""Exported modules as flat graphs: inputs and outputs are tensors with dotted names, whatever structures the module takes and returns."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ir import edit
from ir.canonical import drop_checks
from ir.errors import CaptureError
from ir.settle import settle_sizes
from ir.signature import CACHE, CACHE_PARTS, PRESENT, Port, Signature


def flatten(
    module: torch.nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    example: Sequence[Tensor],
    output_class: str = "",
    positional: Sequence[str] = (),
) -> GraphModule:
    """A graph over the same tensors with flat inputs and outputs, and a signature that names them.

    Args:
        module: what `ExportedProgram.module()` returns; it is changed.
        inputs: the names of its tensors, in order.
        outputs: likewise.
        example: its inputs.
        output_class: as of `Signature`.
        positional: as of `Signature`.

    Raises:
        CaptureError: the module has another number of inputs or outputs.
    """
    assert isinstance(module, GraphModule)
    module.graph.set_codegen(CodeGen())
    gm = edit.copied(module)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        edit.replace(node, node.all_input_nodes[0])  # of the empty tensors that a cache starts from, where the model makes its own
    edit.merge_attributes(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    (returned,) = gm.graph.output_node().args
    if len(placeholders) != len(inputs) or not isinstance(returned, tuple | list) or len(returned) != len(outputs):
        raise CaptureError(f"the graph has {len(placeholders)} inputs where {len(inputs)} were traced", remedy="report this model's class")
    gm.graph.output_node().args = (tuple(returned),)
    ports = [Port.of(name, node.meta["val"]) for name, node in zip(inputs, placeholders, strict=True)]
    results = [Port.of(name, node.meta["val"]) for name, node in zip(outputs, returned, strict=True)]
    gm.meta["signature"] = Signature(tuple(ports), tuple(results), output_class, tuple(positional))
    gm.meta["example"] = [leaf.detach().clone() for leaf in example]
    drop_checks(gm)
    settle_sizes(gm)
    gm.recompile()
    return gm


def input_names(inputs: Mapping[str, Any]) -> list[str]:
    """The dotted names of all tensors in keyword inputs: tensors, and caches of keys and values."""
    names: list[str] = []
    for name, v in inputs.items():
        count = len(pytree.tree_leaves(v))
        names += [name] if isinstance(v, Tensor) else [f"{name}.{i // 2}.{CACHE_PARTS[i % 2]}" for i in range(count)]
    return names


def output_names(structure: pytree.TreeSpec) -> tuple[str, list[str]]:
    """The class that a module returns, and the dotted names of the tensors in it; those of a cache begin with `present`."""
    result = pytree.tree_unflatten([torch.tensor(i) for i in range(structure.num_leaves)], structure)  # caches flatten tensors only
    fields = dict(result.items()) if hasattr(result, "items") else {f"output_{i}": v for i, v in enumerate(result)}
    names, cached = [""] * structure.num_leaves, 0
    for field, v in fields.items():
        for i, leaf in enumerate(pytree.tree_leaves(v)):
            if field.partition(".")[0] == CACHE:  # as one object, or spelled out tensor by tensor
                names[int(leaf)] = f"{PRESENT}.{cached // 2}.{CACHE_PARTS[cached % 2]}"
                cached += 1
            else:
                names[int(leaf)] = field if isinstance(v, Tensor) else f"{field}.{i}"
    return type(result).__name__, names
