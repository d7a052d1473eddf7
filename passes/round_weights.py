"""`round_weights`: choose the integers of annotated weights, to nearest or by GPTQ, block after block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.blocks import Block, blocks
from ir.errors import DataError, OptionError
from ir.rounding import GPTQ, Nearest, Rounding
from ir.sites import Layer, layers
from ir.weights import set_codes
from passes.base import Context, Effect, Pass

MIN_TOKENS = 128  # fewer tell next to nothing about the inputs of a layer
METHODS = ("gptq", "nearest")


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Replace annotated weights by integer codes with scales.

    Before::

        %2 = aten.linear(%1, %w) {weight: u4[1,64]}

    After::

        %2 = fxpress.dequantize(%w_codes, %w_scale, %w_zero_point, 'u4[1,64]', float32); %3 = aten.linear(%1, %2)

    `method="gptq"` (arXiv 2210.17323) minimises `tr(ΔW G ΔWᵀ)` with `G = XᵀX` over calibration inputs X that come from the
    already rounded prefix. The graph is cut at the residual stream, and inside a block layers are rounded in the order they run, so
    memory holds the stream of all samples and one block's activations of one batch.

    Args:
        method: "gptq" or "nearest".
        damping: share of the mean of diag(G) that is added to it.
        act_order: round columns in the order of falling diag(G).
        search: choose scales by a search over clipping ratios, weighted by the inverse of G; else they cover the extremes.
        sweeps: of exact coordinate descent on codes and group scales after GPTQ.

    Raises:
        DataError: GPTQ without calibration data, or with fewer than 128 tokens.
    """

    method: str = "gptq"
    damping: float = GPTQ.damping
    act_order: bool = GPTQ.act_order
    search: bool = GPTQ.search
    sweeps: int = GPTQ.sweeps
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(
                f"there is no rounding {self.method!r}", where="round_weights(method=...)", remedy=f"there are {list(METHODS)}"
            )
        if not 0 <= self.damping < 1:
            raise OptionError(f"damping is a share from 0 up to 1, not {self.damping}", where="round_weights(damping=...)")

    def needs(self, ctx: Context) -> None:
        """Enough calibration data, for GPTQ."""
        if self.method != "gptq":
            return
        if not ctx.calibration:
            raise DataError("round_weights(method='gptq') needs calibration data", remedy="pass calibration=[...], or method='nearest'")
        tokens = sum(_tokens(batch[0]) for batch in ctx.calibration)
        if tokens < MIN_TOKENS:
            raise DataError(
                f"{tokens} calibration tokens are too few", remedy=f"give at least {MIN_TOKENS}, better 32 768; or method='nearest'"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Round every annotated weight, one at a time."""
        pending = {layer.node: layer for layer in layers(gm) if layer.site("weight").encoding is not None and layer.weight.op == "get_attr"}
        linears = {node: layer for node, layer in pending.items() if layer.kind == "Linear" and self.method == "gptq"}
        # First of all what has no inputs to weigh, embeddings: the linears then see what they give once rounded.
        for node, layer in pending.items():
            if node not in linears:
                _round(gm, layer, Nearest(), None)
        if linears:
            rounding = GPTQ(damping=self.damping, act_order=self.act_order, search=self.search, sweeps=self.sweeps)
            _Sequential(gm, ctx, rounding, linears).run()
        return len(pending)


def _tokens(first: Tensor) -> int:
    """Tokens in a batch, from its first input: ids `[batch, length]`, or vectors along the last axis."""
    return int((first.shape[:-1] if first.is_floating_point() else first.shape[:2]).numel())


def _round(gm: GraphModule, layer: Layer, rounding: Rounding, gram: Tensor | None) -> None:
    encoding = layer.site("weight").encoding
    assert encoding is not None
    codes, qparams = rounding.round_weight(edit.attribute(gm, layer.weight), encoding, gram)
    set_codes(gm, layer, encoding, codes, qparams)


@dataclass
class _Sequential:
    """Round the layers of a graph in the order that they run, with inputs from the rounded prefix."""

    gm: GraphModule
    ctx: Context
    rounding: GPTQ
    pending: dict[Node, Layer]

    def run(self) -> None:
        outside, cut = blocks(self.gm)
        streams: list[dict[Node, Any]] = [{} for _ in self.ctx.calibration]
        for block in self.ctx.track(cut, "round weights"):
            # The block's nodes as they were when it was cut; dequantize operators join them as weights are rounded.
            for source in dict.fromkeys(node.args[0] for node in block.nodes if node in self.pending):
                assert isinstance(source, Node)
                self._round_readers(outside, block, source, streams)
            if block is not cut[-1]:
                pairs = zip(self.ctx.calibration, streams, strict=True)
                streams = [self._values(outside, block, batch, stream, block.exit) for batch, stream in pairs]

    def _round_readers(self, outside: list[Node], block: Block, source: Node, streams: Sequence[dict[Node, Any]]) -> None:
        """Round every layer of the block that reads `source`, from one Gram matrix."""
        size = edit.value(source).shape[-1]
        gram = torch.zeros(size, size, dtype=torch.float32)
        count = 0
        for batch, stream in zip(self.ctx.calibration, streams, strict=True):
            x = self._values(outside, block, batch, stream, [source])[source].flatten(0, -2).float()
            gram.addmm_(x.T, x)
            count += x.shape[0]
        gram /= max(count, 1)
        if not torch.isfinite(gram).all():
            raise DataError("the inputs of a layer are not finite on the calibration data", where=edit.module_path(source))
        for layer in [self.pending[node] for node in block.nodes if node in self.pending and node.args[0] is source]:
            _round(self.gm, layer, self.rounding, gram)

    def _values(
        self, outside: list[Node], block: Block, batch: list[Tensor], stream: dict[Node, Any], keep: Sequence[Node]
    ) -> dict[Node, Any]:
        """The values of `keep`, nodes of the block, for one batch and the stream values that enter the block."""
        given = evaluate.bind(self.gm, batch) | stream
        needed = evaluate.ancestors(keep, stop=given)
        nodes = [node for node in outside if node in needed]
        for node in block.nodes:
            weight = node.args[1] if node in self.pending else None
            if isinstance(weight, Node) and weight.op == "call_function" and node in needed:
                nodes.append(weight)
            if node in needed:
                nodes.append(node)
        return evaluate.evaluate(self.gm, nodes, given, keep)
