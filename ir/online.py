"""Which inputs only an operator can rotate: what a nonlinearity makes, and no norm."""

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from ir.channels import ChannelGroup
from ir.match import aten
from ir.ops import HADAMARD
from ir.sites import Layer, heads, readers

NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def online_inputs(gm: GraphModule, groups: Sequence[ChannelGroup]) -> dict[Node, list[Layer]]:
    """Tensors that cannot be rotated offline, and the linears that read them.

    Where a recipe has annotated inputs, only these count. Output heads are left out, and norms: their inputs are the residual stream.

    Args:
        gm: the graph.
        groups: its groups of the kind ROTATE.
    """
    frozen = {member.node for group in groups if group.reason for member in group.readers if member.axis == 1}
    outputs = heads(gm)
    annotated = any(layer.site("input").encoding for found in readers(gm).values() for layer in found)
    result: dict[Node, list[Layer]] = {}
    for source, found in readers(gm).items():
        wanted = [
            layer
            for layer in found
            if layer.weight in frozen and layer.node not in outputs and (layer.site("input").encoding or not annotated)
        ]
        shared = any(len(layer.weight.users) > 1 for layer in wanted)
        if wanted and not shared and source.target not in (*NORMS, HADAMARD) and source.op == "call_function":
            result[source] = wanted
    return result
