"""`Fit`: one linear's weight on the columns that stay, refitted, and what rounding it there leaves of the output."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit, numerics
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.refit import refit
from ir.rounding import Evidence, Rounding
from ir.sites import Layer
from passes.data.prefix import Inputs
from passes.pruning.dropping import has_bias


@dataclass(frozen=True, eq=False)
class Fit:
    """A weight `W [N, K]` and, if columns go, the one `W' [N, k]` that stands in for it on those that stay.

    Args:
        W: as the model has it.
        inputs: of the linear, with `G = E[xxᵀ]` and `m = E[x]`.
        kept: bool `[K]`; None for all.
        fitted: `W'`, refitted; W itself if all stay.
        bias: what refitting adds to a bias that the linear has, `[N]`; None without one.
    """

    W: Tensor
    inputs: Inputs
    kept: Tensor | None
    fitted: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, gm: GraphModule, layer: Layer, inputs: Inputs, kept: Tensor | None, damping: float) -> "Fit":
        """Refit a layer's weight onto the columns that are kept."""
        W = edit.attribute(gm, layer.weight).detach().float()
        if kept is None:
            return cls(W, inputs, None, W, None)
        fitted, bias = refit(W, inputs.gram, kept, damping, inputs.mean if has_bias(layer) else None)
        return cls(W, inputs, kept, fitted[:, kept], None if bias is None else bias.float())

    def round(self, rounding: Rounding, encoding: Encoding) -> tuple[Tensor, QParams]:
        """Codes of `W'` and their parameters."""
        gram = self.inputs.gram if self.kept is None else self.inputs.gram[self.kept][:, self.kept]
        return rounding.round_weight(self.fitted, encoding, Evidence(gram=gram))

    def rounded(self, rounding: Rounding, encoding: Encoding) -> Tensor:
        """`Ŵ [N, K]`, zero in columns that go."""
        return self._spread(numerics.dequantize(*self.round(rounding, encoding), encoding))

    def errors(self, rounded: Tensor | None = None) -> Tensor:
        """The mean square `[N]` of what `Ŵ`, or `W'` as it is, leaves of each output: `(ΔW G ΔWᵀ)_nn`, less what the bias makes up for."""
        D = self.W - (self._spread(self.fitted) if rounded is None else rounded)
        found = squares(D, self.inputs.gram)
        return found if self.bias is None else (found + self.bias * (self.bias - 2 * D @ self.inputs.mean)).clamp_min(0)

    def _spread(self, part: Tensor) -> Tensor:
        if self.kept is None:
            return part
        whole = torch.zeros_like(self.W)
        whole[:, self.kept] = part
        return whole


def squares(W: Tensor, gram: Tensor) -> Tensor:
    """`(W G Wᵀ)_nn [N]`, the mean square of each output."""
    return ((W @ gram) * W).sum(1).clamp_min(0)
