"""`round_weights`: choose the integers of annotated weights, to nearest or by an error that calibration data tell, block after block."""

from dataclasses import dataclass, fields
from typing import ClassVar

from torch.fx import GraphModule

from ir.errors import DataError, OptionError
from ir.rounding import METHODS, Nearest, Rounding
from ir.weights import followers_of, round_layer, set_codes, unrounded
from passes.base import Context, Effect, Pass
from passes.calls import fits
from passes.data.calibration import tokens_in
from passes.data.evidence import rounded

MIN_TOKENS = 128  # fewer tell next to nothing about the inputs of a layer
OPTIONS = ("damping", "act_order", "search", "sweeps", "groups")  # that belong to methods


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Replace annotated weights by integer codes with scales.

    Before::

        %2 = aten.linear(%1, %w) {weight: u4[1,64]}

    After::

        %2 = fxpress.dequantize(%w_codes, %w_scale, %w_zero_point, 'u4[1,64]', float32); %3 = aten.linear(%1, %2)

    Inputs X̂ of a layer come from the already rounded prefix. The graph is cut at the residual stream, and inside a block layers are
    rounded in the order they run, so memory holds the stream of all samples and one block's activations of one batch. Layers without inputs
    to weigh, embeddings, are rounded to nearest.

    | method | least | arXiv |
    |---|---|---|
    | nearest | the weight's own error | |
    | gptq | `tr(ΔW H ΔWᵀ)`, `H = X̂ᵀX̂` | 2210.17323 |
    | exact_scales | the same by scales alone, codes to nearest | 2606.10890 |
    | ternary | the same with three codes, −1, 0 and 1, in 2 bits | |
    | gptaq, qronos | `‖X Wᵀ − X̂ Ŵᵀ‖²`, X of the model as it was | 2504.02692, 2505.11695 |
    | guided | `Σ_g tr(ΔW_g H_g ΔW_gᵀ)`, tokens weighed by squared gradients | 2505.07004 |
    | yaqa | `tr(H_out ΔW H_in ΔWᵀ)`, Kronecker factors of the Fisher information | 2505.22988 |

    Options that are None are the method's own; those that it does not have are refused. `guided` and `yaqa` run the calibration data once
    more, with gradients, on the model before rounding.

    Args:
        method: one of the table.
        damping: share of the mean of diag(H) that is added to it.
        act_order: round columns in the order of falling diag(H).
        search: choose scales by a search over clipping ratios, weighted by the inverse of H; else they cover the extremes.
        sweeps: of exact coordinate descent on codes and group scales afterwards.
        groups: of outputs that have a Hessian each.
        propagation: how much of the error of the compressed prefix a layer makes up for, 0 to 1. Of gptaq and qronos, which do so as they
            round, 1 unless given; of the others 0, and if given the weight is first moved to the optimum (QEP, 2504.09629).

    Raises:
        DataError: a method other than nearest without calibration data, or with fewer than 128 tokens.
        OptionError: an option that the method does not have.
    """

    method: str = "gptq"
    damping: float | None = None
    act_order: bool | None = None
    search: bool | None = None
    sweeps: int | None = None
    groups: int | None = None
    propagation: float | None = None
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(
                f"there is no rounding {self.method!r}", where="round_weights(method=...)", remedy=f"there are {list(METHODS)}"
            )
        self._rounding()
        if self.damping is not None and not 0 <= self.damping < 1:
            raise OptionError(f"damping is a share from 0 up to 1, not {self.damping}", where="round_weights(damping=...)")
        if self.propagation is not None and not (fits(self.propagation, 0.0) and 0 <= self.propagation <= 1):
            raise OptionError(f"propagation lies from 0 to 1, not at {self.propagation}", where="round_weights(propagation=...)")
        if self.propagation and not METHODS[self.method].needs:
            raise OptionError(f"{self.method} does not look at inputs, so it makes up for nothing", where="round_weights(propagation=...)")

    def _rounding(self) -> Rounding:
        """The method with the options that are given.

        Raises:
            OptionError: one that it does not have, or of another type.
        """
        method = METHODS[self.method]
        known = {field.name: field.default for field in fields(method) if field.name in OPTIONS}
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        for name, value in given.items():
            if name not in known:
                remedy = f"its options are {', '.join(known)}"
                raise OptionError(f"the method {self.method!r} has no option {name}", where="round_weights", remedy=remedy)
            if not fits(value, known[name]):
                raise OptionError(f"round_weights({name}={value!r}): the option is a {type(known[name]).__name__}")
        return method(**given)

    @property
    def _share(self) -> float:
        """Of the prefix's error, that a layer makes up for."""
        return float("cross" in METHODS[self.method].needs) if self.propagation is None else self.propagation

    def needs(self, ctx: Context) -> None:
        """Enough calibration data, if the method looks at any."""
        if not METHODS[self.method].needs:
            return
        if not ctx.calibration:
            raise DataError(
                f"round_weights(method={self.method!r}) needs calibration data", remedy="pass calibration=[...], or method='nearest'"
            )
        tokens = sum(tokens_in(batch) for batch in ctx.calibration)
        if tokens < MIN_TOKENS:
            raise DataError(
                f"{tokens} calibration tokens are too few", remedy=f"give at least {MIN_TOKENS}, better 32 768; or method='nearest'"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Round every annotated weight, one at a time."""
        rounding = self._rounding()
        pending = {layer.node: layer for layer in unrounded(gm)}
        linears = {node: layer for node, layer in pending.items() if layer.kind == "Linear" and rounding.needs}
        found = rounded(gm, ctx, linears, rounding, self._share) if linears else iter(())
        tied = {follower.node for layer in pending.values() for follower in followers_of(gm, layer)}
        # First of all what has no inputs to weigh, embeddings: the linears then see what they give once rounded. Tied ones follow the head.
        for node, layer in pending.items():
            if node not in linears and node not in tied:
                round_layer(gm, layer, Nearest() if rounding.needs else rounding)
        for layer, codes, qparams in found:
            set_codes(gm, layer, layer.mark.weight, codes, qparams, followers_of(gm, layer))
        return len(pending)
