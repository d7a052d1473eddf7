"""Turn a flat graph into one that ONNX can state: float32 arithmetic, and each quantized site as one operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import backends.onnx_qdq.operators  # noqa: F401 (registers the operators)
from backends.onnx_qdq import layout
from backends.onnx_qdq.forms import BLOCKED, EMULATED, GATHERED, INTEGER, SHARED, Form, block_size, form_of, refusal, stored_width
from backends.onnx_qdq.layout import Stored
from backends.onnx_qdq.legal import Legal, Lowered, key
from backends.sites import FXPRESS, Activation, QuantizedSite, Weight, is_call, quantized_sites, weight_name, weight_of
from ir.edit import STORE, add_attribute, attribute, clean, copied, merge_attributes, replace
from ir.errors import BackendError
from ir.numerics import code_range

SITE = torch.ops.fxpress_onnx
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What lowering depends on besides the graph.

    Args:
        dtype: the dtype of activations and of weights that are not quantized.
        signed: whether 8-bit weights of integer matrix products are signed.
    """

    dtype: torch.dtype
    signed: bool


def legalize(gm: GraphModule, options: Options, notes: list[str]) -> Legal:
    """A copy of `gm` for export; `gm` keeps its tensors and nodes.

    Raises:
        BackendError: a site has no form.
    """
    copy = copied(gm)
    copy.meta.pop(STORE, None)  # places that take no memory are not to be kept on disk
    legal = Legal(copy)
    merge_attributes(copy)
    tables: dict[int, Node] = {}  # gathers by the identity of the codes they read
    for site in list(quantized_sites(copy)):
        legal.sites.append(_lower_site(legal, site, options, notes, tables))
    clean(copy)
    _fold_weights(legal, notes)
    _cast(legal, options.dtype)
    clean(copy)
    return legal


def _lower_site(legal: Legal, site: QuantizedSite, options: Options, notes: list[str], tables: dict[int, Node]) -> Lowered:
    """Replace a site by one operator of its form, that of a head that is tied to an embedding by one that reads the same table."""
    encodings = {"weight": site.weight.encoding} | ({"input": site.activation.encoding} if site.activation else {})
    reason = refusal(site.operator, encodings, tuple(site.weight.codes.shape))
    if reason:
        raise BackendError(reason, where=site.path, remedy="choose another encoding for this site, or the reference backend")
    form = form_of(site.operator, site.weight.encoding, site.activation.encoding if site.activation else None)
    table = tables.get(id(site.weight.codes)) if form is BLOCKED else None
    if table is not None and table.args[5] in SHARED.widths:
        form, (bits, emit) = SHARED, _write_shared(site, table)
    else:
        bits, emit = _WRITERS[form](legal, site, form, options)
    if form is GATHERED:
        tables[id(site.weight.codes)] = emit
    elif form is not SHARED and "#" in site.name and tables:
        notes.append(f"{site.name}: tied to an embedding, and stored once more in {_stored_bytes(legal, site)} bytes for another kernel")
    _note(notes, site, form, bits)
    replace(site.node, emit)
    rows, columns = site.weight.codes.shape
    activation = str(site.activation.encoding) if site.activation else ""
    return Lowered(site.name, site.path, form, str(site.weight.encoding), activation, bits, (rows, columns))


def _note(notes: list[str], site: QuantizedSite, form: Form, bits: int) -> None:
    """State once what a user might not expect."""
    width = site.weight.encoding.bits
    sentences = [form.note] if form.note else []
    if bits != width:
        sentences.append(f"{width}-bit weights are stored in {bits}-bit containers{' for integer kernels' if form is INTEGER else ''}")
    if site.activation and form is INTEGER and site.activation.encoding.bits < 8:
        sentences.append(f"{site.activation.encoding.bits}-bit activations are multiplied in 8-bit containers")
    notes.extend(sentence for sentence in sentences if sentence not in notes)


def _attach(legal: Legal, site: QuantizedSite, stored: Stored) -> list[Node | None]:
    """get_attr nodes for a stored weight: codes, scale, zero point."""
    tensors = {"codes": stored.codes, "scale": stored.scale, "zero_point": stored.zero_point}
    nodes: list[Node | None] = []
    for part, tensor in tensors.items():
        nodes.append(None if tensor is None else legal.attach(key(site.name, part), tensor, site.node))
    return nodes


def _insert(site: QuantizedSite, target: Any, args: Sequence[Any]) -> Node:
    graph = site.node.graph
    with graph.inserting_before(site.node):
        node = graph.call_function(target, tuple(args))
    node.meta = dict(site.node.meta)
    return node


def _bias(site: QuantizedSite) -> Any:
    return site.node.args[2] if len(site.node.args) > 2 else site.node.kwargs.get("bias")


def _block(site: QuantizedSite, *, ragged: bool) -> int:
    block = block_size(site.weight.encoding, site.weight.codes.shape[1], ragged=ragged)
    assert block is not None, "refused before"
    return block


def _write_blocked(legal: Legal, site: QuantizedSite, form: Form, options: Options) -> tuple[int, Node]:
    block = _block(site, ragged=True)
    rows = site.weight.codes.shape[0]
    bits = stored_width(form, site.weight.encoding, rows, block)
    operands = _attach(legal, site, layout.blocked(site.weight, bits, block))
    return bits, _insert(site, SITE.blocked.default, [site.node.args[0], *operands, _bias(site), rows, bits, block])


def _write_integer(legal: Legal, site: QuantizedSite, form: Form, options: Options) -> tuple[int, Node]:
    activation = site.activation
    assert activation is not None
    operands = _attach(legal, site, layout.integer(site.weight, options.signed))
    step, offset = (None, None) if activation.encoding.dynamic else _static(legal, site, activation)
    low, high = code_range(activation.encoding)
    rest = [_bias(site), step, offset, low, high, activation.encoding.clip]
    return 8, _insert(site, SITE.integer.default, [activation.source, *operands, *rest])


def _static(legal: Legal, site: QuantizedSite, activation: Activation) -> tuple[Node, Node | None]:
    """Scale and zero point of a static activation as scalars."""
    gm = legal.graph
    step = add_attribute(gm, key(site.name, "step"), attribute(gm, activation.scale).float().reshape(()), before=site.node)
    if activation.zero_point is None:
        return step, None
    offset = attribute(gm, activation.zero_point).to(torch.uint8).reshape(())
    return step, add_attribute(gm, key(site.name, "offset"), offset, before=site.node)


def _write_gathered(legal: Legal, site: QuantizedSite, form: Form, options: Options) -> tuple[int, Node]:
    block = _block(site, ragged=False)
    columns = site.weight.codes.shape[1]
    bits = stored_width(form, site.weight.encoding, 4, block)  # a gather packs along the row, so any number of rows will do
    operands = _attach(legal, site, layout.gathered(site.weight, bits, block))
    return bits, _insert(site, SITE.gather.default, [site.node.args[1], *operands, columns, bits, block])


def _write_shared(site: QuantizedSite, table: Node) -> tuple[int, Node]:
    given: tuple[Any, ...] = table.args
    _, *operands, columns, bits, block = given
    return bits, _insert(site, SITE.shared.default, [site.node.args[0], *operands, _bias(site), columns, bits, block])


def _stored_bytes(legal: Legal, site: QuantizedSite) -> int:
    parts = [getattr(legal.graph, key(site.name, part), None) for part in ("codes", "scale", "zero_point")]
    return sum(tensor.nbytes for tensor in parts if tensor is not None)


_WRITERS: dict[Form, Callable[[Legal, QuantizedSite, Form, Options], tuple[int, Node]]] = {
    BLOCKED: _write_blocked,
    EMULATED: _write_blocked,
    INTEGER: _write_integer,
    GATHERED: _write_gathered,
}


def _fold_weights(legal: Legal, notes: list[str]) -> None:
    """Store a dequantized constant that no form covers as floats, and say so."""
    gm = legal.graph
    for node in list(gm.graph.nodes):
        if not is_call(node, FXPRESS.dequantize.default) or node.args[0].op != "get_attr":
            continue
        weight: Weight = weight_of(gm, node)
        name = weight_name(node.args[0])
        notes.append(f"{name} is stored as floats: it is read by an operator that has no quantized form")
        replace(node, legal.attach(key(name, "values"), layout.dequantized(weight), node))


def _cast(legal: Legal, dtype: torch.dtype) -> None:
    """Let all float arithmetic be done in `dtype`: parameters, and every dtype that a node names."""
    gm = legal.graph
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            if attribute(gm, node).dtype in HALVES:
                legal.convert(node, dtype)
        elif node.op == "call_function" and node.target != FXPRESS.choose_qparams.default:  # scales that are kept stay as they are
            node.args = torch.fx.node.map_aggregate(node.args, lambda v: dtype if v in HALVES else v)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, lambda v: dtype if v in HALVES else v)
