"""Deterministic graph text: what tests compare, what `fxpress inspect` prints, what the checks of effects read."""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.sites import KEY


def graph_text(gm: GraphModule, annotations: bool = True) -> str:
    """One line per node, names renumbered in order, with dtype and shape, and annotations in braces.

    Two graphs with the same text have the same operators, operands, tensor names and shapes. Symbolic sizes print as `?`.
    """
    names: dict[Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        names[node] = f"%{node.target}" if node.op in {"placeholder", "get_attr"} else f"%{len(lines)}"
        if node.op == "get_attr":
            continue
        lines.append(_line(node, names, annotations))
    return "\n".join(lines)


def node_text(node: Node) -> str:
    """One node as a line, with the graph's own names, for error messages."""
    names = {n: f"%{n.name}" for n in [node, *node.all_input_nodes]}
    return _line(node, names, True)


def _line(node: Node, names: dict[Node, str], annotations: bool) -> str:
    if node.op == "placeholder":
        return f"{names[node]}: {_type(node)}"
    if node.op == "output":
        return f"return {_operand(node.args[0], names)}"
    operands = [_operand(argument, names) for argument in node.args]
    operands += [f"{key}={_operand(argument, names)}" for key, argument in sorted(node.kwargs.items())]
    marks = (node.meta.get("custom") or {}).get(KEY) if annotations else None
    suffix = " {" + ", ".join(f"{k}: {v}" for k, v in sorted(marks.items())) + "}" if isinstance(marks, dict) and marks else ""
    return f"{names[node]} = {_target(node)}({', '.join(operands)}): {_type(node)}{suffix}"


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    text = str(target)
    if "." in text and "<" not in text:
        return text.removesuffix(".default")
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', text)}".replace("_operator", "operator")


def _type(node: Node) -> str:
    fake: Any = node.meta.get("val")
    if isinstance(fake, Tensor):
        sizes = ", ".join(str(size) if isinstance(size, int) else "?" for size in fake.shape)
        return f"{str(fake.dtype).removeprefix('torch.')}[{sizes}]"
    return "tuple" if isinstance(fake, tuple | list) else type(fake).__name__


def _operand(argument: Any, names: dict[Node, str]) -> str:
    if isinstance(argument, Node):
        return names.get(argument, f"%{argument.name}")
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(_operand(item, names) for item in argument) + "]"
    return repr(argument).removeprefix("torch.")


def where(node: Node) -> str:
    """The place a node came from: its name, its module's path, and the line of the model's source."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    lines = [line for line in lines if "/torch/nn/" not in line] or lines  # the model's own line, not the one of nn.Linear
    path = edit.module_path(node)
    return ", ".join(filter(None, [f"node %{node.name}", f"module {path}" if path else "", lines[-1] if lines else ""]))
