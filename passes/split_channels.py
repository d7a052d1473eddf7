"""`split_channels`: store some input channels of linears in another way than the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, numerics
from ir.errors import OptionError
from ir.rounding import search_qparams
from ir.schemes import bits_of
from ir.sites import Layer
from ir.split import split_best, splittable
from passes.base import Context, Effect, Pass
from passes.data.gradients import output_sensitivity
from passes.data.observation import mean_squares

CRITERIA = ("loss", "activation")


@dataclass(frozen=True)
class SplitChannels(Pass):
    """Split annotated linears into two over their input channels: those that matter most, and the rest.

    Before::

        %2 = aten.linear(%1, %w, %b) {input: i4[1,-1]dynamic, weight: i4[1,-1]}

    After::

        %2 = aten.index_select(%1, 2, %channels_0); %3 = aten.index_select(%1, 2, %channels_1)
        %4 = aten.linear(%2, %w_0, %b) {input: i8[1,-1]dynamic, weight: i8[1,-1]}
        %5 = aten.linear(%3, %w_1) {input: i4[1,-1]dynamic, weight: i4[1,-1]}; %6 = aten.add(%4, %5)

    Law: `x Wᵀ + b = Σ_p x_p W_pᵀ + b` for any partition of the channels. Each part has scales of its own, for activations too, so that
    outliers of one no longer stretch those of the other (2606.07819, after QUIK and Atom). Layers that read one tensor are split alike.
    How many channels of a layer are chosen differs; only the share over all layers is given. Within a part, channels go by their mean
    square, so that groups hold like channels.

    Limits: 1. weights are not quantized yet; 2. gathering costs a copy of the activations, and 32 bits for each channel of a tensor, which
    count among the model's bytes and not among the bits per weight.

    Args:
        high: scheme of the chosen channels; "" leaves both parts as annotated, for `assign_bits` to choose.
        share: of all annotated weights, to choose.
        by: "loss", what rounding the channel as annotated costs the model, predicted; or "activation", the mean square.
        multiple: channels of a layer are chosen that many at a time.
        order: sort channels within a part; else they keep their order.
        tokens: that gradients are taken from.
        seed: of what is drawn for them.

    Raises:
        DataError: no calibration data.
        OptionError: an unknown scheme or criterion, or a share that is none.
    """

    high: str = ""
    share: float = 0.125
    by: str = "loss"
    multiple: int = 16
    order: bool = True
    tokens: int = 8192
    seed: int = 0
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        if self.by not in CRITERIA:
            raise OptionError(f"{self.by!r} is no criterion", where="split_channels(by=...)", remedy=f"there are {list(CRITERIA)}")
        if not 0 < self.share < 1 or self.multiple < 1 or self.tokens < 1:
            raise OptionError("a share lies between 0 and 1, multiple and tokens are at least 1", where=str(self))
        if self.high:
            bits_of(self.high, "split_channels(high=...)")

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        self.need_calibration(ctx)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Inputs in floating point."""
        splittable(gm)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Choose over all layers, then split; returns the number of linears that became two."""
        whole = splittable(gm)
        if not whole:
            return 0
        moments = mean_squares(gm, ctx, whole)
        scores = moments if self.by == "activation" else self._costs(gm, ctx, whole, moments)
        taken, changed = split_best(gm, whole, scores, self.share, self.multiple, self.high, moments if self.order else {})
        ctx.notes.append(f"split_channels: {taken:.2%} of the weights are chosen, in {changed} linears")
        return changed

    def _costs(
        self, gm: GraphModule, ctx: Context, whole: Mapping[Node, Sequence[Layer]], moments: Mapping[Node, Tensor]
    ) -> dict[Node, Tensor]:
        """`½ E[x_j²] Σ_n h_n (ΔW_nj² + 4⁻ᵃ W_nj²)` over all readers, nats a token, `a` the bits of activations."""
        feels = output_sensitivity(gm, ctx, [layer.node for found in whole.values() for layer in found], self.tokens, self.seed)
        return {
            source: sum((0.5 * moments[source] * (feels[layer.node] @ _errors(gm, layer)) for layer in found), torch.zeros(()))
            for source, found in whole.items()
        }


def _errors(gm: GraphModule, layer: Layer) -> Tensor:
    """Squared errors `[N, K]` of a linear's products, relative to the inputs."""
    W = edit.attribute(gm, layer.weight).detach().float()
    encoding, given = layer.site("weight").encoding, layer.site("input").encoding
    assert encoding is not None
    rounded = numerics.fake_quantize(W, encoding, search_qparams(W, encoding, torch.ones(W.shape[1])))
    return (W - rounded).square() + (0.0 if given is None else 4.0**-given.bits) * W.square()
