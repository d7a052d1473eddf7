"""Qronos: exact correction of past errors, then diffusion to the future."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ir.encoding import Encoding
from ir.numerics import QParams
from ir.rounding.columns import Feedback, round_columns
from ir.rounding.descent import descend
from ir.rounding.evidence import Evidence
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import Grid
from ir.rounding.propagation import propagate_error


@dataclass(frozen=True)
class Qronos(GPTQ):
    """Round each column to what is best with all others as they are, then let the free ones take their optimum: `‖X Wᵀ − X̂ Ŵᵀ‖²`.

    Qronos (2505.11695, Theorem 1): the first column is the code nearest to `w_1 + (W δᵀX̂)_1 / H_11`, `δ = X − X̂`; the others then take
    the exact optimum `argmin_V ‖X Wᵀ − x̂_1 ŵ_1 − X̂_2: Vᵀ‖`, and from there on the steps are those of GPTQ, with almost no damping. That
    optimum is the one without rounding, `W* = W XᵀX̂ H⁻¹`, after GPTQ's update by the error of column 1. The sweeps, not in the paper,
    descend on the same objective. Options are those of `GPTQ`.
    """

    damping: float = 1e-4
    needs: ClassVar[tuple[str, ...]] = ("gram", "cross")

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        gram, cross = evidence.take("gram"), evidence.take("cross")
        grid, feedback = Grid(encoding, self.search), Feedback.of(gram, self.damping, self.act_order)
        target, j = propagate_error(W, gram, cross, damping=self.damping), int(feedback.order[0])
        first = W[:, j] + W @ (cross - gram)[:, j].float() / feedback.H[j, j]
        draft = round_columns(target, grid, feedback, block=self.block, first=first)
        return descend(target, draft.codes.T, draft.qparams, grid, feedback.H, sweeps=self.sweeps)
