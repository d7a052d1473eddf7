"""`quantize`: turn annotations into operators."""

from dataclasses import dataclass
from operator import getitem
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from ir.rounding import Nearest
from ir.sites import Layer, layers, readers
from ir.weights import set_codes
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class Quantize(Pass):
    """Insert quantize and dequantize operators at every annotated operand that has none yet.

    Before::

        %2 = aten.linear(%1, %w) {input: i8[1,-1]dynamic, weight: i8[1,-1]}

    After::

        %2 = fxpress.choose_qparams(%1, 'i8[1,-1]dynamic'); %3 = getitem(%2, 0)
        %4 = fxpress.quantize(%1, %3, None, ...); %5 = fxpress.dequantize(%4, %3, None, ...)
        %6 = fxpress.dequantize(%w.codes, %w.scale, None, 'i8[1,-1]', float32); %7 = aten.linear(%5, %6)

    Weights that `round_weights` has not rounded are rounded to nearest; or, with `weights=False`, left to it, which then sees inputs as
    they will be rounded. Layers that read one tensor with one encoding share its operators.
    Static activations take their range from `observe`; `quantile` < 1 clips it to that quantile of |x| over all elements.
    """

    quantile: float = 1.0
    weights: bool = True
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise OptionError(f"a quantile lies above 0 and up to 1, not at {self.quantile}", where="quantize(quantile=...)")

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Statistics, if an activation is static."""
        for source, found in readers(gm).items():
            if source.target is DEQUANTIZE:
                continue
            static = [layer for layer in found if (encoding := layer.site("input").encoding) is not None and not encoding.dynamic]
            if static and (ctx.statistics is None or found[0].path not in ctx.statistics):
                raise DataError(
                    f"static activations of {static[0].path} need statistics",
                    remedy="put observe before quantize, after the last pass that changes the graph, and give calibration data",
                )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Quantize weights one at a time, then activations."""
        made: dict[tuple[Node, str], Node] = {}
        first = {layer.node: found[0].path for found in readers(gm).values() for layer in found}
        changed = 0
        for layer in ctx.track(layers(gm), "quantize"):
            encoding = layer.site("weight").encoding
            if encoding is not None and self.weights and layer.weight.op == "get_attr":
                codes, qparams = Nearest().round_weight(edit.attribute(gm, layer.weight), encoding)
                set_codes(gm, layer, encoding, codes, qparams)
                changed += 1
            activation = layer.site("input").encoding if layer.kind == "Linear" else None
            if activation is None or layer.input_rounded:
                continue
            key = (layer.site("input").operand, str(activation))
            if key not in made:
                made[key] = self._activation(gm, ctx, layer, activation, first[layer.node])
            layer.site("input").read(made[key])
            changed += 1
        return changed

    def _activation(self, gm: GraphModule, ctx: Context, layer: Layer, encoding: Encoding, key: str) -> Node:
        """The dequantized twin of a layer's input, placed before its first reader."""
        source, text = layer.site("input").operand, str(encoding)
        before = min(source.users)
        if encoding.dynamic:
            chosen = edit.emit(gm, CHOOSE_QPARAMS, (source, text), before=before)
            scale = edit.emit(gm, getitem, (chosen, 0), before=before)
            zero_point = None if encoding.symmetric else edit.emit(gm, getitem, (chosen, 1), before=before)
        else:
            scale, zero_point = self._static(gm, ctx, source, encoding, key)
        codes = edit.emit(gm, QUANTIZE, (source, scale, zero_point, text), before=before)
        return edit.emit(gm, DEQUANTIZE, (codes, scale, zero_point, text, edit.value(source).dtype), before=before)

    def _static(self, gm: GraphModule, ctx: Context, source: Node, encoding: Encoding, key: str) -> tuple[Node, Node | None]:
        assert ctx.statistics is not None
        measured, before = ctx.statistics[key], min(source.users)
        low, high = (torch.tensor(bound).reshape((1,) * edit.value(source).ndim) for bound in measured.range)
        if self.quantile < 1 and measured.sketch is not None:
            limit = measured.sketch.pooled().quantile(self.quantile)
            low, high = low.clamp_min(-limit), high.clamp_max(limit)
        qparams = numerics.qparams_from_range(low.clamp_max(0), high.clamp_min(0), encoding)
        scale = edit.add_attribute(gm, f"{key}.input_scale", qparams.scale, before=before)
        if qparams.zero_point is None:
            return scale, None
        return scale, edit.add_attribute(gm, f"{key}.input_zero_point", qparams.zero_point, before=before)
