"""What a compile did layer by layer: encodings and their errors, what layers read before and after, what each part of the model takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.ops import DEQUANTIZE
from ir.sites import Layer, Mark, before_rounding, floats, layers, quantized, readers
from ir.weights import ERROR
from passes.base import Context
from passes.data.observation import watch
from passes.page.grid import place
from passes.probe import relative_error
from passes.progress import Progress
from passes.ranks import Ranks

QUANTILES = (0.5, 0.99, 0.999, 1.0)  # of |x|, that are told of what linears read
OTHERS = "others"  # the part of tensors that the model itself holds
DIGITS = 5  # that count, of numbers in the report

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Read:
    """What a linear reads on the probe: `QUANTILES` of |x| before it is rounded; and ‖x̂ − x‖ / ‖x‖, None where it is not."""

    quantiles: list[float]
    error: float | None = None


@dataclass(frozen=True)
class View:
    """A graph at one time: bytes by part, and what linears read, by their paths."""

    sizes: Mapping[str, int]
    reads: Mapping[str, Read]

    @classmethod
    def of(cls, gm: GraphModule, ctx: Context) -> "View":
        """The view of a graph, by one run on the probe."""
        return cls(sizes(gm), reads(gm, ctx))


def sizes(gm: GraphModule) -> dict[str, int]:
    """Bytes of stored tensors by part: the module that holds them, as its layer calls it, `self_attn.q_proj`. Shared ones count once."""
    stored = [(str(node.all_input_nodes[0].target), -(-bits // 8)) for node, _, _, bits in quantized(gm)]
    stored += [(str(node.target), tensor.nbytes) for node, tensor in floats(gm)]
    found: dict[str, int] = {}
    for name, size in stored:
        part = place(name.rpartition(".")[0])[1] or OTHERS
        found[part] = found.get(part, 0) + size
    return found


def reads(gm: GraphModule, ctx: Context) -> dict[str, Read]:
    """What every linear reads on the probe."""
    operands = readers(gm)
    sources = {operand: before_rounding(operand) for operand in operands}
    waiting: dict[Node, set[Node]] = {}
    for operand, source in sources.items():
        waiting.setdefault(source, set()).add(operand)
    held: dict[Node, tuple[Tensor, list[float]]] = {}
    found: dict[str, Read] = {}

    def take(node: Node, value: Tensor) -> None:
        if node in waiting:
            held[node] = value, _quantiles(value)
        if node not in operands:
            return
        source = sources[node]
        x, quantiles = held[source]
        error = None if node is source else _short(relative_error((value,), (x,)))
        found.update((layer.path, Read(quantiles, error)) for layer in operands[node])
        waiting[source].discard(node)
        if not waiting[source]:
            del held[source]

    watch(gm, replace(ctx, calibration=[list(ctx.probe)], progress=Progress(), ranks=Ranks()), {*operands, *waiting}, take, "look")
    return found


def layer_rows(gm: GraphModule, after: View) -> Rows:
    """A row for each layer: its encodings, empty for floating point; its weights; relative errors of both operands, where rounded."""
    rows: Rows = []
    for layer in layers(gm):
        stored = layer.weight.all_input_nodes[0] if layer.weight.target is DEQUANTIZE else layer.weight
        read = after.reads.get(layer.path, Read([]))
        errors = {"error": layer.weight.meta.get(ERROR), "input error": read.error}
        known = {name: _short(error) for name, error in errors.items() if error is not None}
        rows.append({"layer": layer.path, "encoding": _mark(layer), "weights": edit.value(stored).numel(), **known})
    return rows


def read_rows(gm: GraphModule, before: View, after: View) -> Rows:
    """A row for each tensor that linears read, by the first of them: its quantiles before the first pass, if known, and after the last."""
    rows: Rows = []
    for path in (found[0].path for found in readers(gm).values() if found[0].path in after.reads):
        was = {"before": before.reads[path].quantiles} if path in before.reads else {}
        rows.append({"layer": path, **was, "after": after.reads[path].quantiles})
    return rows


def part_rows(before: View, after: View) -> Rows:
    """A row for each part of the model: its bytes before and after."""
    parts = dict.fromkeys([*before.sizes, *after.sizes])
    return [{"part": part, "before": before.sizes.get(part, 0), "after": after.sizes.get(part, 0)} for part in parts]


def _mark(layer: Layer) -> str:
    """The encodings that a layer's operators say it has."""
    weight, given = layer.site("weight").rounded, layer.site("input").rounded if layer.kind == "Linear" else None
    return "" if weight is None else str(Mark(given, weight))


def _quantiles(x: Tensor) -> list[float]:
    flat = x.detach().abs().flatten().float()
    return [] if not len(flat) else [_short(float(flat.kthvalue(max(1, math.ceil(q * len(flat)))).values)) for q in QUANTILES]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
