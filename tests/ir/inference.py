"""Whether recorded shapes are those that the operators give: every value is inferred again, which is slow, and compared."""

from typing import Any

import torch
from torch.fx import GraphModule

from ir import edit
from ir.errors import GraphError
from ir.text import node_text, where


def check_shapes(gm: GraphModule) -> None:
    """Infer the value of every call from those of its operands, and compare fixed sizes and dtype with what is recorded.

    It takes about 10 ms a call, symbols being slow, so it does not run between passes as `verify` does; the graph is not changed.

    Raises:
        GraphError: the first call whose value cannot be inferred, or is recorded otherwise.
    """
    for node in [node for node in gm.graph.nodes if node.op == "call_function"]:
        recorded = edit.value(node)
        try:
            edit.infer(node)
            found = described(edit.value(node))
        except (RuntimeError, ValueError) as error:
            found = f"an error: {error}"
        node.meta["val"] = recorded
        if found != described(recorded):
            what = f"%{node.name} is recorded as {described(recorded)}, and gives {found}"
            raise GraphError(what, where=f"{where(node)}\n{node_text(node)}", remedy="infer it again with `edit.infer`")


def described(value: Any) -> Any:
    """Fixed sizes, None for those that vary, and dtype; of every result."""
    if isinstance(value, tuple | list):
        return [described(each) for each in value]
    if not isinstance(value, torch.Tensor):
        return None
    return [size if isinstance(size, int) else None for size in value.shape], value.dtype
