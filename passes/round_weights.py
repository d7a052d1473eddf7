"""`round_weights`: choose the integers of annotated weights, to nearest or by GPTQ, block after block."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from ir.errors import DataError, OptionError
from ir.rounding import GPTQ, Nearest, propagate_error
from ir.sites import Layer
from ir.weights import round_layer, unrounded
from passes.base import Context, Effect, Pass
from passes.calibration import tokens_in
from passes.prefix import Inputs, Prefix

MIN_TOKENS = 128  # fewer tell next to nothing about the inputs of a layer
METHODS = ("gptq", "nearest")
PROPAGATION_DAMPING = 0.1  # of the regression on the prefix's error: a smaller one follows the calibration data too closely


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
        propagation: how much of the error of the compressed prefix a layer makes up for before it is rounded, 0 to 1 (QEP, 2504.09629).

    Raises:
        DataError: GPTQ without calibration data, or with fewer than 128 tokens.
    """

    method: str = "gptq"
    damping: float = GPTQ.damping
    act_order: bool = GPTQ.act_order
    search: bool = GPTQ.search
    sweeps: int = GPTQ.sweeps
    propagation: float = 0.0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(
                f"there is no rounding {self.method!r}", where="round_weights(method=...)", remedy=f"there are {list(METHODS)}"
            )
        if not 0 <= self.damping < 1:
            raise OptionError(f"damping is a share from 0 up to 1, not {self.damping}", where="round_weights(damping=...)")
        if not 0 <= self.propagation <= 1:
            raise OptionError(f"propagation lies from 0 to 1, not at {self.propagation}", where="round_weights(propagation=...)")

    def needs(self, ctx: Context) -> None:
        """Enough calibration data, for GPTQ."""
        if self.method != "gptq":
            return
        if not ctx.calibration:
            raise DataError("round_weights(method='gptq') needs calibration data", remedy="pass calibration=[...], or method='nearest'")
        tokens = sum(tokens_in(batch) for batch in ctx.calibration)
        if tokens < MIN_TOKENS:
            raise DataError(
                f"{tokens} calibration tokens are too few", remedy=f"give at least {MIN_TOKENS}, better 32 768; or method='nearest'"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Round every annotated weight, one at a time."""
        pending = {layer.node: layer for layer in unrounded(gm)}
        linears = {node: layer for node, layer in pending.items() if layer.kind == "Linear" and self.method == "gptq"}
        # First of all what has no inputs to weigh, embeddings: the linears then see what they give once rounded.
        for node, layer in pending.items():
            if node not in linears:
                round_layer(gm, layer, Nearest())
        if linears:
            rounding = GPTQ(damping=self.damping, act_order=self.act_order, search=self.search, sweeps=self.sweeps)
            for inputs in Prefix(gm, ctx, linears, exact=self.propagation > 0).inputs("round weights"):
                for layer in inputs.layers:
                    round_layer(gm, layer, rounding, inputs.gram, self._target(gm, layer, inputs))
        return len(pending)

    def _target(self, gm: GraphModule, layer: Layer, inputs: Inputs) -> Tensor:
        """The weight to round."""
        weight = edit.attribute(gm, layer.weight).detach().float()
        if inputs.cross is None:
            return weight
        return propagate_error(weight, inputs.gram, inputs.cross, self.propagation, PROPAGATION_DAMPING)
