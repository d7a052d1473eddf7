"""Stored weights: where codes, scales and zero points live in a graph."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from ir import edit, numerics
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.ops import DEQUANTIZE
from ir.rounding import SCALE_DTYPE, Rounding
from ir.sites import Layer, layers

ERROR = "rounding_error"  # the entry of a dequantize operator's `node.meta`: ‖Ŵ − W‖ / ‖W‖, as the weight was rounded


def set_codes(gm: GraphModule, layer: Layer, encoding: Encoding, codes: Tensor, qparams: QParams, followers: Sequence[Layer] = ()) -> None:
    """Make a layer read `dequantize(codes, scale, zero_point)` instead of its floating-point weight, which is dropped by the next `clean`.

    The tensors are stored as `<weight>_codes`, `<weight>_scale` and `<weight>_zero_point`, beside the weight's own name. The operator's
    `meta` keeps the relative error that they leave.

    Args:
        followers: other layers with the same weight, which read the same codes.
    """
    weight = layer.weight
    name, dtype = str(weight.target), edit.value(weight).dtype
    W = edit.attribute(gm, weight).detach().float()
    error = float((numerics.dequantize(codes, qparams, encoding).detach() - W).norm() / W.norm().clamp_min(numerics.TINY))
    parts = {"codes": codes, "scale": qparams.scale, "zero_point": qparams.zero_point}
    reading = {reader.node for reader in (layer, *followers)}
    first = layer.node if not followers else next(node for node in gm.graph.nodes if node in reading)
    nodes = {
        key: None if tensor is None else edit.add_attribute(gm, f"{name}_{key}", tensor, before=first) for key, tensor in parts.items()
    }
    operands = (nodes["codes"], nodes["scale"], nodes["zero_point"], str(encoding), dtype)
    values = edit.emit(gm, DEQUANTIZE, operands, before=first, like=layer.node)
    values.meta[ERROR] = error
    for reader in (layer, *followers):
        reader.site("weight").read(values)
    edit.drop(gm, weight)


def followers_of(gm: GraphModule, layer: Layer) -> list[Layer]:
    """The embeddings that read the weight of a linear, a tied head, in the encoding that it has: they take its codes."""
    encoding = layer.site("weight").encoding
    if layer.kind != "Linear" or len(layer.weight.users) < 2:
        return []
    return [
        other
        for other in unrounded(gm)
        if other.kind == "Embedding" and other.weight is layer.weight and other.site("weight").encoding == encoding
    ]


def round_layer(gm: GraphModule, layer: Layer, rounding: Rounding) -> None:
    """Round a layer's weight as it is annotated, by a method that needs to know nothing more. Tied embeddings take the codes."""
    encoding = layer.site("weight").encoding
    assert encoding is not None
    codes, qparams = rounding.round_weight(edit.attribute(gm, layer.weight), encoding)
    set_codes(gm, layer, encoding, codes, qparams, followers_of(gm, layer))


def stored_bits(shape: tuple[int, ...], encoding: Encoding) -> int:
    """Bits that a tensor takes: its codes, a scale for each block, and zero points in the width of the codes."""
    scales = math.prod(encoding.scale_shape(shape))
    zero_points = 0 if encoding.symmetric else scales * encoding.bits
    return math.prod(shape) * encoding.bits + scales * 8 * SCALE_DTYPE.itemsize + zero_points


def unrounded(gm: GraphModule) -> list[Layer]:
    """The layers whose weights are annotated and still in floating point."""
    return [layer for layer in layers(gm) if layer.site("weight").encoding is not None and layer.weight.op == "get_attr"]
