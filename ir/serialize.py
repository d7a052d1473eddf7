"""Graphs as plain data, and back: JSON for nodes, safetensors for tensors. Loading resolves names in closed lists and runs nothing."""

import json
import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError
from ir.ops import DEQUANTIZE

GRAPH_FILE, WEIGHTS_FILE, FORMAT = "graph.json", "weights.safetensors", 1
NAMESPACES = ("aten", "fxpress")
# Arithmetic on sizes; nothing else of these modules: `operator.attrgetter` alone reaches every object of the interpreter.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{function.__module__}:{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, operator.neg),
        *(operator.pos, operator.abs, operator.and_, operator.or_, operator.not_, operator.getitem),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(math.ceil, math.floor, math.trunc),
        *(torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_ite, torch.sym_sum),
    )
}
NAME = re.compile(r"[^\"'\\\s]+")  # fx writes names into source code, between quotes where they are no identifiers
TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def save_graph(gm: GraphModule, directory: Path) -> None:
    """Write a graph's nodes and tensors into a folder; codes of fewer than 8 bits are packed."""
    encodings = _encodings(gm)
    nodes = [_node(node) for node in gm.graph.nodes]
    packed = {name: [str(encoding), list(_tensor(gm, name).shape)] for name, encoding in encodings.items()}
    names = sorted({str(node.target) for node in gm.graph.nodes if node.op == "get_attr"})
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name in names:
        tensor = _tensor(gm, name)
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() and key in owners and _tensor(gm, owners[key]).shape == tensor.shape:
            shared[name] = owners[key]
            continue
        owners[key] = name
        tensors[name] = (numerics.pack(tensor, encodings[name]) if name in encodings else tensor).detach().contiguous()
    save_file(tensors, directory / WEIGHTS_FILE)
    data = {"format": FORMAT, "nodes": nodes, "packed": packed, "shared": shared}
    (directory / GRAPH_FILE).write_text(json.dumps(data), encoding="utf-8")


def load_graph(directory: Path) -> GraphModule:
    """The graph that `save_graph` wrote, ready to run.

    Raises:
        DataError: damaged files, or operators that are not in the closed lists.
    """
    try:
        data = json.loads((directory / GRAPH_FILE).read_text(encoding="utf-8"))
        gm = GraphModule(torch.nn.Module(), Graph())
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                tensor = stored.get_tensor(name).clone()  # aligned as torch aligns memory, which decides the last bit of products
                if name in data["packed"]:
                    text, shape = data["packed"][name]
                    tensor = numerics.unpack(tensor, Encoding.parse(text), shape[-1])
                edit.store(gm, name, tensor)
        for name, owner in data["shared"].items():
            edit.store(gm, name, _tensor(gm, owner))
        made: dict[str, Node] = {}
        if [entry["op"] for entry in data["nodes"]].index("output") != len(data["nodes"]) - 1:
            raise DataError("a graph ends in its output", where=str(directory))
        for entry in data["nodes"]:
            made[entry["name"]] = _read_node(gm.graph, entry, made)
        gm.graph.lint()
        gm.recompile()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError) as error:
        raise DataError(f"a damaged graph: {error}", where=str(directory)) from error
    return gm


def _tensor(gm: GraphModule, name: str) -> Tensor:
    holder, _, leaf = name.rpartition(".")
    tensor = getattr(gm.get_submodule(holder), leaf)
    if not isinstance(tensor, Tensor):
        raise DataError(f"{name} is not a tensor")
    return tensor


def _encodings(gm: GraphModule) -> dict[str, Encoding]:
    """Encodings of the codes that packing makes smaller, by tensor name."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is DEQUANTIZE and isinstance(node.args[0], Node) and node.args[0].op == "get_attr":
            encoding = Encoding.parse(str(node.args[3]))
            if encoding.bits < 8:
                found[str(node.args[0].target)] = encoding
    return found


def _node(node: Node) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else _name(node.target)
    return {"name": node.name, "op": node.op, "target": target, "args": _data(node.args), "kwargs": _data(dict(node.kwargs))}


def _name(target: Callable[..., Any]) -> str:
    name = str(target) if isinstance(target, torch._ops.OpOverload) else f"{target.__module__}:{target.__name__}"
    _resolve(name)  # refuse now what could not be loaded
    return name


def _data(value: Any) -> Any:
    """JSON for an operand: nodes, tuples and torch's constants are tagged."""
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_data(item) for item in value]}
    if isinstance(value, list):
        return [_data(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _data(item) for key, item in value.items()}}
    if isinstance(value, TORCH_VALUES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(f"an operand of type {type(value).__name__} cannot be saved")


def _value(data: Any, made: dict[str, Node]) -> Any:
    if isinstance(data, list):
        return [_value(item, made) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "node":
        return made[content]
    if tag == "tuple":
        return tuple(_value(item, made) for item in content)
    if tag == "dict":
        return {key: _value(item, made) for key, item in content.items()}
    if tag == "device":
        return torch.device(content)
    constant = getattr(torch, content)
    if tag != "torch" or not isinstance(constant, TORCH_VALUES):
        raise DataError(f"{content!r} is not a constant of torch")
    return constant


def _read_node(graph: Graph, entry: dict[str, Any], made: dict[str, Node]) -> Node:
    kind, target, kwargs = entry["op"], entry["target"], _value(entry["kwargs"], made)
    if kind not in {"placeholder", "get_attr", "call_function", "output"}:
        raise DataError(f"{kind!r} is not a kind of node")
    if not (NAME.fullmatch(target) if kind == "get_attr" else kind == "call_function" or target.isidentifier()):
        raise DataError(f"{target!r} is not a name")
    if not all(key.isidentifier() for key in kwargs):
        raise DataError(f"operands {list(kwargs)} are not names")
    resolved = _resolve(target) if kind == "call_function" else target
    return graph.create_node(kind, resolved, _value(entry["args"], made), kwargs, entry["name"])


def _resolve(name: str) -> Callable[..., Any]:
    """The operator called `name`, from the namespaces and functions that graphs may use.

    Raises:
        DataError: any other; one that changes its operands, or reads or writes files.
    """
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    namespace, operation, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    found = getattr(getattr(getattr(torch.ops, namespace), operation), overload) if namespace in NAMESPACES else None
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable or "filename" in {a.name for a in found._schema.arguments}:
        raise DataError(f"{name!r} is not an operator of graphs")
    return found
