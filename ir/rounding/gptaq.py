"""GPTAQ: GPTQ towards the outputs of the uncompressed model."""

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
class GPTAQ(GPTQ):
    """Round column by column towards the outputs of the uncompressed model: least `‖X Wᵀ − X̂ Ŵᵀ‖²`.

    GPTAQ (2504.02692): as column j is rounded, the columns F still free also make up for what the input's error `δ = X − X̂` does there,
    `w_F += w_j (δᵀX̂)_jF H_F⁻¹`. All these rows are `P = triu(δᵀX̂ Uᵀ, 1) U`, with GPTQ's `U`. The sweeps, not in the paper, descend on the
    same objective, whose optimum without rounding is `propagate_error`. Options are those of `GPTQ`.
    """

    needs: ClassVar[tuple[str, ...]] = ("gram", "cross")

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        gram, cross = evidence.take("gram"), evidence.take("cross")
        grid, feedback = Grid(encoding, self.search), Feedback.of(gram, self.damping, self.act_order)
        error, U = (cross - gram)[feedback.order][:, feedback.order].double(), feedback.U.double()
        P = ((error @ U.T).triu(1) @ U).float()
        draft = round_columns(W, grid, feedback, block=self.block, extra=P)
        target = propagate_error(W, gram, cross, damping=self.damping)
        return descend(target, draft.codes.T, draft.qparams, grid, feedback.H, sweeps=self.sweeps)
