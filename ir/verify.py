"""The verifier: the rules of the normal form, as a table.

`verify` runs between all passes, so it is cheap: it reads recorded values, never tensors. `check_weights` reads tensors.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ir.edit import attribute, value
from ir.encoding import Encoding
from ir.errors import DataError, GraphError, OptionError
from ir.hadamard import misfit
from ir.match import aten, find, is_tensor, operand, operands
from ir.numerics import storage_dtype
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, HADAMARD, PACK, QUANTIZE, UNPACK
from ir.schema import misfits
from ir.sites import KEY
from ir.text import node_text, where

KINDS = ("placeholder", "get_attr", "call_function", "output")
SIZE_MODULES = ("_operator", "operator", "math", "torch", "torch.utils._sympy.functions")
SAME_DTYPE: dict[Any, tuple[str, ...]] = {
    aten.linear.default: ("input", "weight", "bias"),
    aten.matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.addmm.default: ("self", "mat1", "mat2"),
    aten.scaled_dot_product_attention.default: ("query", "key", "value"),
}
NEIGHBOURS = 3  # lines of graph shown before and after a fault


class Fault(NamedTuple):
    """A node that breaks a rule, and how."""

    node: Node
    detail: str


Faults = Iterator[Fault]


class Rule(NamedTuple):
    """A rule of the normal form: its name, what finds its faults, and what it says."""

    name: str
    check: Callable[[GraphModule], Faults]
    sentence: str


def _nodes(gm: GraphModule) -> Faults:
    for node in gm.graph.nodes:
        if node.op not in KINDS:
            yield Fault(node, f"it is a {node.op} of {node.target!r}")


def _targets(gm: GraphModule) -> Faults:
    for node in _calls(gm):
        target = node.target
        if isinstance(target, OpOverload):
            if target._schema.is_mutable:
                yield Fault(node, f"{target} changes its operand")
        elif target is not operator.getitem and (is_tensor(node) or getattr(target, "__module__", "") not in SIZE_MODULES):
            yield Fault(node, f"{target!r} is not an operator overload")


def _calls(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def _schema(gm: GraphModule) -> Faults:
    for node in _calls(gm):
        if isinstance(node.target, OpOverload):
            yield from (Fault(node, detail) for detail in misfits(node, node.target))


def _order(gm: GraphModule) -> Faults:
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        for read in node.all_input_nodes:
            if read not in seen:
                yield Fault(node, f"it reads %{read.name}, which comes later or is not in the graph")
        seen.add(node)
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield Fault(gm.graph.output_node(), str(error))


def _readers(gm: GraphModule) -> Faults:
    for node in gm.graph.nodes:
        if node.op in {"call_function", "get_attr"} and not node.users:
            yield Fault(node, "nothing reads it; call `edit.clean`")


def _attributes(gm: GraphModule) -> Faults:
    for node in gm.graph.find_nodes(op="get_attr"):
        try:
            tensor = attribute(gm, node)
        except (AttributeError, AssertionError):
            yield Fault(node, f"the module has no tensor {node.target!r}")
            continue
        fake = node.meta.get("val")
        if is_tensor(node) and (tuple(fake.shape), fake.dtype) != (tuple(tensor.shape), tensor.dtype):
            yield Fault(node, f"recorded as {fake.dtype} {list(fake.shape)}, the tensor is {tensor.dtype} {list(tensor.shape)}")


def _values(gm: GraphModule) -> Faults:
    for node in gm.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None:
            yield Fault(node, 'it has no meta["val"]; make nodes with `edit.emit`')


def _dtypes(gm: GraphModule) -> Faults:
    for node in find(gm, *SAME_DTYPE):
        read = {name: operand(node, name) for name in SAME_DTYPE[node.target]}
        dtypes = {name: value(other).dtype for name, other in read.items() if is_tensor(other)}
        if len(set(dtypes.values())) > 1:
            yield Fault(node, ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items()))


def _encodings(gm: GraphModule) -> Faults:
    for node in find(gm, QUANTIZE, DEQUANTIZE, CHOOSE_QPARAMS, PACK, UNPACK):
        given = operands(node)
        try:
            encoding = Encoding.parse(given["encoding"])
        except (OptionError, TypeError) as error:
            yield Fault(node, f"{given['encoding']!r}: {error}")
            continue
        if node.target in {QUANTIZE, DEQUANTIZE}:
            yield from (Fault(node, detail) for detail in _qparams(node, given, encoding))


def _qparams(node: Node, given: dict[str, Any], encoding: Encoding) -> Iterator[str]:
    """What is wrong with the codes, scales and zero points of one quantize or dequantize."""
    codes = value(given.get("codes", node))
    if codes.dtype != storage_dtype(encoding):
        yield f"codes of {encoding} are {storage_dtype(encoding)}, not {codes.dtype}"
    if (given["zero_point"] is None) != encoding.symmetric:
        yield f"{encoding} has {'no' if encoding.symmetric else 'a'} zero point"
    shape = tuple(codes.shape)
    for name in ("scale", "zero_point"):
        qparam = given[name]
        if qparam is None or not all(isinstance(size, int) for size in (*shape, *value(qparam).shape)):
            continue
        try:
            expected = encoding.scale_shape(shape)
        except ValueError:
            yield f"{encoding} has more axes than {list(shape)}"
            continue
        if tuple(value(qparam).shape) != expected:
            yield f"{name} has shape {list(value(qparam).shape)}, {encoding} of {list(shape)} needs {list(expected)}"


def _transforms(gm: GraphModule) -> Faults:
    details = ((node, misfit(value(operand(node, "x")).shape[-1], operand(node, "block"))) for node in find(gm, HADAMARD))
    yield from (Fault(node, detail) for node, detail in details if detail)


def _annotations(gm: GraphModule) -> Faults:
    for node in gm.graph.nodes:
        marks = (node.meta.get("custom") or {}).get(KEY) or {}
        for name, text in marks.items():
            if not is_tensor(operands(node).get(name)):
                yield Fault(node, f"an encoding is annotated for {name!r}, which is not a tensor operand")
            try:
                Encoding.parse(text)
            except (OptionError, TypeError) as error:
                yield Fault(node, f"annotated for {name!r}: {error}")


def _outputs(gm: GraphModule) -> Faults:
    node = gm.graph.output_node()
    results = node.args[0]
    signature = gm.meta.get("signature")
    if not isinstance(results, tuple) or not all(isinstance(result, Node) for result in results):
        yield Fault(node, "it returns something else")
    elif signature is not None and len(results) != len(signature.outputs):
        yield Fault(node, f"it returns {len(results)} values, the signature names {len(signature.outputs)}")
    inputs = gm.graph.find_nodes(op="placeholder")
    if signature is not None and len(inputs) != len(signature.inputs):
        yield Fault(node, f"there are {len(inputs)} placeholders, the signature names {len(signature.inputs)}")


RULES = (
    Rule("nodes", _nodes, "a graph has placeholders, get_attr nodes, function calls and one output"),
    Rule("targets", _targets, "calls are of operator overloads that change no operand, or arithmetic on sizes"),
    Rule("schema", _schema, "operands fit the operator's schema"),
    Rule("attributes", _attributes, "a get_attr node reads a tensor of the recorded shape and dtype"),
    Rule("order", _order, "a node is defined before it is read"),
    Rule("values", _values, "every node records its value"),
    Rule("readers", _readers, "every value is read"),
    Rule("dtypes", _dtypes, "the operands of a product have one dtype"),
    Rule("encodings", _encodings, "quantized values agree with their encoding"),
    Rule("transforms", _transforms, "blocks of a Hadamard transform have a matrix and divide the last axis"),
    Rule("annotations", _annotations, "annotations are encodings of tensor operands"),
    Rule("outputs", _outputs, "inputs and outputs are flat, as many as the signature names"),
)


def verify(gm: GraphModule, stage: str = "") -> None:
    """Check the rules of the normal form.

    Args:
        gm: the graph; it is not changed.
        stage: what was done to it last, for the error.

    Raises:
        GraphError: the first rule that is broken, with the lines of the graph around the fault and where the model's source has it.
    """
    for rule in RULES:
        for fault in rule.check(gm):
            raise GraphError(
                f"{f'after {stage}: ' if stage else ''}{rule.sentence}, but %{fault.node.name} breaks this: {fault.detail}",
                where=f"{where(fault.node)}\n{_neighbourhood(fault.node)}",
                remedy=f"the rule is called {rule.name!r}; the pass that ran last broke it"
                if stage
                else f"the rule is called {rule.name!r}",
            )


def _neighbourhood(fault: Node) -> str:
    """The lines around a node, the fault marked."""
    nodes = list(fault.graph.nodes)
    at = nodes.index(fault)
    shown = nodes[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]
    return "\n".join(f"    {'>' if node is fault else ' '} {node_text(node)[:160]}" for node in shown)


def check_weights(gm: GraphModule) -> None:
    """Check that all floating-point tensors of the graph are finite, one at a time.

    Raises:
        DataError: the first tensor that holds a NaN or an infinity, and how many.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = attribute(gm, node).detach()
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(wide)):
            bad = int((~torch.isfinite(wide)).sum())
            raise DataError(
                f"parameter {node.target!r} has {bad} values that are not finite", where=where(node), remedy="check the checkpoint"
            )
