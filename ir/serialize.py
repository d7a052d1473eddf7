"""Graphs as plain data, and back: JSON for nodes, safetensors for tensors. Loading resolves names in closed lists and runs nothing."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.files import inside, read_json
from ir.ops import DEQUANTIZE
from ir.resolve import resolve
from ir.store import Store
from ir.tensor_file import ALIGNED, Source, write_tensors

GRAPH_FILE, WEIGHTS_FILE, FORMAT = "graph.json", "weights.safetensors", 1
AT_ONCE = 1 << 22  # codes that are packed or unpacked at once
LARGE = 1 << 30  # bytes of weights, of which more stay on disk
NAME = re.compile(r"[^\"'\\\s]+")  # fx writes names into source code, between quotes where they are no identifiers
TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)
CONSTANTS = {name: value for name, value in vars(torch).items() if isinstance(value, TORCH_VALUES)}
# What reading a damaged file raises: from Python, from the code that fx generates and compiles, and from torch.
DAMAGE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError),
    SafetensorError,
)


def save_graph(gm: GraphModule, directory: Path) -> None:
    """Write a graph's nodes and tensors into a folder; codes of fewer than 8 bits are packed."""
    encodings = _encodings(gm)
    nodes = [_node(node) for node in gm.graph.nodes]
    packed = {name: [str(encoding), list(_tensor(gm, name).shape)] for name, encoding in encodings.items()}
    names = sorted({str(node.target) for node in gm.graph.nodes if node.op == "get_attr"})
    tensors: dict[str, Source] = {}
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name in names:
        tensor = _tensor(gm, name)
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() and key in owners and _tensor(gm, owners[key]).shape == tensor.shape:
            shared[name] = owners[key]
            continue
        owners[key] = name
        tensors[name] = _Stored(gm, name, encodings.get(name))
    write_tensors(directory / WEIGHTS_FILE, tensors)
    data = {"format": FORMAT, "nodes": nodes, "packed": packed, "shared": shared}
    (directory / GRAPH_FILE).write_text(json.dumps(data), encoding="utf-8")


@dataclass(frozen=True)
class _Stored:
    """A tensor of a graph as it is written: codes of fewer than 8 bits packed, some rows at a time."""

    gm: GraphModule
    name: str
    encoding: Encoding | None

    @property
    def dtype(self) -> torch.dtype:
        return _tensor(self.gm, self.name).dtype if self.encoding is None else torch.uint8

    @property
    def shape(self) -> Sequence[int]:
        shape = _tensor(self.gm, self.name).shape
        return shape if self.encoding is None else _packed_shape(shape, self.encoding)

    def pieces(self) -> Iterator[Tensor]:
        tensor = edit.counted(self.gm, _tensor(self.gm, self.name)).detach()
        if self.encoding is None:
            yield tensor
            return
        for rows in _rows(tensor, tensor.shape[-1]):
            yield numerics.pack(rows, self.encoding)


def _rows(tensor: Tensor, size: int) -> Sequence[Tensor]:
    """A tensor of codes, or of their bytes, as parts of as many rows as have some million codes; a row has `size` of them."""
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor[None]
    return torch.split(rows, max(1, AT_ONCE // max(size, 1)))


def _packed_shape(shape: Sequence[int], encoding: Encoding) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] * encoding.bits // 8))


def load_graph(directory: Path) -> GraphModule:
    """The graph that `save_graph` wrote, ready to run.

    Raises:
        DataError: damaged files, or operators that are not in the closed lists.
    """
    try:
        data = read_json(inside(directory, GRAPH_FILE))
        gm = GraphModule(torch.nn.Module(), Graph())
        known = _store_weights(gm, inside(directory, WEIGHTS_FILE), data["packed"])
        for name, owner in data["shared"].items():
            if owner not in known:
                raise DataError(f"{name} shares {owner!r}, which is not stored", where=str(directory))
            edit.store(gm, name, _tensor(gm, owner))
        known |= data["shared"].keys()
        made: dict[str, Node] = {}
        if [entry["op"] for entry in data["nodes"]].index("output") != len(data["nodes"]) - 1:
            raise DataError("a graph ends in its output", where=str(directory))
        for entry in data["nodes"]:
            made[entry["name"]] = _read_node(gm.graph, entry, made, known)
        gm.graph.lint()
        gm.recompile()
    except (*DAMAGE, OptionError) as error:  # an encoding that is none is an option elsewhere
        raise DataError(f"a damaged graph: {error}", where=str(directory)) from error
    return gm


def _store_weights(gm: GraphModule, path: Path, packed: dict[str, Any]) -> set[str]:
    """Put the tensors of a file into a module, codes unpacked; returns their names. Those of a large file stay on disk, mapped."""
    store, large = Store(), path.stat().st_size > LARGE
    if large:
        gm.meta[edit.STORE] = store
    stored = store.open(path)
    for name, tensor in stored.items():
        edit.counted(gm, tensor)
        if name in packed:
            edit.store(gm, name, _unpacked(name, tensor, *packed[name]))
        else:  # aligned as torch aligns memory, which decides the last bit of products
            edit.store(gm, name, tensor if large and tensor.data_ptr() % ALIGNED == 0 else tensor.clone())
    return set(stored)


def _unpacked(name: str, tensor: Tensor, text: str, shape: list[int]) -> Tensor:
    """Codes from bytes, of which there must be as many as encoding and shape say: a stated shape alone takes no memory."""
    encoding = Encoding.parse(text)
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != _packed_shape(shape, encoding) or encoding.bits >= 8:
        raise DataError(f"{name} has {tensor.dtype} {list(tensor.shape)} for codes {encoding} of the shape {shape}")
    codes = torch.empty(shape, dtype=numerics.storage_dtype(encoding))
    for rows, part in zip(_rows(codes, shape[-1]), _rows(tensor, shape[-1]), strict=True):
        rows.copy_(numerics.unpack(part, encoding, shape[-1]))
    return codes


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
    resolve(name)  # refuse now what could not be loaded
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
    if tag != "torch" or content not in CONSTANTS:
        raise DataError(f"{content!r} is not a constant of torch")
    return CONSTANTS[content]


def _argument(name: str) -> bool:
    """Whether the code that fx writes may call an argument so."""
    return name.isidentifier() and not iskeyword(name) and name != "self"


def _read_node(graph: Graph, entry: dict[str, Any], made: dict[str, Node], known: set[str]) -> Node:
    kind, target, args, kwargs = entry["op"], entry["target"], _value(entry["args"], made), _value(entry["kwargs"], made)
    if kind not in {"placeholder", "get_attr", "call_function", "output"}:
        raise DataError(f"{kind!r} is not a kind of node")
    if not (NAME.fullmatch(target) if kind == "get_attr" else kind == "call_function" or _argument(target)):
        raise DataError(f"{target!r} is not a name")
    if kind == "get_attr" and target not in known:  # a path may lead to any object of the interpreter
        raise DataError(f"{target!r} is not a stored tensor")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(map(_argument, kwargs)):
        raise DataError(f"{args!r} and {kwargs!r} are not operands")
    resolved = resolve(target) if kind == "call_function" else target
    return graph.create_node(kind, resolved, args, kwargs, entry["name"])
