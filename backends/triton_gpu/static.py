"""A decoding step over caches of fixed size: new keys and values are written in place, so that one CUDA graph serves every step."""

from operator import add
from typing import Any

from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import BackendError
from ir.match import aten, find, is_call, operand
from ir.signature import CACHE, PRESENT, TOKENS, Signature
from ir.text import node_text

TOKEN_INPUTS = ("input_ids", "position_ids", "token_type_ids")
INDEX_COPY = aten.index_copy_.default  # changes its operand: such a graph is run, and never saved or verified


def static_step(gm: GraphModule, signature: Signature) -> GraphModule:
    """A copy of a decoder's graph that takes `slots`, int64 `[tokens]`, as its last input, and caches with room for all tokens.

    Before: `%p = sym_size(%past, 2); %all = cat([%past, %new], -2); %total = add(%p, %length); %q = add(%offsets, %p)`
    After:  `%all = index_copy_(%past, -2, %slots, %new); %total = sym_size(%past, 2); %q = add(%offsets, select(%slots, 0, 0))`

    Law: slots that nothing was written to lie behind every query, so the causal mask hides them; what they hold is finite. Attention is
    that over the same keys and values, and zeros of weight zero. The graph returns its outputs but the caches, which are the caller's.

    Raises:
        BackendError: the graph does something else with its cache than to append to it.
    """
    step = edit.copied(gm)
    placeholders = step.graph.find_nodes(op="placeholder")
    results: Any = step.graph.output_node().args[0]
    returned = dict(zip((port.name for port in signature.outputs), results, strict=True))
    with step.graph.inserting_after(placeholders[-1]):
        slots = step.graph.placeholder("slots")
    with step.graph.inserting_before(next(node for node in step.graph.nodes if node.op != "placeholder")):
        first = step.graph.call_function(aten.select.int, (slots, 0, 0))
    caches = {node: port.name for port, node in zip(signature.inputs, placeholders, strict=True) if port.cached}
    for past, name in caches.items():
        _write_in_place(past, returned.get(name.replace(CACHE, PRESENT, 1)), slots)
    for size in [node for node in find(step, aten.sym_size.int) if node.args[0] in caches and node.args[1] in {TOKENS, TOKENS - 4}]:
        _refer_to_slots(size, first)
    kept = [node for port, node in zip(signature.outputs, results, strict=True) if not port.cached]
    edit.set_outputs(step, kept)
    edit.clean(step)
    return step


def _write_in_place(past: Node, result: Node | None, slots: Node) -> None:
    """Let new tokens of one cache be written into it."""
    joins = [user for user in past.users if is_call(user, aten.cat.default)]
    others = [user for user in past.users if user not in joins and not is_call(user, aten.sym_size.int)]
    if others or len(joins) != 1 or joins[0] is not result:
        raise BackendError(f"%{past.name} is read by {node_text((others or joins or [past])[0])}, not appended to and returned")
    (join,) = joins
    tensors: Any = operand(join, "tensors")
    if operand(join, "dim") not in {TOKENS, TOKENS - 4} or len(tensors) != 2 or tensors[0] is not past:
        raise BackendError(f"{node_text(join)} does not append new tokens to past ones")
    with join.graph.inserting_before(join):
        written = join.graph.call_function(INDEX_COPY, (past, TOKENS, slots, tensors[1]))
    edit.replace(join, written)


def _refer_to_slots(size: Node, first: Node) -> None:
    """Let what counted past tokens count them by the first slot that is written to, and what counted all tokens by the cache's size."""
    for user in list(size.users):
        if is_call(user, add) and any(_is_length(other) for other in user.args if other is not size):
            edit.replace(user, size)
        elif is_call(user, aten.add.Tensor) and user.args[1] is size:
            user.update_arg(1, first)
        else:
            raise BackendError(f"{node_text(user)} counts past tokens in a way that is not known")


def _is_length(value: object) -> bool:
    """Whether a value is the number of new tokens: the second size of an input that is no cache, tokens or positions."""
    if not is_call(value, aten.sym_size.int):
        return False
    source, axis = value.args
    return isinstance(source, Node) and source.name in TOKEN_INPUTS and bool(axis == 1)
