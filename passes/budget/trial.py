"""`Trial`: how far the model is from itself with some of its linears rounded, or smaller, measured without a copy of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate, numerics
from ir.blocks import Block, blocks
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.rounding import Rounding
from ir.sites import Layer
from passes.base import Context
from passes.budget.forms import WHOLE, Cuts, Form
from passes.data.calibration import take_rows, tokens_in
from passes.data.prefix import Inputs
from passes.data.spread import coded, tensors
from passes.data.still import still_inputs
from passes.learning.divergence import of_outputs, own_outputs
from passes.memo.packed import numbers
from passes.pruning.fit import Fit

Variant = Mapping[Layer, Form]  # the linears that are changed, and into what
Values = dict[Node, Any]
Key = tuple[Layer, int, Encoding]  # what codes depend on: the number of columns says which they are


class Trial:
    """Variants of one model, each with other linears smaller, or rounded: their weights, and their inputs where the form says so.

    Codes are kept as integers, one byte a weight, on disk where the graph has a store, and are made floats for one call. What a variant
    shares with the first one, all blocks before the first layer that differs, is not run again. Static inputs are rounded over each batch's
    own range, linears that are left out read theirs in floating point, and weights are rounded by inputs in floating point.

    Args:
        gm: the graph; its weights stay as they are.
        ctx: with the calibration data that weights are rounded by.
        held: batches to measure on.
        rounding: that makes codes.
        cuts: which rows and columns smaller forms keep.
    """

    def __init__(self, gm: GraphModule, ctx: Context, held: Sequence[Sequence[Tensor]], rounding: Rounding, cuts: Cuts = WHOLE) -> None:
        self.gm, self.ctx, self.held, self.rounding, self.cuts = gm, ctx, held, rounding, cuts
        self.codes: dict[Key, tuple[Tensor, QParams, Tensor | None]] = {}
        _, self.cut = blocks(gm)
        stream = {node for block in self.cut for node in block.nodes}
        self.outputs = {node: name for node, name in own_outputs(gm).items() if node in stream}
        self.plans = [self._plan(block) for block in self.cut]
        self.block_of = {node: index for index, block in enumerate(self.cut) for node in block.nodes}

    def divergences(self, variants: Sequence[Variant]) -> list[float]:
        """`KL(model ‖ variant)` of every variant, nats a token; of outputs that are no logits the relative squared error."""
        return self.ctx.memo.kept("divergences", partial(self._divergences, variants), numbers(len(variants)))

    def _divergences(self, variants: Sequence[Variant]) -> list[float]:
        self._round(dict.fromkeys(item for forms in variants for item in forms.items()))
        ranks, counts = self.ctx.ranks, [tokens_in(batch) for batch in self.held]
        own = [(index, self._measured(self.held[index], variants)) for index in self.ctx.track(ranks.share(len(self.held)), "measure")]
        measured = dict(pair for said in ranks.everyone(own) for pair in said)
        totals = [sum(count * measured[index][variant] for index, count in enumerate(counts)) for variant in range(len(variants))]
        return [total / max(sum(counts), 1) for total in totals]

    def _measured(self, batch: Sequence[Tensor], variants: Sequence[Variant]) -> list[float]:
        """Of every variant on one batch."""
        exact, _ = self._run(batch, {})
        first, entering = self._run(batch, variants[0])
        measured = []
        for index, forms in enumerate(variants):
            start = self._parting(variants[0], forms)
            found = first | self._run(batch, forms, start, entering[start])[0] if index else first
            measured.append(float(of_outputs(found, exact, self.outputs)))
        return measured

    def _plan(self, block: Block) -> tuple[list[Node], list[Node]]:
        """The calls of a block, and what they need from outside of the stream; and the values to keep."""
        keep = [*block.exit, *(node for node in block.nodes if node in self.outputs and node not in block.exit)]
        needed = evaluate.ancestors(keep, stop={*block.entry, *evaluate.placeholders(self.gm)})
        return [node for node in self.gm.graph.nodes if node in needed and node.op == "call_function"], keep

    def _parting(self, one: Variant, other: Variant) -> int:
        """The first block in which two variants differ."""
        apart = {layer for layer in {*one, *other} if one.get(layer) != other.get(layer)}
        return min((self.block_of[layer.node] for layer in apart), default=len(self.cut) - 1)

    def _run(self, batch: Sequence[Tensor], forms: Variant, start: int = 0, now: Values | None = None) -> tuple[Values, list[Values]]:
        """The outputs from block `start` on, which `now` enters, and what enters each block."""
        instead = {layer.node: partial(self._linear, layer, form) for layer, form in forms.items()}
        given, now = evaluate.bind(self.gm, batch), now or {}
        found: Values = {}
        entering = []
        for nodes, keep in self.plans[start:]:
            entering.append(now)
            now = evaluate.evaluate(self.gm, nodes, given | now, keep, instead=instead)
            found |= {node: value for node, value in now.items() if node in self.outputs}
        return found, entering

    def _linear(self, layer: Layer, form: Form, x: Tensor, _: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer in a form, in place of `aten.linear`. Rows that go are computed: of what reads them nothing does."""
        kept = self.cuts.columns(layer, form)
        if kept is not None:
            x = x[..., kept]
        if form.input is not None and not layer.input_rounded:
            x = numerics.fake_quantize(x, form.input)
        codes, qparams, more = self.codes[self._key(layer, form)]
        weight = numerics.dequantize(edit.counted(self.gm, codes), qparams, form.weight)
        bias = bias if bias is None or more is None else bias + more.to(bias.dtype)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def _key(layer: Layer, form: Form) -> Key:
        return layer, form.shape_of(layer)[1], form.weight

    def _round(self, wanted: Iterable[tuple[Layer, Form]]) -> None:
        """Make the codes that are not known yet, in one run over the calibration data."""
        missing: dict[Node, dict[Key, Form]] = {}
        for layer, form in wanted:
            if self._key(layer, form) not in self.codes:
                missing.setdefault(layer.node, {})[self._key(layer, form)] = form
        if not missing:
            return
        pending = {node: layer for node, forms in missing.items() for layer, _, _ in forms}
        owner = self.ctx.ranks.dealt({key: math.prod(form.shape_of(key[0])) for forms in missing.values() for key, form in forms.items()})
        for inputs in still_inputs(self.gm, self.ctx, pending, "round for measuring"):
            items = [(layer, key, form) for layer in inputs.layers for key, form in missing[layer.node].items()]
            own = (self._coded(inputs, layer, form) for layer, key, form in items if owner[key] == self.ctx.ranks.rank)
            found = self.ctx.ranks.collect([owner[key] for _, key, _ in items], own)
            for (_, key, _), parts in zip(items, found, strict=True):
                codes, qparams = coded(parts)
                self.codes[key] = edit.kept(self.gm, codes), qparams, parts.get("bias")

    def _coded(self, inputs: Inputs, layer: Layer, form: Form) -> dict[str, Tensor]:
        """A linear's codes in a form, and what is added to its bias."""
        fit = Fit.of(self.gm, layer, inputs, self.cuts.columns(layer, form), self.cuts.damping)
        found = tensors(fit.round(self.rounding, form.weight))
        return found if fit.bias is None else found | {"bias": fit.bias}


def hold_out(ctx: Context, tokens: int, seed: int) -> tuple[Context, list[list[Tensor]]]:
    """A context whose calibration data lacks about `tokens` tokens, at most half of its samples, drawn at random; and these.

    None are held out for `tokens=0`. One sample alone cannot be divided: it is then on both sides.
    """
    if not tokens:
        return ctx, []
    samples = [(place, row) for place, batch in enumerate(ctx.calibration) for row in range(len(batch[0]))]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: set[tuple[int, int]] = set()
    count = 0
    for index in order[: len(samples) // 2]:
        if count >= tokens:
            break
        place, row = samples[index]
        taken.add((place, row))
        count += tokens_in(ctx.calibration[place]) // len(ctx.calibration[place][0])
    if not taken:
        return ctx, [list(batch) for batch in ctx.calibration]
    parts = [[_rows(batch, place, taken, held) for place, batch in enumerate(ctx.calibration)] for held in (False, True)]
    rest, held = ([batch for batch in part if len(batch[0])] for part in parts)
    return replace(ctx, calibration=rest), held


def _rows(batch: Sequence[Tensor], place: int, taken: set[tuple[int, int]], held: bool) -> list[Tensor]:
    """The samples of a batch that are held out, or the others."""
    return take_rows(batch, [row for row in range(len(batch[0])) if ((place, row) in taken) is held])
