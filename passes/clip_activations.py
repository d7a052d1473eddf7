"""`clip_activations`: choose how much of their extremes the dynamic scales of activations cover."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate, numerics
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.sites import Layer, readers
from passes.base import Context, Effect, Pass
from passes.data.observation import tokens_of, total
from passes.memo.packed import like

RATIOS = tuple(round(1 - 0.05 * i, 2) for i in range(11))  # 1 to 0.5


@dataclass(frozen=True)
class ClipActivations(Pass):
    """Clip dynamic activations where that makes the outputs of the linears that read them more exact.

    Before::

        %2 = aten.linear(%1, %w) {input: i4[1,-1]dynamic, weight: i4[1,-1]}

    After::

        %2 = aten.linear(%1, %w) {input: i4[1,-1]dynamic*0.85, weight: i4[1,-1]}

    Every tensor gets the ratio `c`, of 1, 0.95 … 0.5, with the least `Σ ‖(Q_c(x) − x) Wᵀ‖²` over its readers and over calibration tokens:
    a scale `c · max|x| / (2^(b−1) − ½)` rounds the many small values more finely, and clips the few greatest. Rotated activations are
    nearly Gaussian, and gain most. One streaming run.

    Args:
        tokens: of the calibration data to look at.

    Raises:
        DataError: no calibration data.
    """

    tokens: int = 2048
    effect: ClassVar[Effect] = Effect.ANNOTATE

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError(f"at least one token is needed, not {self.tokens}", where="clip_activations(tokens=...)")

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        self.need_calibration(ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Annotate the ratios; returns the number of linears whose inputs are clipped."""
        found = {source: [layer for layer in layers if _dynamic(layer)] for source, layers in readers(gm).items()}
        at = {source: place for place, source in enumerate(source for source, layers in found.items() if layers)}

        def zeros() -> list[Tensor]:
            return [torch.zeros(len(RATIOS), dtype=torch.float64) for _ in at]

        def take(errors: Sequence[Tensor], source: Node, value: Tensor) -> None:
            errors[at[source]].add_(_errors(gm, tokens_of(value, ctx, self.tokens).float(), found[source]))

        errors = ctx.memo.kept("errors", lambda: total(gm, ctx, at, zeros, take, "clip activations"), like(zeros()))
        clipped = 0
        for source, error in zip(at, errors, strict=True):
            ratio = RATIOS[int(error.argmin())]
            for layer in found[source]:
                encoding = layer.site("input").encoding
                assert encoding is not None
                layer.site("input").annotate(replace(encoding, clip=ratio))
                clipped += ratio != 1
        return clipped


def _dynamic(layer: Layer) -> bool:
    encoding = layer.site("input").encoding
    return encoding is not None and encoding.dynamic


def _errors(gm: GraphModule, x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """For each ratio, the squared error that the readers of `x [tokens, channels]` make."""
    encoding = layers[0].site("input").encoding
    assert encoding is not None
    weights = [_weight(gm, layer) for layer in layers]
    return torch.stack([sum((((_rounded(x, encoding, c) - x) @ W.T).square().sum() for W in weights), x.new_zeros(())) for c in RATIOS])


def _rounded(x: Tensor, encoding: Encoding, ratio: float) -> Tensor:
    return numerics.fake_quantize(x, replace(encoding, clip=ratio))


def _weight(gm: GraphModule, layer: Layer) -> Tensor:
    """The layer's weight, dequantized if it is rounded already."""
    node = layer.weight
    if node.op == "get_attr":
        return edit.attribute(gm, node).float()
    ((value),) = evaluate.evaluate(gm, [node], {}, [node]).values()
    return value.float()  # type: ignore[no-any-return]
