"""Graphs in float64 throughout: tells exact laws from rounding, as Hugging Face norms compute in float32 even in a float64 model."""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ir import edit
from ir.signature import Port, Signature


def in_float64(gm: GraphModule) -> GraphModule:
    """A copy of a graph whose tensors, casts and ports are float64 wherever they were floats of another width."""
    gm = edit.copied(gm)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = edit.attribute(gm, node)
            if tensor.is_floating_point():
                edit.set_attribute(gm, node, tensor.double())
        elif node.op == "placeholder":
            fake = edit.value(node)
            if fake.is_floating_point():
                edit.set_input(node, fake.shape, torch.float64)
        elif node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, _wide), map_aggregate(node.kwargs, _wide)
            edit.infer(node)
    signature: Signature = gm.meta["signature"]
    gm.meta["signature"] = replace(signature, inputs=_ports(signature.inputs), outputs=_ports(signature.outputs))
    gm.meta["example"] = [tensor.double() if tensor.is_floating_point() else tensor for tensor in gm.meta["example"]]
    gm.recompile()
    return gm


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _ports(ports: tuple[Port, ...]) -> tuple[Port, ...]:
    return tuple(replace(port, dtype="float64") if port.torch_dtype.is_floating_point else port for port in ports)
