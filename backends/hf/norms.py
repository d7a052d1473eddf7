"""The vectors that a class's norms must hold to compute what a graph's norms do: solved for, not looked up.

A norm is affine in its vectors: `y = a(x) + Σ θ_p ⊙ d_p(x)`. What `a` and `d_p` are is read off the module's outputs on a probe. So a gain
of one is a one for most classes, and a zero for those that compute `1 + w`. A layer norm whose mean was folded into what it reads is an RMS
norm in the graph, and the same on a probe of mean zero; the comparison of logits tells whether its inputs have that mean.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ir import edit
from ir.match import NORMS, find, operands
from passes.probe import relative_error

TOKENS = 16  # of the probe
CLOSE = 1e-4  # of the outputs, relative
EXACT = 1e-5  # of a vector's elements: as near to a whole number they are one, which float32 arithmetic missed


def norm_vectors(gm: GraphModule, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors of norms whose gains or biases are not stored in the graph as the class names and means them.

    Args:
        gm: the graph.
        model: of the class, on any device.
        stored: the graph's tensors by the class's names; those that it has need no solving.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for node in find(gm, *NORMS):
        path = edit.module_path(node)
        names = [name for name, _ in modules[path].named_parameters(recurse=False)] if path in modules else []
        if names and any(f"{path}.{name}" not in stored for name in names):
            solved = _solved(gm, node, modules[path], names)
            found |= {f"{path}.{name}": vector for name, vector in solved.items()}
    return found


def _solved(gm: GraphModule, node: Node, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The module's vectors that make it compute what the node does; nothing if there are none."""
    given = operands(node)
    size, dtype = int(given["normalized_shape"][-1]), edit.value(node).dtype
    x = torch.randn(TOKENS, size, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(-1, keepdim=True)
    wanted = _of_node(gm, node, x)
    own = copy.deepcopy(module).to_empty(device="cpu").float()
    base = _of_module(own, x, dict.fromkeys(names, torch.zeros(size)))
    directions = []
    for name in names:
        ones = {other: torch.full((size,), float(other == name)) for other in names}
        directions.append(_of_module(own, x, ones) - base)
    D = torch.stack(directions, -1).transpose(0, 1).double()  # [channels, tokens, vectors]
    theta = torch.linalg.lstsq(D, (wanted - base).T.unsqueeze(-1).double()).solution[..., 0]
    theta = torch.where((theta - theta.round()).abs() < EXACT, theta.round(), theta)
    solved = {name: theta[:, index].float() for index, name in enumerate(names)}
    error = relative_error((_of_module(own, x, solved),), (wanted,))
    return {name: vector.to(dtype) for name, vector in solved.items()} if error < CLOSE else {}


def _of_node(gm: GraphModule, node: Node, x: Tensor) -> Tensor:
    """The node's function of another input."""
    read: dict[str, Any] = {**operands(node), "input": x}
    for name in ("weight", "bias"):
        if isinstance(read.get(name), Node):
            read[name] = edit.attribute(gm, read[name]).detach().float()
    with torch.no_grad():
        return node.target(**read)  # type: ignore[operator, no-any-return]


def _of_module(module: nn.Module, x: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
    """The module's function with other vectors."""
    with torch.no_grad():
        return torch.func.functional_call(module, dict(vectors), (x,))  # type: ignore[no-any-return]
