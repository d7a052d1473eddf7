"""From the exporter's raw model to the one that is saved: narrow types, folded constants, the names that users know."""

from collections.abc import Mapping, Sequence
from functools import partial

import onnx_ir as onir
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer, rewriter

from backends.onnx_qdq.forms import SHARED
from backends.onnx_qdq.legal import Legal, Lowered, key
from ir.deferred import Deferred
from ir.signature import CACHE, Port, Signature

IR_VERSION = 10
OPSET_2_BIT, IR_VERSION_2_BIT = 25, 13
_PARTS = (("codes", ""), ("scale", ".scale"), ("zero_point", ".zero_point"), ("step", ".input_scale"), ("offset", ".input_zero_point"))
SCALAR = 1  # elements: sites that share larger constants are not fused
ROUNDS = 2  # of folding and rewriting, as the exporter's own optimizer does

_AXES = (
    # name's prefix, axes
    (f"{CACHE}.", {0: "batch", 2: "past"}),
    ("present.", {0: "batch", 2: "total"}),
    ("attention_mask", {0: "batch", 1: "total"}),
    ("", {0: "batch", 1: "sequence"}),
)


def finish(model: onir.Model, signature: Signature, legal: Legal) -> list[str]:
    """Change the exporter's model in place into the one that is saved, whose large tensors are made when they are written.

    Returns:
        What the values are called that the graph returned besides the signature's outputs; the model returns them no more.
    """
    lowered = legal.sites
    _await(model, legal.waiting)
    _retag(model, lowered)
    further = optimize(model, len(signature.outputs))
    _name_sites(model, lowered)
    _name_ports(model, signature)
    common.ClearMetadataAndDocStringPass()(model)
    _forget_shapes(model)
    narrow = any(site.bits == 2 and site.form.fused == "MatMulNBits" for site in lowered)
    model.ir_version = IR_VERSION_2_BIT if narrow else max(IR_VERSION, min(model.ir_version, IR_VERSION_2_BIT))
    if narrow:
        model.opset_imports[""] = max(OPSET_2_BIT, model.opset_imports[""])
    model.producer_name, model.producer_version = "fxpress", None
    return [str(v.name) for v in further]


def optimize(model: onir.Model, outputs: int) -> list[onir.Value]:
    """Fold and rewrite, leaving parameters as they are: a folded parameter would lose its name.

    Args:
        model: is changed in place.
        outputs: how many it keeps.

    Returns:
        The values of the other outputs.
    """
    graph = model.graph
    common.InlinePass()(model)

    def should_fold(node: onir.Node) -> bool | None:
        return False if any(v is not None and _is_parameter(v) for v in node.inputs) else None

    for _ in range(ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.rewrite(model)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=SCALAR)(model)
    common.CommonSubexpressionEliminationPass()(model)
    further = list(graph.outputs)[outputs:]
    while len(graph.outputs) > outputs:
        graph.outputs.pop()
    for unused in (common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass, common.RemoveUnusedOpsetsPass):
        unused()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    assert graph is model.graph
    return further


def _is_parameter(v: onir.Value) -> bool:
    """Whether a value comes from the graph's tensors and not from the exporter, whose names have no dot."""
    name = v.name or ""
    return v.is_initializer() and ("." in name or name.startswith("onnx_"))


def _await(model: onir.Model, waiting: Mapping[str, Deferred]) -> None:
    """Let the tensors that are yet to be made take their places."""
    for name, tensor in waiting.items():
        v = model.graph.initializers[name]
        assert v.const_value is not None
        v.const_value = onir.LazyTensor(partial(_made, tensor), v.const_value.dtype, onir.Shape(tensor.shape), name=name)


def _made(tensor: Deferred) -> onir.TensorProtocol:
    return TorchTensor(tensor.make().contiguous())


def _packed(v: onir.TensorProtocol, dtype: onir.DataType, shape: onir.Shape) -> onir.TensorProtocol:
    return onir.PackedTensor(v.numpy(), dtype, shape=shape, name=v.name)


def _retag(model: onir.Model, lowered: Sequence[Lowered]) -> None:
    """Give packed bytes the integer type and the shape they stand for."""
    for site in lowered:
        if site.form.fused != "MatMulNBits" or site.form is SHARED or site.bits == 8:
            continue
        dtype = onir.DataType[f"{'INT' if site.weight.startswith('i') else 'UINT'}{site.bits}"]
        rows, columns = site.shape
        blocks = model.graph.initializers[key(site.name, "scale")].shape
        assert blocks is not None
        for part, shape in (("codes", onir.Shape([columns, rows])), ("zero_point", onir.Shape(list(blocks)))):
            v = model.graph.initializers.get(key(site.name, part))
            if v is None:
                continue
            assert v.const_value is not None
            v.const_value = onir.LazyTensor(partial(_packed, v.const_value, dtype, shape), dtype, shape, name=v.name)
            v.type, v.shape = onir.TensorType(dtype), shape
            for node in v.consumers():
                node.outputs[0].shape = onir.Shape([columns, rows])


def _name_sites(model: onir.Model, lowered: Sequence[Lowered]) -> None:
    """Name the nodes of each site by its weight, so that profiles and errors can be read."""
    for site in lowered:
        if site.form is SHARED:
            continue  # it reads what its embedding is named by
        codes = model.graph.initializers[key(site.name, "codes")]
        for node in codes.consumers():
            node.name = f"{site.name}/{node.op_type}"
            if node.op_type == "DequantizeLinear":
                for product in node.outputs[0].consumers():
                    product.name = f"{site.name}/{product.op_type}"
        for part, suffix in _PARTS:
            v = model.graph.initializers.get(key(site.name, part))
            if v is not None:
                wanted = f"{site.name}{suffix}"
                v.name = wanted if wanted not in model.graph.initializers else f"{wanted}.quantized"


def _name_ports(model: onir.Model, signature: Signature) -> None:
    """Names and dynamic axes of inputs and outputs, from the signature."""
    decoder = signature.layers > 0
    taken = {v.name: v for node in model.graph for v in node.outputs}
    for values, ports in ((model.graph.inputs, signature.inputs), (model.graph.outputs, signature.outputs)):
        for v, port in zip(values, ports, strict=True):
            if port.name in taken and taken[port.name] is not v:
                taken[port.name].name = f"{port.name}.inner"
            v.name = port.name
            v.shape = onir.Shape([axis_name(port, axis, decoder) if size is None else size for axis, size in enumerate(port.shape)])


def axis_name(port: Port, axis: int, decoder: bool) -> str:
    """What a dynamic axis is called: batch, sequence, past or total; otherwise by its port and position."""
    if not decoder and port.name == "attention_mask":
        return _AXES[-1][1].get(axis, f"{port.name}_{axis}")
    axes = next(axes for prefix, axes in _AXES if port.name.startswith(prefix))
    return axes.get(axis, f"{port.name}_{axis}")


def _forget_shapes(model: onir.Model) -> None:
    """Drop the exporter's shapes of intermediate values: ONNX Runtime infers its own, with the axes' new names."""
    kept = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for v in node.outputs:
            if v not in kept:
                v.shape = None
                v.type = None
