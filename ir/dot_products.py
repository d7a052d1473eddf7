"""Where cached keys meet queries: the attentions behind a cache site."""

from torch.fx import Node

from ir import edit
from ir.cache import CacheSite
from ir.match import aten, is_call, operand

Query = tuple[Node, str]  # an attention or matrix product, and the name of the operand that holds its queries

# What repeats heads or drops tokens, and leaves the last axis alone.
STRUCTURE = (aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.repeat_interleave.self_int)


def queries(site: CacheSite) -> tuple[list[Query], str]:
    """Every query that meets the keys of a cache site, or why they could not be followed."""
    frontier: list[Node] = [site.joined]
    found: list[Query] = []
    while frontier:
        keys = frontier.pop()
        for user in keys.users:
            if is_call(user, aten.scaled_dot_product_attention.default) and operand(user, "key") is keys:
                found.append((user, "query"))
            elif is_call(user, aten.matmul.default) and _flips(keys) and user.args[1] is keys:
                found.append((user, "self"))
            elif _flips(user) or (is_call(user, *STRUCTURE) and edit.value(user).shape[-1] == site.width):
                frontier.append(user)
            elif user.op != "output" and not is_call(user, aten.sym_size.int):
                return [], f"{user.name} reads them too"
    return found, "" if found else "no dot product reads them"


def _flips(node: Node) -> bool:
    """Whether a node exchanges the tokens and the elements of a head."""
    return is_call(node, aten.transpose.int) and {int(axis) % 4 for axis in node.args[1:]} == {2, 3}  # type: ignore[arg-type]
