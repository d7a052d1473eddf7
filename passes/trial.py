"""`Trial`: how far the model is from itself with some of its linears rounded, measured without a copy of it."""

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
from ir.rounding import Evidence, Rounding
from ir.sites import Layer, Mark
from passes.base import Context
from passes.calibration import take_rows, tokens_in
from passes.divergence import of_outputs, own_outputs
from passes.prefix import still_inputs

Marks = Mapping[Layer, Mark]  # the linears that are rounded, and how
Values = dict[Node, Any]


class Trial:
    """Variants of one model, each with other linears rounded: their weights, and their inputs where the mark says so.

    Codes are kept as integers, one byte a weight, and are made floats for one call. What a variant shares with the first one, all blocks
    before the first layer that differs, is not run again. Static inputs are rounded over each batch's own range, linears that are
    left out read theirs in floating point, and weights are rounded by inputs in floating point.

    Args:
        gm: the graph; its weights stay as they are.
        ctx: with the calibration data that weights are rounded by.
        held: batches to measure on.
        rounding: that makes codes.
    """

    def __init__(self, gm: GraphModule, ctx: Context, held: Sequence[Sequence[Tensor]], rounding: Rounding) -> None:
        self.gm, self.ctx, self.held, self.rounding = gm, ctx, held, rounding
        self.codes: dict[tuple[Layer, Encoding], tuple[Tensor, QParams]] = {}
        _, self.cut = blocks(gm)
        stream = {node for block in self.cut for node in block.nodes}
        self.outputs = {node: name for node, name in own_outputs(gm).items() if node in stream}
        self.plans = [self._plan(block) for block in self.cut]
        self.block_of = {node: index for index, block in enumerate(self.cut) for node in block.nodes}

    def divergences(self, variants: Sequence[Marks]) -> list[float]:
        """`KL(model ‖ variant)` of every variant, nats a token; of outputs that are no logits the relative squared error."""
        self._round(dict.fromkeys((layer, mark.weight) for marks in variants for layer, mark in marks.items()))
        totals, tokens = [0.0] * len(variants), 0
        for batch in self.ctx.track(self.held, "measure"):
            count = tokens_in(batch)
            exact, _ = self._run(batch, {})
            first, entering = self._run(batch, variants[0])
            for index, marks in enumerate(variants):
                start = self._parting(variants[0], marks)
                found = first | self._run(batch, marks, start, entering[start])[0] if index else first
                totals[index] += count * float(of_outputs(found, exact, self.outputs))
            tokens += count
        return [total / max(tokens, 1) for total in totals]

    def _plan(self, block: Block) -> tuple[list[Node], list[Node]]:
        """The calls of a block, and what they need from outside of the stream; and the values to keep."""
        keep = [*block.exit, *(node for node in block.nodes if node in self.outputs and node not in block.exit)]
        needed = evaluate.ancestors(keep, stop={*block.entry, *evaluate.placeholders(self.gm)})
        return [node for node in self.gm.graph.nodes if node in needed and node.op == "call_function"], keep

    def _parting(self, one: Marks, other: Marks) -> int:
        """The first block in which two variants differ."""
        apart = {layer for layer in {*one, *other} if one.get(layer) != other.get(layer)}
        return min((self.block_of[layer.node] for layer in apart), default=len(self.cut) - 1)

    def _run(self, batch: Sequence[Tensor], marks: Marks, start: int = 0, now: Values | None = None) -> tuple[Values, list[Values]]:
        """The outputs from block `start` on, which `now` enters, and what enters each block."""
        instead = {layer.node: partial(self._linear, layer, mark) for layer, mark in marks.items()}
        given, now = evaluate.bind(self.gm, batch), now or {}
        found: Values = {}
        entering = []
        for nodes, keep in self.plans[start:]:
            entering.append(now)
            now = evaluate.evaluate(self.gm, nodes, given | now, keep, instead=instead)
            found |= {node: value for node, value in now.items() if node in self.outputs}
        return found, entering

    def _linear(self, layer: Layer, mark: Mark, x: Tensor, _: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with its operands rounded, in place of `aten.linear`."""
        if mark.input is not None and not layer.input_rounded:
            x = numerics.fake_quantize(x, mark.input)
        weight = numerics.dequantize(*self.codes[layer, mark.weight], mark.weight)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    def _round(self, wanted: Iterable[tuple[Layer, Encoding]]) -> None:
        """Make the codes that are not known yet, in one run over the calibration data."""
        missing: dict[Node, list[tuple[Layer, Encoding]]] = {}
        for pair in wanted:
            if pair not in self.codes:
                missing.setdefault(pair[0].node, []).append(pair)
        if not missing:
            return
        pending = {node: pairs[0][0] for node, pairs in missing.items()}
        for inputs in still_inputs(self.gm, self.ctx, pending, "round for measuring"):
            for layer in inputs.layers:
                W = edit.attribute(self.gm, layer.weight).detach().float()
                for pair in missing[layer.node]:
                    self.codes[pair] = self.rounding.round_weight(W, pair[1], Evidence(gram=inputs.gram))


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
