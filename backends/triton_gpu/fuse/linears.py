"""Linears and embeddings of dequantized weights become operators on packed ones."""

from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from backends.sites import Activation, QuantizedSite, quantized_sites
from backends.triton_gpu import forms
from backends.triton_gpu.ops.embedding import PACKED_EMBEDDING
from backends.triton_gpu.ops.linear import PACKED_LINEAR, PACKED_LINEAR_INT8
from backends.triton_gpu.ops.rows import QUANTIZE_ROWS
from backends.triton_gpu.ops.static import QUANTIZE_STATIC
from backends.triton_gpu.weights import Packed, packed
from ir import edit
from ir.errors import BackendError
from ir.match import operand

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDE, NARROW = 16, 8  # containers of weights that meet floats, and integers
COLUMNS = "columns"  # entry of a lowered graph's meta: K of the weights in narrow containers, by the name of their first plane
EMULATED = "{} activations are rounded as asked but multiplied as floats: integer kernels take 2 to 8 bits, one scale a token or tensor"

Operands = list[Any]  # planes, scale, zero point: nodes


@dataclass(frozen=True)
class Site:
    """A quantized linear or embedding after lowering.

    Args:
        name: of its weight.
        path: of its module.
        operator: that runs it.
        weight: its encoding.
        activation: the encoding of its input; "" for floats.
        bytes_before: of the weight in floating point.
        bytes_now: of planes, scales and zero points; 0 if an earlier site has them already.
    """

    name: str
    path: str
    operator: str
    weight: str
    activation: str
    bytes_before: int
    bytes_now: int


@dataclass
class Fusion:
    """What sites of one graph share.

    Args:
        gm: the graph.
        start: the node that all stored tensors are read before.
        weights: by the identity of their codes and the width of their containers.
        codes: of rounded activations, their scales and zero points, by the quantize node that they stand for.
    """

    gm: GraphModule
    start: Node
    weights: dict[tuple[int, int], tuple[Packed, Operands]] = field(default_factory=dict)
    codes: dict[Node, tuple[Node, Node, Node | None]] = field(default_factory=dict)

    def weight(self, site: QuantizedSite, container: int) -> tuple[Packed, Operands]:
        """A site's weight, packed, and the nodes that read it."""
        key = (id(site.weight.codes), container)
        if key not in self.weights:
            made = packed(site.weight, container)
            planes = [self._stored(f"{site.name}_plane_{index}", plane) for index, plane in enumerate(made.planes)]
            zero = None if made.zero is None else self._stored(f"{site.name}_zeros", made.zero)
            self.weights[key] = made, [planes, self._stored(f"{site.name}_scales", made.scale), zero]
            if container == NARROW:
                self.gm.meta[COLUMNS][str(planes[0].target)] = int(site.weight.codes.shape[1])
        return self.weights[key]

    def _stored(self, name: str, tensor: torch.Tensor) -> Node:
        return edit.add_attribute(self.gm, name.replace("#", "_"), tensor, before=self.start)

    def rounded(self, site: QuantizedSite, activation: Activation) -> tuple[Node, Node, Node | None]:
        """Codes of a site's input as int8, their scales and zero points."""
        dequantize: Any = site.node.args[0]
        quantize: Node = dequantize.args[0]
        if quantize not in self.codes:
            make = self._dynamic if activation.encoding.dynamic else self._static
            self.codes[quantize] = make(activation, quantize, site.name)
        return self.codes[quantize]

    def _dynamic(self, activation: Activation, quantize: Node, name: str) -> tuple[Node, Node, Node | None]:
        """One operator in place of the choice of scales and the rounding by them, where scales were chosen."""
        before: Any = activation.scale.args[0]  # scales are a part of what choose_qparams gives
        rows = edit.emit(self.gm, QUANTIZE_ROWS, (activation.source, str(activation.encoding)), before=before, like=quantize)
        codes, scale, zero = (edit.emit(self.gm, getitem, (rows, part), before=before, like=quantize) for part in range(3))
        return codes, scale, None if activation.encoding.symmetric else zero

    def _static(self, activation: Activation, quantize: Node, name: str) -> tuple[Node, Node, Node | None]:
        """Unsigned codes of b bits less 2^(b−1) are the signed ones of the same scale, whose zero point is that much less."""
        bits, zero = activation.encoding.bits, None
        if activation.zero_point is not None:
            less = edit.attribute(self.gm, activation.zero_point).to(torch.int16) - 2 ** (bits - 1)
            zero = self._stored(f"{name}_input_zero", less.to(torch.int8))
        codes = edit.emit(self.gm, QUANTIZE_STATIC, (activation.source, activation.scale, zero, bits), before=quantize)
        return codes, activation.scale, zero


def fuse_linears(gm: GraphModule, notes: list[str]) -> list[Site]:
    """Replace every quantized linear and embedding; linears first, so that embeddings that are tied to one can read its planes.

    Before: `%w = dequantize(%codes, %scale, ..); %y = aten.linear(%x, %w, %b)`
    After:  `%y = packed_linear(%x, [%planes], %scale, None, %b, bits, group, offset)`

    Before: `%q = quantize(%x, ..); %r = dequantize(%q, ..); %y = aten.linear(%r, %w, %b)`
    After:  `%q, %s, %z = quantize_rows(%x, encoding); %y = packed_linear_int8(%q, %s, %z, [%planes], ..)`

    Sites that read one activation share its codes, sites that read one weight its planes.

    Raises:
        BackendError: a weight without a place in the packed layout, or arithmetic in another dtype than `FLOATS`.
    """
    gm.meta[COLUMNS] = {}
    fusion = Fusion(gm, next(node for node in gm.graph.nodes if node.op != "placeholder"))
    sites = list(quantized_sites(gm))
    for site in sites:
        _check(site)
    linears = [site for site in sites if site.operator == "linear"]
    return [_fuse(fusion, site, notes) for site in (*linears, *(site for site in sites if site.operator == "embedding"))]


def _check(site: QuantizedSite) -> None:
    encodings = {"weight": site.weight.encoding}
    if reason := forms.refusal(site.operator, encodings, tuple(site.weight.codes.shape)):
        raise BackendError(reason, where=site.path, remedy="choose another encoding for this site, or the reference backend")
    if (dtype := edit.value(site.node).dtype) not in FLOATS:
        raise BackendError(f"there are no kernels of {dtype}", where=site.path, remedy="load the model in float16 or bfloat16")


def _fuse(fusion: Fusion, site: QuantizedSite, notes: list[str]) -> Site:
    """Replace one site by the operator that runs it."""
    activation, stored = site.activation, len(fusion.weights)
    dtype = edit.value(site.node).dtype
    if site.operator == "embedding":
        narrow = (id(site.weight.codes), NARROW) in fusion.weights
        made, operands = fusion.weight(site, NARROW if narrow else WIDE)
        rest = [made.bits, made.group, made.offset, int(site.weight.codes.shape[1]), dtype]
        target, args = PACKED_EMBEDDING, [operand(site.node, "indices"), *operands, *rest]
    elif activation is not None and forms.integer(activation.encoding):
        made, operands = fusion.weight(site, NARROW)
        bias = operand(site.node, "bias")
        target, args = (
            PACKED_LINEAR_INT8,
            [*fusion.rounded(site, activation), *operands, bias, made.bits, made.group, made.offset, dtype],
        )
    else:
        made, operands = fusion.weight(site, WIDE)
        target, args = PACKED_LINEAR, [site.node.args[0], *operands, operand(site.node, "bias"), made.bits, made.group, made.offset]
        if activation is not None and (sentence := EMULATED.format(activation.encoding)) not in notes:
            notes.append(sentence)
    edit.replace(site.node, edit.emit(fusion.gm, target, args, before=site.node))
    return Site(
        name=site.name,
        path=site.path,
        operator=str(target).removesuffix(".default"),
        weight=str(site.weight.encoding),
        activation="" if activation is None else str(activation.encoding),
        bytes_before=site.weight.codes.numel() * dtype.itemsize,
        bytes_now=made.nbytes if len(fusion.weights) > stored else 0,
    )
