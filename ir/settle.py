"""Sizes that turned out to be fixed while a graph was traced."""

from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ir import edit


def settle_sizes(gm: GraphModule) -> int:
    """Write sizes that turned out to be fixed while the graph was traced as numbers; says how many nodes recorded one as a symbol."""
    mode = edit.fake_mode(gm.graph)
    count = 0
    for node in list(gm.graph.nodes):
        fake = node.meta.get("val")
        if isinstance(fake, torch.SymInt) and _settled(fake) is not fake:
            for user in list(node.users):
                _pass_number(user, node, _settled(fake))
            count += 1
        elif isinstance(fake, torch.Tensor) and any(_settled(size) is not size for size in fake.shape):
            with mode if mode is not None else nullcontext():
                shape, stride = [_settled(size) for size in fake.shape], [_settled(step) for step in fake.stride()]
                node.meta["val"] = torch.empty_strided(shape, stride, dtype=fake.dtype, device=fake.device)
            count += 1
    return count


def _pass_number(user: Node, old: Node, number: int) -> None:
    """Let a call read a number where it read a node."""

    def substitute(read: Node) -> Any:
        return number if read is old else read

    user.args, user.kwargs = map_arg(user.args, substitute), map_arg(user.kwargs, substitute)


def _settled(size: Any) -> Any:
    """A size as a number if it is known, itself otherwise."""
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if number is None else number
