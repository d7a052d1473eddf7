"""Which inputs only an operator can rotate: what a nonlinearity makes, and no norm."""

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from ir.channels import ChannelGroup
from ir.match import NORMS, behind_casts, is_call
from ir.ops import HADAMARD
from ir.sites import Layer, chosen

Found = dict[Node, list[Layer]]


def online_inputs(gm: GraphModule, groups: Sequence[ChannelGroup]) -> tuple[Found, dict[str, str]]:
    """Tensors that a nonlinearity makes, so that nothing rotates them offline, with the linears that read them; and what is left out, why.

    What norms write belongs to the residual stream, and what the graph is given to its caller: neither is one of them. Of the linears only
    those count that `ir.sites.chosen` names.

    Args:
        gm: the graph.
        groups: its groups of the kind ROTATE.

    Returns:
        The linears by the tensor that they read, and reasons by the path of the linear.
    """
    frozen = {member.node for group in groups if group.reason for member in group.readers if member.axis == 1}
    found: Found = {}
    left: dict[str, str] = {}
    for layer in chosen(gm, "input"):
        source = layer.site("input").operand
        made = behind_casts(source)
        if layer.weight not in frozen or made.op != "call_function" or is_call(made, *NORMS, HADAMARD):
            continue
        if len(layer.weight.users) > 1:
            left[layer.path] = "its weight is shared with another layer (run untie first)"
        else:
            found.setdefault(source, []).append(layer)
    return found, left
