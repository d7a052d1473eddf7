"""GPTQ: round column by column, against the Gram matrix of the inputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ir.encoding import Encoding
from ir.errors import OptionError
from ir.numerics import QParams
from ir.rounding.columns import Feedback, round_columns
from ir.rounding.descent import descend
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.grid import Grid


@dataclass(frozen=True)
class GPTQ(Rounding):
    """Round column by column, each error made up for by the columns still free; then descend on codes and scales together.

    GPTQ (2210.17323) minimises `tr(ΔW H ΔWᵀ)`, `ΔW = W − Ŵ`, `H = X̂ᵀX̂`: with `U` upper and `UᵀU = (H + λI)⁻¹`, `e = (w_j − ŵ_j)/U_jj`,
    `w_i −= e U_ji` for `i > j`. The parameters of a group are chosen when it is reached, from the weights as updated by then. `search`
    weighs the error of column j by `1/U_jj²`: what it costs after all later columns have made up for it. The sweeps are `descend`. Columns
    that no input reaches are rounded to nearest.

    Args:
        damping: λ, as a share of the mean of H's diagonal; raised tenfold, up to 10, until the factorisation succeeds.
        act_order: columns in falling order of H's diagonal; the groups' parameters are then chosen beforehand, from `W`.
        block: columns between two updates of all that follow; affects speed only.
        search: choose scales by `search_qparams` instead of covering the extremes.
        sweeps: passes of coordinate descent after GPTQ, each about as long as GPTQ itself.
    """

    damping: float = 0.01
    act_order: bool = False
    block: int = 128
    search: bool = True
    sweeps: int = 3
    needs: ClassVar[tuple[str, ...]] = ("gram",)
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block < 1 or self.sweeps < 0:
            raise OptionError("damping and sweeps are at least 0, block at least 1", where=str(self))

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        return self.by_columns(W, Grid(encoding, self.search), evidence.take("gram"))

    def by_columns(self, W: Tensor, grid: Grid, gram: Tensor) -> tuple[Tensor, QParams]:
        """GPTQ on any grid, then the sweeps."""
        feedback = Feedback.of(gram, self.damping, self.act_order)
        draft = round_columns(W, grid, feedback, block=self.block)
        return descend(W, draft.codes.T, draft.qparams, grid, feedback.H, sweeps=self.sweeps)
