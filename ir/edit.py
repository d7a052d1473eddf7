"""The one place that changes graphs: emit, replace, parameters, clean."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Target, map_arg

STORE = "store"  # the entry of a graph's meta: the `Store` that its large tensors are kept in, if it has one
KEPT_META = ("stack_trace", "nn_module_stack")  # provenance that an emitted node inherits


def value(node: Node) -> Any:
    """The fake value recorded for a node: a fake tensor, a symbolic size or a tuple of them."""
    return node.meta["val"]


def module_path(node: Node) -> str:
    """The dotted path of the module that a node was captured from; empty for nodes of the root."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values())), "")


def emit(
    gm: GraphModule,
    target: Target,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    before: Node,
    like: Node | None = None,
) -> Node:
    """Insert `target(*args, **kwargs)` before a node, infer its value, and record where it came from.

    Args:
        before: the node that the new one precedes.
        like: the node whose provenance (module path, source line) the new one inherits; `before` if None.
    """
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(target, tuple(args), dict(kwargs or {}))  # type: ignore[arg-type]
    source = before if like is None else like
    node.meta.update({key: source.meta[key] for key in KEPT_META if key in source.meta})
    infer(node)
    return node


def infer(node: Node) -> None:
    """Set a call's `meta["val"]` from its operands' values."""
    mode = fake_mode(node.graph)
    args, kwargs = map_arg((node.args, node.kwargs), value)
    with mode if mode is not None else nullcontext(), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode(graph: Graph) -> Any:
    """The mode that made the graph's fake tensors, if there is one."""
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
    return next((mode for mode in modes if mode is not None), None)


def replace(node: Node, new: Node) -> None:
    """Let every reader of `node` read `new` instead, and erase `node`."""
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    node.graph.erase_node(node)


def attribute(gm: GraphModule, node: Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    holder, _, name = str(node.target).rpartition(".")
    tensor = getattr(gm.get_submodule(holder), name)
    assert isinstance(tensor, torch.Tensor)
    return counted(gm, tensor)


def counted(gm: GraphModule, tensor: Tensor) -> Tensor:
    """A tensor of the graph that is about to be read; where the graph has a store, it releases what was read before every so often."""
    if STORE in gm.meta:
        gm.meta[STORE].count(tensor.nbytes)
    return tensor


def kept(gm: GraphModule, tensor: Tensor) -> Tensor:
    """A tensor that goes with the graph for long, on disk where the graph has a store. It may be written to."""
    made: Tensor = gm.meta[STORE].keep(tensor) if STORE in gm.meta else tensor
    return made


def add_attribute(gm: GraphModule, name: str, tensor: Tensor, *, before: Node) -> Node:
    """A new get_attr node for `tensor` under the dotted `name`, made unique with a counter if it is taken."""
    unique, counter = name, 1
    while _taken(gm, unique):
        unique, counter = f"{name}_{counter}", counter + 1
    store(gm, unique, tensor)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(unique)
    node.meta["val"] = _fake(gm, tensor)
    return node


def set_attribute(gm: GraphModule, node: Node, tensor: Tensor) -> None:
    """Give a get_attr node another tensor; the old one, which the caller's model may share, is left untouched."""
    store(gm, str(node.target), tensor)
    node.meta["val"] = _fake(gm, tensor)


def store(gm: GraphModule, name: str, tensor: Tensor) -> None:
    """Put `tensor` under a dotted name of the module tree, large ones on disk where the graph has a store.

    Floats are frozen parameters, the rest buffers.
    """
    tensor = kept(gm, tensor)
    holder, _, leaf = name.rpartition(".")
    module = _submodule(gm, holder)
    for registry in (module._parameters, module._buffers):
        registry.pop(leaf, None)
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        module.register_parameter(leaf, torch.nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        module.register_buffer(leaf, tensor.detach())


def _submodule(gm: GraphModule, path: str) -> torch.nn.Module:
    """The module at a dotted path, made on the way where it does not exist."""
    module: torch.nn.Module = gm
    for name in filter(None, path.split(".")):
        if name not in module._modules:  # no other attribute: names may come from anybody
            module.add_module(name, torch.nn.Module())
        module = module.get_submodule(name)
    return module


def _taken(gm: GraphModule, name: str) -> bool:
    module: Any = gm
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _fake(gm: GraphModule, tensor: Tensor) -> Any:
    mode = fake_mode(gm.graph)
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def add_input(gm: GraphModule, name: str, shape: Sequence[Any], dtype: torch.dtype, *, after: Node) -> Node:
    """A new placeholder behind another one. The caller states its port in the signature."""
    with gm.graph.inserting_after(after):
        node = gm.graph.placeholder(name)
    node.meta["val"] = value(after)
    set_input(node, shape, dtype)
    return node


def set_input(node: Node, shape: Sequence[Any], dtype: torch.dtype) -> None:
    """Let a placeholder take tensors of that shape and dtype; the values of its readers are not inferred again."""
    node.meta["val"] = value(node).new_empty(tuple(shape), dtype=dtype)


def set_outputs(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Let the graph return the values of `nodes`. The caller states their ports in the signature."""
    gm.graph.output_node().args = (tuple(nodes),)


def set_operand(node: Node, name: str, new: Any) -> None:
    """Pass `new` as the operand of that schema name; the node's value is not inferred again."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [argument.name for argument in node.target._schema.arguments].index(name)
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(name, new)


def drop_unread(gm: GraphModule) -> int:
    """Erase calls and get_attr nodes that nothing reads; says how many."""
    count = 0
    for node in reversed(gm.graph.nodes):
        if node.op in {"call_function", "get_attr"} and not node.users:
            gm.graph.erase_node(node)
            count += 1
    return count


def copied(gm: GraphModule) -> GraphModule:
    """A graph of its own, without hooks, over the same tensors."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = GraphModule(gm, graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    copy.meta.update(gm.meta)
    return copy


def merge_attributes(gm: GraphModule) -> None:
    """Let one get_attr node stand for each stored tensor: nodes of one name, or of names that share memory (tied weights)."""
    first: dict[tuple[object, ...], Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            tensor = attribute(gm, node)
            shared = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (node.target,)
            if first.setdefault(shared, node) is not node:
                replace(node, first[shared])


def drop(gm: GraphModule, node: Node) -> None:
    """Erase a get_attr node that nobody reads any more, and release its tensor: in normal form no other node reads that name."""
    if not node.users:
        holder, _, leaf = str(node.target).rpartition(".")
        node.graph.erase_node(node)
        delattr(gm.get_submodule(holder), leaf)


def clean(gm: GraphModule) -> None:
    """Drop nodes without readers and tensors without nodes, then recompile."""
    drop_unread(gm)
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if name not in used:
            holder, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(holder), leaf)
    gm.delete_all_unused_submodules()
    gm.recompile()
