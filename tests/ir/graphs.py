"""Small captured graphs for tests."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.graph import CodeGen


class Applied(nn.Module):
    """A function of an input and named parameters, as a module."""

    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def traced(function: Callable[..., Tensor], x: Tensor, **parameters: Tensor) -> GraphModule:
    """The flat graph of a function of `x`, whose first two axes vary, and of parameters."""
    program = torch.export.export(Applied(function, **parameters), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    gm = program.module(check_guards=False)
    gm.graph.set_codegen(CodeGen())
    output = gm.graph.output_node()
    output.args = (tuple(output.args[0]) if isinstance(output.args[0], list | tuple) else (output.args[0],),)
    gm.recompile()
    return gm


def operators(gm: GraphModule) -> list[str]:
    """The names of a graph's calls, in order, without sizes."""
    names = [str(node.target).removeprefix("aten.").removesuffix(".default") for node in gm.graph.nodes if node.op == "call_function"]
    return [name for name in names if not name.startswith("sym_size")]
